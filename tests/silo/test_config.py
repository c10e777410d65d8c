"""Settings: what is unknown, missing or of another type is named, and overrides win."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from silo.config import apply_override, load_config
from silo.errors import UsageError


@dataclass(frozen=True)
class Inner:
    """A group of settings."""

    width: int = 3
    names: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Outer:
    """Settings with one of each type that recipes use."""

    path: Path
    rate: float = 0.5
    count: int = 1
    flag: bool = False
    kind: str | list[str] = "dense"
    limit: int | None = None
    where: Path | None = None
    inner: Inner = field(default_factory=Inner)
    free: dict[str, Any] = field(default_factory=dict)


def load(tmp_path: Path, text: str | bytes, *overrides: str) -> Outer:
    file = tmp_path / "settings.yaml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return load_config(Outer, file, overrides)


def test_every_type_is_read(tmp_path: Path):
    """Paths, numbers, unions, groups and free mappings come out as what the dataclass declares."""
    text = (
        "path: a/b\nrate: 1e-3\ncount: 7\nflag: true\nkind: [moe, dense]\nlimit: null\nwhere: c\n"
        "inner: {width: 4, names: [x]}\nfree: {anything: [1, {goes: 2}]}\n"
    )
    assert load(tmp_path, text) == Outer(
        path=Path("a/b"),
        rate=0.001,
        count=7,
        flag=True,
        kind=["moe", "dense"],
        where=Path("c"),
        inner=Inner(4, ["x"]),
        free={"anything": [1, {"goes": 2}]},
    )


def test_defaults_stand_where_nothing_is_said(tmp_path: Path):
    """Only what has no default must be there, and a whole number is a rate as well."""
    assert load(tmp_path, "path: a\nrate: 2") == Outer(path=Path("a"), rate=2.0)
    assert isinstance(load(tmp_path, "path: a\nrate: 2").rate, float)


def test_overrides_win(tmp_path: Path):
    """key=value replaces a setting of the file, dotted keys reach into groups, and the last one counts."""
    settings = load(
        tmp_path,
        "path: a\ncount: 7\ninner: {width: 4}",
        "count=8",
        "count=9",
        "inner.names=[y, z]",
        "free.a.b=1",
        "path=x=y",
    )
    assert settings == Outer(path=Path("x=y"), count=9, inner=Inner(4, ["y", "z"]), free={"a": {"b": 1}})


@pytest.mark.parametrize(
    ("text", "overrides", "said"),
    [
        ("path: a\ncoutn: 1", [], "unknown setting 'coutn'; known are count, flag"),
        ("path: a\n1: 1", [], "unknown setting 1"),
        ("path: a\ninner: {widht: 1}", [], "inner: unknown setting 'widht'; known are names, width"),
        ("count: 1", [], "setting 'path' is missing"),
        ("path: 3", [], "path is 3; expected Path"),
        ("path: a\ncount: 1.5", [], "count is 1.5; expected int"),
        ("path: a\ncount: '1'", [], "count is '1'; expected int"),
        ("path: a\ncount: true", [], "count is True; expected int"),
        ("path: a\nrate: fast", [], "rate is 'fast'; expected float"),
        ("path: a\nrate: true", [], "rate is True; expected float"),
        ("path: a\nflag: 1", [], "flag is 1; expected bool"),
        ("path: a\nlimit: x", [], "limit is 'x'; expected int or NoneType"),
        ("path: a\nkind: 3", [], "kind is 3; expected str or list"),
        ("path: a\ninner: 3", [], "inner is 3; expected a group of settings"),
        ("path: a\nfree: []", [], "free is []; expected dict"),
        ("- path", [], "holds a list; expected a mapping of settings"),
        ("", [], "holds a NoneType; expected a mapping"),
        ("path: [a", [], "is not valid YAML"),
        (b"path: \xff\xfe", [], "is not valid YAML"),
        ("path: a", ["count"], "'count' is not an override; expected key=value"),
        ("path: a", ["=3"], "'=3' is not an override"),
        ("path: a", ["count.x=3"], "count is {'x': 3}; expected int"),
        ("path: a\ncount: 1", ["count.x=3"], "'count' is not a group of settings"),
        ("path: a", ["inner.x=3"], "unknown setting 'x'"),
        ("path: a", ["kind=[dense"], "'kind=[dense' is not an override: its value is not valid YAML"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, text: str, overrides: list[str], said: str):
    """An unknown key, a missing one, another type or broken YAML is a UsageError that names file, key and value."""
    with pytest.raises(UsageError) as error:
        load(tmp_path, text, *overrides)
    assert said in str(error.value)
    assert "settings.yaml" in str(error.value) or overrides


def test_a_missing_file_is_named(tmp_path: Path):
    """A file that is not there, or is a directory, is a UsageError with its path."""
    with pytest.raises(UsageError, match=r"none\.yaml does not exist; expected a YAML file"):
        load_config(Outer, tmp_path / "none.yaml")
    with pytest.raises(UsageError, match="is a directory; expected a YAML file"):
        load_config(Outer, tmp_path)


def test_an_override_makes_its_groups():
    """Groups that the file does not have are made on the way."""
    values: dict[str, Any] = {}
    apply_override(values, "a.b.c=[1, 2]")
    assert values == {"a": {"b": {"c": [1, 2]}}}
