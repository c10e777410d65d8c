"""A model and a store, ready to generate: ``silo.load``."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datastore.policy import Named, QueryPolicy
from datastore.store import Store
from silo.causal_lm import MixtureForCausalLM
from silo.errors import UsageError
from silo.language_model import LanguageModel
from silo.mixture import Mixture
from silo.weights import METHODS, Weighing, Weights, read_weighing

if TYPE_CHECKING:
    from silo.in_context import InContext
    from silo.nearest import Nearest

OWN_GATE = "gate"
"""In place of a file of weights: the gate that the store keeps."""


def load(
    model: str | Path | LanguageModel,
    *,
    store: str | Path | Store | None = None,
    use: Sequence[str] | None = None,
    weights: str | Path | Mapping[str, Any] | Weighing | None = None,
    allow: Named = None,
    deny: Named = None,
    purpose: str | None = None,
    in_context: InContext | None = None,
    nearest: Nearest | None = None,
) -> MixtureForCausalLM:
    """Load a model beside what some documents of a store answer, as a causal language model of transformers.

    Args:
        model: a directory of ours or of any causal model of Hugging Face's.
        store: of that model; without one the model is alone.
        use: ``lm``, and of ``knn``, ``ric`` and ``ngram`` what is wanted; if absent, what is weighed.
        weights: a JSON file, of a gate or of weights, or a mapping, as :func:`silo.weights.read_weighing` takes them,
            such as ``{"knn": 0.3}``; or a weighing. If absent, or ``"gate"``, the store's own gate.
        allow: documents that may be used, if not all: patterns of licences such as ``"CC-BY-*"``, or a mapping such as
            ``{"owners": ["Ada"], "sources": ["mail"]}``, of which a document needs one.
        deny: documents that may not, in the same way.
        purpose: ``"commercial"`` or ``"research"``: only documents whose licence permits it.
        in_context: how blocks are looked up and read.
        nearest: how neighbours are looked up, and which searches are spared (:class:`silo.nearest.Nearest`); as they
            were when the weights were made, if absent. With others there is a warning.

    Raises:
        UsageError: what is asked for does not fit together.
        StoreError: the store is of another model.
    """
    policy = QueryPolicy.of(allow, deny, purpose)
    opened = Store.open(Path(store)) if isinstance(store, (str, Path)) else store
    weighing = choose_weighing(weights, use, opened)
    lm = model if isinstance(model, LanguageModel) else LanguageModel.load(Path(model))
    if opened is not None:  # also for the model alone: a limit on copies is of the store's tokens
        opened.require_model(lm)
    if opened is None or list(weighing.methods) == ["lm"]:
        return MixtureForCausalLM(Mixture(lm), weighing, opened.ngrams if opened is not None else None)
    way = _lookup(nearest, weighing)
    mixture = opened.mixture(lm, weighing.methods, in_context=in_context, nearest=way, **policy.selections(opened))
    return MixtureForCausalLM(mixture, weighing, opened.ngrams)


def load_by(
    policy: QueryPolicy, model: Path, *, store: Path | None, use: str | None, weights: str | Path | None
) -> MixtureForCausalLM:
    """As :func:`load`, for what a command line says: a policy, and methods such as ``lm,knn``.

    Raises:
        UsageError: there is a policy and no store that it could choose from, or as :func:`load`.
    """
    if store is None and policy.to_json():
        raise UsageError("--allow, --deny and --purpose choose from a store; give --store")
    methods = use.split(",") if use else None
    choice = {"allow": policy.allow, "deny": policy.deny, "purpose": policy.purpose}
    return load(model, store=store, use=methods, weights=weights, **choice)  # type: ignore[arg-type]


def _lookup(nearest: Nearest | None, weighing: Weighing) -> Nearest | None:
    """How neighbours are looked up; a warning if the weights were learnt by others."""
    learnt = weighing.nearest if "knn" in weighing.methods else None
    if nearest is not None and learnt is not None and nearest != learnt:
        warnings.warn(
            f"the weights were made with {learnt}, and neighbours are looked up with {nearest}; they may be far off: "
            "make others with these, as `silo eval perplexity` and `silo eval gate` do with --neighbours and --probes",
            stacklevel=3,
        )
    return nearest or learnt


def choose_weighing(
    weights: str | Path | Mapping[str, Any] | Weighing | None, use: Sequence[str] | None, store: Store | None
) -> Weighing:
    """The weights that are meant. Raises :class:`UsageError` if none are, or they do not fit ``use`` or the store."""
    unknown = sorted(set(use or ()) - set(METHODS))
    if unknown or (use is not None and "lm" not in use):
        raise UsageError(f"use {', '.join(use or ())}; expected lm, and some of {', '.join(METHODS[1:])}")
    alone = set(use or ()) == {"lm"} or (use is None and weights is None and store is None)
    found = Weights({"lm": 1.0}) if alone else _weighing(weights, use, store)
    if store is None and set(found.methods) != {"lm"}:
        raise UsageError(f"{', '.join(found.methods[1:])} cannot be used without a store; give one")
    return found


def _weighing(
    weights: str | Path | Mapping[str, Any] | Weighing | None, use: Sequence[str] | None, store: Store | None
) -> Weighing:
    if weights is None:
        if store is None or not store.manifest.gate:
            raise UsageError(
                "a store without weights; teach it a gate with `silo eval gate`, or give weights: a file that `silo "
                'eval perplexity --fit FILE --save-weights` wrote, or λ by method such as {"knn": 0.3}'
            )
        weights = OWN_GATE
    if store is not None and weights == OWN_GATE:
        weights = store.gate_path()
    if isinstance(weights, (str, Path, Mapping)):
        return read_weighing(weights, use, model=store.manifest.model["fingerprint"] if store is not None else None)
    return weights
