"""Takedowns: by licence, with near-duplicates, signed, proved; and what is read for them."""

import gc
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import datastore.shard
import datastore.snapshot
import datastore.store
from datastore import groups, verification
from datastore.history import read
from datastore.signing import load_key, signer
from datastore.sketches import LIKEST
from datastore.store import Selection, Store
from datastore.verification import RUN_TOKENS, find_traces
from silo.cli import main
from silo.documents import Document
from silo.errors import DataError, IntegrityError, StoreError, UsageError
from silo.sources import open_source


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["datastore", *map(str, arguments)])


def said(*arguments: object) -> dict:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def distinct() -> list[Document]:
    """Twelve documents of three owners that have nothing in common, not even a licence's header."""
    files = [file for file in open_source("python:rich") if len(file.text) > 6000 and "/_" not in file.id][:12]
    return [
        replace(
            file,
            id=f"{owner}/{number // 3}",
            text=file.text[3000:4500],
            owner=owner,
            license="GPL-3.0-only",
            source=f"{owner}'s",
        )
        for number, file in enumerate(files)
        for owner in (("Ada", "Grace", "Mary")[number % 3],)
    ]


@pytest.fixture
def key(tmp_path: Path) -> Path:
    """An operator's private key, in the form in which openssl writes it."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    path = tmp_path / "operator.pem"
    path.write_bytes(pem(Ed25519PrivateKey.from_private_bytes(bytes(range(32)))))
    return path


def pem(key) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


# --- what is meant ----------------------------------------------------------------------------------------------------


def test_a_licence_is_removed_by_its_pattern(make_store, distinct):
    """A pattern removes the documents of each licence that it fits, and leaves the others of the same owner."""
    names = ("CC-BY-NC-4.0", "CC-BY-NC-SA-3.0", "GPL-3.0-only")
    licensed = [replace(document, license=names[number % 3]) for number, document in enumerate(distinct)]
    store = make_store("store", licensed)
    store.remove(Selection(licenses=("CC-BY-NC-*",)))
    left = {row.id: row.license for rows in store.rows().values() for row in rows}
    assert left == {each.id: each.license for each in licensed if each.license == "GPL-3.0-only"}
    with pytest.raises(UsageError, match=r"no license 'CC-\*' is in the store; it has such as GPL-3.0-only"):
        store.remove(Selection(licenses=("CC-*",)))


COMPOSED = ("(MIT) AND (GPL-3.0-only)", "MIT OR GPL-3.0-only", "Gpl-3.0-Only", "MIT")


@pytest.mark.parametrize(
    ("pattern", "gone"),
    [("gpl-3.0-only", {0, 2}), ("GPL-*", {0, 2}), ("(mit) AND (GPL-*)", {0}), ("MIT*", {0, 3}), ("* OR *", {1})],
)
@pytest.mark.parametrize("shards", [1, 4])
def test_a_licence_goes_from_every_expression_that_needs_it(make_store, distinct, pattern, gone, shards):
    """What a pattern removes, in any case and within expressions, is what the same pattern denies."""
    licensed = [
        replace(each, license=license, text=each.text[:200], id=license, owner=f"owner {number % shards}")
        for number, (each, license) in enumerate(zip(distinct, COMPOSED, strict=False))
    ]
    store = make_store("store", licensed)
    assert store.select(deny=Selection(licenses=(pattern,))).num_documents == len(COMPOSED) - len(gone)
    receipt = store.remove(Selection(licenses=(pattern,)))
    assert {row["id"] for row in receipt.content["documents"]} == {COMPOSED[number] for number in gone}


def test_a_licence_allows_no_expression_that_needs_another(make_store, distinct):
    """A document that may be used only under several licences is not allowed by one of them."""
    licensed = [
        replace(each, license=license, text=each.text[:200]) for each, license in zip(distinct, COMPOSED, strict=False)
    ]
    store = make_store("store", licensed)
    views = [store.select(allow=Selection(licenses=(pattern,))) for pattern in ("MIT", "gpl-*", "*")]
    assert [view.num_documents for view in views] == [2, 2, 4]


@pytest.mark.parametrize(
    "selection",
    [
        Selection(owners=("Ada",)),
        Selection(documents=("Ada/0",)),
        Selection(shards=("Ada",)),
        Selection(sources=("Ada's",)),
    ],
    ids=["owner", "document", "shard", "source"],
)
def test_only_the_shards_that_are_meant_are_read(make_store, distinct, monkeypatch, selection):
    """To find what goes, no other shard's documents are read, whatever names it."""
    monkeypatch.setattr(groups, "GROUP_TOKENS", 1)
    store = make_store("store", distinct)
    seen, real = [], datastore.shard.read_rows

    def spy(directory, manifest):
        seen.append(directory.name)
        return real(directory, manifest)

    monkeypatch.setattr(datastore.shard, "read_rows", spy)
    assert {name for name, _ in Store.open(store.path).affected(selection)} == {"Ada"}
    assert {name.partition("-")[0] for name in seen} == {"ada"}


def test_what_is_there_already_is_passed_over_when_asked(make_store, distinct, model_dir, tmp_path):
    """--skip-present adds what is new; the same text again is no error, and another text under the same id is one."""
    store = make_store("store", distinct[:4])
    file = tmp_path / "more.jsonl"
    file.write_text("".join(json.dumps(each.to_json()) + "\n" for each in distinct[2:6]))
    assert run("add", store.path, file, "--model", model_dir).exit_code == 1
    assert said("add", store.path, file, "--model", model_dir, "--skip-present")["documents"] == 2
    before = Store.open(store.path).hash
    assert said("add", store.path, file, "--model", model_dir, "--skip-present")["documents"] == 0
    assert Store.open(store.path).hash == before == make_store("fresh", distinct[:6]).hash
    with pytest.raises(DataError, match="'Ada/0' is in the store with another text"):
        Store.open(store.path).present([replace(distinct[0], text="another")])


def test_an_id_that_comes_twice_is_not_passed_over(make_store, distinct, model_dir, tmp_path):
    """With --skip-present too, an id that comes twice is refused, also where the last of its texts is the store's."""
    store = make_store("store", distinct[:1])
    files = [tmp_path / name for name in ("one.jsonl", "two.jsonl")]
    for file, document in zip(files, (replace(distinct[0], text="another"), distinct[0]), strict=True):
        file.write_text(json.dumps(document.to_json()))
    result = run("add", store.path, *files, "--model", model_dir, "--skip-present")
    assert (result.exit_code, "'Ada/0' comes twice" in result.stderr) == (1, True)


# --- near-duplicates --------------------------------------------------------------------------------------------------


@pytest.fixture
def copies(distinct):
    """The documents of two owners, and an edited copy of one of them inside a text of a third."""
    words = distinct[0].text.split()
    words[20::25] = ["changed"] * len(words[20::25])
    mary = next(each for each in distinct if each.owner == "Mary")
    copy = replace(mary, id="Mary/copy", text=f"{mary.text}\n{' '.join(words)}")
    return [*(each for each in distinct if each.owner in ("Ada", "Grace")), copy]


def test_near_duplicates_are_named_and_stay(make_store, copies):
    """A removal names the document elsewhere that holds an edited copy, with how much of it, and no other."""
    store = make_store("store", copies)
    receipt = store.remove(Selection(documents=("Ada/0",)), duplicates="report")
    (alike,) = receipt.content["near_duplicates"]
    assert (alike["id"], alike["shard"], alike["of"]) == ("Mary/copy", "Mary", "Ada/0")
    assert 0.5 < alike["share"] < 1
    assert {row["id"] for row in receipt.content["documents"]} == {"Ada/0"}
    assert "Mary" in store.manifest.shards


def test_near_duplicates_go_when_asked(make_store, copies, answers):
    """With duplicates removed too, the store is the one that never held either."""
    store = make_store("store", copies)
    receipt = store.remove(Selection(documents=("Ada/0",)), duplicates="remove")
    assert {row["id"] for row in receipt.content["documents"]} == {"Ada/0", "Mary/copy"}
    rest = [each for each in copies if each.id not in ("Ada/0", "Mary/copy")]
    assert answers(store) == answers(make_store("fresh", rest))
    store.verify()


def test_the_command_names_them_before_and_after(make_store, copies):
    """--dry-run and remove name near-duplicates; --no-duplicates does not look; both options at once are wrong use."""
    store = make_store("store", copies)
    assert said("remove", store.path, "--document", "Ada/0", "--dry-run")["near_duplicates"] == ["Mary/copy"]
    assert said("remove", store.path, "--document", "Ada/0", "--dry-run", "--no-duplicates")["near_duplicates"] == []
    assert run("remove", store.path, "--document", "Ada/0", "--no-duplicates", "--with-duplicates").exit_code == 2
    assert said("remove", store.path, "--document", "Ada/0")["near_duplicates_left"] == ["Mary/copy"]


# --- what is damaged --------------------------------------------------------------------------------------------------


def damage(store, shard, name):
    """Change a bit of a shard's file."""
    path = store.path / "shards" / store.manifest.shards[shard].directory / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["tokens.npy", "codes.npy"])
def test_a_damaged_shard_can_be_removed(make_store, copies, tmp_path, name):
    """By its owner, with near-duplicates asked for: they are not looked for, result and receipt say so, and the store
    is the one without the owner."""
    store = make_store("store", copies)
    damage(store, "Ada", name)
    assert said("remove", store.path, "--owner", "Ada", "--dry-run")["not_compared"] == ["Ada"]
    result = said("remove", store.path, "--owner", "Ada")
    assert (result["not_compared"], result["near_duplicates_left"]) == (["Ada"], [])
    assert json.loads(Path(result["receipt"]).read_bytes())["not_compared"] == ["Ada"]
    assert said("verify", store.path, "--deep")["verified"]
    assert result["hash"] == make_store("fresh", [each for each in copies if each.owner != "Ada"]).hash


def test_another_damaged_shard_is_not_compared(make_store, copies):
    """A removal from a sound shard does not fail because a near-duplicate lies in a damaged one."""
    store = make_store("store", copies)
    damage(store, "Mary", "tokens.npy")
    receipt = store.remove(Selection(documents=("Ada/0",)), duplicates="report")
    assert (receipt.content["near_duplicates"], receipt.content["not_compared"]) == ([], ["Mary"])


@pytest.mark.parametrize("name", ["documents.jsonl", "shard.json"])
@pytest.mark.parametrize("alone", [False, True])
def test_a_shard_whose_documents_cannot_be_read_is_removed_by_its_name(
    make_store, distinct, tmp_path, monkeypatch, name, alone
):
    """The receipt has the hash that the store knew it by, and names its exports; by owner, it is told how it goes."""
    monkeypatch.setattr(groups, "GROUP_TOKENS", 1 if alone else groups.GROUP_TOKENS)
    store = make_store("store", distinct)
    store.export("Ada", tmp_path / "ada.shard")
    entry = store.manifest.shards["Ada"]
    damage(store, "Ada", name)
    refused = run("remove", store.path, "--owner", "Ada")
    assert (refused.exit_code, refused.stderr.count("\n")) == (1, 1)
    assert f"{name} is damaged" in refused.stderr
    assert "remove --shard 'Ada'` removes all of it" in refused.stderr
    assert said("remove", store.path, "--shard", "Ada", "--dry-run")["unreadable_shards"] == ["Ada"]
    result = said("remove", store.path, "--shard", "Ada", "--document", "Grace/0")
    lost = [{"shard": "Ada", "hash": entry.hash, "documents": entry.documents, "tokens": entry.tokens}]
    assert json.loads(Path(result["receipt"]).read_bytes())["unreadable_shards"] == lost == result["unreadable_shards"]
    assert (result["exports"], result["not_compared"]) == (["000002-export.json"], ["Ada"])
    assert said("verify", store.path, "--deep")["verified"]
    rest = [each for each in distinct if each.owner != "Ada" and each.id != "Grace/0"]
    assert result["hash"] == make_store("fresh", rest).hash


# --- receipts ---------------------------------------------------------------------------------------------------------


def test_a_signed_receipt_is_checked(make_store, distinct, key):
    """A signed removal says by whom; verify counts it, and a changed receipt or signature is found out."""
    store = make_store("store", distinct)
    result = said("remove", store.path, "--owner", "Ada", "--reason", "asked", "--key", key)
    receipt = Path(result["receipt"])
    content = json.loads(receipt.read_bytes())
    public = load_key(key).public_key().public_bytes_raw().hex()
    assert signer(content, receipt) == public
    checked = said("verify", store.path)
    assert (checked["signed"], checked["signers"]) == (1, [public])
    for change in ({"reason": "not asked"}, {"signature": {**content["signature"], "public_key": "00" * 32}}):
        with pytest.raises(IntegrityError, match="is not what its signature says"):
            signer({**content, **change}, receipt)
    assert signer({name: value for name, value in content.items() if name != "signature"}, receipt) is None
    assert read(store.path / "log.jsonl")[-1]["reason"] == "asked"


def test_the_same_removal_has_the_same_receipt(make_store, distinct, key):
    """Signed with one key, equal histories give equal receipts."""
    stores = [make_store(name, distinct) for name in ("one", "two")]
    made = [store.remove(Selection(owners=("Ada",)), key=load_key(key)).path.read_bytes() for store in stores]
    assert made[0] == made[1]


def test_a_key_that_is_none_is_wrong_use(make_store, distinct, tmp_path):
    """A missing key, no key, and a key of another kind each say what is wanted, before anything is removed."""
    from cryptography.hazmat.primitives.asymmetric.ed448 import Ed448PrivateKey

    store = make_store("store", distinct[:3])
    (tmp_path / "no.pem").write_text("nothing")
    (tmp_path / "other.pem").write_bytes(pem(Ed448PrivateKey.generate()))
    for name, complaint in (("x.pem", "does not exist"), ("no.pem", "no unencrypted"), ("other.pem", "another kind")):
        result = run("remove", store.path, "--owner", "Ada", "--key", tmp_path / name)
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
        assert complaint in result.stderr
    assert "Ada" in Store.open(store.path).manifest.shards


# --- proofs -----------------------------------------------------------------------------------------------------------


def test_absence_is_proved_and_presence_found(make_store, distinct, model, model_dir, tmp_path):
    """Before a removal every kind of trace of the documents is found; after it none is, in no file."""
    store = make_store("store", distinct)
    gone = [each for each in distinct if each.owner == "Ada"]
    assert {trace.kind for trace in find_traces(store, gone, model)} == {"tokens", "shingles", "codes"}
    file = tmp_path / "gone.jsonl"
    file.write_text("".join(json.dumps(each.to_json()) + "\n" for each in gone))
    found = run("verify", store.path, "--absent", file, "--model", model_dir)
    assert (found.exit_code, "it is not gone" in found.stderr) == (1, True)
    store.remove(Selection(owners=("Ada",)))
    assert list(find_traces(store, gone, model)) == []
    assert said("verify", store.path, "--absent", file, "--model", model_dir)["absent"] == len(gone)
    (store.path / "receipts" / "note.txt").write_text(gone[0].text)
    assert {trace.kind for trace in find_traces(store, gone[:1])} == {"bytes"}


@pytest.mark.parametrize("text", ["content_hash", "Meet me at noon behind the old mill."])
def test_a_short_text_is_found_until_it_is_gone(make_store, distinct, text):
    """A text of fewer tokens than a trace has is found as long as the store holds it, and no longer, though receipts
    may hold its few bytes for ever."""
    store = make_store("store", [*distinct, replace(distinct[0], id="short", text=text)])
    short = [Document(id="short", text=text)]
    assert len(store.tokenizer.encode(text).ids) < RUN_TOKENS
    assert {"tokens.npy"} == {trace.file.name for trace in find_traces(store, short) if trace.kind == "tokens"}
    store.remove(Selection(documents=("short",)))
    assert (text == "content_hash") == any(text.encode() in path.read_bytes() for path in store.path.rglob("*.json"))
    assert list(find_traces(store, short)) == []


@pytest.mark.parametrize("part", ["blocks", "sketches", "keys", "texts", "suffixes"])
def test_deep_verification_compares_what_is_derived(make_store, distinct, part):
    """A search structure that was made of something else, with every checksum made good, is found and named."""
    store = make_store("store", distinct)
    assert said("verify", store.path, "--deep")["rebuilt_and_equal"] == 2
    other = make_store("other", [replace(each, text=each.text + " ".join(map(str, range(200)))) for each in distinct])
    (mine,), (theirs,) = (each.path.glob(f"*/*/{part}") for each in (store, other))
    for path in mine.iterdir():
        path.unlink()
    for path in theirs.iterdir():
        (mine / path.name).write_bytes(path.read_bytes())
    groups._seal(mine.parent, [store.manifest.shards[name] for name in store.manifest.groups[0].shards])
    assert run("verify", store.path).exit_code == 0
    result = run("verify", store.path, "--deep")
    assert result.exit_code == 1
    assert f"{mine}" in result.stderr
    named = Path(result.stderr.removeprefix("error: ").partition(" is not what its shards give")[0])
    shutil.rmtree(named) if named.is_dir() else named.unlink()  # as it advises
    assert said("verify", store.path, "--repair", "--deep")["rebuilt_and_equal"] == 2


def test_deep_verification_writes_within_the_store(make_store, distinct, monkeypatch):
    """What it builds is restricted text: killed, it leaves that where the next removal deletes it, and nowhere else."""
    store, real = make_store("store", distinct), verification.build_ngrams
    built = []
    monkeypatch.setattr(verification, "build_ngrams", lambda path, *rest: built.append(path) or real(path, *rest))
    with monkeypatch.context() as patch:
        patch.setattr(verification, "remove_tree", lambda path: None)  # as if it were killed
        verification.verify_derived(store)
    assert all(path.is_relative_to(store.path) and any(path.rglob("*.npy")) for path in built)
    store.remove(Selection(owners=("Ada",)))
    assert not any(path.exists() for path in built)
    assert verification.verify_derived(store) == 2
    assert not any(path.exists() for path in built)


def test_deep_verification_and_changes_keep_apart(make_store, distinct, monkeypatch):
    """No change is made while search structures are built anew, and a store that was changed is opened again first."""
    store, real = make_store("store", distinct), verification.build_group

    def meanwhile(*given, **named):
        with pytest.raises(StoreError, match="being written by another process"):
            Store.open(store.path).remove(Selection(owners=("Ada",)))
        real(*given, **named)

    monkeypatch.setattr(verification, "build_group", meanwhile)
    assert verification.verify_derived(store) == 2
    Store.open(store.path).remove(Selection(owners=("Ada",)))
    with pytest.raises(StoreError, match="was changed since it was opened"):
        verification.verify_derived(store)


def test_what_cannot_be_deleted_keeps_nothing_else(make_store, distinct, monkeypatch):
    """Where one of the directories that a removal leaves behind stays, the others go, and the next change takes it."""
    store = make_store("store", distinct)
    old = [path for kind in ("shards", *groups.KINDS) for path in (store.path / kind).iterdir()]
    gone = [path for path in old if path.parent.name != "shards" or path.name.lower().startswith("ada")]
    real = datastore.store.remove_tree
    with monkeypatch.context() as patch:

        def busy(path):
            if path == gone[0]:
                raise OSError(39, "Directory not empty")
            real(path)

        patch.setattr(datastore.store, "remove_tree", busy)
        with pytest.raises(StoreError, match="is committed, but what it replaced may still be on disk"):
            store.remove(Selection(owners=("Ada",)))
    assert [path for path in gone if path.exists()] == gone[:1]
    assert store.verify()["collected"] == [f"{gone[0].parent.name}/{gone[0].name}"]
    assert not gone[0].exists()


def test_documents_with_one_text_are_not_all_compared(make_store, distinct, model, monkeypatch):
    """Of two owners who have the same text many times, every document is compared with a few, and all are named."""
    store, compared = make_store("store"), []
    copies = [
        replace(distinct[0], id=f"{owner}/{number}", owner=owner, text=f"{distinct[0].text} {number}")
        for owner in ("Ada", "Grace")
        for number in range(20)
    ]
    store.add(copies, model, keyed=False)
    real = datastore.snapshot.containment
    monkeypatch.setattr(datastore.snapshot, "containment", lambda *two: compared.append(1) or real(*two))
    alike = store.near_duplicates(store.affected(Selection(owners=("Ada",))))
    assert [row["id"] for row in alike] == sorted(each.id for each in copies if each.owner == "Grace")
    assert len(compared) <= 20 * LIKEST


def test_show_tells_what_a_store_is(make_store, distinct, model):
    """People see model, control plane, counts, and a row for each shard."""
    store = make_store("store", distinct)
    shown = said("show", store.path)
    assert shown["model"] == model.fingerprint
    assert (shown["documents"], shown["tokens"]) == (12, sum(row["tokens"] for row in shown["shards"]))
    assert {"control_lists", "control_codes", "hash", "groups", "ngram_groups", "changes"} <= shown.keys()
    text = run("show", store.path).stdout
    for words in ("model", "Ada", "GPL-3.0-only"):
        assert words in text


def test_names_are_shown_as_they_are(make_store, distinct):
    """Brackets in the names of owners and licences are no markup of the tables."""
    owners = ("dependabot[bot]", "[/x]")
    named = [replace(each, owner=owner, license=f"[b]{owner}") for each, owner in zip(distinct, owners, strict=False)]
    store = make_store("store", named)
    for command in ("list", "show"):
        result = run(command, store.path)
        assert result.exit_code == 0
        for owner in owners:
            assert f" {owner} " in result.stdout
            assert f" [b]{owner} " in result.stdout


def test_a_store_that_was_searched_keeps_no_map_of_what_it_removed(make_store, distinct):
    """A process that goes on after a removal maps no deleted file of the store: its bytes would stay on the disk."""
    store = make_store("store", distinct)
    store.neighbours()
    store.remove(Selection(owners=("Ada",)))
    gc.collect()
    held = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(store.path) in line]
    assert [line for line in held if "(deleted)" in line] == []


def test_a_reason_of_two_lines_is_one_line_of_the_log(make_store, documents):
    """What breaks lines is escaped where people read the log, and kept as it is in the record."""
    store = make_store("store", documents[:2])
    store.remove(Selection(documents=(documents[0].id,)), reason="by letter\n     3  forged")
    shown = run("log", store.path)
    assert shown.stdout.count("\n") == 2
    assert "by letter\\n     3  forged" in shown.stdout
    assert store.log()[-1]["reason"] == "by letter\n     3  forged"


def test_the_log_says_what_each_change_was(make_store, documents, key):
    """Whose documents came, what was asked for, how many went, and whether the receipt is signed; a damaged receipt is
    named."""
    store = make_store("store", documents[:6])
    assert run("remove", store.path, "--owner", "Ada", "--document", documents[1].id, "--key", key).exit_code == 0
    store.note_weights(key, ["Grace"])
    log = said("log", store.path)["log"]
    assert [(line["what"], line["documents"], line["signed"]) for line in log] == [
        ("6 documents of Ada, Grace, Mary", 6, False),
        (f"document {documents[1].id}; owner Ada: 3 documents", 3, True),
        (f"weights {key.name}", 0, False),
    ]
    lines = run("log", store.path).stdout.splitlines()
    assert ["unsigned" in line for line in lines] == [True, False, True]
    assert all(told["what"] in line for told, line in zip(log, lines, strict=True))
    receipt = store.path / "receipts" / log[1]["receipt"]
    receipt.write_bytes(receipt.read_bytes().replace(b"Ada", b"Eve"))
    assert f"{receipt} is damaged" in run("log", store.path).stderr
