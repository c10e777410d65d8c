"""Documents without keys: no neighbours in them, and everything else as of any document."""

import json
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

from datastore.selection import Selection
from datastore.store import Store
from datastore.verification import find_traces, verify_derived
from silo.cli import main
from silo.weights import METHODS


@pytest.fixture(scope="module")
def halves(documents):
    """Short documents of the same three owners: some that get keys, and some that do not. All begin after the licence
    at their head."""
    short = [replace(document, text=document.text[600:1300]) for document in documents if len(document.text) > 1300]
    ordered = sorted(short[:12], key=lambda document: document.id)  # so that both kinds take turns in each shard
    return ordered[1::2], ordered[0::2]


@pytest.fixture
def mixed_store(make_store, model, halves):
    """A store of both."""
    keyed, bare = halves
    store = make_store("mixed", keyed)
    store.add(bare, model, keyed=False)
    return store


def test_neighbours_are_those_of_the_keyed(mixed_store, make_store, halves, answers):
    """Neighbours are found as in a store of the documents with keys, blocks and ∞-grams as in one where all have."""
    keyed, bare = halves
    some, all_ = answers(make_store("some", keyed)), answers(make_store("all", [*keyed, *bare]))
    found = answers(mixed_store)
    for part in ("neighbours", "cited"):
        assert found[part] == some[part] != all_[part], part
    for part in ("rows", "blocks", "ngrams", "following", "origins", "traced"):
        assert found[part] == all_[part] != some[part], part


def test_the_model_is_not_asked(make_store, model, halves, monkeypatch):
    """Adding without keys makes no key, and tokenises only."""
    store = make_store("bare", [])
    monkeypatch.setattr(model, "key_batches", lambda tokens: pytest.fail("the model was run"))
    store.add(halves[1], model, keyed=False)
    told = store.describe()
    assert (told["keys"], told["tokens"]) == (0, sum(len(model.tokenize(each)) for each in halves[1]))
    assert {row["keys"] for row in store.summary()} == {0}


@pytest.mark.parametrize("which", [0, 1], ids=["keyed", "bare"])
def test_one_that_left_was_never_there(mixed_store, make_store, model, halves, answers, bytes_of, which):
    """Without one document, with a key or without, the store is that which never held it, in every shard's bytes."""
    gone = halves[which][2]
    mixed_store.remove(Selection(documents=(gone.id,)))
    keyed, bare = ([each for each in half if each is not gone] for half in halves)
    never = make_store("never", keyed)
    never.add(bare, model, keyed=False)
    assert answers(mixed_store) == answers(never)
    ours, theirs = (
        {name: data for name, data in bytes_of(store.path).items() if name.startswith("shards")}
        for store in (mixed_store, never)
    )
    assert ours == theirs
    traces = [
        sorted((trace.kind, trace.file.name) for trace in find_traces(each, [gone], model))
        for each in (mixed_store, never)
    ]
    assert traces[0] == traces[1], "nothing but what other documents have in common with it"
    assert verify_derived(mixed_store) == len(mixed_store.manifest.groups) + len(mixed_store.manifest.ngrams)
    mixed_store.verify()


def test_a_selection_equals_a_store_of_it(mixed_store, make_store, model, halves):
    """Where an owner is denied, neighbours are those of a store that has only the others'."""
    owner = halves[0][0].owner
    keyed, bare = ([each for each in half if each.owner != owner] for half in halves)
    others = make_store("others", keyed)
    others.add(bare, model, keyed=False)
    queries = model.keys(model.tokenize(halves[0][0]))
    view = mixed_store.select(deny=Selection(owners=(owner,))).neighbours()
    ours, theirs = view.search(queries, 2000), others.neighbours().search(queries, 2000)
    np.testing.assert_array_equal(ours.distances, theirs.distances)
    np.testing.assert_array_equal(ours.values, theirs.values)
    assert view.num_keys == sum(len(model.tokenize(each)) for each in keyed)
    assert np.isfinite(ours.distances).sum(axis=1).max() <= view.num_keys


def test_pointers_stay_within_keys(mixed_store, model, halves):
    """Neighbours that are followed are those of documents with keys."""
    tokens = model.tokenize(halves[1][0])
    keys = model.keys(tokens)
    turns = np.arange(len(keys)) % 4
    index = mixed_store.neighbours()
    found = index.follow(keys, tokens, 16, turns=turns, pointers=1, wanted=np.ones(len(keys), bool))
    cited = {index.document(at).id for at in np.unique(found.documents[found.documents >= 0])}
    assert cited <= {each.id for each in halves[0]}
    assert cited


def test_nothing_has_keys(make_store, model, halves):
    """A store of documents without keys has no neighbours, and a mixture gives their weight to the model."""
    store = make_store("bare", [])
    store.add(halves[1], model, keyed=False)
    assert store.neighbours().num_keys == 0
    tokens = model.tokenize(halves[1][0])
    parts = next(store.mixture(model, METHODS).parts(tokens))
    assert not parts.knn.found.any()
    assert parts.ngram.found.any()
    verify_derived(store)


@pytest.mark.parametrize("last", [False, True], ids=["bare", "keyed"])
def test_an_interrupted_add_goes_on(make_store, model, halves, monkeypatch, last):
    """What was encoded with keys or without survives in the spool; what was encoded otherwise is encoded anew."""
    keyed, bare = halves
    store = make_store("broken", keyed)

    def stop(done, total):
        if done == 3:
            raise KeyboardInterrupt

    for as_keyed in (not last, last):
        with pytest.raises(KeyboardInterrupt):
            store.add(bare, model, keyed=as_keyed, progress=stop)
    store = Store.open(store.path)
    assert store.verify()["unfinished_add"] == 6
    encoded, encode = [], Store.encode
    monkeypatch.setattr(Store, "encode", lambda *given, **how: encoded.append(given[1].id) or encode(*given, **how))
    store.add(bare, model, keyed=last)
    assert encoded == [each.id for each in bare[3:]]
    whole = make_store("whole", keyed)
    whole.add(bare, model, keyed=last)
    assert store.hash == whole.hash


def test_an_export_keeps_it_so(mixed_store, make_store, halves, tmp_path):
    """A shard that is handed on has keys where it had them."""
    name = halves[0][0].owner
    mixed_store.export(name, tmp_path / "it.shard")
    other = make_store("other", [])
    other.take_in(tmp_path / "it.shard")
    own = {row["shard"]: row for row in mixed_store.summary()}
    assert other.summary() == [own[name]]
    assert 0 < own[name]["keys"] < own[name]["tokens"]


def test_from_the_command_line(make_store, model_dir, halves, tmp_path):
    """``--no-keys`` adds without, and `show` tells how many keys there are."""
    store = make_store("cli", [])
    fields = ("id", "text", "license", "owner", "source", "title")
    lines = [json.dumps({name: getattr(each, name) for name in fields}) for each in halves[1]]
    (tmp_path / "bare.jsonl").write_text("\n".join(lines) + "\n")
    run = CliRunner().invoke
    added = run(
        main,
        ["datastore", "add", str(store.path), str(tmp_path / "bare.jsonl"), "--model", str(model_dir), "--no-keys"],
        catch_exceptions=False,
    )
    assert added.exit_code == 0, added.output
    shown = json.loads(run(main, ["datastore", "show", str(store.path), "--json"]).output)
    assert (shown["keys"], shown["documents"]) == (0, len(halves[1]))
