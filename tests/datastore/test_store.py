"""The store: what was added is found, what was removed was never there (law 4), and history leaves no trace."""

import itertools
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from datastore import groups, snapshot
from datastore.groups import first_free_row, regroup
from datastore.manifest import Group, ShardEntry
from datastore.store import Selection, Store
from silo.cli import main
from silo.errors import DataError, IntegrityError, LicenseError, UsageError

ROOT = Path(__file__).resolve().parents[2]
RUN = 8
"""Tokens in a row that count as a trace of a document."""


def ids_of(store):
    return {row.id for rows in store.rows().values() for row in rows}


# --- removal is exact -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("selection", "gone"),
    [
        (Selection(documents=("Ada/0",)), {"Ada/0"}),
        (Selection(owners=("Grace",)), {"Grace/0", "Grace/1"}),
        (Selection(sources=("mail",)), {"Ada/0", "Ada/1"}),
        (Selection(sources=("web",)), {"Grace/0", "Grace/1", "Mary/0", "Mary/1"}),
        (Selection(shards=("found",)), {"nobody's"}),
        (
            Selection(documents=("Mary/1",), owners=("Ada",), shards=("found",)),
            {"Mary/1", "Ada/0", "Ada/1", "nobody's"},
        ),
        (Selection(owners=("Ada", "Grace", "Mary"), sources=("found",)), None),
    ],
    ids=["document", "owner", "source", "source-of-two", "shard", "several", "everything"],
)
def test_removed_is_never_added(make_store, mixed, answers, fresh_answers, selection, gone):
    """After a removal, hash, neighbours, blocks and every bit of all distributions are a fresh store's of the rest."""
    store = make_store("store", mixed)
    everything = answers(store)
    remaining = {document.id for document in mixed} - gone if gone else set()
    receipt = store.remove(selection)
    assert answers(store) == answers(Store.open(store.path)) == fresh_answers(remaining) != everything
    assert {row["id"] for row in receipt.content["documents"]} == {document.id for document in mixed} - remaining
    store.verify()


def test_order_of_adding_leaves_no_trace(make_store, mixed, model, answers):
    """Forwards, backwards or at once, the documents make equal shards, under the same hashes, and equal answers."""
    stores = [make_store("together", mixed[::-1]), make_store("forwards"), make_store("backwards")]
    for document, other in zip(mixed, reversed(mixed), strict=True):
        stores[1].add([document], model)
        stores[2].add([other], model)
    first, *others = [answers(store) for store in stores]
    assert all(other == first for other in others)
    assert all(store.manifest.shards == stores[0].manifest.shards for store in stores)


def test_shard_grows_by_what_is_added(make_store, mixed, model):
    """A second document of an owner joins the owner's shard, which then is the shard of both."""
    store = make_store("store", mixed[:1])
    store.add(mixed[3:4], model)
    assert {name: [row.id for row in rows] for name, rows in store.rows().items()} == {"Ada": ["Ada/0", "Ada/1"]}
    assert store.hash == make_store("both", [mixed[3], mixed[0]]).hash


def test_document_of_an_owner_with_a_new_shard_is_found_by_bm25(make_store, mixed, model):
    """Each owner added after another is found by words of their own, whatever the order of names."""
    store = make_store("store")
    for document in (mixed[1], mixed[0], mixed[2]):
        store.add([document], model)
        words = model.tokenizer.decode(model.tokenize(document)[600:660])
        ((block,),) = store.blocks().search([words], 1)
        assert block.document.id == document.id


def test_add_leaves_control_plane_and_tokenizer_as_they_are(make_store, mixed, bytes_of):
    """What shards share has the same bytes before anything was added, after, and after removal (law 2)."""
    empty = make_store("empty")
    store = make_store("store", mixed)
    store.remove(Selection(owners=("Ada",)))
    assert bytes_of(store.path / "control") == bytes_of(empty.path / "control")
    assert (store.path / "tokenizer.json").read_bytes() == (empty.path / "tokenizer.json").read_bytes()


# --- removal is physical ----------------------------------------------------------------------------------------------


def traces(store, going, staying):
    """Bytes that only the documents that go can have left, by kind; tokens and codes as the store holds them."""
    held = {encoded.document.id: encoded for name in store.manifest.shards for encoded in store.shard(name).documents()}
    others = [held[document.id] for document in staying]
    text = "\n".join([*(document.text for document in staying), *(d.title for d in (*staying, *going))]).lower()
    found = {"tokens": set(), "codes": set(), "words": set(), "titles": set(), "lines": set()}
    known_runs = {run for encoded in others for run in runs(encoded.tokens)}
    known_codes = {row.tobytes() for encoded in others for row in encoded.codes}
    for document in going:
        encoded = held[document.id]
        found["tokens"] |= set(runs(encoded.tokens)) - known_runs
        found["codes"] |= {row.tobytes() for row in encoded.codes} - known_codes
        # Lucene shares the beginnings of words, so that a word is looked for from its third letter.
        ends = {word[2:] for word in re.findall("[a-z]{9,}", document.text.lower())}
        found["words"] |= {end.encode() for end in ends if end not in text}
        found["lines"] |= {line.encode() for line in document.text.splitlines() if len(line) > 30 and line not in text}
        found["titles"].add(document.title.encode())
    return found


def runs(tokens):
    return [tokens[at : at + RUN].tobytes() for at in range(len(tokens) - RUN + 1)]


def kinds_found(files, needles):
    """Of each kind of trace, the files that hold one."""
    return {
        kind: sorted({name for name, data in files.items() for needle in of_kind if needle in data})
        for kind, of_kind in needles.items()
    }


@pytest.mark.parametrize(
    "selection",
    [Selection(documents=("Grace/0",)), Selection(owners=("Grace",)), Selection(sources=("found",))],
    ids=["document", "owner", "source"],
)
def test_nothing_of_what_was_removed_is_in_any_file(make_store, mixed, bytes_of, selection):
    """Tokens, codes, words and titles of a document are in the store's files before its removal and in none after."""
    store = make_store("store", mixed)
    going = [row.id for _, row in store.affected(selection)]
    needles = traces(
        store, [d for d in mixed if d.id in going], [document for document in mixed if document.id not in going]
    )
    before = kinds_found(bytes_of(store.path), needles)
    assert [bool(before[kind]) for kind in ("tokens", "codes", "words", "titles")] == [True] * 4
    assert all("search/" in name for name in before["words"])
    store.remove(selection, reason="asked for")
    assert kinds_found(bytes_of(store.path), needles) == {kind: [] for kind in needles}


def test_text_is_in_no_file_while_it_is_in_the_store(make_store, mixed, bytes_of):
    """No line of a document is in any file as text: the store holds tokens, and Lucene words without their order."""
    store = make_store("store", mixed)
    needles = {"lines": traces(store, mixed, [])["lines"]}
    assert needles["lines"]
    assert kinds_found(bytes_of(store.path), needles) == {"lines": []}


def test_log_and_receipts_keep_ids_and_hashes_only(make_store, mixed):
    """A receipt names each document by id, shard, owner, licence, source, hash and length; neither text nor title."""
    store = make_store("store", mixed)
    store.remove(Selection(owners=("Ada",)), reason="by letter")
    fields = {"id", "shard", "owner", "license", "source", "content_hash", "tokens"}
    receipts = [json.loads(path.read_bytes()) for path in sorted((store.path / "receipts").iterdir())]
    assert [set(row) for receipt in receipts for row in receipt["documents"]] == [fields] * (len(mixed) + 2)
    removal = receipts[1]
    assert {row["content_hash"] for row in removal["documents"]} == {mixed[0].content_hash, mixed[3].content_hash}
    assert (removal["request"], removal["reason"]) == ({"owners": ["Ada"]}, "by letter")
    assert removal["store_before"] == receipts[0]["store_after"]
    assert removal["store_after"] == store.hash
    assert [(line["sequence"], line["operation"], line["reason"]) for line in store.log()] == [
        (1, "add", ""),
        (2, "remove", "by letter"),
    ]
    kept = {"sequence", "time", "operation", "reason", "receipt", "receipt_sha256", "previous", "hash"}
    assert [set(line) for line in store.log()] == [kept, kept]


# --- what changes no byte ---------------------------------------------------------------------------------------------


def test_dry_run_changes_no_byte(make_store, mixed, bytes_of):
    """``remove --dry-run`` lists what would go, and every file is as it was, the lock included."""
    store = make_store("store", mixed)
    before = bytes_of(store.path), {path: path.stat().st_mtime_ns for path in store.path.rglob("*")}
    arguments = ["datastore", "remove", str(store.path), "--source", "mail", "--dry-run", "--json"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0
    said = json.loads(result.stdout)
    assert said["would_remove"] == ["Ada/0", "Ada/1"]
    assert said["tokens"] == store.manifest.shards["Ada"].tokens
    assert (bytes_of(store.path), {path: path.stat().st_mtime_ns for path in store.path.rglob("*")}) == before


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (Selection(), "nothing to remove was named"),
        (Selection(documents=("Ada/9",)), "no document 'Ada/9' is in the store; it has such as Ada/0"),
        (Selection(owners=("ada",)), "no owner 'ada'"),
        (Selection(sources=("we",)), "no source 'we'"),
        (Selection(shards=("ada-0",)), "no shard 'ada-0'"),
        (Selection(owners=("Grace", "Adah")), "no owner 'Adah'"),
    ],
    ids=["nothing", "document", "owner", "source", "shard", "one-of-two"],
)
def test_misspelt_takedown_is_refused(make_store, mixed, bytes_of, selection, message):
    """A removal that names anything unknown is wrong use, names it, and removes nothing, not even what it got right."""
    store = make_store("store", mixed)
    before = bytes_of(store.path)
    with pytest.raises(UsageError, match=message):
        store.remove(selection)
    assert bytes_of(store.path) == before
    store.verify()


def test_all_are_added_or_none(make_store, mixed, model, bytes_of):
    """If one of several documents cannot be added, none is, and the store's bytes are as before."""
    store = make_store("store", mixed[:2])
    before = bytes_of(store.path)
    good = mixed[2]
    for bad, message in [
        (mixed[0], "'Ada/0' is in shard 'Ada' already"),
        (replace(good, text="other"), "'Mary/0' comes twice"),
        (replace(mixed[3], owner="", source=""), "'Ada/1' has neither owner nor source"),
    ]:
        with pytest.raises(DataError, match=message):
            store.add([good, bad], model)
        assert bytes_of(store.path) == before
    assert ids_of(store) == {"Ada/0", "Grace/0"}


def test_adding_nothing_is_wrong_use(make_store, model, bytes_of):
    """An empty list of documents is refused and leaves no line in the log."""
    store = make_store("store")
    before = bytes_of(store.path)
    with pytest.raises(UsageError, match="nothing to add"):
        store.add([], model)
    assert bytes_of(store.path) == before


def test_same_input_gives_the_same_bytes(make_store, mixed, model, bytes_of):
    """Two stores with one history are equal files, but for the log's times and Lucene's own files (law 7)."""
    stores = [make_store(name, mixed[:5]) for name in ("a", "b")]
    for store in stores:
        store.remove(Selection(documents=("Ada/0",)), reason="x")
        store.add(mixed[5:], model)
    a, b = (
        {
            name: data
            for name, data in bytes_of(store.path).items()
            if name != "log.jsonl" and not name.startswith("search/")
        }
        for store in stores
    )
    assert {"store.json", "tokenizer.json", "control/control.json", "receipts/000003-add.json"} < a.keys()
    assert a == b
    logs = [
        [{key: line[key] for key in ("sequence", "receipt_sha256", "reason")} for line in store.log()]
        for store in stores
    ]
    assert logs[0] == logs[1]


# --- groups -----------------------------------------------------------------------------------------------------------


def inodes(directory):
    return {path.name: path.stat().st_ino for path in directory.iterdir()}


def test_grouping_changes_no_answer(make_store, mixed, answers, fresh_answers, monkeypatch):
    """With a group for each shard, or for pairs of small ones, or such for ∞-grams alone, every answer is that of one
    group for all."""
    expected = fresh_answers({document.id for document in mixed})
    for name, bound, times, counts in (("single", 1, 8, (4, 4)), ("pairs", 2900, 1, (3, 3)), ("both", 1, 2900, (4, 3))):
        monkeypatch.setattr(groups, "GROUP_TOKENS", bound)
        monkeypatch.setitem(groups.TIMES, groups.NGRAMS, times)
        store = make_store(name, mixed)
        assert (len(store.manifest.groups), len(store.manifest.ngrams)) == counts
        assert answers(store) == expected


@pytest.mark.parametrize("there", [True, False])
def test_a_link_becomes_a_link_to_the_store(model, model_dir, control, tmp_path, there):
    """A store is made where a link says: in an empty directory, or in one that is not there yet."""
    link, place = tmp_path / "link", tmp_path / "disk" / "place"
    if there:
        place.mkdir(parents=True)
    link.symlink_to(place)
    Store.create(link, model, model_dir / "tokenizer.json", control).verify()
    assert link.is_symlink()
    assert [path.name for path in place.parent.iterdir()] == ["place"]
    with pytest.raises(UsageError, match="link is not empty"):
        Store.create(link, model, model_dir / "tokenizer.json", control)


def test_groups_are_checked_when_opened_if_all_together_are_small(make_store, mixed, monkeypatch):
    """Of a store whose groups are small and many no file is read when it is opened, so that it opens at once; of one
    that is small as a whole every one is."""
    monkeypatch.setattr(groups, "GROUP_TOKENS", 1)
    store = make_store("store", mixed)
    files = [file for kind in groups.KINDS for file in (store.path / kind).rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    for file in (store.path / "search").glob("*/keys/lists.bin"):
        data = bytearray(file.read_bytes())
        data[0] ^= 1
        file.write_bytes(data)
    monkeypatch.setattr(snapshot, "CHECKED_BYTES", size)
    with pytest.raises(IntegrityError, match=r"lists.bin is damaged"):
        Store.open(store.path).neighbours()
    monkeypatch.setattr(snapshot, "CHECKED_BYTES", size - 1)
    Store.open(store.path).neighbours()
    with pytest.raises(IntegrityError, match=r"lists.bin is damaged"):
        Store.open(store.path).verify()


def test_removal_rewrites_only_the_group_that_it_touches(make_store, mixed, monkeypatch):
    """Other groups and other shards are the very directories that they were, in which no file was written."""
    monkeypatch.setattr(groups, "GROUP_TOKENS", 2900)
    monkeypatch.setitem(groups.TIMES, groups.NGRAMS, 1)
    store, kinds = make_store("store", mixed), ("shards", *groups.KINDS)
    touched = {
        kind: {group.directory for group in store.groups_of(kind) if "Ada" in group.shards} for kind in groups.KINDS
    }
    before = {kind: inodes(store.path / kind) for kind in kinds}
    times = {path: path.stat().st_mtime_ns for kind in kinds for path in (store.path / kind).glob("*/*")}
    store.remove(Selection(documents=("Ada/0",)))
    after = {kind: inodes(store.path / kind) for kind in kinds}
    assert {kind: before[kind].keys() - after[kind].keys() for kind in groups.KINDS} == touched
    assert {name.partition("-")[0] for name in before["shards"].keys() - after["shards"].keys()} == {"ada"}
    for kind in kinds:
        kept = before[kind].keys() & after[kind].keys()
        assert len(kept) == len(before[kind]) - 1
        assert {name: before[kind][name] for name in kept} == {name: after[kind][name] for name in kept}
    assert all(path.stat().st_mtime_ns == time for path, time in times.items() if path.exists())


def test_removing_a_whole_group_writes_no_search_structure(make_store, mixed, monkeypatch):
    """A removed shard that had its group to itself is deleted with it, and nothing is built."""
    monkeypatch.setattr(groups, "GROUP_TOKENS", 1)
    store = make_store("store", mixed)
    before = [inodes(store.path / kind) for kind in groups.KINDS]
    store.remove(Selection(owners=("Ada",)))
    for was, kind in zip(before, groups.KINDS, strict=True):
        after = inodes(store.path / kind)
        assert after.items() < was.items()
        assert len(after) == len(was) - 1


names = st.sampled_from("abcdefgh")
entries = st.dictionaries(names, st.integers(1, 60).map(lambda tokens: ShardEntry("d", "h", tokens, 1)))


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.lists(entries, min_size=1, max_size=6))
def test_row_numbers_of_groups_never_overlap(states):
    """Groups come and go; each new one gets the lowest row numbers that no live one has."""
    live: list[Group] = []
    sizes: dict[str, ShardEntry] = {}
    for number, state in enumerate(states):
        live = live[number % 2 :: 2]  # half of them go
        for entry in state.values():
            first = first_free_row(live, sizes, entry.tokens)
            lower = [*(each.first_row + sizes[each.shards[0]].tokens for each in live), 0]
            assert first in lower
            sizes[name := f"{number}/{len(live)}"] = entry
            live.append(Group([name], "d", first))
        spans = sorted((each.first_row, each.first_row + sizes[each.shards[0]].tokens) for each in live)
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.lists(entries, min_size=1, max_size=6), st.sampled_from([(groups.SEARCH, 100), (groups.NGRAMS, 50)]))
def test_groups_are_bounded_and_move_only_for_cause(states, of):
    """Through any changes each shard is in one group, groups keep the bound of their kind, and a removal touches its
    own only."""
    kind, tokens = of
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups, "GROUP_TOKENS", tokens)
        patch.setitem(groups.TIMES, groups.NGRAMS, 2)
        planned, live = [], {}
        for state in states:
            changed = {name for name in state.keys() | live.keys() if state.get(name) != live.get(name)}
            before = [Group(list(members), "x", 0) for members in planned]
            planned = regroup(before, state, changed, kind)
            assert [group.shards for group in before] == [sorted(group.shards) for group in before]
            assert sorted(itertools.chain(*planned)) == sorted(state)
            for members in planned:
                assert members == sorted(members)
                assert len(members) == 1 or sum(state[name].tokens for name in members) <= 100
            if not any(name not in live or state[name].tokens > live[name].tokens for name in changed & state.keys()):
                untouched = [group.shards for group in before if not changed & set(group.shards)]
                assert [members for members in planned if members in untouched] == untouched
                assert len(planned) <= len(before)
            live = state


# --- making and opening -----------------------------------------------------------------------------------------------


def test_control_plane_of_restricted_text_cannot_be_made(model, corpus, mixed):
    """The store's own documents are refused as teachers of what its shards share."""
    from datastore.control import fit_control_plane
    from silo.licensing import Policy, Tier

    everything_restricted = Policy(owners=(("*", Tier.RESTRICTED),), licenses=(("*", Tier.RESTRICTED),))
    with pytest.raises(LicenseError, match="restricted"):
        fit_control_plane(model, corpus, everything_restricted, set())


def test_empty_store_answers_with_the_model_alone(make_store, answers, model, documents):
    """A store without documents finds nothing, and its mixture is the model's own distribution."""
    import torch

    from silo.weights import METHODS, Weights

    store = make_store("empty")
    said = answers(store)
    assert set(itertools.chain(*said["cited"])) == {None}
    assert not any(said["blocks"])
    mixture = store.mixture(model, METHODS)
    for parts in mixture.parts(model.tokenize(documents[0])[:50]):
        distribution = parts.distribution(Weights({"lm": 0.4, "knn": 0.25, "ric": 0.15, "ngram": 0.2}, 8.0))
        torch.testing.assert_close(distribution, parts.lm.distribution())
    store.verify()


def test_summary_counts_what_is_there(make_store, mixed, model):
    """Documents and tokens of each shard are those of its owner's documents."""
    table = {line["shard"]: line for line in make_store("store", mixed).summary()}
    assert set(table) == {"Ada", "Grace", "Mary", "found"}
    for name, line in table.items():
        own = [document for document in mixed if name in (document.owner or document.source,)]
        assert line["documents"] == len(own)
        assert line["tokens"] == sum(len(model.tokenize(document)) for document in own)
        assert line["licenses"] == ["GPL-3.0-only"]


def test_two_owners_whose_names_look_alike_have_two_shards(make_store, mixed, model):
    """Names that give the same directory name, or none at all, do not share a shard, and each is removed by itself."""
    owners = ["A. B.", "a-b", "漢", "字"]
    store = make_store("store", [replace(mixed[0], id=owner, owner=owner) for owner in owners])
    assert sorted(store.manifest.shards) == sorted(owners)
    store.remove(Selection(owners=("a-b", "漢")))
    assert ids_of(store) == {"A. B.", "字"}
    store.verify()


def test_store_opens_without_torch():
    """What needs no model loads none: a takedown does not wait for torch, nor for Java until something is built."""
    code = (
        "import datastore.store, datastore.cli, sys; print(sorted({'torch', 'transformers', 'jnius'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_stores_text_is_found_in_a_permissive_corpus(make_store, documents, tmp_path):
    """``silo corpus audit --against STORE`` decodes the store's tokens, and finds a copy of a document of it."""
    from click.testing import CliRunner

    from datastore.texts import documents_of_store
    from silo.cli import main

    store = make_store("store", documents)
    assert {each.id: each.text for each in documents_of_store(store.path)} == {each.id: each.text for each in documents}
    rows = [
        {"id": "copy", "text": documents[5].text, "license": "MIT"},
        {"id": "own", "text": "mine", "license": "MIT"},
    ]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    runner = CliRunner()
    assert (
        runner.invoke(main, ["corpus", "collect", str(tmp_path / "x.jsonl"), "--out", str(tmp_path / "c")]).exit_code
        == 0
    )
    result = runner.invoke(main, ["corpus", "audit", str(tmp_path / "c"), "--against", str(store.path), "--json"])
    found = json.loads(result.stdout)["repeated"]
    assert [(row["id"], row["of"]) for row in found["rows"]] == [("copy", documents[5].id)]
