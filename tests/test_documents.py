"""README, RESULTS.md and help say what is true."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import click
import pytest

from silo.cli import COMMANDS, main

ROOT = Path(__file__).parent.parent


def commands(group: click.Group, path: str) -> dict[str, click.Command]:
    """Every command below a group, by what a user types."""
    found: dict[str, click.Command] = {}
    for name in group.list_commands(click.Context(group)):
        command = group.get_command(click.Context(group), name)
        assert command is not None
        below = commands(command, f"{path} {name}") if isinstance(command, click.Group) else {f"{path} {name}": command}
        found.update(below)
    return found


ALL = commands(main, "silo")


@pytest.mark.parametrize("typed", ALL)
def test_every_command_and_option_has_help(typed: str) -> None:
    """Each command says what it does, and so does each of its options."""
    assert ALL[typed].help
    for parameter in ALL[typed].params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{typed} {parameter.opts}"


@pytest.mark.parametrize("name", COMMANDS)
def test_the_readme_names_every_command_group(name: str) -> None:
    """README.md shows how to use each command that `silo --help` lists."""
    assert f"silo {name}" in (ROOT / "README.md").read_text()


def test_the_readme_s_commands_exist() -> None:
    """Every `silo …` line of the README's code blocks is a command, with options that it has."""
    lines = re.findall(r"^    (silo [^#\n]*(?:\\\n[^\n]*)*)", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert len(lines) >= 8
    for line in lines:
        words = line.replace("\\\n", " ").split()
        typed = next(name for name in (" ".join(words[:size]) for size in (4, 3, 2)) if name in ALL)
        known = {option for parameter in ALL[typed].params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known, line


def test_results_are_those_of_the_recorded_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """RESULTS.md, its figure and the README's numbers hold exactly what the recorded runs render to."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    specification = importlib.util.spec_from_file_location("render_results", ROOT / "scripts" / "render_results.py")
    assert specification
    assert specification.loader
    render = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(render)
    records = render.read_records()
    assert (ROOT / "RESULTS.md").read_text() == render.results(
        records, render.read_records(render.REPEATED), render.read_records(render.ELSEWHERE)
    )
    readme = (ROOT / "README.md").read_text()
    assert readme == render.with_results(readme, records)
    assert render.FIGURE.read_text() == render.figure(records)
    assert records["quickstart"]["result"]["reports_equal_but_for_times"]
