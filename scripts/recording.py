"""What every recorded number comes with: the machine, the commit, and the hash of the data."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import torch

PACKAGES = ("torch", "transformers", "accelerate", "faiss-cpu", "pyserini", "numpy", "tokenizers")


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    versions = {name: version(name) for name in PACKAGES}
    return {
        "cpu": model,
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "memory_bytes": memory,
        "python": platform.python_version(),
        "versions": versions,
    }


def command() -> str:
    """What was typed, with files by their names alone."""
    script, *arguments = sys.argv
    named = [Path(each).name if "/" in each and Path(each).exists() else each for each in arguments]
    return shlex.join(["python", f"scripts/{Path(script).name}", *named])


def commit() -> str:
    """The commit that is checked out, with a plus if the tree differs from it."""
    here = Path(__file__).parent
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    status = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=False)
    return head.stdout.strip() + ("+" if status.stdout.strip() else "")


def files_hash(paths: Iterable[Path]) -> str:
    """SHA-256 over the names and bytes of some files, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(paths, key=lambda path: path.name):
        digest.update(f"{path.name}\n{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def made(files: Iterable[Path], seed: int = 0) -> dict[str, Any]:
    """What a record begins with: machine, command, commit, seed, and the hash of the files."""
    return {
        "machine": machine(),
        "command": command(),
        "commit": commit(),
        "seed": seed,
        "data": files_hash(files),
    }


def require_same_run(directory: Path, what: dict[str, Any]) -> None:
    """Note in a directory what a run there is of; raise :class:`click.ClickException` if it was begun with something
    else, since what is there would be told as if it were of this."""
    file = directory / "begun_with.json"
    if file.exists() and (before := json.loads(file.read_bytes())) != what:
        raise click.ClickException(f"{directory} was begun with {before}, and this is {what}; give another directory")
    file.write_text(json.dumps(what))


def processor(record: dict[str, Any]) -> str:
    """A record's processor and how wide its vectors are, which makers sell several of by one name; older records do not
    say."""
    machine = record["machine"]
    return f"{machine['cpu']} with {machine['vectors']}" if "vectors" in machine else str(machine["cpu"])


def provenance(record: dict[str, Any]) -> str:
    """Command, commit, seed, data and machine of a run, as list items."""
    machine = record["machine"]
    data = record["data"]
    hashes = {"files": data} if isinstance(data, str) else {"corpus": data["permissive"], "store": data["store"]}
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    seed = f", seed {record['seed']}" if "seed" in record else ""
    return "\n".join(
        [
            f"- Command: `{record['command']}`",
            f"- Commit: `{record['commit']}`{seed}",
            "- Data: " + ", ".join(f"{name} `{digest[:16]}`" for name, digest in hashes.items()),
            f"- Machine: {processor(record)}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB; "
            f"Python {machine['python']}, {versions}",
        ]
    )
