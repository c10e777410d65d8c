"""The bench as a command: every subject loads, says what it does, and is where recorded runs say it is."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

ROOT = Path(__file__).resolve().parents[2]
RECORDS = sorted((ROOT / "scripts" / "results").glob("*.json"))


@pytest.fixture(scope="module")
def subjects():
    """Name → command."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", ["", *sys.path])  # whose first the bench replaces
        loaded = importlib.import_module("runpy").run_path(str(ROOT / "scripts" / "bench"), run_name="bench.__main__")
        context = click.Context(loaded["main"])
        yield {name: loaded["main"].get_command(context, name) for name in loaded["main"].list_commands(context)}


def flat(name, command):
    """Commands below a command, by what is typed."""
    if isinstance(command, click.Group):
        return {each: of for below, at in command.commands.items() for each, of in flat(f"{name} {below}", at).items()}
    return {name: command}


def test_every_subject_loads_and_explains_itself(subjects):
    """Each subject, and each of its options, says what it does; each that measures can be checked against a record."""
    typed = {each: of for name, command in subjects.items() for each, of in flat(name, command).items()}
    assert len(subjects) > 10
    for name, command in typed.items():
        assert command.help, name
        for option in command.params:
            assert not isinstance(option, click.Option) or option.help, f"{name} {option.opts}"
        checks = any("--check" in option.opts for option in command.params)
        assert checks or command.hidden or name == "compare", name


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_recorded_commands_are_still_there(subjects, path):
    """What a recorded run was made with is a subject of the bench, or a script."""
    command = json.loads(path.read_text())["command"]
    if command.startswith("python scripts/"):
        bench = importlib.import_module("bench.ratios")
        script = command.split()[1]
        assert bench.subject_of({"command": command}) in subjects or (ROOT / script).is_file()


def test_modules_say_how_they_are_run(subjects):
    """The command in a subject's docstring is one that exists."""
    for name in subjects:
        said = importlib.import_module(f"bench.{name}").__doc__
        (typed,) = set(re.findall(r"python scripts/bench ([a-z_0-9]+(?: run)?) ", said))
        assert typed in {each for each in flat(name, subjects[name])}, name


def test_help_loads_no_subject():
    """``--help`` is quick: it lists subjects without loading them, and fails for one that is not there."""
    program = [sys.executable, "-X", "importtime", ROOT / "scripts" / "bench"]
    shown = subprocess.run([*program, "--help"], capture_output=True, text=True, check=True)
    assert "growth" in shown.stdout
    assert "torch" not in shown.stderr
    wrong = subprocess.run([*program, "speed"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "No such command 'speed'" in wrong.stderr
