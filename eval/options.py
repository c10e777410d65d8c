"""What the commands of ``silo eval`` ask for alike."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from silo.errors import UsageError

if TYPE_CHECKING:
    from silo.licensing import Policy

RULES = click.option(
    "--policy", "rules", type=click.Path(path_type=Path), help="Licence policy file that judges the text to learn from."
)
METHODS = ("lm", "knn", "ric", "ngram")
ELSE = "without both options, as given weights say"


def parse_methods(ctx: click.Context, parameter: click.Parameter, value: str) -> list[str]:
    """Read ``lm,knn,ric``."""
    methods = value.split(",")
    unknown = [method for method in methods if method not in METHODS]
    if unknown or methods[0] != "lm" or len(set(methods)) != len(methods):
        raise click.BadParameter(f"{value!r}; expected lm, or lm and some of knn, ric and ngram, such as lm,knn")
    return methods


def nearest_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command options that say how neighbours are looked up; it gets ``nearest``, None if nothing is said."""
    count = click.IntRange(min=1)

    @click.option("--neighbours", "k", type=count, help=f"Of each token.  [default: 256; {ELSE}]")
    @click.option("--probes", type=count, help=f"Inverted lists read for each.  [default: 4; {ELSE}]")
    @functools.wraps(function)
    def command(*args: Any, k: int | None, probes: int | None, **kwargs: Any) -> Any:
        from silo.nearest import USUAL, Nearest

        asked = Nearest(k=k or USUAL.k, probes=probes or USUAL.probes) if k or probes else None
        return function(*args, nearest=asked, **kwargs)

    return command


def require_options(methods: list[str], store: Path | None, fit_on: Path | None, weights: Path | None) -> None:
    """Raise :class:`UsageError` for options that do not fit together."""
    if fit_on and weights:
        raise UsageError("--fit and --weights were both given; choose one")
    if len(methods) > 1 and store is None:
        raise UsageError(f"--use {','.join(methods)} needs --store")
    if len(methods) > 1 and not (fit_on or weights):
        raise UsageError("a mixture needs weights: give --fit FILE with validation text, or --weights FILE")


def licence_policy(path: Path | None) -> Policy:
    """The policy in a file, or the default one."""
    from silo.licensing import DEFAULT_POLICY, load_policy

    return load_policy(path) if path is not None else DEFAULT_POLICY


def require_used(
    store: Path | None, fit_on: Path | None, save_weights: Path | None, rules: Path | None, *, of_store: bool
) -> None:
    """Raise :class:`UsageError` for options that would have no effect; ``of_store``: whether there is one that only
    concerns a store."""
    if save_weights and not fit_on:
        raise UsageError("--save-weights writes what was fitted, and nothing is; give --fit FILE with validation text")
    if rules and not fit_on:
        raise UsageError("--policy judges the text of --fit, and there is none; give --fit FILE, or no --policy")
    if of_store and store is None:
        raise UsageError("--allow, --deny, --purpose, --neighbours and --probes choose from a store; give --store")


def file_of_weights(weights: Path, store: Path | None) -> Path:
    """The file of weights that is meant: the store's own gate, if ``gate`` is."""
    from datastore.loading import OWN_GATE
    from datastore.store import Store

    return Store.open(store).gate_path() if store is not None and str(weights) == OWN_GATE else weights
