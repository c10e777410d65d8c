"""A shard as one file, to hand to another store of the same model and control plane.

The file is a tar archive of the shard's own files behind a sealed ``export.json`` that says what it is. Equal shards
give equal files: owners, times and permissions of the archive's members are fixed. Nothing is encoded anew on the way,
and the hash of the shard, which the seal holds, covers every byte.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

from datastore.admission import FILES, INDEX, Fitting, read_fitting, read_index
from datastore.integrity import read_sealed, sealed
from datastore.manifest import Manifest, ShardEntry
from datastore.shard import Shard
from silo.errors import DataError, IntegrityError, StoreError, UsageError
from silo.files import written_whole

FORMAT = 1
ABOUT = "export.json"


def write_export(directory: Path, entry: ShardEntry, name: str, file: Path, manifest: Manifest) -> None:
    """Write a shard's files into one file, which is whole or absent.

    Args:
        directory: the shard's own.
        entry: the shard's.
        name: the shard's.
        file: must not be there yet.
        manifest: of the shard's store.

    Raises:
        UsageError: there is such a file already.
    """
    if file.exists():
        raise UsageError(f"{file} exists already; choose another name")
    files = sorted(json.loads((directory / INDEX).read_bytes())["files"])
    spec = manifest.model["key_spec"]
    about = sealed({"format": FORMAT, "shard": name, "hash": entry.hash, "files": [INDEX, *files], "key_spec": spec})
    with (
        written_whole(file) as raw,
        tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        archive.addfile(_member(ABOUT, len(about)), io.BytesIO(about))
        for each in (INDEX, *files):
            with open(directory / each, "rb") as source:
                archive.addfile(_member(each, os.fstat(source.fileno()).st_size), source)


def _member(name: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size = size
    return member


def read_export(file: Path, directory: Path, manifest: Manifest, fitting: Fitting) -> Shard:
    """Unpack an exported shard into an empty directory and map it, every byte checked.

    Args:
        file: what :func:`write_export` wrote.
        directory: an empty one.
        manifest: of the store that takes it in.
        fitting: what this store asks of a shard.

    Raises:
        UsageError: there is no such file.
        DataError: it is no exported shard, or not a whole one, or none that the store could have.
        StoreError: it is of another model or control plane, or its keys are made in another way.
        IntegrityError: it is damaged.
    """
    about = _unpack(file, directory)
    try:
        made_by = read_index(directory, about["hash"])
        if (made_by["model"], made_by["control"]) != (manifest.model["fingerprint"], manifest.control):
            raise StoreError(f"{file} was exported by a store of another model or control plane; encode its text anew")
        other = manifest.other_keys(about["key_spec"]) if "key_spec" in about else ""  # earlier exports do not say it
        if other:
            raise StoreError(f"{file} holds other keys of the store's model, made with {other}; encode its text anew")
        return read_fitting(directory, about["shard"], about["hash"], fitting)
    except (DataError, IntegrityError) as error:
        raise type(error)(f"{file} holds no shard that a store could have: {error}; export it again") from None


def _unpack(file: Path, directory: Path) -> dict[str, Any]:
    """Put an archive's files into a directory, not checked yet, and give what it says of itself."""
    if not file.is_file():
        raise UsageError(f"{file} does not exist or is not a file; expected what `silo datastore export` wrote")
    try:
        with tarfile.open(file, mode="r:") as archive:
            members = {member.name: member for member in archive if member.isreg()}
            (directory / ABOUT).write_bytes(_opened(archive, members, ABOUT).read())
            about = _about(directory / ABOUT)
            for name in about["files"]:
                with open(directory / name, "wb") as target:
                    shutil.copyfileobj(_opened(archive, members, name), target)
    except (tarfile.TarError, KeyError, EOFError) as error:
        raise DataError(f"{file} is no exported shard, or not a whole one ({error}); export it again") from None
    (directory / ABOUT).unlink()
    return about


def _about(path: Path) -> dict[str, Any]:
    """What an archive says of itself."""
    try:
        about = read_sealed(path)
    except (IntegrityError, ValueError):
        raise tarfile.TarError(f"its {ABOUT} is damaged") from None
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise tarfile.TarError(f"it is not of format {FORMAT}, which this version reads")
    files = about["files"]
    if not isinstance(files, list) or not all(
        isinstance(each, str) and each in FILES for each in files
    ):  # so that no name leads elsewhere
        raise tarfile.TarError("it names files that no shard has")
    if set(files) != FILES:
        raise tarfile.TarError(f"it lacks {', '.join(sorted(FILES - set(files)))}")
    if not all(isinstance(about[name], str) for name in ("shard", "hash")):
        raise tarfile.TarError("it does not say which shard it holds")
    if not isinstance(about.get("key_spec", {}), dict):
        raise tarfile.TarError("it does not say how its keys are made")
    return about


def _opened(archive: tarfile.TarFile, members: dict[str, tarfile.TarInfo], name: str) -> Any:
    found = archive.extractfile(members[name])
    if found is None:
        raise tarfile.TarError(f"{name} is missing")
    return found
