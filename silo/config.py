"""Settings: YAML files and ``key=value`` overrides become frozen dataclasses, and nothing unknown slips through."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from silo.errors import UsageError

T = TypeVar("T")


def load_config(cls: type[T], path: Path, overrides: Sequence[str] = ()) -> T:
    """Read a YAML mapping, apply dotted overrides such as ``model.num_experts=4``, and build ``cls``.

    Raises:
        UsageError: the file is missing or no mapping, a key is unknown, or a value has the wrong type.
    """
    try:
        values = yaml.safe_load(path.read_bytes())
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist; expected a YAML file") from None
    except IsADirectoryError:
        raise UsageError(f"{path} is a directory; expected a YAML file") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise UsageError(f"{path} holds a {type(values).__name__}; expected a mapping of settings")
    for override in overrides:
        apply_override(values, override)
    return build(cls, values, where=str(path))


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one dotted key in nested mappings; the value is read as YAML."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UsageError(f"{override!r} is not an override; expected key=value, such as seed=1 or model.ffn=dense")
    *parents, last = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise UsageError(f"{override!r}: {parent!r} is not a group of settings")
    try:
        values[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UsageError(f"{override!r} is not an override: its value is not valid YAML ({error})") from None


def build(cls: type[T], values: dict[str, Any], *, where: str) -> T:
    """Build a dataclass of a mapping, group by group. ``where`` names the mapping in a :class:`UsageError`."""
    hints = typing.get_type_hints(cls)
    known = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            raise UsageError(f"{where}: unknown setting {name!r}; known are {', '.join(sorted(known))}")
    for name, field in known.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise UsageError(f"{where}: setting {name!r} is missing")
    return cls(**{name: convert(value, hints[name], f"{where}: {name}") for name, value in values.items()})


def convert(value: Any, hint: Any, where: str) -> Any:
    """One setting as the type that it is declared to have. ``where`` names it in a :class:`UsageError`."""
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise UsageError(f"{where} is {value!r}; expected a group of settings")
        return build(hint, value, where=where)  # type: ignore[arg-type]
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        plain = typing.get_origin(option) or option
        if plain is Path and isinstance(value, str):
            return Path(value)
        if plain is float and isinstance(value, int | float | str) and not isinstance(value, bool):
            try:
                return float(value)  # YAML 1.1 reads 1e-3, without a dot, as a string.
            except ValueError:
                continue
        if isinstance(value, plain) and not (plain is int and isinstance(value, bool)):
            return value
    expected = " or ".join(getattr(option, "__name__", str(option)) for option in options)
    raise UsageError(f"{where} is {value!r}; expected {expected}")
