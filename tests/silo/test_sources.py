"""Sources: what becomes a document, and what is refused with which reason."""

import io
import json
import subprocess
import tarfile
import zipfile
from importlib.metadata import version
from pathlib import Path

import pyarrow
import pytest

from silo.errors import DataError, UsageError
from silo.files import sha256
from silo.sources import Refusal, open_source

CODE = "def add(a, b):\n    return a + b\n" * 10

METADATA = """\
Metadata-Version: 2.4
Name: Tiny.Pkg
Version: 1.0
License-Expression: {license}
Author-email: Ada Lovelace <ada@example.org>, "Babbage, C." <c@example.org>

A description that mentions License: GPL
"""


def write_wheel(path: Path, files: dict[str, bytes], license: str = "LGPL-2.1-only") -> str:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_pkg-1.0.dist-info/METADATA", METADATA.format(license=license))
        for name, data in files.items():
            archive.writestr(name, data)
    return sha256(path.read_bytes())


WHEEL = "tiny_pkg-1.0-py3-none-any.whl"


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch):
    """pip finds nothing at all: whatever a test gets, it did not come from a registry."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_an_installed_distribution_gives_its_python_files():
    """``python:click`` yields click's own .py files with its licence and its owner, and nothing else."""
    documents = {document.id: document for document in open_source("python:click")}
    core = documents["python:click/click/core.py"]
    assert (core.license, core.owner, core.title) == ("BSD-3-Clause", "Pallets", "click/core.py")
    assert core.source == f"python:click=={version('click')}"
    assert "class Command" in core.text
    assert all(id.startswith("python:click/click/") and id.endswith(".py") for id in documents)


def test_what_is_too_short_is_refused_with_its_length():
    """A stub is no document; it is among the refusals with the reason."""
    refusals: list[Refusal] = []
    list(open_source("python:rich", refusals=refusals))
    assert refusals
    assert {refusal.reason for refusal in refusals} <= {"under 200 characters", "over 200000 characters"}
    assert all(refusal.id.startswith("python:rich/rich/") for refusal in refusals)


def test_a_wheel_is_read_as_data(tmp_path: Path):
    """A wheel in the downloads gives its modules with licence, owner, source and id, and runs nothing."""
    bomb = f"raise SystemExit('imported')\n{CODE}".encode()
    files = {"tiny/a.py": bomb, "tiny_pkg-1.0.data/purelib/b.py": bomb, "tiny_pkg-1.0.data/scripts/c.py": bomb}
    digest = write_wheel(tmp_path / WHEEL, files)
    documents = list(open_source(f"pypi:tiny-pkg==1.0#sha256={digest}", downloads=tmp_path))
    assert [document.id for document in documents] == ["pypi:Tiny.Pkg/b.py", "pypi:Tiny.Pkg/tiny/a.py"]
    document = documents[1]
    assert (document.license, document.source) == ("LGPL-2.1-only", "pypi:Tiny.Pkg==1.0")
    assert document.owner == "Ada Lovelace, Babbage, C."
    assert document.text == bomb.decode()


def test_each_reason_for_refusing_a_file_is_told(tmp_path: Path):
    """Size, encoding, vendored code and restricted notices each keep a file out, and each under its own name."""
    files = {
        "p/good.py": CODE.encode(),
        "p/long.py": b"x = 1\n" * 40_000,
        "p/latin.py": CODE.encode() + b"# caf\xe9\n",
        "p/empty.py": b"",
        "p/gpl.py": b"# Licensed under the GPL, version 2\n" + CODE.encode(),
        "p/_vendor/other.py": CODE.encode(),
        "p/data.txt": CODE.encode(),
    }
    write_wheel(tmp_path / WHEEL, files, license="MIT")
    refusals: list[Refusal] = []
    documents = list(open_source("pypi:tiny-pkg==1.0", downloads=tmp_path, refusals=refusals))
    assert [document.title for document in documents] == ["p/good.py"]
    reasons = {refusal.id.removeprefix("pypi:Tiny.Pkg/"): refusal.reason for refusal in refusals}
    assert reasons == {
        "p/_vendor/other.py": "vendored: another's code, whose licence the distribution does not declare",
        "p/empty.py": "under 200 characters",
        "p/gpl.py": "a restricted notice in a permissive distribution",
        "p/latin.py": "not UTF-8",
        "p/long.py": "over 200000 characters",
    }
    assert "# Licensed under the GPL, version 2" in [refusal.detail for refusal in refusals]


def test_a_notice_within_a_restricted_distribution_is_no_conflict(tmp_path: Path):
    """A GPL header in a distribution that declares the GPL keeps nothing out."""
    write_wheel(tmp_path / WHEEL, {"a.py": b"# Licensed under the GPL\n" + CODE.encode()}, license="GPL-2.0-only")
    assert len(list(open_source("pypi:tiny-pkg==1.0", downloads=tmp_path))) == 1


def test_an_sdist_in_the_downloads_is_read(tmp_path: Path):
    """Where there is no wheel, an sdist that lies in the downloads is read without running its setup.py."""
    with tarfile.open(tmp_path / "tiny_pkg-1.0.tar.gz", "w:gz") as archive:
        for name, text in {"PKG-INFO": METADATA.format(license="MPL-2.0"), "src/tiny/a.py": CODE}.items():
            member = tarfile.TarInfo(f"tiny_pkg-1.0/{name}")
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    (document,) = open_source("pypi:tiny-pkg==1.0", downloads=tmp_path)
    assert (document.id, document.license) == ("pypi:Tiny.Pkg/src/tiny/a.py", "MPL-2.0")


def test_an_archive_with_another_hash_is_refused(tmp_path: Path):
    """A file that is not the pinned one is named with both hashes and never used."""
    found = write_wheel(tmp_path / WHEEL, {"a.py": CODE.encode()})
    with pytest.raises(DataError) as error:
        open_source(f"pypi:tiny-pkg==1.0#sha256={'0' * 64}", downloads=tmp_path)
    assert found in str(error.value)
    assert "0" * 64 in str(error.value)
    assert str(tmp_path / WHEEL) in str(error.value)


def test_without_a_registry_one_line_says_what_to_put_where(tmp_path: Path):
    """When pip fails, the error names the file, its hash and the directory, and leaves no file behind."""
    spec = f"pypi:tiny-pkg==1.0#sha256={'a' * 64}"
    with pytest.raises(DataError) as error:
        open_source(spec, downloads=tmp_path / "wheels")
    message = str(error.value)
    assert "put tiny-pkg-1.0-*.whl or tiny-pkg-1.0.tar.gz" in message
    assert "a" * 64 in message
    assert str(tmp_path / "wheels") in message
    assert "\n" not in message
    assert list(tmp_path.rglob("*.*")) == []
    with pytest.raises(DataError, match="--downloads"):
        open_source(spec)


def test_a_download_is_hashed_without_dependencies_and_without_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """pip is asked for the one wheel of that hash, and for nothing that runs the package."""
    calls = []

    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        requirement = Path(command[command.index("-r") + 1]).read_text()
        assert requirement.startswith("tiny-pkg==1.0 --hash=sha256:")
        (tmp_path / WHEEL).write_bytes(wheel)
        return subprocess.CompletedProcess(command, 0, "", "")

    digest = write_wheel(tmp_path / "elsewhere", {"a.py": CODE.encode()})
    wheel = (tmp_path / "elsewhere").read_bytes()
    monkeypatch.setattr(subprocess, "run", pip)
    spec = f"pypi:tiny-pkg==1.0#sha256={digest}"
    assert len(list(open_source(spec, downloads=tmp_path))) == 1
    assert {"--no-deps", "--only-binary", ":all:", "--require-hashes"} <= set(calls[0])
    assert len(list(open_source(spec, downloads=tmp_path))) == 1
    assert len(calls) == 1


def write_compressed(path: Path, data: bytes) -> None:
    with pyarrow.output_stream(str(path), compression={".gz": "gzip", ".zst": "zstd"}[path.suffix]) as stream:
        stream.write(data)


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_compressed_json_lines_are_read_alike(tmp_path: Path, suffix):
    """A .gz and a .zst file give the documents of the plain file; blank lines are none."""
    path = tmp_path / f"x.jsonl.{suffix}"
    write_compressed(path, json.dumps({"id": "a", "text": "b", "license": "MIT"}).encode() + b"\n\n")
    (document,) = open_source(str(path))
    assert (document.id, document.text, document.license) == ("a", "b", "MIT")


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_broken_compressed_file_is_named(tmp_path: Path, suffix):
    """Cut short, empty, or holding a broken line, a compressed file is an error with its name and the line."""
    path = tmp_path / f"x.jsonl.{suffix}"
    lines = b"".join(json.dumps({"id": str(n), "text": str(n) * 999}).encode() + b"\n" for n in range(2000))
    for data, complaint in (
        (lines, "cannot be decompressed"),
        (b'{"id": 1\n', f"{path}:1: not valid JSON"),
        (b"", "no doc"),
    ):
        write_compressed(path, data)
        if data is lines:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(DataError, match=complaint):
            list(open_source(str(path)))


def test_the_hub_loader_reads_a_local_directory(tmp_path: Path):
    """``hf:DIR`` streams a directory's rows, reads a nested licence, and numbers rows that have no id."""
    rows = [
        {"text": "one", "metadata": {"license": "Apache 2.0", "author": "Ada"}},
        {"text": "two", "metadata": {"license": "ask me", "author": "Bob"}},
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    one, two = open_source(f"hf:{tmp_path}")
    assert (one.id, one.text, one.license, one.owner) == (f"hf:{tmp_path}/train/0", "one", "Apache-2.0", "Ada")
    assert (two.license, two.source) == ("ask me", f"hf:{tmp_path}")
    (tmp_path / "train.jsonl").write_text(json.dumps({"body": "one"}) + "\n")
    with pytest.raises(DataError, match="field 'text' is missing"):
        list(open_source(f"hf:{tmp_path}"))
    with pytest.raises(DataError, match="cannot be read"):
        list(open_source(f"hf:{tmp_path / 'nowhere'}"))


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("python:no-such-distribution-xq", "not installed here"),
        ("python:", "not installed here"),
        ("pypi:click", "expected pypi:NAME==VERSION"),
        ("pypi:click==8.0#sha256=12", "expected pypi:NAME==VERSION"),
        ("notes.txt", "is no source"),
        ("nowhere.jsonl", "does not exist"),
        ("nowhere.jsonl.zst", "does not exist"),
    ],
)
def test_a_source_that_is_none_is_wrong_use(spec, complaint):
    """A source that cannot exist as named is a usage error that says what was wanted."""
    with pytest.raises(UsageError, match=complaint):
        list(open_source(spec))


def test_damaged_archives_are_data_errors(tmp_path: Path):
    """An archive that is no archive, lacks its metadata, or holds no Python is an error that names it."""
    for name, data, complaint in (
        (WHEEL, b"not a zip", "is not a wheel"),
        ("tiny_pkg-1.0.tar.gz", b"not a tar", "is not an sdist"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=complaint):
            open_source("pypi:tiny-pkg==1.0", downloads=tmp_path)
        (tmp_path / name).unlink()
    write_wheel(tmp_path / WHEEL, {})
    with pytest.raises(DataError, match=r"holds no \.py file"):
        open_source("pypi:tiny-pkg==1.0", downloads=tmp_path)
