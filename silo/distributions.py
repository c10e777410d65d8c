"""Python distributions as sources: the ones that are installed here, and archives on PyPI.

A distribution is data. Its files are read from disk or out of the archive in memory; nothing of it is imported, built
or executed. What it cannot give as a document is refused with a reason, never dropped in silence.
"""

from __future__ import annotations

import email
import email.message
import email.utils
import importlib.metadata
import io
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from silo.documents import Document
from silo.errors import DataError, UsageError
from silo.evidence import text_claim
from silo.files import sha256
from silo.findings import Finding, Note
from silo.licensing import COPYLEFT, NO_LICENSE, normalize_license, tier_of

SHORTEST_CHARACTERS, LONGEST_CHARACTERS = 200, 200_000
"""Python files outside these bounds are refused: stubs on one side, tables and generated code on the other."""

_VENDORED = frozenset({"_vendor", "_vendored", "vendor", "vendored", "third_party", "extern", "externals"})
"""Directories in which a distribution carries another's code, under a licence that its own metadata does not name."""

_DAMAGED = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError)
"""What reading from a damaged archive raises."""

_LICENSE_FILE = re.compile(
    r"(?:[^/]+\.dist-info/(?:licenses/)?)?(?:(?:un)?(?:licen[sc]e|copying)[^/]*|licenses/[^/]+)", re.IGNORECASE
)
"""What lies at the top, where metadata names it, or in REUSE's folder of all licences that apply; licences deeper down
are of what is bundled."""


class Statement(NamedTuple):
    """One place that says something of a licence, and how it was read."""

    place: str
    """A metadata field, or the path of a licence file."""
    raw: str
    """What stands there; of a long text, its first line."""
    license: str
    """As SPDX, or ``NOASSERTION`` where it cannot be read."""


def license_statements(expression: str, license: str, classifiers: Iterable[str]) -> list[Statement]:
    """What a Python distribution declares in its three places.

    A classifier cannot say whether two licences are a choice or a sum, so several are a sum. A ``License`` field that
    holds an unreadable text, rather than a name, is passed over if nothing in it speaks of copyleft; an unreadable
    name is a contradiction, and restricted.
    """
    found = [Statement("License-Expression", expression, normalize_license(expression))] if _stated(expression) else []
    if _stated(license):
        name = normalize_license(license)
        if name != NO_LICENSE or "\n" not in license.strip() or COPYLEFT.search(license):
            found.append(Statement("License", license.strip().partition("\n")[0], name))
    telling = {c for c in classifiers if c.startswith("License ::") and c != "License :: OSI Approved"}
    read = sorted((normalize_license(classifier), classifier) for classifier in telling)
    return found + [Statement("Classifier", classifier, name) for name, classifier in read]


def declared_license(statements: Iterable[Statement]) -> str:
    """The licence that some statements come to: where they disagree, the strictest."""
    return max((statement.license for statement in statements), key=tier_of, default=NO_LICENSE)


def _stated(value: str) -> bool:
    return value.strip().lower() not in ("", "unknown", "none")


@dataclass(frozen=True, slots=True)
class Distribution:
    """A distribution's declared rights, and a way to its files."""

    metadata: email.message.Message
    files: dict[str, Callable[[], bytes]]
    """Path within the distribution → its bytes."""
    license_files: dict[str, Callable[[], bytes]]
    """The licence files at its top, likewise."""

    def field(self, name: str) -> str:
        """One field of the metadata, or an empty string."""
        return str(self.metadata.get(name) or "").strip()

    def read(self, path: str) -> bytes | None:
        """One of its files, or None where it is listed and not there. Raises :class:`DataError` if it is damaged."""
        try:
            return (self.files.get(path) or self.license_files[path])()
        except FileNotFoundError:
            return None
        except _DAMAGED as error:
            raise DataError(
                f"{self.field('Name')}=={self.field('Version')}: {path} is damaged in the archive ({error}); "
                "fetch it again"
            ) from None

    def statements(self) -> list[Statement]:
        """Everything that it says of its licence: metadata, and licence files that are stricter than metadata.

        Raises:
            DataError: a licence file is damaged.
        """
        classifiers = [str(value) for value in self.metadata.get_all("Classifier") or []]
        found = license_statements(self.field("License-Expression"), self.field("License"), classifiers)
        declared = tier_of(declared_license(found))
        for path in sorted(self.license_files):
            data = self.read(path)
            claim = text_claim(data.decode("utf-8", errors="replace")) if data is not None else None
            if claim is not None and tier_of(claim.license) > declared:
                found.append(Statement(path, claim.text, claim.license))
        return found

    @property
    def license(self) -> str:
        """The declared licence; of one that ships a stricter licence file, both."""
        found = self.statements()
        beside = [statement.license for statement in found if statement.place in self.license_files]
        declared = declared_license(s for s in found if s.place not in self.license_files)
        return " AND ".join(f"({name})" for name in (declared, *sorted(set(beside)))) if beside else declared

    @property
    def owner(self) -> str:
        """The author, else the maintainer, else the distribution itself: names, never addresses."""
        for role in ("Author", "Maintainer"):
            name = re.sub(r"\s*<[^>]*>", "", self.field(role)).strip()
            if name and name.upper() != "UNKNOWN" and not re.fullmatch(r"\S+@\S+", name):
                return name
            addresses = email.utils.getaddresses([self.field(f"{role}-email")])
            names = [name for name, _ in addresses if name and name.upper() != "UNKNOWN"]
            if names:
                return ", ".join(names)
        return self.field("Name")


def distribution_documents(kind: str, distribution: Distribution, note: Note) -> Iterator[Document]:
    """The Python files of a distribution, as documents; what is refused goes to ``note``."""
    name, version = distribution.field("Name"), distribution.field("Version")
    license, owner, source = distribution.license, distribution.owner, f"{kind}:{name}=={version}"
    for path in sorted({*distribution.files, *distribution.license_files}):
        id = f"{kind}:{name}/{path}"
        data = distribution.read(path)
        if data is None:
            note(Finding(id, "listed by the distribution, and not there"))
        if data is None or path not in distribution.files:
            continue
        text = _source_text(path, data)
        if isinstance(text, str):
            yield Document(id=id, text=text, license=license, owner=owner, source=source, title=path)
        else:
            note(Finding(id, *text))


def _source_text(path: str, data: bytes) -> str | tuple[str, str]:
    """The text of a Python file, or the reason and the evidence for refusing it."""
    if _VENDORED.intersection(PurePosixPath(path).parts):
        return "vendored: another's code, whose licence the distribution does not declare", path
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        return "not UTF-8", str(error)
    if len(text) < SHORTEST_CHARACTERS:
        return f"under {SHORTEST_CHARACTERS} characters", str(len(text))
    if len(text) > LONGEST_CHARACTERS:
        return f"over {LONGEST_CHARACTERS} characters", str(len(text))
    return text


def _python_files(names: Iterable[str], *, where: str) -> list[str]:
    found = [name for name in names if name.endswith(".py") and ".." not in PurePosixPath(name).parts]
    if not found:
        raise DataError(f"{where} holds no .py file; leave it out, or name the distribution that holds the code")
    return found


def installed(name: str) -> Distribution:
    """A distribution of this environment. Raises :class:`UsageError` if it is not installed."""
    try:
        distribution = importlib.metadata.distribution(name)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        raise UsageError(f"python:{name}: not installed here; install it, or use pypi:{name}==VERSION") from None
    listed = {file.as_posix(): file for file in distribution.files or ()}
    files = {path: listed[path].read_binary for path in _python_files(listed, where=f"python:{name}")}
    metadata = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or ""
    beside = {path: listed[path].read_binary for path in listed if _LICENSE_FILE.fullmatch(path)}
    return Distribution(email.message_from_string(metadata), dict(files), dict(beside))


# --- PyPI -------------------------------------------------------------------------------------------------------------

_PINNED = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*)==(?P<version>[\w.!+-]+)(?:#sha256=(?P<sha256>[0-9a-f]{64}))?")


@dataclass(frozen=True, slots=True)
class _Pin:
    name: str
    version: str
    sha256: str | None

    def __str__(self) -> str:
        return f"pypi:{self.name}=={self.version}"

    def accepts(self, filename: str) -> bool:
        """Whether an archive's name says that it is this version of this distribution."""
        stem = filename.removesuffix(".whl").removesuffix(".tar.gz")
        if stem == filename:
            return False
        name, version = (*stem.split("-"), "")[:2] if filename.endswith(".whl") else stem.rpartition("-")[::2]
        return _canonical(name) == _canonical(self.name) and version == self.version


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def download(spec: str, directory: Path) -> None:
    """See to it that the archive of a ``pypi:`` source lies in a directory. Raises as :func:`open_source` does."""
    _archive(spec.removeprefix("pypi:"), directory)


def _archive(name: str, downloads: Path | None) -> tuple[str, bytes]:
    match = _PINNED.fullmatch(name)
    if match is None:
        raise UsageError(f"pypi:{name}: expected pypi:NAME==VERSION, or pypi:NAME==VERSION#sha256= and 64 hex digits")
    pin = _Pin(**match.groupdict())
    archive = _find_archive(pin, downloads) if downloads is not None and downloads.is_dir() else None
    return archive or _download(pin, downloads)


def published(name: str, downloads: Path | None) -> Distribution:
    """A distribution of the package index, pinned. Raises as :func:`silo.sources.open_source` does."""
    filename, data = _archive(name, downloads)
    return _read_wheel(data, where=filename) if filename.endswith(".whl") else _read_sdist(data, where=filename)


def _find_archive(pin: _Pin, directory: Path) -> tuple[str, bytes] | None:
    """The archive of a pin in a directory, a wheel before an sdist; :class:`DataError` if its hash is another."""
    candidates = sorted(
        (path for path in directory.iterdir() if pin.accepts(path.name)),
        key=lambda path: (path.suffix != ".whl", path.name),
    )
    for path in candidates:
        data = path.read_bytes()
        if pin.sha256 in (None, sha256(data)):
            return path.name, data
    if not candidates:
        return None
    found = sha256(candidates[0].read_bytes())
    raise DataError(
        f"{candidates[0]} has sha256 {found}, {pin} is pinned to {pin.sha256}; delete the file or mend the pin"
    )


def _download(pin: _Pin, downloads: Path | None) -> tuple[str, bytes]:
    """Fetch a wheel through pip. An sdist is read if it lies in ``downloads``, and never fetched.

    pip asks an sdist's own build script for its metadata, even on ``pip download``; that would run the package.
    """
    with tempfile.TemporaryDirectory() as temporary:
        requirements = Path(temporary) / "requirements.txt"
        hashed = f" --hash=sha256:{pin.sha256}" if pin.sha256 else ""
        requirements.write_text(f"{pin.name}=={pin.version}{hashed}\n")
        target = Path(temporary) if downloads is None else downloads
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
        command += ["--retries", "1", "--no-deps", "--only-binary", ":all:", "--dest", str(target)]
        command += ["--require-hashes"] if pin.sha256 else []
        result = subprocess.run([*command, "-r", str(requirements)], capture_output=True, text=True, check=False)
        archive = _find_archive(pin, target) if result.returncode == 0 else None
    if archive is None:
        raise DataError(_no_download(pin, downloads, result.stderr))
    return archive


def _no_download(pin: _Pin, downloads: Path | None, stderr: str) -> str:
    errors = [line.removeprefix("ERROR: ") for line in stderr.splitlines() if line.startswith("ERROR: ")]
    reason = errors[-1] if errors else (stderr.strip().splitlines() or ["no archive came"])[-1]
    files = f"{pin.name}-{pin.version}-*.whl or {pin.name}-{pin.version}.tar.gz"
    hashed = f" (sha256 {pin.sha256})" if pin.sha256 else ""
    where = "a directory, name it with --downloads" if downloads is None else str(downloads)
    return f"{pin}: pip could not fetch a wheel ({reason}); put {files}{hashed} into {where}, and run this again"


def _read_wheel(data: bytes, *, where: str) -> Distribution:
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
    except zipfile.BadZipFile as error:
        raise DataError(f"{where} is not a wheel ({error}); delete it, so that it is fetched again") from None
    # Files under NAME.data/purelib are installed beside the others; NAME.data/scripts and the like are not modules.
    places = {name: re.sub(r"^[^/]+\.data/(purelib|platlib)/", "", name) for name in archive.namelist()}
    places = {name: path for name, path in places.items() if not re.match(r"[^/]+\.data/", path)}
    metadata = [name for name in places if re.fullmatch(r"[^/]+\.dist-info/METADATA", name)]
    if len(metadata) != 1:
        raise DataError(f"{where} has {len(metadata)} METADATA files, expected one; it is not a wheel")
    try:
        declared = archive.read(metadata[0])
    except _DAMAGED as error:
        raise DataError(f"{where}: {metadata[0]} is damaged in the archive ({error}); fetch it again") from None
    files = {places[name]: _reader(archive.read, name) for name in _python_files(places, where=where)}
    beside = {places[name]: _reader(archive.read, name) for name in places if _LICENSE_FILE.fullmatch(places[name])}
    return Distribution(_parse_metadata(declared), files, beside)


def _read_sdist(data: bytes, *, where: str) -> Distribution:
    """Read an sdist. Its members are read now: a compressed tar has no way back."""
    members: dict[str, bytes | None] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as archive:
            for member in archive:
                path = member.name.partition("/")[2]
                wanted = path == "PKG-INFO" or path.endswith(".py") or _LICENSE_FILE.fullmatch(path)
                try:
                    stream = archive.extractfile(member) if wanted else None
                except (KeyError, RecursionError):  # a link to what the archive does not hold, or to itself
                    members[path] = None
                    continue
                if stream is not None:
                    members[path] = stream.read()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"{where} is not an sdist ({error}); fetch it again") from None
    declared = members.get("PKG-INFO")
    if declared is None:
        raise DataError(f"{where} has no PKG-INFO, expected one; it is not an sdist")

    def read(path: str) -> bytes:
        found = members[path]
        if found is None:
            raise FileNotFoundError(path)
        return found

    files = {path: _reader(read, path) for path in _python_files(members, where=where)}
    beside = {path: _reader(read, path) for path in members if _LICENSE_FILE.fullmatch(path)}
    return Distribution(_parse_metadata(declared), files, beside)


def _reader(read: Callable[[str], bytes], name: str) -> Callable[[], bytes]:
    return lambda: read(name)


def _parse_metadata(data: bytes) -> email.message.Message:
    return email.message_from_string(data.decode("utf-8", errors="replace"))
