"""Corpora: what goes where, what is refused, and what a damaged or forged one is worth."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import silo.corpus
from silo.audit import audit
from silo.collect import collect
from silo.corpus import Corpus, split_of
from silo.documents import Document
from silo.errors import DataError, IntegrityError, LicenseError, StoreError, UsageError
from silo.files import canonical_json, exclusive_lock, sha256
from silo.licensing import Policy, Tier

FUNCTION = 'def f{n}(x):\n    """Add {n}."""\n    y = x + {n}\n    z = y * 2\n    return z\n'


def write_documents(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows(count: int, license: str, prefix: str) -> list[dict[str, str]]:
    return [
        {"id": f"{prefix}{n}.py", "text": f"# {prefix}\n" + FUNCTION.format(n=n), "license": license, "owner": prefix}
        for n in range(count)
    ]


@pytest.fixture
def sources(tmp_path: Path) -> list[str]:
    """40 permissive documents, 40 under the GPL, one of unknown licence and one of none."""
    odd = [{"id": "odd", "text": "x", "license": "Mine-1.0"}, {"id": "none", "text": "y"}]
    return [
        write_documents(tmp_path / "a.jsonl", rows(40, "MIT", "a")),
        write_documents(tmp_path / "g.jsonl", rows(40, "GPL-3.0-only", "g") + odd),
    ]


@pytest.fixture
def out(tmp_path: Path, sources: list[str]) -> Path:
    collect(sources, tmp_path / "out", pairs=True)
    return tmp_path / "out"


def files_of(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@given(st.text(), st.text())
def test_a_pair_follows_its_file(id, name):
    """What stands behind the first # of an id does not move it to another split."""
    file = id.partition("#")[0]
    assert split_of(file) == split_of(f"{file}#{name}")
    assert split_of(file, "restricted") == ("train" if split_of(file) == "control" else split_of(file))


def test_splits_have_the_promised_shares():
    """Of many ids, a tenth each falls to test, val and control, and the rest to train."""
    shares = Counter(split_of(f"document {n}") for n in range(20_000))
    for split, share in {"train": 0.7, "test": 0.1, "val": 0.1, "control": 0.1}.items():
        assert abs(shares[split] / 20_000 - share) < 0.01


def test_each_document_lands_on_the_side_of_its_licence(out: Path):
    """Known permissive licences go one way; copyleft, unknown and missing ones the other, and none is lost."""
    permissive, restricted = Corpus.open(out / "permissive"), Corpus.open(out / "restricted")
    assert {row.license for row in permissive.rows} == {"MIT"}
    assert Counter(row.license for row in restricted.rows) == {"GPL-3.0-only": 40, "Mine-1.0": 1, "NOASSERTION": 1}
    assert not (out / "restricted" / "control.jsonl").exists()
    assert all(row.tier == "restricted" for row in restricted.rows)


def test_the_index_holds_no_text(out: Path):
    """No line of any document stands in the index or the manifest."""
    for name in ("index.jsonl", "manifest.json"):
        assert b"return z" not in (out / "permissive" / name).read_bytes()


def test_documents_come_back_as_they_went_in(out: Path, sources: list[str]):
    """Every document of every split is read back with its text, its rights and the split of its id."""
    read = {}
    for side in ("permissive", "restricted"):
        corpus = Corpus.open(out / side)
        for split in silo.corpus.SIDES[side]:
            for document in corpus.documents(split):
                assert split_of(document.id, side) == split
                read[document.id] = document
    written = [json.loads(line) for source in sources for line in Path(source).read_text().splitlines()]
    for row in written:
        assert (read[row["id"]].text, read[row["id"]].owner) == (row["text"], row.get("owner", ""))
    assert len([id for id in read if "#" not in id]) == len(written)


def test_pairs_are_drawn_from_the_permissive_side_only(out: Path):
    """Each permissive function gives its pair, beside its file; restricted files give none."""
    corpus = Corpus.open(out / "permissive")
    pairs = [
        document for split in silo.corpus.SIDES["permissive"] for document in corpus.documents(split) if document.prompt
    ]
    assert sorted(pair.id for pair in pairs) == sorted(f"a{n}.py#f{n}" for n in range(40))
    assert corpus.manifest["counts"]["documents"] == corpus.manifest["counts"]["pairs"] == 40
    assert not any("#" in row.id for row in Corpus.open(out / "restricted").rows)


def test_the_same_sources_give_the_same_bytes(tmp_path: Path, sources: list[str]):
    """Neither a second run nor another order of the sources changes a byte."""
    collect(sources, tmp_path / "one", pairs=True)
    collect(sources[::-1], tmp_path / "two", pairs=True)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_a_side_without_documents_is_not_written(tmp_path: Path, sources: list[str]):
    """A corpus of permissive text alone has no restricted directory."""
    collect(sources[:1], tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["audit.json", "findings.jsonl", "permissive"]


def test_a_text_that_is_restricted_anywhere_is_restricted(tmp_path: Path):
    """Of two equal texts the restricted one is kept, whatever its id, and the audit names whose it is."""
    source = write_documents(
        tmp_path / "x.jsonl",
        [
            {"id": "a", "text": "same", "license": "MIT"},
            {"id": "b", "text": "same", "license": "GPL-3.0-only"},
            {"id": "c", "text": "twice", "license": "MIT"},
            {"id": "d", "text": "twice", "license": "Apache-2.0"},
        ],
    )
    summary = collect([source], tmp_path / "out")
    assert [row.id for row in Corpus.open(tmp_path / "out" / "permissive").rows] == ["c"]
    assert [row.id for row in Corpus.open(tmp_path / "out" / "restricted").rows] == ["b"]
    assert {group["reason"]: group["examples"] for group in summary["refused"]} == {
        "restricted elsewhere: the same text": [{"id": "a", "detail": "b (GPL-3.0-only)"}],
        "a duplicate: the same text": [{"id": "d", "detail": "c (MIT)"}],
    }


def test_a_policy_moves_documents_and_is_recorded(tmp_path: Path, sources: list[str]):
    """An owner whom the policy trusts goes to the permissive side, and the manifest says by which policy."""
    policy = Policy(owners=(("g", Tier.BY),))
    collect(sources, tmp_path / "out", policy=policy)
    corpus = Corpus.open(tmp_path / "out" / "permissive")
    assert {row.owner for row in corpus.rows} == {"a", "g"}
    assert corpus.manifest["policy_fingerprint"] == policy.fingerprint
    corpus.require_permissive(policy)
    with pytest.raises(LicenseError, match=r"'g0\.py' is under 'GPL-3.0-only', which is restricted"):
        corpus.require_permissive()


def forge(side: Path, change) -> None:
    """Rewrite the index by hand, with every checksum made good again, as someone would who means it."""
    lines = [json.loads(line) for line in (side / "index.jsonl").read_bytes().splitlines()]
    for line in lines:
        change(line)
    data = b"".join(canonical_json(line) for line in lines)
    (side / "index.jsonl").write_bytes(data)
    manifest = json.loads((side / "manifest.json").read_bytes())
    manifest["files"]["index.jsonl"] = {"sha256": sha256(data), "bytes": len(data)}
    del manifest["digest"]
    (side / "manifest.json").write_bytes(canonical_json({**manifest, "digest": sha256(canonical_json(manifest))}))


def test_the_gate_trusts_no_tier_that_is_written_down(out: Path):
    """A restricted licence is refused although directory, tier column and all checksums say permissive."""
    forge(out / "permissive", lambda row: row.update(license="GPL-2.0-only") if row["id"] == "a7.py" else None)
    corpus = Corpus.open(out / "permissive")
    assert {row.tier for row in corpus.rows} == {"SW"}
    with pytest.raises(LicenseError, match=r"'a7\.py' is under 'GPL-2.0-only'"):
        corpus.require_permissive()


def test_a_licence_that_differs_from_the_text_is_refused(out: Path):
    """An index that calls a restricted text permissive is found out when the text is read."""
    forge(out / "restricted", lambda row: row.update(license="MIT"))
    corpus = Corpus.open(out / "restricted")
    corpus.require_permissive()
    with pytest.raises(IntegrityError, match=r"has license 'GPL-3\.0-only', the index says 'MIT'"):
        list(corpus.documents("train"))


@pytest.mark.parametrize("name", ["manifest.json", "index.jsonl"])
def test_a_flipped_byte_of_the_index_is_caught_on_opening(out: Path, name):
    """Whichever byte of manifest or index changes, the corpus does not open, and the file is named."""
    path = out / "permissive" / name
    data = path.read_bytes()
    for position in range(0, len(data), max(1, len(data) // 300)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with pytest.raises(IntegrityError, match=str(path)):
            Corpus.open(out / "permissive")
    path.write_bytes(data)
    Corpus.open(out / "permissive")


def test_a_flipped_byte_of_the_text_is_caught_on_reading(out: Path):
    """A changed byte of a text file is an error that names the file and the document, and spares the others."""
    path = out / "permissive" / "train.jsonl"
    corpus = Corpus.open(out / "permissive")
    row = [row for row in corpus.rows if row.split == "train"][3]
    data = bytearray(path.read_bytes())
    data[row.offset + 5] ^= 1
    path.write_bytes(data)
    documents = Corpus.open(out / "permissive").documents("train")
    assert len([next(documents) for _ in range(3)]) == 3
    with pytest.raises(IntegrityError) as error:
        next(documents)
    assert str(path) in str(error.value)
    assert row.id in str(error.value)
    with pytest.raises(IntegrityError):
        audit(out)


def test_a_shortened_or_missing_text_is_caught_on_opening(out: Path):
    """A text file that lost its end, or is gone, keeps the corpus from opening."""
    path = out / "permissive" / "train.jsonl"
    os.truncate(path, 100)
    with pytest.raises(IntegrityError, match="100 bytes, the manifest says"):
        Corpus.open(out / "permissive")
    path.unlink()
    with pytest.raises(IntegrityError, match="is missing"):
        Corpus.open(out / "permissive")


def test_an_index_that_lost_a_row_is_caught(out: Path):
    """Rows and counts must agree even if the checksums do."""
    forge(out / "permissive", lambda row: row.update(split="val"))
    with pytest.raises(IntegrityError, match="the manifest says"):
        Corpus.open(out / "permissive")
    forge(out / "permissive", lambda row: row.update(colour="red"))
    with pytest.raises(IntegrityError, match="is no row of an index"):
        Corpus.open(out / "permissive")


def test_what_is_no_corpus_is_wrong_use(out: Path, tmp_path: Path):
    """A missing directory, one without a manifest, and the one above the sides each say what to do instead."""
    (tmp_path / "empty").mkdir()
    for path, complaint in (
        (tmp_path / "nowhere", "does not exist"),
        (tmp_path / "empty", "has no manifest.json"),
        (out, f"use {out / 'permissive'} or {out / 'restricted'}"),
    ):
        with pytest.raises(UsageError, match=complaint):
            Corpus.open(path)
    with pytest.raises(UsageError, match="no split 'control'"):
        list(Corpus.open(out / "restricted").documents("control"))


def test_the_fingerprint_follows_the_content(tmp_path: Path, out: Path, sources: list[str]):
    """Equal corpora share a fingerprint; one document more changes it."""
    write_documents(tmp_path / "more.jsonl", rows(1, "MIT", "more"))
    collect([*sources, str(tmp_path / "more.jsonl")], tmp_path / "two", pairs=True)
    collect(sources, tmp_path / "three", pairs=True)
    prints = [Corpus.open(path / "permissive").fingerprint for path in (out, tmp_path / "two", tmp_path / "three")]
    assert prints[0] == prints[2] != prints[1]


def test_the_audit_counts_what_is_there(out: Path):
    """Documents, pairs and characters are those of the sources, by tier and licence, with their owners."""
    report = audit(out)
    mit = report["licenses"][0]
    assert (mit["tier"], mit["license"], mit["documents"], mit["pairs"], mit["owners"]) == ("SW", "MIT", 40, 40, ["a"])
    assert mit["characters"] == sum(len(row["text"]) for row in rows(40, "MIT", "a"))
    assert report["tiers"]["restricted"]["documents"] == 42
    assert "refusals" not in report
    stored = json.loads((out / "audit.json").read_bytes())
    assert {key: stored[key] for key in report} == report
    assert audit(out / "permissive")["licenses"] == [mit]


class Letters:
    """A tokenizer that makes a token of each character."""

    def encode_batch_fast(self, texts: list[str], add_special_tokens: bool) -> list[str]:
        """As a ``tokenizers.Tokenizer`` does; a text is as long as its tokens are many."""
        return texts


def test_the_audit_counts_tokens_when_told_how(out: Path):
    """With a tokenizer, every document's tokens are counted, and the pairs' are not counted twice."""
    for line in audit(out, Letters())["licenses"]:
        assert line["tokens"] == line["characters"]


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        ([b'{"id": "a", "text": "b"}', b"{broken"], "x.jsonl:2: not valid JSON"),
        ([b'{"id": "a", "text": ""}'], "x.jsonl:1: field 'text' is empty"),
        ([b'{"id": "a", "text": "b"}', b'{"id": "a", "text": "c"}'], "x.jsonl:2: id 'a' was already used in line 1"),
        ([b'{"id": "a", "text": "\\ud800"}'], "x.jsonl:1: an unpaired surrogate"),
        ([], "holds no document"),
    ],
)
def test_bad_input_leaves_nothing_behind(tmp_path: Path, lines, complaint):
    """A broken source is named by file and line, and neither a corpus nor a part of one is left."""
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(lines))
    with pytest.raises(DataError, match=complaint):
        collect([str(tmp_path / "x.jsonl")], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]


def test_an_id_in_two_sources_names_both(tmp_path: Path):
    """The second use of an id is an error that says who used it first."""
    one = write_documents(tmp_path / "one.jsonl", [{"id": "a", "text": "b"}])
    two = write_documents(tmp_path / "two.jsonl", [{"id": "a", "text": "c"}])
    with pytest.raises(DataError) as error:
        collect([one, two], tmp_path / "out")
    assert one in str(error.value)
    assert two in str(error.value)


def test_an_existing_directory_is_never_overwritten(tmp_path: Path, sources: list[str]):
    """A directory that holds anything is refused and left alone; an empty one is used."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(UsageError, match="choose another --out, or delete it"):
        collect(sources, tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "precious"
    (tmp_path / "out" / "mine").unlink()
    collect(sources, tmp_path / "out")
    Corpus.open(tmp_path / "out" / "permissive")


def test_a_failing_disk_leaves_nothing_half_written(
    tmp_path: Path, sources: list[str], monkeypatch: pytest.MonkeyPatch
):
    """Wherever the disk fails to sync, there is no corpus afterwards and no rest of one."""
    real, calls = os.fsync, []
    for failing in range(6):
        calls.clear()

        def fsync(descriptor: int, failing: int = failing) -> None:
            calls.append(descriptor)
            if len(calls) > failing:
                raise OSError(28, "No space left on device")
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match="No space"):
            collect(sources, tmp_path / "out")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "g.jsonl"]


def test_the_rest_of_a_killed_run_is_swept(tmp_path: Path, sources: list[str]):
    """What a killed run left does not show in the next one, and a run that is still going is not disturbed."""
    collect(sources, tmp_path / "clean")
    partial = tmp_path / ".out.partial"
    (partial / "permissive").mkdir(parents=True)
    (partial / "permissive" / "train.jsonl").write_text("half a li")
    (partial / "spool").write_text("half")
    with exclusive_lock(partial / "lock"), pytest.raises(StoreError, match="another process"):
        collect(sources, tmp_path / "out")
    assert (partial / "spool").exists()
    collect(sources, tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "clean")
    assert not partial.exists()


def test_progress_hears_of_every_document(tmp_path: Path, sources: list[str]):
    """The callback is told the number of documents read from each source."""
    heard: dict[str, int] = {}
    collect(sources, tmp_path / "out", progress=lambda source, count: heard.update({source: count}))
    assert heard == {sources[0]: 40, sources[1]: 42}


def test_a_users_own_pairs_are_documents(tmp_path: Path):
    """A pair that was given, not drawn, counts as a document with prompt and completion."""
    row = {"id": "p", "prompt": "2+2=", "completion": "4", "license": "CC0-1.0", "source": "sums"}
    collect([write_documents(tmp_path / "x.jsonl", [row])], tmp_path / "out", pairs=True)
    corpus = Corpus.open(tmp_path / "out" / "permissive")
    assert list(corpus.documents(split_of("p"))) == [
        Document(id="p", prompt="2+2=", text="4", license="CC0-1.0", source="sums")
    ]
    assert audit(tmp_path / "out")["licenses"][0]["documents"] == 1
