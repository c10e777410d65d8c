"""``silo corpus`` as a user meets it: exit statuses, one line of error, JSON on stdout alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from click.testing import CliRunner, Result

from silo.cli import main
from silo.corpus import Corpus, split_of

GOOD = {"id": "a", "text": "some text", "license": "MIT", "owner": "Ada [bold]"}


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["corpus", *map(str, arguments)])


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def assert_error(result: Result, exit_code: int, *parts: str) -> None:
    assert result.exit_code == exit_code
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: ")
    for part in parts:
        assert part in result.stderr


def test_collect_and_audit_speak_json(tmp_path: Path):
    """With --json both commands print one JSON document on stdout, and it is the same audit."""
    source = write(tmp_path / "x.jsonl", GOOD, {"id": "b", "text": "other"})
    collected = run("collect", source, "--out", tmp_path / "out", "--json")
    audited = run("audit", tmp_path / "out", "--json")
    assert (collected.exit_code, audited.exit_code) == (0, 0)
    assert json.loads(collected.stdout) == json.loads(audited.stdout)
    assert [line["license"] for line in json.loads(audited.stdout)["licenses"]] == ["MIT", "NOASSERTION"]


def test_people_get_a_table(tmp_path: Path):
    """Without --json a person reads tiers, licences and owners, brackets and all, and what was refused."""
    source = write(tmp_path / "x.jsonl", GOOD, {**GOOD, "id": "b"})
    collected = run("collect", source, "--out", tmp_path / "out")
    assert collected.exit_code == 0
    for words in ("SW", "MIT", "Ada [bold]", "a duplicate"):
        assert words in collected.stdout
    assert run("audit", tmp_path / "out").stdout == collected.stdout


def test_audit_counts_tokens_with_a_model(tmp_path: Path):
    """--model adds the tokens of that directory's tokenizer, and a directory without one is wrong use."""
    source = write(tmp_path / "x.jsonl", GOOD)
    run("collect", source, "--out", tmp_path / "out")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    report = json.loads(run("audit", tmp_path / "out", "--model", tmp_path, "--json").stdout)
    assert report["licenses"][0]["tokens"] == 2
    assert_error(run("audit", tmp_path / "out", "--model", tmp_path / "out"), 2, "tokenizer.json does not exist")


def test_an_unknown_or_missing_licence_is_restricted(tmp_path: Path):
    """Neither an unknown licence nor a missing field stops a run, and neither reaches the permissive side."""
    source = write(tmp_path / "x.jsonl", {**GOOD, "license": "Own-1.0"}, {"id": "b", "text": "no licence field"})
    assert run("collect", source, "--out", tmp_path / "out").exit_code == 0
    assert not (tmp_path / "out" / "permissive").exists()
    assert {row.license for row in Corpus.open(tmp_path / "out" / "restricted").rows} == {"Own-1.0", "NOASSERTION"}


@pytest.mark.parametrize(
    ("lines", "part"),
    [
        ([GOOD, "{broken"], "x.jsonl:2: not valid JSON"),
        ([GOOD, GOOD], "x.jsonl:2: id 'a' was already used in line 1"),
        ([{"id": "a"}], "x.jsonl:1: field 'text' is missing"),
        ([], "x.jsonl holds no document"),
    ],
)
def test_broken_data_is_one_line_and_exit_1(tmp_path: Path, lines, part):
    """A broken line, a double id, a missing field and an empty file name file and line, and leave no corpus."""
    assert_error(run("collect", write(tmp_path / "x.jsonl", *lines), "--out", tmp_path / "out"), 1, part)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["nowhere.jsonl"], "nowhere.jsonl does not exist"),
        (["python:no-such-distribution-xq"], "not installed here"),
        (["notes.pdf"], "is no source"),
        (["python:click", "--policy", "nowhere.yaml"], "nowhere.yaml does not exist"),
    ],
)
def test_wrong_use_is_one_line_and_exit_2(tmp_path: Path, arguments, part):
    """A missing file, an unknown distribution, source or policy is wrong use."""
    assert_error(run("collect", *arguments, "--out", tmp_path / "out"), 2, part)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_corpus_is_refused(tmp_path: Path):
    """A second run into the same directory is wrong use, and the first corpus stays as it was."""
    source = write(tmp_path / "x.jsonl", GOOD)
    run("collect", source, "--out", tmp_path / "out")
    before = (tmp_path / "out" / "audit.json").read_bytes()
    assert_error(run("collect", source, "--out", tmp_path / "out"), 2, "choose another --out")
    assert (tmp_path / "out" / "audit.json").read_bytes() == before
    assert_error(run("audit", tmp_path / "nowhere"), 2, "does not exist")


@pytest.mark.parametrize("name", ["audit.json", "permissive/manifest.json", "permissive/index.jsonl", "TEXT"])
def test_a_flipped_byte_is_one_line_and_exit_1(tmp_path: Path, name):
    """A damaged file of any kind is named by the audit."""
    run("collect", write(tmp_path / "x.jsonl", GOOD), "--out", tmp_path / "out")
    path = tmp_path / "out" / name.replace("TEXT", f"permissive/{split_of('a')}.jsonl")
    data = bytearray(path.read_bytes())
    data[20] ^= 1
    path.write_bytes(data)
    assert_error(run("audit", tmp_path / "out"), 1, str(path), "damaged" if data[20:21].isalnum() else "")


def test_a_policy_file_is_obeyed(tmp_path: Path):
    """--policy moves a licence to the tier that the file names."""
    policy = write(tmp_path / "policy.yaml", "licenses: {CC-BY-SA-4.0: BY}")
    source = write(tmp_path / "x.jsonl", {**GOOD, "license": "CC-BY-SA-4.0"})
    report = run("collect", source, "--out", tmp_path / "out", "--policy", policy, "--json")
    assert json.loads(report.stdout)["licenses"][0]["tier"] == "BY"


def test_installed_packages_become_a_corpus_with_pairs(tmp_path: Path):
    """``python:rich --pairs`` gives rich's files and pairs, on the permissive side alone."""
    report = run("collect", "python:rich", "--pairs", "--out", tmp_path / "out", "--json")
    (line,) = json.loads(report.stdout)["licenses"]
    assert (line["license"], line["owners"]) == ("MIT", ["Will McGugan"])
    assert line["documents"] > 50
    assert line["pairs"] > 100


def test_the_command_loads_neither_torch_nor_datasets():
    """Collecting local files needs no heavy library, so that the command starts at once."""
    code = "import silo.corpus_cli, sys; print({'torch', 'datasets', 'transformers', 'jnius'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_page_shows_every_finding_with_its_evidence(tmp_path: Path):
    """--html writes one page that loads nothing, with licences, owners and each conflict's line, all of it escaped."""
    text = ":License: GPL-3.0-only <b>\n" + "word " * 50
    source = write(tmp_path / "x.jsonl", GOOD, {**GOOD, "id": "<script>", "text": text})
    run("collect", source, "--out", tmp_path / "out")
    page = tmp_path / "audit.html"
    assert run("audit", tmp_path / "out", "--html", page).exit_code == 0
    html = page.read_text()
    for words in ("Ada [bold]", "&lt;script&gt;", "line 1: :License: GPL-3.0-only &lt;b&gt;", "Conflicts", "SW · MIT"):
        assert words in html
    for part in ("<script", "src=", "http:", "https:"):
        assert part not in html
    assert_error(run("audit", tmp_path / "out", "--html", tmp_path / "no" / "x.html"), 2, "does not exist")
    assert_error(run("audit", tmp_path / "out" / "permissive", "--html", page), 2, "has no audit.json")


def test_audit_finds_other_text_in_the_permissive_side(tmp_path: Path):
    """--against names each permissive document that repeats a source's text, with how many words, and whose."""
    words = " ".join(f"word{n}" for n in range(80))
    source = write(
        tmp_path / "x.jsonl", {**GOOD, "text": f"own words first, {words}"}, {**GOOD, "id": "b", "text": "new"}
    )
    other = write(tmp_path / "y.jsonl", {**GOOD, "id": "theirs", "license": "GPL-3.0-only", "text": words})
    run("collect", source, "--out", tmp_path / "out")
    found = json.loads(run("audit", tmp_path / "out", "--against", other, "--json").stdout)["repeated"]
    assert (found["documents"], found["compared_with"]) == (1, 1)
    longest = {"words": 80, "begin": 3, "end": 83}
    assert found["rows"] == [{"id": "a", "words": 80, "longest": longest, "of": "theirs", "license": "GPL-3.0-only"}]
    assert "theirs (GPL-3.0-only)" in run("audit", tmp_path / "out", "--against", other).stdout
    assert_error(run("audit", tmp_path / "out", "--against", tmp_path / "z.jsonl"), 2, "does not exist")
