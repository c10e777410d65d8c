"""A disk that fails on demand: builds and steers the library in ``failing_writes.c``, which has to be preloaded.

It sees what a whole process writes below one directory, Java's writes too.
"""

from __future__ import annotations

import mmap
import os
import shutil
import struct
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".c")
_LAYOUT = struct.Struct("<qqii256s1024s")


def build(directory: Path) -> Path | None:
    """Compile the library; None where there is no C compiler, or the system is not one that can preload it."""
    compiler = shutil.which("cc")
    if compiler is None or os.uname().sysname != "Linux":
        return None
    library = directory / "failing_writes.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(SOURCE), "-ldl"]
    return library if subprocess.run(command, capture_output=True, check=False).returncode == 0 else None


class Disk:
    """Steers the library in a process, or in those that it starts, from the inside or from another process."""

    def __init__(self, control: Path, log: Path) -> None:
        """``control`` and ``log`` are files for :meth:`environment`; they are made if they are not there."""
        self._control, self._log = control, log
        if not control.exists():
            control.write_bytes(bytes(_LAYOUT.size))
        log.touch()
        with open(control, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), _LAYOUT.size)

    @classmethod
    def here(cls) -> Disk | None:
        """That of this process; None if it runs without the library."""
        control, log = os.environ.get("FAILING_WRITES"), os.environ.get("FAILING_WRITES_LOG")
        return cls(Path(control), Path(log)) if control and log and "LD_PRELOAD" in os.environ else None

    def environment(self, library: Path) -> dict[str, str]:
        """What a process has to be started with."""
        named = {"FAILING_WRITES": self._control, "FAILING_WRITES_LOG": self._log, "LD_PRELOAD": library}
        return {name: str(path.absolute()) for name, path in named.items()}

    def watch(self, root: Path, *, fail_at: int = 0, error: int = 0, stays: bool = False) -> None:
        """Count from 0 what is written below a directory, and let one operation fail; nothing is synced there.

        Args:
            root: the directory.
            fail_at: the operation's number, from 1; 0 for none.
            error: the ``errno`` that it fails with; 0 kills the process instead.
            stays: whether everything fails from then on.
        """
        self._log.write_bytes(b"")
        self._map[:] = _LAYOUT.pack(0, fail_at, error, stays, b"", os.fsencode(root.absolute()))

    @property
    def count(self) -> int:
        """Operations since :meth:`watch`."""
        return int(_LAYOUT.unpack(self._map)[0])

    @property
    def failed(self) -> str:
        """The operation that failed, and on what; empty if none did."""
        return str(_LAYOUT.unpack(self._map)[4].rstrip(b"\0").decode(errors="replace"))

    def unseen(self, files: dict[Path, int]) -> list[Path]:
        """Those of some files (with how many bytes each has) that were written, at least in part, by other ways."""
        seen: Counter[int] = Counter()
        for line in self._log.read_text().splitlines():
            inode, length = map(int, line.split())
            seen[inode] += length
        return [path for path, size in files.items() if seen[path.stat().st_ino] < size]


def scratch() -> tempfile.TemporaryDirectory[str]:
    """A directory for library, control file and log."""
    return tempfile.TemporaryDirectory(prefix="failing-writes-")
