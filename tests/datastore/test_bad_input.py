"""Bad input and damaged stores: one clear line on stderr, exit 1 or 2, and the store as it was."""

import copy
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from datastore.store import Selection, Store
from silo.cli import main
from silo.errors import DataError, IntegrityError, SiloError, StoreError

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments):
    """Call the command in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def refused(*arguments, code):
    """Call the command, make sure that it fails as it should, and give the message."""
    result = run(*arguments)
    assert isinstance(result.exception, SystemExit), result.exception
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert result.stderr.endswith("\n")
    return result.stderr


@pytest.fixture(scope="module")
def pristine(model, model_dir, control, documents, tmp_path_factory):
    """A store of two shards with a change of each kind behind it; copied, never changed."""
    path = tmp_path_factory.mktemp("pristine") / "store"
    store = Store.create(path, model, model_dir / "tokenizer.json", control)
    store.add(documents[:3], model)
    store.remove(Selection(owners=("Mary",)), reason="by letter")
    return path


@pytest.fixture
def store(pristine, tmp_path):
    """A copy of that store."""
    return Path(shutil.copytree(pristine, tmp_path / "store"))


@pytest.fixture
def jsonl(tmp_path):
    """A function that writes lines to a file; what is not a string is written as JSON."""

    def write(*lines, name="input.jsonl"):
        path = tmp_path / name
        path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
        return path

    return write


def record(id="new", **fields):
    return {"id": id, "text": f"def {id.replace('/', '_')}(): pass", "license": "MIT", "owner": "Joan", **fields}


# --- licences that nobody knows ---------------------------------------------------------------------------------------


def test_unknown_and_missing_licences_are_accepted_and_listed(store, jsonl, model_dir):
    """A store takes text under any licence or none: that is what it is for. ``list`` shows what was declared."""
    nothing = record("b")
    del nothing["license"]
    path = jsonl(record("a", license="Foo-1.0 (mine)"), nothing, record("c", license="  "), record("d", license=None))
    added = run("datastore", "add", store, path, "--model", model_dir, "--json")
    assert added.exit_code == 0
    assert json.loads(added.stdout)["documents"] == 4
    listed = run("datastore", "list", store, "--json")
    shards = {line["shard"]: line["licenses"] for line in json.loads(listed.stdout)["shards"]}
    assert shards["Joan"] == ["Foo-1.0 (mine)", "NOASSERTION"]
    assert "NOASSERTION" in run("datastore", "list", store).stdout
    assert run("datastore", "verify", store).exit_code == 0


def test_unknown_licence_is_restricted(jsonl):
    """The tier of a licence that nobody knows, and of none, is ``restricted``: no corpus would train on it."""
    from silo.documents import read_documents
    from silo.licensing import DEFAULT_POLICY, Tier

    nothing = record("b")
    del nothing["license"]
    documents = read_documents(jsonl(record("a", license="Foo-1.0 (mine)"), nothing))
    assert [DEFAULT_POLICY.tier(document) for document in documents] == [Tier.RESTRICTED] * 2


# --- input that cannot be added ---------------------------------------------------------------------------------------

BAD_LINES = {
    "broken JSON": ([record("a"), '{"id": "b", "text": '], ":2: not valid JSON"),
    "not an object": ([record("a"), record("b"), "[1]"], ":3: a list, expected an object"),
    "no text": ([{"id": "a", "license": "MIT"}], ":1: field 'text' is missing"),
    "empty text": ([record("a", text="")], ":1: field 'text' is empty"),
    "id of another type": ([record("a"), {**record("b"), "id": 7}], ":2: field 'id' is of type int"),
    "licence of another type": ([record("a", license=["MIT"])], ":1: field 'license' is of type list"),
    "binary": (["\x00\x01"], ":1: not valid JSON"),
    "empty file": ([], "holds no document"),
    "blank lines only": (["", " "], "holds no document"),
    "id twice": ([record("a"), record("b"), record("a")], ":3: id 'a' was already used in line 1"),
    "id in the store": ([record("a"), record("Ada/0")], "document 'Ada/0' is in shard 'Ada' already; remove it first"),
    "nobody's": ([record("a", owner="")], "document 'a' has neither owner nor source; name who may remove it"),
    "nobody's, in line 2": ([record("b"), record("a", owner="")], ":2: document 'a' has neither owner nor source"),
    "lone surrogate": (['{"id": "a", "text": "\\ud800", "owner": "o"}'], ":1: an unpaired surrogate"),
}


@pytest.mark.parametrize(("lines", "message"), BAD_LINES.values(), ids=BAD_LINES)
def test_bad_input_adds_nothing(store, jsonl, model_dir, bytes_of, lines, message):
    """Each kind of bad input exits 1 with a line that says where and what; no document of it is added."""
    before = bytes_of(store)
    said = refused("datastore", "add", store, jsonl(*lines), "--model", model_dir, code=1)
    assert message in said
    if message.startswith(":"):
        assert f"input.jsonl{message}" in said
    assert bytes_of(store) == before


def test_id_in_two_files_adds_nothing(store, jsonl, model_dir, bytes_of):
    """An id that two files of one call share is refused, though each file by itself is good."""
    before = bytes_of(store)
    paths = [jsonl(record("a", text=name), name=name) for name in ("one.jsonl", "two.jsonl")]
    assert "'a' comes twice" in refused("datastore", "add", store, *paths, "--model", model_dir, code=1)
    assert bytes_of(store) == before


def test_one_bad_file_of_two_adds_nothing(store, jsonl, model_dir, bytes_of):
    """If the second file is broken, the first is not added."""
    before = bytes_of(store)
    good, bad = jsonl(record("a"), name="good.jsonl"), jsonl("{", name="bad.jsonl")
    assert "bad.jsonl:1: not valid JSON" in refused("datastore", "add", store, good, bad, "--model", model_dir, code=1)
    assert bytes_of(store) == before


def test_missing_and_wrong_paths_are_wrong_use(store, jsonl, model_dir, tmp_path, bytes_of):
    """A missing file, a directory for a file, no store, no model: exit 2, and the path is named."""
    before = bytes_of(store)
    good = jsonl(record("a"))
    (tmp_path / "other").mkdir()
    for arguments, message in [
        (("add", store, tmp_path / "absent.jsonl", "--model", model_dir), "absent.jsonl does not exist"),
        (("add", store, tmp_path / "other", "--model", model_dir), "other does not exist or is not a file"),
        (("add", store, good, "--model", tmp_path / "other"), "other is not a model directory: config.json is missing"),
        (("add", tmp_path / "other", good, "--model", model_dir), "other is not a store; make one with"),
        (("verify", tmp_path / "absent"), "absent is not a store"),
        (("hash", good), "input.jsonl is not a store"),
        (("list", tmp_path / "other"), "other is not a store"),
        (("log", tmp_path / "other"), "other is not a store"),
        (("remove", tmp_path / "other", "--owner", "Ada"), "other is not a store"),
        (("remove", store, "--owner", "Adah"), "no owner 'Adah' is in the store"),
        (("remove", store, "--owner", "aDA"), "such as Ada, Grace; did you mean 'Ada'?"),
        (("remove", store), "nothing to remove was named"),
        (("create", store, "--model", model_dir), "store is not empty; choose another directory"),
        (("create", good, "--model", model_dir), "input.jsonl is not empty"),
        (("create", tmp_path / "new", "--model", tmp_path / "other"), "other is not a model directory"),
        (("create", tmp_path / "new", "--model", model_dir, "--control", tmp_path / "absent"), "absent does not exist"),
        (("create", tmp_path / "new", "--model", model_dir, "--codes", "sq8"), "fitted on text; give --control CORPUS"),
    ]:
        assert message in refused("datastore", *arguments, code=2), arguments
    assert bytes_of(store) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["input.jsonl", "other", "store"]


def test_store_of_another_model_is_refused(store, jsonl, model_dir, tmp_path, bytes_of):
    """A model that differs in any fingerprinted byte can neither add to a store nor be measured with it."""
    before = bytes_of(store)
    other = Path(shutil.copytree(model_dir, tmp_path / "other"))
    (other / "config.json").write_bytes((other / "config.json").read_bytes() + b" ")
    good = jsonl(record("a"))
    said = refused("datastore", "add", store, good, "--model", other, code=1)
    assert "holds keys of the model" in said
    assert "use that model, or make a new store for this one" in said
    assert "holds keys of the model" in refused(*measure(other, store, good, tmp_path), code=1)
    assert bytes_of(store) == before


def test_other_keys_of_the_model_are_refused(store, model, documents, bytes_of):
    """The same model with keys of another layer, or of other windows, can neither add to a store nor be mixed in."""
    before = bytes_of(store)
    for change, said in (({"layer": "x"}, "layer 'x' instead of 'last_"), ({"stride": 9}, "stride 9 instead of")):
        other = copy.copy(model)
        other.key_spec = replace(model.key_spec, **change)
        for use in (lambda store, lm: store.add(documents[9:], lm), lambda store, lm: store.mixture(lm, ["lm", "knn"])):
            with pytest.raises(StoreError, match=f"holds other keys of this model: it was loaded with {said}"):
                use(Store.open(store), other)
    assert bytes_of(store) == before


def test_store_of_another_format_is_refused(store, bytes_of):
    """A store that a later version wrote is not guessed at."""
    from datastore.integrity import read_sealed, sealed

    content = read_sealed(store / "store.json")
    (store / "store.json").write_bytes(sealed({**content, "format": 99}))
    before = bytes_of(store)
    assert "has format 99; this version reads format 5: make the store anew" in refused(
        "datastore", "verify", store, code=2
    )
    assert bytes_of(store) == before


def measure(model_dir, store, data, tmp_path, use="lm,knn,ric"):
    """The arguments of ``silo eval perplexity`` with made-up weights."""
    methods = use.split(",")
    mixture = {"weights": dict.fromkeys(methods, 1 / len(methods)), "temperature": 8.0}
    named = dict.fromkeys(["lm", "lm+knn", "lm+ric", "all"], mixture)
    for name in ("lm+knn", "lm+ric"):
        named[name] = {"weights": {"lm": 0.5, name[3:]: 0.5}, "temperature": 8.0}
    (tmp_path / "weights.json").write_text(
        json.dumps({"mixtures": {**named, "lm": {"weights": {"lm": 1}, "temperature": 1}}})
    )
    options = ("--model", model_dir, "--store", store, "--use", use, "--data", data, "--max-tokens", 40)
    return ("eval", "perplexity", *options, "--weights", tmp_path / "weights.json")


NO_TEXT = "A\udce9da"
"""What Python makes of a name in Latin-1 on a command line."""


@pytest.mark.parametrize("option", ["--document", "--owner", "--source", "--license", "--shard"])
def test_a_name_that_is_no_text_is_wrong_use(store, option, bytes_of):
    """Bytes that are no UTF-8, in a name or in the reason, are refused in one line before anything is done."""
    before = bytes_of(store)
    said = refused("datastore", "remove", store, option, NO_TEXT, code=2)
    assert rf"{option[2:]} 'A\udce9da' is no Unicode text" in said
    for command in (
        ("remove", store, "--owner", "Ada"),
        ("export", store, "--shard", "Ada", "--out", store.parent / "x"),
    ):
        assert "the reason 'A" in refused("datastore", *command, "--reason", NO_TEXT, code=2)
    assert bytes_of(store) == before


def test_a_policy_that_is_no_text_is_wrong_use(store, model_dir, jsonl, tmp_path):
    """The same for what may be used, in every command that has a policy."""
    common = ("--model", model_dir, "--store", store, "--deny-owner", NO_TEXT)
    assert "no Unicode text" in refused("generate", "a", *common, code=2)
    measured = measure(model_dir, store, jsonl(record("a")), tmp_path)
    assert "no Unicode text" in refused(*measured, "--deny-owner", NO_TEXT, code=2)
    assert "no Unicode text" in refused(
        "eval", "zero-shot", model_dir, jsonl(record("a")), "--store", store, "--deny", NO_TEXT, code=2
    )


@pytest.mark.parametrize("field", ["id", "owner", "license", "source", "title", "text", "prompt"])
def test_a_document_that_is_no_text_is_refused(store, model, documents, bytes_of, field):
    """A document that was not read from a file is looked at as well."""
    before = bytes_of(store)
    with pytest.raises(DataError, match=f"has a {field} with an unpaired surrogate"):
        Store.open(store).add([replace(documents[9], **{field: NO_TEXT})], model)
    assert bytes_of(store) == before


def test_a_very_long_id_is_refused(store, jsonl, model_dir, bytes_of):
    """An id of 8,192 bytes is added; one of a byte more is not, and is named by its beginning."""
    path = jsonl({**record(), "id": "é" * 4096}, {**record(), "id": "x" + "é" * 4096})
    before = bytes_of(store)
    said = refused("datastore", "add", store, path, "--model", model_dir, code=1)
    assert f"document 'x{'é' * 39}'… has an id of 8,193 bytes" in said
    assert bytes_of(store) == before
    assert run("datastore", "add", store, jsonl({**record(), "id": "é" * 4096}), "--model", model_dir).exit_code == 0


# --- damaged stores ---------------------------------------------------------------------------------------------------


def flip(path, at):
    """Change one bit of a byte."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_any_flipped_byte_is_found_and_named(store, bytes_of):
    """In every file of a store, a bit flipped at the start, at the end or between makes ``verify`` name the file."""
    files = bytes_of(store)
    kinds = {name.partition("/")[0] for name in files}
    assert kinds == {"store.json", "tokenizer.json", "control", "shards", "search", "ngrams", "receipts", "log.jsonl"}
    for name, data in files.items():
        for at in {0, len(data) // 3, len(data) // 2, len(data) - 1}:
            flip(store / name, at)
            damaged = bytes_of(store)
            with pytest.raises(IntegrityError) as caught:
                Store.open(store).verify()
            assert str(store / name) in str(caught.value), (name, at)
            assert bytes_of(store) == damaged
            (store / name).write_bytes(data)
    Store.open(store).verify()


def test_any_missing_or_cut_file_is_found_and_named(store, bytes_of):
    """A file that is gone, empty or cut short makes ``verify`` name it; gone ``store.json`` is no store at all."""
    for name, data in bytes_of(store).items():
        for left in (None, b"", data[:-1]):
            (store / name).unlink() if left is None else (store / name).write_bytes(left)
            with pytest.raises(SiloError) as caught:
                Store.open(store).verify()
            assert str(store / name if name != "store.json" or left is not None else store) in str(caught.value)
            (store / name).write_bytes(data)
    Store.open(store).verify()


def test_no_byte_of_the_small_files_is_uncovered(store, bytes_of):
    """In the manifest, the log and the lists of files no byte, of every ninth, can change unseen."""
    for name, data in bytes_of(store).items():
        if Path(name).name in ("store.json", "log.jsonl", "shard.json", "control.json", "group.json"):
            for at in range(0, len(data), 9):
                for bit in (1, 32):
                    (store / name).write_bytes(data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :])
                    with pytest.raises(IntegrityError):
                        Store.open(store).verify()
            (store / name).write_bytes(data)


def one_of_each_kind(store):
    """One file of every kind, and the parts of a store that must not be opened when it is damaged."""
    group = next((store / "search").iterdir())
    for name in ("control.json", "centroids.npy", "codes.npy", "provenance.jsonl"):
        yield store / "control" / name, ("knn",)
    for path in sorted(path for path in group.rglob("*") if path.is_file()):
        yield path, ("knn", "ric")


def test_damage_is_never_turned_into_numbers(store, model_dir, documents, jsonl, tmp_path):
    """``eval perplexity`` prints no number from a store whose part in it is damaged, but names the file and exits 1."""
    data = jsonl(documents[3].to_json())
    for path, uses in one_of_each_kind(store):
        good = path.read_bytes()
        flip(path, len(good) // 2)
        for use in uses:
            said = refused(*measure(model_dir, store, data, tmp_path, f"lm,{use}"), code=1)
            assert f"{path} is damaged" in said
        path.write_bytes(good)
    assert run(*measure(model_dir, store, data, tmp_path)).exit_code == 0


def test_damage_stops_a_change_that_would_read_it(store, jsonl, model_dir, bytes_of):
    """Neither add nor remove carries damaged bytes over into a new shard; the store stays as it was."""
    good = jsonl(record("Ada/9", owner="Ada"))
    shard = next(path for path in (store / "shards").iterdir() if path.name.startswith("ada"))
    last_receipt = sorted((store / "receipts").iterdir())[-1]
    for path in (
        shard / "codes.npy",
        shard / "documents.jsonl",
        store / "tokenizer.json",
        store / "log.jsonl",
        last_receipt,
    ):
        intact = path.read_bytes()
        flip(path, len(intact) // 2)
        before = bytes_of(store)
        assert str(path) in refused("datastore", "add", store, good, "--model", model_dir, code=1)
        assert bytes_of(store) == before
        path.write_bytes(intact)
    assert run("datastore", "add", store, good, "--model", model_dir).exit_code == 0


def test_empty_directories_that_a_copy_lost_are_made_again(jsonl, model, model_dir, tmp_path):
    """A store of nothing, checked out from git, which keeps no empty directories, verifies and takes documents."""
    store = Store.create(tmp_path / "store", model, model_dir / "tokenizer.json").path
    for name in ("shards", "search", "ngrams", "receipts"):
        (store / name).rmdir()
    assert run("datastore", "verify", store).exit_code == 0
    for name in ("shards", "search", "ngrams", "receipts"):
        (store / name).rmdir()
    assert run("datastore", "add", store, jsonl(record("a")), "--model", model_dir).exit_code == 0
    assert run("datastore", "verify", store).exit_code == 0


def test_a_missing_directory_that_was_not_empty_is_named(store):
    """What was in it is missing: nothing is made up for it."""
    for name in ("shards", "search", "ngrams", "receipts"):
        (store / name).rename(store.parent / name)
        assert f"{store / name}" in refused("datastore", "verify", store, code=1)
        (store / name).rmdir()
        (store.parent / name).rename(store / name)
    assert run("datastore", "verify", store).exit_code == 0


def test_stray_file_is_named(store):
    """A file that is not the store's own, which might be text that was removed, makes ``verify`` fail and name it."""
    places = [store, store / "control", store / "receipts"]
    places += [next((store / "shards").iterdir()), next((store / "search").iterdir())]
    for place in places:
        stray = place / "notes.txt"
        stray.write_text("what was removed")
        with pytest.raises(IntegrityError, match=f"{stray} does not belong to the store; remove it"):
            Store.open(store).verify()
        assert stray.exists()
        stray.unlink()
    Store.open(store).verify()


def test_stray_file_among_the_shards_is_collected(store):
    """What lies among shards or search structures and is not live, file or directory, is deleted and reported."""
    (store / "shards" / "stray").write_text("x")
    (store / "search" / "old").mkdir()
    (store / "search" / "old" / "_0.cfs").write_text("x")
    assert Store.open(store).verify()["collected"] == ["shards/stray", "search/old"]
    assert Store.open(store).verify()["collected"] == []


def test_log_and_receipts_must_agree(store, bytes_of):
    """A log cut by whole lines, or one whose last line is of another receipt, is refused and not written on."""
    log = store / "log.jsonl"
    good = log.read_bytes()
    for lines in (b"", good + good.splitlines(keepends=True)[-1]):
        log.write_bytes(lines)
        before = bytes_of(store)
        for arguments in (("verify", store), ("remove", store, "--owner", "Ada")):
            assert str(log) in refused("datastore", *arguments, code=1)
            assert bytes_of(store) == before


def test_log_of_another_store_is_refused(store, pristine, model, model_dir, documents, tmp_path):
    """A log that is whole but tells of other receipts is not this store's log."""
    other = Store.create(tmp_path / "other", model, model_dir / "tokenizer.json")
    other.add(documents[:3], model)
    other.remove(Selection(owners=("Mary",)), reason="otherwise")
    shutil.copy(other.path / "log.jsonl", store / "log.jsonl")
    with pytest.raises(IntegrityError, match=r"log\.jsonl ends with change 2, the store is at change 2 with receipt"):
        Store.open(store).verify()


def test_search_structure_of_other_shards_is_refused(store, pristine, model, documents, tmp_path):
    """An index that is whole but was built from other documents is not searched."""
    other = Store.open(Path(shutil.copytree(pristine, tmp_path / "other")))
    other.remove(Selection(owners=("Ada",)))
    (theirs,), (ours,) = (list((path / "search").iterdir()) for path in (other.path, store))
    shutil.rmtree(ours)
    shutil.copytree(theirs, ours)
    with pytest.raises(IntegrityError, match="is of other shards than the store's"):
        Store.open(store).blocks()


# --- as a user meets it -----------------------------------------------------------------------------------------------


def test_real_process_says_one_line(store, jsonl, model_dir, bytes_of):
    """In a process of its own, a broken line and a flipped byte each give one line on stderr, exit 1, no traceback."""
    before = bytes_of(store)
    done = command("datastore", "add", store, jsonl(record("a"), "{"), "--model", model_dir)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")
    assert "input.jsonl:2: not valid JSON" in done.stderr
    assert done.stderr.count("\n") == 1
    assert bytes_of(store) == before
    codes = next((store / "shards").glob("*/codes.npy"))
    flip(codes, 1000)
    done = command("datastore", "verify", store, "--json")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith(f"error: {codes} is damaged")


def command(*arguments):
    """Call the command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "silo", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
