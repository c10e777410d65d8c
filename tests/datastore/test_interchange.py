"""A shard as one file: exported, taken in elsewhere, and remembered."""

import copy
import io
import json
import tarfile
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

from datastore.control import ControlPlane
from datastore.integrity import sealed
from datastore.store import Selection, Store
from silo.cli import main
from silo.errors import DataError, IntegrityError, StoreError, UsageError
from silo.files import canonical_json, sha256


@pytest.fixture
def few(documents):
    """Six short documents of three owners."""
    return [replace(document, text=document.text[:500]) for document in documents[:6]]


@pytest.fixture
def exported(make_store, few, tmp_path):
    """A store, and Ada's shard of it as a file."""
    store = make_store("from", few)
    store.export("Ada", tmp_path / "ada.shard", reason="moved")
    return store, tmp_path / "ada.shard"


def test_what_comes_in_is_what_was_added(exported, make_store, few, answers):
    """A store that takes the file in is in hash and answers the store to which the documents were added."""
    _, file = exported
    others = [document for document in few if document.owner != "Ada"]
    store = make_store("to", others)
    store.take_in(file)
    store = Store.open(store.path)
    assert store.verify()["verified"]
    assert answers(store) == answers(make_store("fresh", few))


def test_export_changes_no_answer_and_is_in_the_log(exported, make_store, few):
    """The exporting store keeps its hash; its log says what was exported and why; it verifies."""
    store, _ = exported
    store = Store.open(store.path)
    assert store.hash == make_store("same", few).hash
    last = store.log()[-1]
    assert (last["operation"], last["reason"]) == ("export", "moved")
    assert store.verify()["changes"] == 2


def test_equal_shards_give_equal_files(exported, make_store, few, tmp_path):
    """The bytes of the file depend on the shard alone."""
    make_store("again", list(reversed(few))).export("Ada", tmp_path / "again.shard")
    assert (tmp_path / "again.shard").read_bytes() == exported[1].read_bytes()


def test_removal_names_the_exports_that_it_cannot_reach(exported, few):
    """Removing an exported document names the export's receipt; removing another names none."""
    store, _ = exported
    ada = next(document for document in few if document.owner == "Ada")
    other = next(document for document in few if document.owner != "Ada")
    assert "exports" not in store.remove(Selection(documents=(other.id,))).content
    assert store.remove(Selection(documents=(ada.id,))).content["exports"] == ["000002-export.json"]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_damage_is_found_and_leaves_the_store_as_it_was(exported, make_store, tmp_path, bytes_of, share):
    """A flipped byte, or a missing end, is an error that names the file, and nothing is taken in."""
    data = exported[1].read_bytes()
    at = int(share * (len(data) - 20_000))  # the end of a tar is padding
    store = make_store("to", [])
    before = bytes_of(store.path)
    for number, bad in enumerate((data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :], data[:at])):
        file = tmp_path / f"bad-{number}"
        file.write_bytes(bad)
        with pytest.raises((DataError, IntegrityError)):
            Store.open(store.path).take_in(file)
        assert bytes_of(store.path) == before


def test_archive_cannot_write_elsewhere(make_store, tmp_path):
    """An archive whose list names a path is refused before anything of it is unpacked."""
    path = tmp_path / "evil"
    about = sealed({"format": 1, "shard": "x", "hash": "0" * 64, "files": ["../../evil.txt"]})
    with tarfile.open(path, "w") as archive:
        for name, data in (("export.json", about), ("../../evil.txt", b"gotcha")):
            source = tmp_path / "source"
            source.write_bytes(data)
            archive.add(source, arcname=name)
    with pytest.raises(DataError, match="names files that no shard has"):
        make_store("to", []).take_in(path)
    assert not list(tmp_path.rglob("evil.txt"))


def no_array(array):
    """What says that it is an array, and is none."""
    return b"nothing"


CRAFTED = {
    "wider tokens": ("tokens.npy", lambda array: array.astype(np.uint32)),
    "unknown tokens": ("tokens.npy", lambda array: array + np.uint16(60_000)),
    "fewer tokens": ("tokens.npy", lambda array: array[:-1]),
    "no array": ("tokens.npy", no_array),
    "lists that there are not": ("lists.npy", lambda array: array + np.int32(1 << 20)),
    "negative lists": ("lists.npy", lambda array: array - np.int32(1 << 20)),
    "wider lists": ("lists.npy", lambda array: array.astype(np.int64)),
    "narrower codes": ("codes.npy", lambda array: np.ascontiguousarray(array[:, :-1])),
    "codes as numbers": ("codes.npy", lambda array: array.astype(np.float32)),
    "flat codes": ("codes.npy", lambda array: array.ravel()),
    "fewer codes": ("codes.npy", lambda array: array[:-1]),
    "an owner that is a number": ("documents.jsonl", lambda rows: [{**row, "owner": 3} for row in rows]),
    "another's documents": ("documents.jsonl", lambda rows: [{**rows[0], "owner": "Grace"}, *rows[1:]]),
    "a field too many": ("documents.jsonl", lambda rows: [{**row, "more": 1} for row in rows]),
    "a field too few": ("documents.jsonl", lambda rows: [{"id": row["id"]} for row in rows]),
    "no object": ("documents.jsonl", lambda rows: [1, *rows]),
    "no documents": ("documents.jsonl", lambda rows: []),
    "documents beyond the tokens": (
        "documents.jsonl",
        lambda rows: [*rows[:-1], {**rows[-1], "end": rows[-1]["end"] + 100}],
    ),
    "documents that overlap": ("documents.jsonl", lambda rows: [{**row, "begin": 0} for row in rows]),
    "a document twice": ("documents.jsonl", lambda rows: [rows[0], *rows]),
    "documents with fewer keys": ("documents.jsonl", lambda rows: [{**rows[0], "keyed": False}, *rows[1:]]),
    "a file without its checksum": (None, lambda index, about: index["files"].pop("codes.npy")),
    "no checksums": (None, lambda index, about: index.pop("files")),
    "no model": (None, lambda index, about: index.pop("model")),
    "a file too few": (None, lambda index, about: about["files"].remove("codes.npy")),
    "files that are none": (None, lambda index, about: about.update(files=[["shard.json"]])),
    "a number for a shard": (None, lambda index, about: about.update(shard=3)),
    "a list for a key spec": (None, lambda index, about: about.update(key_spec=[])),
}
"""What was changed → in which file, and how; None for what says which files there are."""


def crafted(source, target, name, change):
    """An export with one file changed and every checksum made good."""
    with tarfile.open(source) as archive:
        files = {member.name: archive.extractfile(member).read() for member in archive}
    about, index = json.loads(files["export.json"])["content"], json.loads(files["shard.json"])
    if name is None:
        change(index, about)
    elif name == "documents.jsonl":
        rows = change([json.loads(line) for line in files[name].splitlines()])
        files[name] = b"".join(map(canonical_json, rows))
    else:
        changed, buffer = change(np.load(io.BytesIO(files[name]))), io.BytesIO()
        np.save(buffer, changed) if isinstance(changed, np.ndarray) else buffer.write(changed)
        files[name] = buffer.getvalue()
    if name is not None:
        index["files"][name] = sha256(files[name])
    files["shard.json"] = canonical_json(index)
    files["export.json"] = sealed({**about, "hash": sha256(files["shard.json"])})
    with tarfile.open(target, "w") as archive:
        for member, data in files.items():
            entry = tarfile.TarInfo(member)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


@pytest.mark.parametrize(("name", "change"), CRAFTED.values(), ids=CRAFTED)
def test_a_shard_that_no_store_wrote_is_refused(exported, make_store, few, tmp_path, bytes_of, name, change):
    """A sealed file whose content is not a shard's, or not such as the store has, is one line, and the store as it
    was."""
    store = make_store("to", [document for document in few if document.owner == "Mary"][:1])
    before = bytes_of(store.path)
    crafted(exported[1], tmp_path / "bad", name, change)
    run = CliRunner().invoke(main, ["datastore", "import", str(store.path), str(tmp_path / "bad")])
    assert (run.exit_code, run.stderr.count("\n")) == (1, 1)
    assert run.stderr.startswith(f"error: {tmp_path / 'bad'}")
    assert bytes_of(store.path) == before


def test_tokens_of_two_types_are_not_mixed(exported, make_store, few, tmp_path, model, bytes_of):
    """An empty store cannot know its model's type of tokens; what it took in by mistake spoils nothing that follows."""
    crafted(exported[1], tmp_path / "bad", *CRAFTED["wider tokens"])
    store = make_store("to")
    store.take_in(tmp_path / "bad")
    before = bytes_of(store.path)
    more = [document for document in few if document.owner == "Mary"]
    with pytest.raises(StoreError, match=r"are uint32, those of 'Mary/\d' uint16; .* remove that first"):
        store.add(more, model)
    assert bytes_of(store.path) == before
    store.remove(Selection(owners=("Ada",)))
    store.add(more, model)
    assert store.hash == make_store("fresh", more).hash


def test_shard_of_another_control_plane_is_refused(exported, model, model_dir, tmp_path):
    """Codes of another control plane are not mixed in."""
    other = Store.create(
        tmp_path / "other", model, model_dir / "tokenizer.json", ControlPlane.unfitted(model.key_spec.dimension)
    )
    with pytest.raises(StoreError, match="another model or control plane"):
        other.take_in(exported[1])


def test_shard_of_other_keys_is_refused(model, model_dir, few, tmp_path):
    """Keys of another layer are not mixed in, also where nothing was fitted on either; an export of an earlier version,
    which does not say how its keys are made, is taken in."""
    other = copy.copy(model)
    other.key_spec = replace(model.key_spec, layer="last_hidden_state")
    stores = {}
    for name, lm in (("from", model), ("to", other), ("same", model)):
        stores[name] = Store.create(tmp_path / name, lm, model_dir / "tokenizer.json")
    stores["from"].add(few[:1], model)
    stores["from"].export("Ada", tmp_path / "ada.shard")
    with pytest.raises(StoreError, match="made with layer 'last_ffn_input' instead of 'last_hidden_state'"):
        stores["to"].take_in(tmp_path / "ada.shard")
    with tarfile.open(tmp_path / "ada.shard") as new, tarfile.open(tmp_path / "old.shard", "w") as old:
        for member in new:
            data = new.extractfile(member).read()
            if member.name == "export.json":
                content = json.loads(data)["content"]
                data = sealed({name: value for name, value in content.items() if name != "key_spec"})
                member.size = len(data)
            old.addfile(member, io.BytesIO(data))
    stores["same"].take_in(tmp_path / "old.shard")
    assert stores["same"].hash == stores["from"].hash


def test_wrong_use_is_told(exported, make_store, tmp_path):
    """A file that is there, a shard that is not, documents that are present already: one line each."""
    store, file = exported
    with pytest.raises(UsageError, match="exists already"):
        store.export("Ada", file)
    with pytest.raises(UsageError, match="no shard 'Nobody' is in the store"):
        store.export("Nobody", tmp_path / "nobody")
    with pytest.raises(UsageError, match="does not exist"):
        store.take_in(tmp_path / "absent")
    with pytest.raises(DataError, match="is in shard 'Ada' already") as caught:
        store.take_in(file)
    assert "--skip-present" not in str(caught.value)  # which import does not have
    assert not (tmp_path / "nobody").exists()
    (tmp_path / "link").symlink_to(store.path / "receipts")
    for place in (store.path, store.path / "shards", tmp_path / "link"):
        with pytest.raises(UsageError, match="would lie in the store"):
            store.export("Ada", place / "ada.shard")
    assert store.verify()["verified"]


def test_commands(exported, make_store, tmp_path):
    """`export` and `import` print what moved."""
    store, _ = exported
    target = make_store("to", [])
    run = CliRunner().invoke(
        main,
        ["datastore", "export", str(store.path), "--shard", "Grace", "--out", str(tmp_path / "g"), "--json"],
    )
    assert json.loads(run.stdout)["file"] == str(tmp_path / "g")
    run = CliRunner().invoke(main, ["datastore", "import", str(target.path), str(tmp_path / "g"), "--json"])
    assert json.loads(run.stdout)["shards"] == ["Grace"]
    assert run.exit_code == 0
