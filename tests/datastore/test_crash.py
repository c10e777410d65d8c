"""Crashes: a store is what it was before a change or what it is after, wherever the change is cut off (law 6)."""

import builtins
import contextlib
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import silo.files
from datastore import bm25
from datastore.groups import KINDS
from datastore.integrity import refuse_strays
from datastore.store import PARTS, Selection, Store
from silo.errors import StoreError

ROOT = Path(__file__).resolve().parents[2]
KILLS = 4
"""At random moments of each kind of change."""


@pytest.fixture(scope="module")
def short(documents):
    """Four short documents: two of Ada, one of Grace, and one of Ada that comes later."""
    ada, grace, second, later = (documents[number] for number in (0, 1, 3, 6))
    return [replace(document, text=document.text[-250:]) for document in (ada, grace, second, later)]


CHANGES = {
    "add": lambda store, model, later: store.add([later], model),
    "remove-shard": lambda store, model, later: store.remove(Selection(owners=("Ada",)), reason="x"),
    "remove-document": lambda store, model, later: store.remove(Selection(documents=("Ada/0",)), reason="x"),
}


# --- a failing write, at every write in turn --------------------------------------------------------------------------


class Disk:
    """Counts what Python writes to disk, and fails at one write: only there, or there and ever after.

    Failing ever after leaves the disk as a ``kill -9`` at that moment would: no clean-up can touch it either.
    Nothing is synced, which would cost most of the time.
    """

    def __init__(self, patch, *, fail_at, stays_broken):
        self.count = 0
        self._fail_at = fail_at
        self._stays_broken = stays_broken
        for name in ("rename", "replace", "mkdir", "unlink", "rmdir"):
            patch.setattr(os, name, self._watch(getattr(os, name)))
        patch.setattr(os, "fsync", lambda descriptor: self.write())
        patch.setattr(silo.files, "open", self._open, raising=False)

    def write(self):
        """Count one more."""
        self.count += 1
        if self.count == self._fail_at or (self._stays_broken and self.count > self._fail_at):
            raise OSError(errno.ENOSPC, "No space left on device", f"write {self.count}")

    def _watch(self, function):
        def watched(*args, **kwargs):
            self.write()
            return function(*args, **kwargs)

        return watched

    def _open(self, path, mode="r", *args):
        if mode == "wb":
            self.write()
        file = builtins.open(path, mode, *args)  # noqa: SIM115 (the caller closes it)
        return FailingFile(file, self) if mode == "wb" else file


class FailingFile:
    """A file that is open for writing, of which a write may fail with half of the bytes written."""

    def __init__(self, file, disk):
        self._file = file
        self._disk = disk

    def write(self, data):
        """Write it all, or half of it."""
        self._file.write(data[: len(data) // 2])
        self._disk.write()
        self._file.write(data[len(data) // 2 :])

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._file.close()


@pytest.fixture
def plain_index(monkeypatch):
    """Lucene's place taken by one file with the blocks, so that hundreds of changes are quick and their bytes equal."""

    def build_index(directory, blocks):
        silo.files.write_file(directory / "blocks", json.dumps(list(blocks)).encode())

    def cut_index(directory, whole, gone):
        blocks, gone = json.loads((whole / "blocks").read_bytes()), set(gone)
        build_index(directory, [block for block in blocks if block[0] not in gone])

    monkeypatch.setattr(bm25, "build_index", build_index)
    monkeypatch.setattr(bm25, "cut_index", cut_index)


def canonical(files):
    """All but the log, which holds times."""
    return {name: data for name, data in files.items() if name != "log.jsonl"}


def replaced(path, files):
    """Make a store's directory hold exactly these files."""
    shutil.rmtree(path)
    for name in ("shards", "search", "receipts"):
        (path / name).mkdir(parents=True)
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)


@pytest.mark.usefixtures("plain_index")
@pytest.mark.parametrize("stays_broken", [False, True], ids=["once", "ever after"])
@pytest.mark.parametrize("change", CHANGES)
def test_failing_write_leaves_before_or_after(make_store, model, short, bytes_of, change, stays_broken):
    """Whichever write fails, the store verifies and is, byte for byte, that before or after the change.

    It is that after exactly if the error says that the change is committed.
    """
    store = make_store("store", short[:3])
    before = bytes_of(store.path), store.hash
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch, fail_at=-1, stays_broken=False)
        CHANGES[change](store, model, short[3])
    after = bytes_of(store.path), store.hash
    outcomes = []
    for number in range(1, disk.count + 1):
        replaced(store.path, before[0])
        with pytest.MonkeyPatch.context() as patch:
            Disk(patch, fail_at=number, stays_broken=stays_broken)
            with pytest.raises((OSError, StoreError)) as caught:
                CHANGES[change](store, model, short[3])
        committed = "change 2 is committed, but what it replaced may still be on disk" in str(caught.value)
        files, digest = after if committed else before
        opened = Store.open(store.path)
        assert opened.hash == digest, (number, caught.value)
        opened.verify()
        assert opened.hash == digest
        assert canonical(bytes_of(store.path)) == canonical(files), (number, caught.value)
        outcomes.append(committed)
    assert outcomes == sorted(outcomes)
    assert outcomes.count(False) > 15
    assert outcomes.count(True) > 5


@pytest.mark.usefixtures("plain_index")
@pytest.mark.parametrize("change", CHANGES)
def test_change_that_failed_can_be_made_again(make_store, model, short, bytes_of, change):
    """After a crash at any of some writes the same change, or what is left of it, leads to the store after it."""
    store = make_store("store", short[:3])
    before = bytes_of(store.path)
    CHANGES[change](store, model, short[3])
    after = bytes_of(store.path)
    for number in range(1, 60, 7):
        replaced(store.path, before)
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(OSError, StoreError):
            Disk(patch, fail_at=number, stays_broken=True)
            CHANGES[change](store, model, short[3])
        if Store.open(store.path).manifest.sequence == 1:
            CHANGES[change](store, model, short[3])
        else:
            store.verify()
        assert canonical(bytes_of(store.path)) == canonical(after)
        assert [line["sequence"] for line in store.log()] == [1, 2]


@pytest.mark.parametrize("change", CHANGES)
def test_failing_lucene_leaves_the_store_before(make_store, model, short, bytes_of, monkeypatch, change):
    """If Lucene fails with a part of its index written, the store's bytes are as before and the error is Lucene's."""
    store = make_store("store", short[:3])
    before = bytes_of(store.path)

    def fail(directory, *_):
        (directory / "_0.cfs").write_bytes(b"half")
        raise StoreError("cannot write the BM25 index: IOException: No space left on device")

    monkeypatch.setattr(bm25, "build_index", fail)
    monkeypatch.setattr(bm25, "cut_index", fail)
    with pytest.raises(StoreError, match="cannot write the BM25 index"):
        CHANGES[change](store, model, short[3])
    assert bytes_of(store.path) == before
    monkeypatch.undo()
    store.verify()
    CHANGES[change](store, model, short[3])
    store.verify()


def test_failing_create_leaves_nothing_or_a_store(model, model_dir, control, tmp_path):
    """Whichever write of ``create`` fails, there is no trace of a store afterwards, or a whole one."""
    path, outcomes = tmp_path / "store", []
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch, fail_at=-1, stays_broken=False)
        Store.create(path, model, model_dir / "tokenizer.json", control).verify()
    writes = disk.count
    for number in range(1, writes + 1):
        shutil.rmtree(path, ignore_errors=True)
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(OSError):
            Disk(patch, fail_at=number, stays_broken=False)
            Store.create(path, model, model_dir / "tokenizer.json", control)
        outcomes.append(path.exists())
        if path.exists():
            Store.open(path).verify()
        else:
            assert list(tmp_path.iterdir()) == []
    assert outcomes.count(False) > 30


# --- kill -9 ----------------------------------------------------------------------------------------------------------

SERVER = """
import json, os, signal, sys, time
import transformers
import datastore.bm25, datastore.cli, datastore.store, silo.cli, silo.language_model
for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if not child:
        os.dup2(os.open(request["errors"], os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        os.dup2(2, 1)
        exec(request["first"])
        silo.cli.main(request["arguments"])
    begun, status = time.monotonic(), None
    while status is None:
        ended, value = os.waitpid(child, os.WNOHANG)
        if ended:
            status = value
        elif time.monotonic() - begun > request["seconds"] or os.path.exists(request["signal"]):
            os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
        time.sleep(0.002)
    print(json.dumps([os.waitstatus_to_exitcode(status), time.monotonic() - begun]), flush=True)
"""
"""A process that has imported all there is and runs each command in a fork of itself: no Java has started yet."""


class Server:
    """Runs commands in processes that can be killed."""

    def __init__(self, scratch):
        self._scratch = scratch
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, *arguments, seconds=120.0, first="", signal=""):
        """Begin a command; it is killed after some seconds, or when the file ``signal`` is there."""
        request = {"arguments": ["datastore", *map(str, arguments)], "seconds": seconds, "first": first}
        request |= {"signal": str(signal), "errors": str(self._scratch / "errors")}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()

    def wait(self):
        """Its exit status, negative for a signal, and the seconds that it took."""
        return json.loads(self._process.stdout.readline())

    def run(self, *arguments, **options):
        """Begin a command and wait for its end."""
        self.start(*arguments, **options)
        return self.wait()

    def close(self):
        """End the process, which has no command left."""
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


@pytest.fixture
def commands(model_dir, short, tmp_path):
    """The changes as arguments of ``silo datastore``."""
    (tmp_path / "later.jsonl").write_text(json.dumps(short[3].to_json()) + "\n")
    return {
        "add": lambda path: ("add", path, tmp_path / "later.jsonl", "--model", model_dir),
        "remove-shard": lambda path: ("remove", path, "--owner", "Ada"),
        "remove-document": lambda path: ("remove", path, "--document", "Ada/0"),
    }


@pytest.mark.parametrize("change", CHANGES)
def test_killed_at_random_moments(make_store, model, short, bytes_of, server, commands, change):
    """Killed anywhere, the store opens, verifies and is that before or after, no half is left, and work goes on."""
    store = make_store("store", short[:3])
    before, hashes = bytes_of(store.path), {store.hash}
    status, seconds = server.run(*commands[change](store.path))
    assert status == 0
    hashes.add(Store.open(store.path).hash)
    assert len(hashes) == 2
    rng = random.Random(change)
    killed = 0
    for number in range(KILLS):
        replaced(store.path, before)
        status, _ = server.run(*commands[change](store.path), seconds=seconds * (number + rng.random()) / KILLS)
        killed += status == -signal.SIGKILL
        opened = Store.open(store.path)
        assert opened.hash in hashes
        assert opened.neighbours().num_keys == sum(entry.tokens for entry in opened.manifest.shards.values())
        opened.blocks()
        opened.verify()
        assert opened.hash in hashes
        no_orphans(opened)
        if number % 2:
            store.remove(Selection(owners=("Grace",)))
        else:
            store.add([replace(short[1], id="Grace/9")], model)
        store.verify()
    assert killed >= KILLS // 2


def no_orphans(store):
    """Nothing but what the manifest names is on disk."""
    manifest = store.manifest
    refuse_strays(store.path, PARTS)
    refuse_strays(store.path / "shards", {entry.directory for entry in manifest.shards.values()})
    for kind in KINDS:
        refuse_strays(store.path / kind, {group.directory for group in store.groups_of(kind)})
    assert len(list((store.path / "receipts").iterdir())) == len(store.log()) == manifest.sequence


DIE_AFTER_COMMIT = """
import os
collect = datastore.store.Store._collect
def die_after_commit(store):
    if store.manifest.sequence == 2:
        os.kill(os.getpid(), 9)
    return collect(store)
datastore.store.Store._collect = die_after_commit
"""


@pytest.mark.parametrize("finisher", ["verify", "change"])
def test_killed_right_after_the_commit(make_store, model, short, bytes_of, server, commands, finisher):
    """The removed shard's files are still there, the store no longer names them, and the next command finishes."""
    store = make_store("store", short[:3])
    tokens = store.shard("Ada").tokens.tobytes()
    status, _ = server.run(*commands["remove-shard"](store.path), first=DIE_AFTER_COMMIT)
    assert status == -signal.SIGKILL
    opened = Store.open(store.path)
    assert list(opened.rows()) == ["Grace"]
    assert any(tokens in data for data in bytes_of(store.path).values())
    assert [line["sequence"] for line in opened.log()] == [1]
    if finisher == "verify":
        collected = opened.verify()["collected"]
        assert [name.partition("-")[0] for name in collected if name.startswith("shards/")] == ["shards/ada"]
        assert [name.partition("/")[0] for name in collected] == ["shards", "search", "ngrams"]
    else:
        opened.add([short[3]], model)
        assert list(opened.rows()) == ["Ada", "Grace"]
    assert not any(tokens in data for data in bytes_of(store.path).values())
    assert [(line["sequence"], line["operation"]) for line in opened.log()][:2] == [(1, "add"), (2, "remove")]
    no_orphans(opened)
    opened.verify()


# --- two at once ------------------------------------------------------------------------------------------------------

PAUSE_BEFORE_COMMIT = """
import pathlib, time
def pause(*args, **kwargs):
    pathlib.Path({marker!r}).touch()
    time.sleep(120)
datastore.store.Store._commit = pause
"""


def test_second_writer_is_told_and_the_lock_dies_with_its_holder(
    make_store, model, short, bytes_of, server, commands, tmp_path
):
    """While another process writes, changes fail with a clear error and reading goes on; killed, it blocks nobody."""
    store = make_store("store", short[:3])
    before = bytes_of(store.path)
    marker, stop = tmp_path / "marker", tmp_path / "stop"
    pause = PAUSE_BEFORE_COMMIT.format(marker=str(marker))
    server.start(*commands["add"](store.path), first=pause, signal=stop)
    deadline = time.monotonic() + 60
    while not marker.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    for change in (*CHANGES.values(), lambda store, *_: store.verify()):
        with pytest.raises(StoreError, match="is being written by another process; try again when it is done"):
            change(store, model, short[3])
    assert Store.open(store.path).neighbours().num_keys == store.neighbours().num_keys
    assert bytes_of(store.path) == before
    stop.touch()
    assert server.wait()[0] == -signal.SIGKILL
    store.remove(Selection(owners=("Ada",)))
    assert list(store.rows()) == ["Grace"]
    store.verify()


def test_reader_keeps_its_snapshot(make_store, model, short, answers):
    """What was opened before a removal answers after it as before, to the last bit."""
    store = make_store("store", short[:3])
    reader = Store.open(store.path)
    neighbours, blocks = reader.neighbours(), reader.blocks()
    keys, words = model.keys(model.tokenize(short[0])), model.tokenizer.decode(model.tokenize(short[0]))
    asked = [array.tobytes() for array in (neighbours.search(keys, 9).values, neighbours.search(keys, 9).distances)]
    ((block,),) = blocks.search([words], 1)
    store.remove(Selection(owners=("Ada",)))
    found = neighbours.search(keys, 9)
    assert [found.values.tobytes(), found.distances.tobytes()] == asked
    ((again,),) = blocks.search([words], 1)
    assert (again.document.id, again.score) == (block.document.id, block.score) == ("Ada/0", block.score)


@pytest.mark.parametrize("loaded", [False, True], ids=["opened", "half loaded"])
def test_reader_of_what_is_gone_is_told_to_open_again(make_store, short, loaded):
    """A reader that meets files of a shard removed meanwhile gets an error that says so, never a mixture of states."""
    store = make_store("store", short[:3])
    reader = Store.open(store.path)
    if loaded:
        reader.neighbours()
    view = reader.select()
    store.remove(Selection(owners=("Ada",)))
    for read in (reader.blocks, reader.neighbours, reader.rows, view.blocks, view.neighbours, view.ngrams):
        with pytest.raises(StoreError, match="was changed since it was opened; open it again"):
            read()
    assert list(Store.open(store.path).rows()) == ["Grace"]


@pytest.mark.parametrize("own", [False, True], ids=["another's change", "its own change"])
def test_who_is_gone_is_named_no_more(make_store, model, short, own):
    """The names behind neighbours and n-grams are read late: the error says so where they were removed meanwhile."""
    store = make_store("store", short[:3])
    reader = store if own else Store.open(store.path)
    neighbours, ngrams = reader.neighbours(), reader.ngrams()
    tokens = model.tokenize(short[0])
    cited = neighbours.search(model.keys(tokens)[40:41], 1).documents[0, 0]
    traced = ngrams.match([tokens]).origins(np.asarray([40]), tokens[40:41].astype(np.int64)).documents[0]
    store.remove(Selection(owners=("Ada",)))
    for ask in (lambda: neighbours.document(cited), lambda: ngrams.document(traced)):
        with pytest.raises(StoreError, match="was changed since it was opened; open it again"):
            ask()


def test_writer_works_on_the_store_as_it_is_now(make_store, model, short):
    """A store object that was opened before another's change adds to what is there, and loses nothing of it."""
    first = make_store("store", short[:1])
    second = Store.open(first.path)
    first.add([short[1]], model)
    second.add([short[2]], model)
    assert {name: len(rows) for name, rows in second.rows().items()} == {"Ada": 2, "Grace": 1}
    assert second.hash == make_store("fresh", short[:3]).hash
    first.remove(Selection(owners=("Grace",)))
    assert {name: len(rows) for name, rows in first.rows().items()} == {"Ada": 2}
    first.verify()
