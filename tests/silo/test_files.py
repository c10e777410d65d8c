"""Files that are whole or absent, whatever happens while they are written."""

import errno
import gc
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from silo import files
from silo.errors import IntegrityError, StoreError, UsageError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
@pytest.mark.parametrize("old", [b"old", None])
def test_a_failing_write_leaves_the_old_file(tmp_path: Path, monkeypatch, step: str, old: bytes | None):
    """When the disk is full, the sync fails or the rename does, the old bytes stand and no temporary is left."""
    path = tmp_path / "x"
    if old is not None:
        path.write_bytes(old)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    data: object = b"new"
    if step == "write":
        data = "text, which a binary file refuses after it was opened"
    else:
        monkeypatch.setattr(files.os, step, full)
    with pytest.raises((OSError, TypeError)):
        files.write_file(path, data)  # type: ignore[arg-type]
    monkeypatch.undo()
    assert names(tmp_path) == (["x"] if old is not None else [])
    assert old is None or path.read_bytes() == old


def test_an_error_names_the_file_that_was_asked_for(tmp_path: Path):
    """Where no file can be made, the error has the name that was given, not that of the temporary neighbour."""
    (tmp_path / "file").write_text("x")
    for parent in ("no", "file"):
        with pytest.raises(OSError, match="directory") as caught:
            files.write_file(tmp_path / parent / "x", b"new")
        assert caught.value.filename == str(tmp_path / parent / "x")
    assert names(tmp_path) == ["file"]


def test_bytes_are_durable_before_they_have_the_name(tmp_path: Path, monkeypatch):
    """The new file is synced before the rename, and the directory after it: a power cut shows old bytes or new."""
    events = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor: int) -> None:
        events.append("directory" if Path(f"/dev/fd/{descriptor}").is_dir() else "file")
        fsync(descriptor)

    def note_replace(old: Path, new: Path) -> None:
        events.append(f"rename, whole: {old.read_bytes() == b'new'}")
        replace(old, new)

    monkeypatch.setattr(files.os, "fsync", note_fsync)
    monkeypatch.setattr(files.os, "replace", note_replace)
    files.write_file(tmp_path / "x", b"new")
    assert events == ["file", "rename, whole: True", "directory"]


def test_a_reader_sees_old_or_new(tmp_path: Path):
    """While a file is written over and over, and its writer is killed, every read gives one whole version."""
    path = tmp_path / "x"
    versions = {b"0" * 200_000, b"1" * 200_000}
    program = (
        "import sys, pathlib\nfrom silo.files import write_file\npath = pathlib.Path(sys.argv[1])\n"
        "while True:\n    for digit in b'0', b'1':\n        write_file(path, digit * 200_000)\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", program, str(path)], cwd=Path(__file__).parents[2])
    try:
        until = time.monotonic() + 30
        while not path.exists():
            assert writer.poll() is None
            assert time.monotonic() < until
            time.sleep(0.01)
        for _ in range(300):
            assert path.read_bytes() in versions
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    assert path.read_bytes() in versions


def test_one_writer_at_a_time(tmp_path: Path):
    """A second process is refused while the lock is held, and is not once the holder is gone, however it went."""
    lock = tmp_path / "store" / ".lock"
    lock.parent.mkdir()
    program = (
        "import sys, pathlib\nfrom silo.files import exclusive_lock\n"
        "with exclusive_lock(pathlib.Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", program, str(lock)]
    root = Path(__file__).parents[2]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(StoreError, match="store is being written by another process"), files.exclusive_lock(lock):
            pass
    finally:
        holder.kill()
        holder.communicate()
    with files.exclusive_lock(lock):
        pass


def test_the_lock_is_freed_by_an_error(tmp_path: Path):
    """What goes wrong under the lock does not keep it."""
    with pytest.raises(ZeroDivisionError), files.exclusive_lock(tmp_path / "lock"):
        raise ZeroDivisionError
    with files.exclusive_lock(tmp_path / "lock"):
        pass


@given(JSON)
def test_canonical_json_has_one_spelling(value):
    """Reading canonical JSON and writing it again gives the same bytes, one line of them."""
    spelled = files.canonical_json(value)
    assert files.canonical_json(json.loads(spelled)) == spelled
    assert spelled.endswith(b"\n")
    assert spelled.count(b"\n") == 1


def test_canonical_json_ignores_the_order_of_keys():
    """Mappings that are equal are spelled alike."""
    assert files.canonical_json({"b": 1, "a": {"d": 1, "c": "é"}}) == '{"a":{"c":"é","d":1},"b":1}\n'.encode()


def test_a_flipped_bit_is_named(tmp_path: Path):
    """A file whose bytes are not the promised ones, or that is not there, is an IntegrityError with its path."""
    path = tmp_path / "x.npy"
    array = np.arange(6, dtype=np.uint16).reshape(2, 3)[:, ::-1]
    digest = files.write_array(path, array)
    assert files.sha256_file(path) == digest
    again = files.read_array(path, digest)
    assert again.dtype == array.dtype
    assert np.array_equal(again, array)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"x\.npy is damaged"):
        files.read_array(path, digest)
    path.unlink()
    with pytest.raises(IntegrityError, match=r"x\.npy is missing"):
        files.read_checked(path, digest)


def test_json_that_is_none_is_named(tmp_path: Path):
    """A missing JSON file is wrong use, a broken one is damage; both name the path."""
    path = tmp_path / "x.json"
    with pytest.raises(UsageError, match=r"x\.json does not exist"):
        files.read_json(path)
    for broken in (b"{", b'"\xff"', b""):
        path.write_bytes(broken)
        with pytest.raises(IntegrityError, match=r"x\.json is not valid JSON"):
            files.read_json(path)
    files.write_json(path, {"a": [1]})
    assert files.read_json(path) == {"a": [1]}


def test_removing_a_tree_twice_is_fine(tmp_path: Path):
    """A directory goes with all it holds, and a second call, after an interrupted first, finds nothing to do."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c").write_text("x")
    files.remove_tree(tmp_path / "a")
    files.remove_tree(tmp_path / "a")
    assert names(tmp_path) == []


def test_arrays_are_loaded_by_several_threads(tmp_path):
    """Python 3.11 cannot parse the heads of arrays in two threads at a time if one gives way to the other meanwhile, as
    it does where something listens to the garbage collector; ours are parsed one after the other."""
    array = np.arange(3, dtype=np.uint16)
    files.write_array(tmp_path / "array.npy", array)

    def load(depth):
        if depth:
            return load(depth - 1)
        return all(np.array_equal(files.load_array(tmp_path / "array.npy"), array) for _ in range(1000))

    usual = gc.get_threshold()
    gc.callbacks.append(give_way := lambda *_: time.sleep(0))
    gc.set_threshold(20)
    try:
        with ThreadPoolExecutor(2) as pool:
            assert all(pool.map(load, (0, 20)))
    finally:
        gc.callbacks.remove(give_way)
        gc.set_threshold(*usual)
