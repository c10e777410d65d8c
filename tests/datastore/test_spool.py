"""Adding as a stream: what was encoded survives an interruption, is used again, and never outlives a change."""

import json
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

from datastore.spool import Spool, count
from datastore.store import Selection, Store
from datastore.verification import find_traces
from silo.cli import main
from silo.documents import DocumentFiles
from silo.errors import DataError, UsageError


class Stop(Exception):
    """Stands for whatever ends an add in the middle."""


@pytest.fixture
def few(documents):
    """Six short documents of three owners."""
    return [replace(document, text=document.text[:600]) for document in documents[:6]]


def interrupted(store, model, documents, *, after):
    """Begin to add documents, and stop when some are encoded."""

    def stop(done, total):
        if done == after:
            raise Stop

    with pytest.raises(Stop):
        store.add(documents, model, progress=stop)


def counting(model, monkeypatch):
    """What the model is asked to encode from now on, as lengths in tokens."""
    asked, real = [], model.key_batches

    def key_batches(tokens):
        asked.append(len(tokens))
        return real(tokens)

    monkeypatch.setattr(model, "key_batches", key_batches)
    return asked


def test_interrupted_add_goes_on_where_it_stopped(make_store, model, few, answers, monkeypatch):
    """Added again, only what is left goes through the model, and the store is the one of an add without a break."""
    store = make_store("broken", [])
    interrupted(store, model, few, after=4)
    assert store.verify()["unfinished_add"] == 4
    asked = counting(model, monkeypatch)
    Store.open(store.path).add(few, model)
    assert asked == [len(model.tokenize(each)) for each in few[4:]]
    store = Store.open(store.path)
    assert store.verify()["unfinished_add"] == 0
    assert not (store.path / "spool").exists()
    assert answers(store) == answers(make_store("whole", few))


def test_unfinished_add_is_no_part_of_the_store(make_store, model, few):
    """What is in the spool is neither found nor listed nor hashed."""
    store = make_store("store", few[:2])
    before, keys = store.hash, store.neighbours().num_keys
    interrupted(store, model, few[2:], after=3)
    opened = Store.open(store.path)
    assert (opened.hash, opened.neighbours().num_keys) == (before, keys)
    assert sum(map(len, opened.rows().values())) == 2


@pytest.mark.parametrize("file", ["rows.jsonl", "tokens.bin", "lists.bin", "codes.bin"])
@pytest.mark.parametrize("harm", ["cut", "flip", "longer"])
def test_torn_spool_costs_time_only(make_store, model, few, file, harm):
    """Where the end of a file is missing, changed or too long, the store that comes out is the same."""
    store = make_store("torn", [])
    interrupted(store, model, few, after=4)
    path = store.path / "spool" / file
    data = path.read_bytes()
    at = len(data) * 2 // 3
    flipped = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
    path.write_bytes({"cut": data[:-3], "flip": flipped, "longer": data + b"xyz"}[harm])
    Store.open(store.path).add(few, model)
    whole = make_store("whole", few)
    assert Store.open(store.path).hash == whole.hash
    assert Store.open(store.path).verify()["verified"]


def test_corrected_licence_is_the_one_that_is_kept(make_store, model, few):
    """A document whose licence was corrected between two attempts is not taken from the spool as it was."""
    store = make_store("store", [])
    interrupted(store, model, few, after=6)
    corrected = [replace(few[0], license="CC-BY-SA-4.0"), *few[1:]]
    Store.open(store.path).add(corrected, model)
    assert Store.open(store.path).hash == make_store("fresh", corrected).hash


@pytest.mark.parametrize("change", ["remove", "insert"])
def test_any_change_takes_the_spool_with_it(make_store, model, few, change):
    """After a removal, or after another add, no file of the store holds what an unfinished add had encoded."""
    store = make_store("store", few[:2])
    interrupted(store, model, few[2:], after=2)
    needle = model.tokenize(few[2])[:40].astype(np.uint16).tobytes()
    files = [path for path in store.path.rglob("*") if path.is_file()]
    assert any(needle in path.read_bytes() for path in files)
    opened = Store.open(store.path)
    if change == "remove":
        opened.remove(Selection(documents=(few[0].id,)))
    else:
        opened.insert([opened.encode(few[5], model)])
    assert not any(needle in path.read_bytes() for path in store.path.rglob("*") if path.is_file())
    assert not (store.path / "spool").exists()


def test_removal_of_what_is_only_in_the_spool_deletes_it(make_store, model, few):
    """Asked to remove an owner whom only an unfinished add holds, it says that the store has no such owner, and no file
    holds the text any more."""
    store = make_store("store", [each for each in few if each.owner == "Ada"])
    rest = [each for each in few if each.owner != "Ada"]
    interrupted(store, model, rest, after=1)
    needle = model.tokenize(rest[0])[:40].astype(np.uint16).tobytes()
    assert any(needle in path.read_bytes() for path in store.path.rglob("*") if path.is_file())
    with pytest.raises(UsageError, match=f"no owner '{rest[0].owner}' is in the store"):
        Store.open(store.path).remove(Selection(owners=(rest[0].owner,)))
    assert not any(needle in path.read_bytes() for path in store.path.rglob("*") if path.is_file())


def test_a_misspelt_removal_costs_no_encoding(make_store, model, few):
    """What is named neither in the store nor in what an unfinished add has encoded leaves that as it is; but where a
    document was torn, whose nobody can say, it goes."""
    store = make_store("store", few[:1])
    interrupted(store, model, few[1:], after=2)
    kept = {path.name: path.read_bytes() for path in (store.path / "spool").iterdir()}
    for torn in (b"", b"\0" * 2 * len(model.tokenize(few[1])), kept["tokens.bin"]):
        with open(store.path / "spool" / "tokens.bin", "ab") as file:
            file.write(torn)
        with pytest.raises(UsageError, match="no owner 'Typo' is in the store"):
            Store.open(store.path).remove(Selection(owners=("Typo",)))
        if torn:
            assert not (store.path / "spool").exists()
            (store.path / "spool").mkdir()
            for name, data in kept.items():
                (store.path / "spool" / name).write_bytes(data)
        else:
            assert {path.name: path.read_bytes() for path in (store.path / "spool").iterdir()} == kept


def test_what_an_unfinished_add_has_encoded_is_not_absent(make_store, model, few, tmp_path):
    """Tokens and codes in the spool are traces, the command says where they come from, and a removal ends it."""
    store = make_store("store", [])
    interrupted(store, model, few, after=1)
    found = find_traces(store, few[:1], model)
    assert [(trace.kind, trace.file.name) for trace in found] == [("codes", "codes.bin"), ("tokens", "tokens.bin")]
    file = tmp_path / "gone.jsonl"
    file.write_text(json.dumps(few[0].to_json()) + "\n")
    verify = ["datastore", "verify", str(store.path), "--absent", str(file)]
    result = CliRunner().invoke(main, verify)
    assert result.exit_code == 1
    assert "tokens.bin holds tokens of document 'Ada/0'; it is not gone: an unfinished add has" in result.stderr
    with pytest.raises(UsageError):
        Store.open(store.path).remove(Selection(documents=("Ada/0",)))
    assert CliRunner().invoke(main, verify).exit_code == 0


def test_a_document_that_vanishes_while_it_is_added_is_named(make_store, model, few, bytes_of):
    """Where an input changes between its check and its encoding, what is missing is said, and nothing is added."""
    store = make_store("store", few[:1])
    before = bytes_of(store.path)

    class Changing(list):
        def __iter__(self):
            yield from self.pop()

    with pytest.raises(DataError, match="'Mary/0' was there when the input was checked"):
        store.add(Changing([few[1:2], few[1:3]]), model)
    assert bytes_of(store.path) == before


def test_spool_of_a_committed_add_is_collected(make_store, model, few):
    """Killed between the commit and the deletion of its spool, a store loses the spool at the next verification."""
    store = make_store("store", few[:2])
    interrupted(store, model, few[2:4], after=2)
    kept = {path.name: path.read_bytes() for path in (store.path / "spool").iterdir()}
    Store.open(store.path).add(few[2:4], model)
    (store.path / "spool").mkdir()
    for name, data in kept.items():
        (store.path / "spool" / name).write_bytes(data)
    assert Store.open(store.path).verify()["collected"] == ["spool"]
    assert not (store.path / "spool").exists()


def test_spool_of_another_state_is_begun_anew(tmp_path, few, make_store, model):
    """A spool that was begun for another state of the store is empty when it is opened for this one."""
    store = make_store("store", [])
    shape = {"token_type": np.uint16, "code_bytes": store.control.codes.size}
    spool = Spool(tmp_path / "spool", {"sequence": 1}, **shape)
    spool.add(few[0], lambda document: store.encode(document, model))
    assert count(tmp_path / "spool") == 1
    Spool(tmp_path / "spool", {"sequence": 2}, **shape)
    assert count(tmp_path / "spool") == 0


def test_iterator_is_refused(make_store, model, few):
    """Documents that can be gone through only once are refused before anything is encoded."""
    with pytest.raises(UsageError, match="give a sequence, not an iterator"):
        make_store("store", []).add(iter(few), model)


def test_files_are_read_anew_each_time(tmp_path):
    """The documents of files come in the order of the files, each time, but for those that are passed over."""
    for name in "ab":
        (tmp_path / name).write_text("".join(f'{{"id": "{name}{n}", "text": "x"}}\n' for n in range(3)))
    files = DocumentFiles([tmp_path / "b", tmp_path / "a"], passed_over={"b1", "a2"})
    for _ in range(2):
        assert [document.id for document in files] == ["b0", "b2", "a0", "a1"]
