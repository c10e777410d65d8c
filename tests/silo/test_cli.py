"""The command line: every option explained, every error one line, every result one JSON document."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from silo.cli import COMMANDS, main, reports
from silo.errors import DataError, UsageError
from silo.files import canonical_json

ROOT = Path(__file__).parents[2]


def commands(group: click.Group, path: str = "silo") -> Iterator[tuple[str, click.Command]]:
    """Every command below a group with its full name, the group first."""
    yield path, group
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None, name
        if isinstance(command, click.Group):
            yield from commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def run_apart(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, as a shell does."""
    command = [sys.executable, "-m", "silo", *map(str, arguments)]
    everything = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False, env=everything)


def assert_one_line(stdout: str, stderr: str, exit_code: int, expected: int, *parts: object) -> None:
    assert exit_code == expected, stderr
    assert stdout == ""
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    for part in parts:
        assert str(part) in stderr


def test_a_warning_is_one_line():
    """What warns says so in one line on stderr, without the code that it comes from."""
    program = (
        "import click, warnings\n"
        "from silo import cli\n"
        "@click.command()\n"
        "def command(): warnings.warn('a\\nb')\n"
        "cli.COMMANDS['x'] = ('__main__:command', '')\n"
        "cli.main(['x'])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr) == (0, "warning: a b\n")


def test_every_command_and_option_has_help():
    """No command, option or group lands without a word of help, and each help is a sentence or a phrase of its own."""
    names = []
    for path, command in commands(main):
        names.append(path)
        assert command.help, path
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{path} {parameter.name}"
        if not isinstance(command, click.Group):
            assert "--json" in [option for parameter in command.params for option in parameter.opts], path
    assert {"silo train", "silo corpus collect", "silo datastore remove", "silo eval perplexity"} <= set(names)


@pytest.mark.parametrize("path", ["", *COMMANDS])
def test_help_is_shown(path: str):
    """--help of each command prints usage and every option on stdout, and leaves with 0."""
    result = run(*path.split(), "--help")
    assert result.exit_code == 0
    assert result.stdout.startswith("Usage: ")
    assert result.stderr == ""
    if not path:
        for name, (_, summary) in COMMANDS.items():
            assert name in result.stdout
            assert summary.split()[0] in result.stdout


def test_summaries_are_those_of_the_commands():
    """What ``silo --help`` says of a command without importing it is not at odds with the command's own help."""
    for name, (_, summary) in COMMANDS.items():
        command = main.get_command(click.Context(main), name)
        assert command is not None
        assert command.help
        assert summary.endswith(".")


@pytest.fixture
def broken(tmp_path: Path) -> dict[str, Path]:
    """Files and directories with which no command can work."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.json").mkdir()
    (tmp_path / "y.json").write_text("{}")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"id": "a", "text": "x"}\n{\n')
    (tmp_path / "good.jsonl").write_text('{"id": "a", "text": "x"}\n')
    (tmp_path / "recipe.yaml").write_text(f"corpus: {tmp_path / 'empty'}\noutput: {tmp_path / 'm'}\ntoken_budget: 4096")
    return {"here": tmp_path}


WRONG = [
    ("nonsense", 2, "No such command 'nonsense'; see `silo --help`"),
    ("train", 2, "Missing argument 'CONFIG'; see `silo train --help`"),
    ("train {here}/recipe.yaml --fast", 2, "No such option"),
    ("train {here}/none.yaml", 2, "none.yaml does not exist; expected a YAML file"),
    ("train {here}/recipe.yaml", 2, "empty is not a corpus: it has no manifest.json"),
    ("train {here}/recipe.yaml nonsense", 2, "'nonsense' is not an override"),
    ("train {here}/recipe.yaml sed=1", 2, "unknown setting 'sed'"),
    ("corpus collect {here}/none.jsonl --out {here}/o", 2, "none.jsonl"),
    ("corpus collect {here}/broken.jsonl --out {here}/o", 1, "broken.jsonl:2: not valid JSON"),
    ("corpus collect {here}/empty.jsonl --out {here}/o", 1, "empty.jsonl"),
    ("corpus collect {here}/good.jsonl", 2, "Missing option '--out'; see `silo corpus collect --help`"),
    ("corpus collect {here}/good.jsonl --out {here}", 2, "is not an empty directory"),
    ("corpus audit {here}/none", 2, "none does not exist"),
    ("datastore create {here}/s --model {here}/empty", 2, "empty is not a model directory: config.json is missing"),
    ("datastore list {here}/empty", 2, "empty is not a store"),
    ("datastore hash {here}/none", 2, "none is not a store"),
    ("datastore verify {here}/none", 2, "none is not a store"),
    ("datastore add {here}/none --model {here}/empty {here}/good.jsonl", 2, "none is not a store"),
    ("datastore remove {here}/none --owner Ada", 2, "none is not a store"),
    ("eval perplexity --model {here}/empty --data {here}/none.jsonl", 2, "none.jsonl does not exist"),
    ("eval perplexity --model {here}/empty --data {here}/broken.jsonl", 1, "broken.jsonl:2: not valid JSON"),
    ("eval perplexity --model {here}/empty --data {here}/empty.jsonl", 1, "empty.jsonl holds no document"),
    ("eval perplexity --model {here}/empty --data {here}/good.jsonl", 2, "empty is not a model directory"),
    (
        "eval perplexity --model {here}/empty --data {here}/good.jsonl --use all",
        2,
        "'all'; expected lm, or lm and some",
    ),
    ("eval perplexity --model {here}/empty --data {here}/good.jsonl --max-tokens 0", 2, "--max-tokens"),
    (
        "eval perplexity --model {here}/empty --data {here}/good.jsonl --fit {here}/good.jsonl "
        "--save-weights {here}/no/w.json",
        2,
        "no does not exist; --save-weights wants a file in a directory that does",
    ),
    ("eval gate {here}/good.jsonl --model {here}/empty --store {here}/empty --out {here}/no/x", 2, "no does not exist"),
    ("eval gate {here}/good.jsonl --model {here}/empty --store {here}/empty --out {here}", 2, "is a directory; --out"),
    ("eval compare {here}/empty {here}/empty --html {here}/good.jsonl/x", 2, "good.jsonl is not a directory; --html"),
    ("eval study reliance --model {here} --store {here} --data {here} --out {here}/x.json", 2, "x.json is a directory"),
    ("eval study reliance --model {here} --store {here} --data {here} --out {here}/y.json", 2, "y.json is there alrea"),
    ("corpus audit {here}/empty --html {here}", 2, "is a directory; --html wants the name of a file"),
    ("generate x --model {here}/empty --seed -1", 2, "--seed"),
    ("generate x --model {here}/empty --seed 99999999999999999999", 2, "is not in the range 0<=x<=4294967295"),
    ("quickstart --seed 4294967296", 2, "--seed"),
    ("corpus audit {here}/good.jsonl", 2, "is a file; expected a directory that `silo corpus collect"),
    ("eval zero-shot {here} {here}/none", 2, "none does not exist or is not a file; expected JSON Lines, one question"),
    (
        "eval compare {here}/y.json {here}/y.json",
        2,
        "y.json is no result of a suite; expected the directory of results",
    ),
    ("eval compare {here}/broken.jsonl {here}", 2, "expected the directory of results that `silo eval suite --out`"),
    ("eval compare {here}/none {here}", 2, "none does not exist; expected the directory of results"),
    ("generate x --model {here} --weights {here}/broken.jsonl", 2, "expected weights, as `silo eval perplexity --fit"),
    ("generate x --model {here} --weights {here}", 2, "is a directory; expected weights, as"),
    ("generate x --model {here}/empty --temperature nan", 2, "nan is not a finite number"),
    ("generate x --model {here}/empty --temperature inf", 2, "inf is not a finite number"),
    (
        "eval study copying --model {here} --store {here} --data {here} --out {here}/z.json --temperature nan",
        2,
        "nan is not a finite number",
    ),
    ("eval gate {here}/good.jsonl --model {here} --store {here} --store-tokens 0", 2, "--store-tokens"),
    ("eval gate {here}/good.jsonl --model {here} --store {here} --bare-tokens -1", 2, "--bare-tokens"),
    ("eval gate {here}/good.jsonl --model {here} --store {here} --asked-tokens 1", 2, "--asked-tokens"),
    ("datastore export {here}/empty --shard Ada --out {here}/no/ada.shard", 2, "no does not exist; --out wants"),
]


@pytest.mark.parametrize("as_json", [False, True], ids=["", "json"])
@pytest.mark.parametrize(("line", "exit_code", "said"), WRONG, ids=[line for line, _, _ in WRONG])
def test_every_error_is_one_line(broken, line: str, exit_code: int, said: str, as_json: bool):
    """Bad input and wrong use give one line on stderr, 1 or 2, nothing on stdout, and no traceback; so with --json."""
    before = sorted(path.name for path in broken["here"].iterdir())
    result = run(*[word.format(**broken) for word in line.split()], *(["--json"] if as_json else []))
    assert isinstance(result.exception, SystemExit)
    assert_one_line(result.stdout, result.stderr, result.exit_code, exit_code, said)
    assert sorted(path.name for path in broken["here"].iterdir()) == before


def test_a_process_of_its_own_says_the_same(broken):
    """From a shell as well: one line on stderr, the status that the error's class carries, no traceback."""
    done = run_apart("train", broken["here"] / "none.yaml")
    assert_one_line(done.stdout, done.stderr, done.returncode, 2, "none.yaml does not exist")
    done = run_apart("nonsense")
    assert_one_line(done.stdout, done.stderr, done.returncode, 2, "No such command 'nonsense'")


def test_no_arguments_show_help():
    """The bare command explains itself on stderr and leaves with 2, as a wrong call does."""
    result = run()
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Usage: " in result.stderr
    assert "Traceback" not in result.stderr


def reporting(body) -> click.Command:
    """A command whose body is a function without arguments."""
    return click.Command(
        "x", callback=reports(lambda value: click.echo(f"a person reads {value}"))(body), params=body_params(body)
    )


def body_params(body) -> list[click.Parameter]:
    return [click.Option(["--json", "as_json"], is_flag=True, help="JSON")]


def test_json_prints_one_document():
    """With --json the value is the only thing on stdout, one line of UTF-8; without it, a person is told."""
    value = {"name": "É", "list": [1, None]}
    command = reporting(lambda: value)
    as_json = CliRunner().invoke(command, ["--json"])
    assert (as_json.exit_code, as_json.stderr) == (0, "")
    assert as_json.stdout.count("\n") == 1
    assert json.loads(as_json.stdout) == value
    assert "É" in as_json.stdout
    assert CliRunner().invoke(command, []).stdout == f"a person reads {value}\n"


@pytest.mark.parametrize(
    ("error", "exit_code", "said"),
    [
        (UsageError("wrong\n   use"), 2, "error: wrong use\n"),
        (DataError("bad data"), 1, "error: bad data\n"),
        (FileNotFoundError(2, "No such file or directory", "a/b"), 1, "error: a/b: No such file or directory\n"),
        (OSError(28, "No space left on device"), 1, "error: input/output: No space left on device\n"),
        (OSError("odd"), 1, "error: input/output: odd\n"),
    ],
)
@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_errors_become_a_line_and_a_status(error, exit_code, said, arguments):
    """An error of ours keeps its status, one of the system is 1, and many lines become one."""

    def body():
        raise error

    result = CliRunner().invoke(reporting(body), arguments)
    assert (result.exit_code, result.stdout, result.stderr) == (exit_code, "", said)


@pytest.mark.parametrize("arguments", ["--help", "datastore log {store}", "datastore list {store} --json"])
def test_a_full_disk_behind_stdout_is_one_line(make_store, documents, arguments: str):
    """A result that cannot be written leaves 1 and one line, with --help, for people and with --json."""
    store = make_store("store", documents[:1])
    done = run_full(*arguments.format(store=store.path).split())
    assert_one_line("", done.stderr, done.returncode, 1, "standard output: No space left on device")


def test_a_removal_that_cannot_be_told_says_that_it_is_committed(make_store, documents):
    """A full disk behind stdout does not make a removal look as if it had failed."""
    store = make_store("store", documents[:2])
    done = run_full("datastore", "remove", store.path, "--document", documents[0].id)
    said = ("No space left on device; the change is committed", "receipts/000002-remove.json")
    assert_one_line("", done.stderr, done.returncode, 1, *said)


def run_full(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command with a stdout that takes nothing."""
    command = [sys.executable, "-m", "silo", *map(str, arguments)]
    with open("/dev/full", "w") as full:
        return subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=120, check=False
        )


@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_what_stdout_cannot_spell_is_escaped(tmp_path: Path, as_json: list[str]):
    """Under an encoding that lacks an owner's letters these are escaped, and JSON stays JSON."""
    source = tmp_path / "x.jsonl"
    source.write_text('{"id": "a", "text": "x", "owner": "Éva 雪"}\n')
    collect = ("corpus", "collect", source, "--out", tmp_path / "out", *as_json)
    done = run_apart(*collect, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    if as_json:
        assert json.loads(done.stdout)["licenses"][0]["owners"] == ["Éva 雪"]
    else:
        assert "\\xc9va \\u96ea" in done.stdout


def test_a_bug_is_not_dressed_up():
    """An exception that is not ours keeps its traceback: it is to be reported, not to be read as bad input."""

    def body():
        raise ZeroDivisionError

    assert isinstance(CliRunner().invoke(reporting(body), []).exception, ZeroDivisionError)


def test_real_commands_print_one_json_document(model, model_dir, make_store, documents, tmp_path):
    """The commands that read a store print one JSON document each with --json, and text without."""
    store = make_store("store", documents[:2])
    data = tmp_path / "data.jsonl"
    data.write_bytes(b"".join(canonical_json(document.to_json()) for document in documents[3:5]))
    for line in (
        f"datastore list {store.path}",
        f"datastore verify {store.path}",
        f"datastore hash {store.path}",
        f"datastore log {store.path}",
        f"datastore remove {store.path} --owner Ada --dry-run",
        f"eval perplexity --model {model_dir} --data {data} --max-tokens 100",
    ):
        result = run(*line.split(), "--json")
        assert result.exit_code == 0, result.stderr
        assert result.stdout.count("\n") == 1
        assert isinstance(json.loads(result.stdout), dict)
        told = run(*line.split())
        assert told.exit_code == 0
        assert told.stdout.strip()
        assert not told.stdout.startswith("{")
