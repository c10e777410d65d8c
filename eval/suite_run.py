"""Running a suite: one cell for each model and domain, each in a file of its own, so that a run can be taken up again.

A cell's name is the hash of all that determines it: model, store, methods, windows, text and weights. What is there
under that name is not measured again, whatever else of the suite was changed. Weights are fitted on validation text
into a file first, and the test text is scored with what the file says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from datastore.loading import OWN_GATE
from datastore.selection import Selection
from datastore.store import Store
from eval import perplexity as measure
from eval.leakage import leakage
from eval.metrics import Sums, bytes_before
from eval.perplexity import Text
from eval.protocols import Protocol
from eval.suite import Entry, Suite, Texts, documents_hash, read_domains
from silo.errors import UsageError
from silo.files import canonical_json, read_sealed, sealed, sha256, sha256_file, write_json
from silo.gate import Gate
from silo.language_model import LanguageModel
from silo.mixture import Mixture
from silo.nearest import Nearest
from silo.weights import METHODS, Weights, read_weights_file

FORMAT = 1
MODEL_ALONE: dict[str, Any] = {"mixtures": {"lm": {"weights": {"lm": 1.0}, "temperature": 1.0}}}

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Contestant:
    """A model of a suite, opened."""

    name: str
    entry: Entry
    mixture: Mixture
    store: Store | None
    protocol: Protocol | None
    left_out: tuple[str, ...] = ()
    """Documents of the store that are asked about, and so do not answer."""

    @classmethod
    def open(cls, name: str, entry: Entry, protocol: Protocol | None, base: Path) -> Contestant:
        """Load the model, and its store if it has one. Raises :class:`UsageError`, :class:`StoreError`."""
        model = LanguageModel.load(base / entry.path)
        if protocol is not None:
            protocol.require_context(model.key_spec.context)
        store = Store.open(base / entry.store) if entry.store is not None else None
        mixture = Mixture(model)
        if store is not None:
            mixture = store.mixture(model, entry.use, nearest=lookup(entry, store, model, base))
        if protocol is not None:
            mixture.model = model.reading_by(protocol.cut)
        return cls(name, entry, mixture, store, protocol)

    def asked(self, domain: Texts) -> Contestant:
        """The same without the documents of a domain, if its store has them, so that no position finds itself."""
        if self.store is None:
            return self
        hashes = {document.content_hash for document in (*domain.test, *domain.validation)}
        present = sorted(row.id for rows in self.store.rows().values() for row in rows if row.content_hash in hashes)
        if not present:
            return self
        deny, nearest = Selection(documents=tuple(present)), self.mixture.nearest
        mixture = self.store.mixture(self.mixture.model, self.entry.use, deny=deny, nearest=nearest)
        return replace(self, mixture=mixture, left_out=tuple(present))

    def leakage(self, texts: Sequence[Text]) -> dict[str, Any] | None:
        """What its store holds of some texts, but for the documents that do not answer; None without a store."""
        if self.store is None:
            return None
        seen = self.store.select(deny=Selection(documents=self.left_out)) if self.left_out else self.store
        return leakage(seen.ngrams(), [text.tokens for text in texts])

    def described(self) -> dict[str, Any]:
        """What identifies it in a result."""
        return {
            "model": self.mixture.model.fingerprint,
            "store": self.store.hash if self.store is not None else None,
            "left_out_of_store": list(self.left_out),
            "use": list(self.entry.use),
            "nearest": self.mixture.nearest.to_json() if self.store is not None else None,
        }

    def windows(self) -> dict[str, Any]:
        """How it reads, for a result."""
        if self.protocol is not None:
            return {"kind": self.protocol.kind, "context": self.protocol.context, "stride": self.protocol.stride}
        spec = self.mixture.model.key_spec
        return {"kind": "alone", "context": spec.context, "stride": spec.stride}

    def score(self, texts: Sequence[Text], progress: Progress | None = None) -> measure.Scores:
        """Score texts, each alone or all in one stream; in both cases one text after the other."""
        if self.protocol is None or self.protocol.kind == "alone" or not texts:
            return measure.score(self.mixture, texts, progress=progress)
        stream = Text(texts[0].document, np.concatenate([text.tokens for text in texts]))
        return measure.score(self.mixture, [stream], progress=progress)


def named_weights(entry: Entry, store: Store, base: Path) -> Path | None:
    """The file of weights that a suite names; None if they are to be fitted."""
    if entry.weights is None:
        return None
    return store.gate_path() if str(entry.weights) == OWN_GATE else base / entry.weights


def lookup(entry: Entry, store: Store, model: LanguageModel, base: Path) -> Nearest | None:
    """How neighbours are looked up: as the suite says, or as they were when its weights were made. Raises
    :class:`UsageError` if both say something, and not the same."""
    path = named_weights(entry, store, base)
    if path is None:
        return entry.lookup
    weighings = measure.weighings_from_json(read_weights_file(path), entry.use, model, where=str(path))
    return measure.looked_up_by(weighings.values(), entry.lookup, where=str(path))


@dataclass(frozen=True)
class Cell:
    """One model on one domain, measured."""

    model: str
    domain: str
    permissive: bool
    record: dict[str, Any]

    def sums(self, mixture: str) -> Sums:
        """What was measured with one mixture."""
        return Sums(
            np.asarray(self.record["log_probability"][mixture]),
            np.asarray(self.record["tokens"], dtype=np.int64),
            np.asarray(self.record["bytes"], dtype=np.int64),
        )

    @property
    def mixtures(self) -> list[str]:
        """The mixtures that were measured, the model alone first and all methods together last."""
        order = ["lm", *(f"lm+{method}" for method in METHODS), "all", "gate"]
        return sorted(self.record["log_probability"], key=order.index)


def run(suite: Suite, out: Path, base: Path, progress: Progress | None = None) -> list[Cell]:
    """Measure what is not yet in ``out``, and give all cells in the order of the suite.

    Args:
        suite: which models on which text.
        out: where ``cells`` and ``weights`` are kept.
        base: to which the suite's paths are relative.
        progress: is told how many cells are done, and how many there are.

    Raises:
        DataError: text cannot be read, is not the pinned one, or is both fitted and reported on.
        UsageError: a model needs weights and a domain has no validation text.
    """
    domains = read_domains(suite, base)
    for domain in domains:
        measure.require_disjoint(domain.test, domain.validation)
    require_weights(suite, domains)
    for name in ("cells", "weights"):
        (out / name).mkdir(parents=True, exist_ok=True)
    cells: list[Cell] = []
    total = len(suite.models) * len(domains)
    for name, entry in suite.models.items():
        contestant = Contestant.open(name, entry, suite.protocol, base)
        for domain in domains:
            record = measured(contestant.asked(domain), domain, out, base)
            cells.append(Cell(name, domain.name, domain.permissive, record))
            if progress:
                progress(len(cells), total)
    return cells


def require_weights(suite: Suite, domains: Sequence[Texts]) -> None:
    """Raise :class:`UsageError` unless every mixture has weights, or text to fit them on."""
    for name, entry in suite.models.items():
        for domain in domains:
            if len(entry.use) > 1 and entry.weights is None and not domain.validation:
                raise UsageError(
                    f"model {name!r} needs weights for {domain.name!r}: give the domain validation text, or the model "
                    "a file of weights"
                )


def measured(contestant: Contestant, domain: Texts, out: Path, base: Path) -> dict[str, Any]:
    """One cell, from its file if it is there."""
    weights = weights_file(contestant, domain, out, base)
    texts = measure.sample(domain.test, contestant.mixture, domain.tokens)
    determined = {
        "format": FORMAT,
        **contestant.described(),
        "windows": contestant.windows(),
        "data": measure.data_hash(texts),
        "weights": sha256_file(weights) if weights is not None else None,
    }
    path = out / "cells" / f"{sha256(canonical_json(determined))[:24]}.json"
    if path.is_file():
        return read_sealed(path, FORMAT)
    record = sealed({**determined, **score_cell(contestant, texts, weights), "text": documents_hash(domain.test)})
    write_json(path, record)
    return record


def score_cell(contestant: Contestant, texts: Sequence[Text], weights: Path | None) -> dict[str, Any]:
    """Score the test text of a cell with the weights that a file holds."""
    model = contestant.mixture.model
    value = read_weights_file(weights) if weights is not None else MODEL_ALONE
    weighings: Mapping[str, Weights | Gate] = measure.weighings_from_json(
        value, contestant.entry.use, model, where=str(weights)
    )
    scores = contestant.score(texts)
    lengths = [len(text.tokens) for text in texts]
    sums = {
        name: [float(part.sum()) for part in scores.log_probabilities(weighing).split(lengths)]
        for name, weighing in weighings.items()
    }
    return {
        "documents": [text.document.content_hash for text in texts],
        "licenses": sorted({text.document.license for text in texts}),
        "tokens": lengths,
        "bytes": [bytes_of(text, model) for text in texts],
        "log_probability": sums,
        "mixtures": {name: measure.described(each, scores.evidence) for name, each in weighings.items()},
        "leakage": contestant.leakage(texts),
    }


def bytes_of(text: Text, model: LanguageModel) -> int:
    """UTF-8 bytes of the passage that was scored."""
    whole = text.document.full_text
    found = model.tokenizer(whole, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    before = bytes_before(whole, [end for _, end in found["offset_mapping"]])
    return int(before[text.begin + len(text.tokens)] - before[text.begin])


def weights_file(contestant: Contestant, domain: Texts, out: Path, base: Path) -> Path | None:
    """The file of weights for one cell: the one that the suite names, or one fitted on validation text; None without
    a store."""
    entry = contestant.entry
    if contestant.store is None:
        return None
    named = named_weights(entry, contestant.store, base)
    if named is not None:
        require_unfitted(read_weights_file(named), domain, contestant, named)
        return named
    texts = measure.sample(domain.validation, contestant.mixture, domain.fit_tokens)
    fitted_on = {**contestant.described(), "windows": contestant.windows(), "fitted_on": measure.data_hash(texts)}
    path = out / "weights" / f"{sha256(canonical_json(fitted_on))[:24]}.json"
    if not path.is_file():
        fitted = measure.fit_combinations(contestant.score(texts), entry.use)
        mixtures = {name: each.to_json() for name, each in fitted.items()}
        write_json(path, {**fitted_on, "mixtures": mixtures, "texts": sorted(text_hashes(texts))})
    return path


def text_hashes(texts: Sequence[Text]) -> Iterator[str]:
    """The contents of the documents behind some texts."""
    return (text.document.content_hash for text in texts)


def require_unfitted(value: Any, domain: Texts, contestant: Contestant, path: Path) -> None:
    """Raise :class:`UsageError` if a file of weights was fitted on the text that is to be reported on."""
    texts = measure.sample(domain.test, contestant.mixture, domain.tokens)
    measure.require_unfitted(value, domain.test, texts, where=str(path), whose=f"the test text of {domain.name!r}")
