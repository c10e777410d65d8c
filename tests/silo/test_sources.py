"""Sources: what becomes a document, and what is refused with which reason."""

import io
import json
import os
import subprocess
import tarfile
import zipfile
from importlib.metadata import version
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from silo.collect import collect
from silo.corpus import SIDES, Corpus
from silo.errors import DataError, UsageError
from silo.evidence import UNREADABLE
from silo.files import sha256
from silo.findings import Finding
from silo.hub import load_recipe
from silo.sources import open_source

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
    refusals: list[Finding] = []
    list(open_source("python:rich", findings=refusals.append))
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
    """Size, encoding and vendored code each keep a file out, and each under its own name."""
    files = {
        "p/good.py": CODE.encode(),
        "p/long.py": b"x = 1\n" * 40_000,
        "p/latin.py": CODE.encode() + b"# caf\xe9\n",
        "p/empty.py": b"",
        "p/_vendor/other.py": CODE.encode(),
        "p/data.txt": CODE.encode(),
    }
    write_wheel(tmp_path / WHEEL, files, license="MIT")
    refusals: list[Finding] = []
    documents = list(open_source("pypi:tiny-pkg==1.0", downloads=tmp_path, findings=refusals.append))
    assert [document.title for document in documents] == ["p/good.py"]
    reasons = {refusal.id.removeprefix("pypi:Tiny.Pkg/"): refusal.reason for refusal in refusals}
    assert reasons == {
        "p/_vendor/other.py": "vendored: another's code, whose licence the distribution does not declare",
        "p/empty.py": "under 200 characters",
        "p/latin.py": "not UTF-8",
        "p/long.py": "over 200000 characters",
    }


@pytest.mark.parametrize(
    ("file", "license"),
    [
        (b"GNU GENERAL PUBLIC LICENSE\nVersion 3, 29 June 2007", "(MIT) AND (GPL-3.0-only)"),
        (b"Permission is hereby granted, free of charge, to any person", "MIT"),
        (b"Permission is hereby granted, free of charge, except to sell: Commons Clause", f"(MIT) AND ({UNREADABLE})"),
    ],
)
def test_a_licence_file_that_is_stricter_than_the_metadata_counts(tmp_path: Path, file, license):
    """A distribution that declares MIT and ships the GPL is under both; one that ships what it declares is not."""
    files = {"a.py": CODE.encode(), "tiny_pkg-1.0.dist-info/licenses/LICENSE": file}
    write_wheel(tmp_path / WHEEL, files, license="MIT")
    (document,) = open_source("pypi:tiny-pkg==1.0", downloads=tmp_path)
    assert document.license == license


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


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_compressed(path, b"".join(json.dumps(row).encode() + b"\n" for row in rows))


def test_the_open_license_corpus_is_read_by_its_subsets(tmp_path: Path):
    """Rows of text alone get the licence that the corpus's card gives to their subset; CC-BY-SA is not permissive."""
    licenses = {}
    for subset in ("pd_law", "sw_github", "ccby_wikipedia", "someone_elses"):
        write_rows(tmp_path / "olc" / subset / "train-00000-of-00001.jsonl.gz", [{"text": f"a text of {subset}"}])
        (document,) = open_source(f"hf:{tmp_path / 'olc' / subset}", recipe=Path("open-license-corpus"))
        licenses[subset] = document.license
    assert licenses == {
        "pd_law": "LicenseRef-PublicDomain",
        "sw_github": "MIT AND BSD-3-Clause AND Apache-2.0",
        "ccby_wikipedia": "CC-BY-SA-4.0",
        "someone_elses": "NOASSERTION",
    }


def test_the_common_pile_is_read_row_by_row(tmp_path: Path):
    """Its own spellings of licences become SPDX, owner and title come from its metadata, and odd ones stay unknown."""
    spelt = {
        "Public Domain": "LicenseRef-PublicDomain",
        "Creative Commons - Attribution - https://creativecommons.org/licenses/by/4.0/": "CC-BY-4.0",
        "Creative Commons - Attribution Share-Alike - https://creativecommons.org/licenses/by-sa/4.0/": "CC-BY-SA-4.0",
        "Creative Commons Zero - Public Domain - https://creativecommons.org/publicdomain/zero/1.0/": "CC0-1.0",
        "Apache 2 License - https://www.apache.org/licenses/LICENSE-2.0": "Apache-2.0",
        "MIT License": "MIT",
        "Creative Commons - Attribution Non-Commercial": "Creative Commons - Attribution Non-Commercial",
        "Apache 2 License with Commons Clause": "Apache 2 License with Commons Clause",
        "creativecommons.org/licenses/by/4.0/ ; not for sale": "creativecommons.org/licenses/by/4.0/ ; not for sale",
    }
    rows = [
        {
            "id": str(n),
            "text": f"text {n}",
            "source": "arXiv",
            "added": "2024",
            "metadata": {"license": raw, "author": "Ada"},
        }
        for n, raw in enumerate(spelt)
    ]
    write_rows(tmp_path / "arxiv" / "documents" / "00000_arxiv.jsonl.gz", rows)
    documents = list(open_source(f"hf:{tmp_path / 'arxiv'}", recipe=Path("common-pile")))
    assert [document.license for document in documents] == list(spelt.values())
    assert {(document.owner, document.source) for document in documents} == {("Ada", "arXiv")}


def test_of_several_licences_of_a_row_all_hold():
    """A list of licences is read one by one, and is as strict as the strictest of them."""
    recipe = load_recipe(None, "common-pile/arxiv")
    both = ["https://creativecommons.org/licenses/by/4.0/", "https://creativecommons.org/licenses/by-sa/4.0/"]
    assert recipe.license(both[:1], "") == "CC-BY-4.0"
    assert recipe.license(both, "") == "(CC-BY-4.0) AND (CC-BY-SA-4.0)"


def test_a_recipe_maps_fields_and_licences(tmp_path: Path):
    """A user's own recipe names nested fields and spellings; a field that we do not have is wrong use."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("fields: {text: body.en, license: rights, owner: by}\nlicenses: {free*: CC0-1.0}\n")
    table = pyarrow.Table.from_pylist([{"body": {"en": "hello"}, "rights": "Free as air", "by": ["Ada", "Bob"]}])
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    (document,) = open_source(str(tmp_path / "x.parquet"), recipe=recipe)
    assert (document.id, document.text, document.license) == ("x.parquet/0", "hello", "CC0-1.0")
    assert document.owner == "Ada, Bob"
    recipe.write_text("fields: {colour: red}")
    with pytest.raises(UsageError, match=r"colour"):
        open_source(str(tmp_path / "x.parquet"), recipe=recipe)
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        list(open_source(str(tmp_path / "x.parquet")))


def test_a_directory_is_read_as_the_reuse_specification_has_it(tmp_path: Path):
    """Text files take licence and owner from SPDX tags or from a .license file; others are of unknown licence."""
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.py").write_text(
        "# SPDX-FileCopyrightText: 2020-2024 Ada Lovelace <ada@example.org>\n# SPDX-License-Identifier: MIT\nx = 1\n"
    )
    (tmp_path / "b.md").write_text("# Notes\n")
    (tmp_path / "b.md.license").write_text("SPDX-FileCopyrightText: © Bob\nSPDX-License-Identifier: CC-BY-4.0\n")
    (tmp_path / "c.txt").write_text("whose?\n")
    write_compressed(tmp_path / "d.txt.gz", b"packed\n")
    (tmp_path / "e.bin").write_bytes(b"\0")
    (tmp_path / "f.txt").write_bytes(b"caf\xe9")
    (tmp_path / "LICENSE").write_text("MIT License\n\nPermission is hereby granted, free of charge")
    found: list[Finding] = []
    documents = {d.id: d for d in open_source(str(tmp_path), findings=found.append)}
    assert {id: (d.license, d.owner) for id, d in documents.items()} == {
        "src/a.py": ("MIT", "Ada Lovelace"),
        "b.md": ("CC-BY-4.0", "Bob"),
        "c.txt": ("NOASSERTION", ""),
        "d.txt.gz": ("NOASSERTION", ""),
        "LICENSE": ("NOASSERTION", ""),
    }
    assert {finding.id: finding.reason for finding in found} == {
        "e.bin": "a file of a kind that is not read: .bin",
        "f.txt": "not UTF-8",
    }


@pytest.mark.parametrize(
    ("tag", "license"),
    [
        (b"# SPDX-License-Identifier: MIT\r\nx = 1\r\n", "MIT"),
        (b"/* SPDX-License-Identifier: MIT */\r\n", "MIT"),
        (b"# SPDX-License-Identifier: MIT\x0c\n", "MIT"),
        (b"# SPDX-License-Identifier: MIT\n# SPDX-License-Identifier: GPL-3.0-only\n", "(MIT) AND (GPL-3.0-only)"),
        (b"x = 'SPDX-License-Identifier: MIT'\n", "NOASSERTION"),
        (b"# SPDX-License-Identifier:\nx = 1\n", "NOASSERTION"),
        (b"# SPDX-License-Identifier: \r\nx = 1\r\n", "NOASSERTION"),
    ],
)
def test_a_tag_ends_with_its_line_whatever_ends_lines(tmp_path: Path, tag, license):
    """Line ends and blanks are no part of a licence, an empty tag states none, and the corpus can be read again."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.py").write_bytes(tag)
    (document,) = open_source(str(tmp_path / "in"))
    assert document.license == license
    collect([str(tmp_path / "in")], tmp_path / "out")
    corpus = Corpus.open(tmp_path / "out" / ("permissive" if license == "MIT" else "restricted"))
    assert [each.license for split in SIDES[corpus.manifest["side"]] for each in corpus.documents(split)] == [license]


@pytest.mark.parametrize(
    ("name", "text", "license"),
    [
        ("a.md", "<!--\nSPDX-FileCopyrightText: 2020 Ada\n\nSPDX-License-Identifier: MIT\n-->\n\n# Title\n", "MIT"),
        ("a.md", "---\ntitle: x\nSPDX-License-Identifier: MIT\n---\ntext\n", "MIT"),
        ("a.rst", "..\n   SPDX-License-Identifier: MIT\n\nText\n", "MIT"),
        ("a.txt", "Copyright 2020 Ada\nSPDX-License-Identifier: MIT\n\nText\n", "MIT"),
        ("a.txt", "Put this line at the top:\n\n    SPDX-License-Identifier: MIT\n", "NOASSERTION"),
        ("a.md", "# How to tag\n\n```\nSPDX-License-Identifier: MIT\n```\n", "NOASSERTION"),
        ("a.md", "<!-- REUSE-IgnoreStart -->\n<!-- SPDX-License-Identifier: MIT -->\n", "NOASSERTION"),
    ],
)
def test_a_text_that_shows_a_tag_is_not_under_it(tmp_path: Path, name, text, license):
    """In prose a tag counts at the top, in comments or front matter, and not as the example that a text gives."""
    (tmp_path / name).write_text(text)
    (document,) = open_source(str(tmp_path / name))
    assert document.license == license


def test_a_name_on_disk_that_is_no_unicode_is_refused(tmp_path: Path):
    """Files whose names are no UTF-8 are listed, whatever their kind, and the others are collected."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "good.txt").write_text("text")
    for name in (b"caf\xe9.txt", b"caf\xe9.bin"):
        (tmp_path / "in" / os.fsdecode(name)).write_text("text")
    summary = collect([str(tmp_path / "in")], tmp_path / "out")
    assert [(group["reason"], group["examples"][0]["id"]) for group in summary["refused"]] == [
        ("a file of a kind that is not read: .bin", "caf\\udce9.bin"),
        ("its name is not UTF-8", "caf\\udce9.txt"),
    ]


def test_parquet_rows_are_named_by_their_file_s_place(tmp_path: Path):
    """Files of one name in two directories have rows of their own; a number is an id, the number 0 too."""
    for language in ("en", "fr"):
        (tmp_path / language).mkdir()
        table = pyarrow.Table.from_pylist([{"text": f"one, {language}"}, {"text": f"two, {language}"}])
        pyarrow.parquet.write_table(table, tmp_path / language / "train.parquet")
    rows = [{"id": 7, "text": "seven"}, {"id": 0, "text": "zero"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "own.parquet")
    assert {document.id: document.text for document in open_source(str(tmp_path))} == {
        "en/train.parquet/0": "one, en",
        "en/train.parquet/1": "two, en",
        "fr/train.parquet/0": "one, fr",
        "fr/train.parquet/1": "two, fr",
        "own.parquet/7": "seven",
        "own.parquet/0": "zero",
    }


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("python:no-such-distribution-xq", "not installed here"),
        ("python:", "not installed here"),
        ("pypi:click", "expected pypi:NAME==VERSION"),
        ("pypi:click==8.0#sha256=12", "expected pypi:NAME==VERSION"),
        ("notes.pdf", "is no source"),
        ("notes.txt", "does not exist"),
        ("rows.parquet", "does not exist"),
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


@pytest.mark.parametrize("damaged", ["METADATA", "LICENSE", "a.py"])
def test_a_damaged_file_of_a_wheel_is_named(tmp_path: Path, damaged):
    """Whichever member of a wheel is damaged, metadata and licence files too, the error names it."""
    write_wheel(tmp_path / WHEEL, {"a.py": CODE.encode(), "LICENSE": b"MIT License"})
    data = (tmp_path / WHEEL).read_bytes()
    content = {"METADATA": b"Ada Lovelace", "LICENSE": b"MIT License", "a.py": b"def add"}[damaged]
    (tmp_path / WHEEL).write_bytes(data.replace(content, content[::-1], 1))
    with pytest.raises(DataError, match=f"{damaged} is damaged in the archive"):
        list(open_source("pypi:tiny-pkg==1.0", downloads=tmp_path))


def test_links_that_lead_nowhere_are_told(tmp_path: Path):
    """Links of an sdist to what it does not hold, or to themselves, a licence file too, are among the refusals, and the
    rest is read."""
    with tarfile.open(tmp_path / "tiny_pkg-1.0.tar.gz", "w:gz") as archive:
        for name, data in (("PKG-INFO", METADATA.format(license="MIT").encode()), ("a.py", CODE.encode())):
            member = tarfile.TarInfo(f"tiny_pkg-1.0/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        for name, target in (("LICENSE", "../LICENSE"), ("b.py", "b.py")):
            link = tarfile.TarInfo(f"tiny_pkg-1.0/{name}")
            link.type, link.linkname = tarfile.SYMTYPE, target
            archive.addfile(link)
    found: list[Finding] = []
    (document,) = open_source("pypi:tiny-pkg==1.0", downloads=tmp_path, findings=found.append)
    assert (document.title, document.license) == ("a.py", "MIT")
    gone = "listed by the distribution, and not there"
    assert [(each.id, each.reason) for each in found] == [("pypi:Tiny.Pkg/LICENSE", gone), ("pypi:Tiny.Pkg/b.py", gone)]


def test_a_licence_file_that_is_gone_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An installed distribution whose listed files are partly gone, its licence file too, gives the others."""
    information = tmp_path / "other-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Name: other\nVersion: 1.0\nLicense-Expression: MIT\n")
    (information / "RECORD").write_text("other.py,,\ngone.py,,\nother-1.0.dist-info/LICENSE,,\n")
    (tmp_path / "other.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    (document,) = open_source("python:other")
    assert (document.title, document.license) == ("other.py", "MIT")


def test_another_wheel_among_the_downloads_is_passed_over(tmp_path: Path):
    """A file that is called a wheel and has no version in its name is none that is looked for."""
    (tmp_path / "test.whl").write_bytes(b"")
    write_wheel(tmp_path / WHEEL, {"a.py": CODE.encode()})
    assert len(list(open_source("pypi:tiny-pkg==1.0", downloads=tmp_path))) == 1
