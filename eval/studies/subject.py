"""What a study is made on: a model, a store, text that is in neither, and how the mixtures are weighed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datastore.selection import Selection
from datastore.shard import DocumentRow
from datastore.store import Store
from eval import perplexity as measure
from eval.metrics import Sums
from eval.options import file_of_weights
from eval.perplexity import Scores, Text
from eval.suite_report import with_interval
from eval.suite_run import bytes_of
from silo.documents import Document, read_documents
from silo.gate import Gate
from silo.language_model import LanguageModel
from silo.mixture import Mixture
from silo.weights import METHODS, Weights, read_weights_file

Progress = Callable[[int, int], None]
Weighings = Mapping[str, Weights | Gate]
"""How each mixture that is reported is weighed, the model alone first."""


@dataclass(frozen=True)
class Subject:
    """Everything that is opened once for a study."""

    model: LanguageModel
    store: Store
    methods: list[str]
    test: list[Document]
    validation: list[Document]
    """What weights are fitted on; none if they are given."""
    given: Weighings
    """Weights that were given; none if they are to be fitted."""
    budget: int | None = None
    """Tokens of test text, and as many of validation text, that are read; None for all."""

    @classmethod
    def open(
        cls,
        model: Path,
        store: Path,
        methods: list[str],
        data: Sequence[Path],
        *,
        fit_on: Sequence[Path] = (),
        weights: Path | None = None,
        budget: int | None = None,
    ) -> Subject:
        """Read a subject's parts from their files.

        Args:
            model: its directory.
            store: its directory.
            methods: ``lm`` first.
            data: JSON Lines of test text.
            fit_on: JSON Lines of validation text, of other documents.
            weights: a gate, fitted weights, or ``gate`` for the store's own, in place of ``fit_on``.
            budget: see :attr:`budget`.

        Raises:
            UsageError: the weights are of other methods, or were fitted on the test text.
            DataError: a document is both fitted and reported on.
            StoreError: the store is another model's.
        """
        test, validation = ([each for file in files for each in read_documents(file)] for files in (data, fit_on))
        measure.require_disjoint(test, validation)
        lm, opened = LanguageModel.load(model), Store.open(store)
        opened.require_model(lm)
        if weights is None:
            return cls(lm, opened, methods, test, validation, {}, budget)
        value = read_weights_file(file_of_weights(weights, store))
        given = measure.weighings_from_json(value, methods, lm, where=str(weights))
        subject = cls(lm, opened, methods, test, validation, given, budget)
        measure.require_unfitted(value, test, subject.texts(test), where=str(weights))
        return subject

    @cached_property
    def left_out(self) -> Selection | None:
        """Documents of the store that are asked about too: they are not used, so that no position finds itself."""
        asked = {document.content_hash for document in (*self.test, *self.validation)}
        found = sorted(row.id for row in rows_of(self.store) if row.content_hash in asked)
        return Selection(documents=tuple(found)) if found else None

    def mixture(self, store: Store | None = None, allow: Selection | None = None) -> Mixture:
        """The model beside a store, the subject's own if none is given, or beside what ``allow`` names of it."""
        nearest = measure.looked_up_by(self.given.values(), None, where="the weights")
        return (store or self.store).mixture(self.model, self.methods, allow=allow, deny=self.left_out, nearest=nearest)

    def texts(self, documents: Sequence[Document], budget: int | None = None) -> list[Text]:
        """What is read of some documents, by default within the subject's budget."""
        return sampled(self.model, documents, budget or self.budget)

    def weighings(self, mixture: Mixture) -> Weighings:
        """The weights that were given; else such as are fitted with this mixture on the validation text."""
        if self.given:
            return self.given
        return measure.fit_combinations(measure.score(mixture, self.texts(self.validation)), self.methods)

    def described(self) -> dict[str, Any]:
        """What identifies it in a record."""
        left_out = self.left_out
        return {
            "model": self.model.fingerprint,
            "store": self.store.hash,
            "store_tokens": sum(entry.tokens for entry in self.store.manifest.shards.values()),
            "methods": self.methods,
            "left_out_of_store": list(left_out.documents) if left_out else [],
            "test": measure.data_hash(self.texts(self.test)),
            "validation": measure.data_hash(self.texts(self.validation)) if self.validation else None,
        }

    def perplexities(self, scores: Scores, texts: Sequence[Text], weighings: Weighings) -> dict[str, Any]:
        """Perplexity of each mixture on some texts: the value, and the ends of its interval over documents."""
        sizes = [bytes_of(text, self.model) for text in texts]
        return {
            name: with_interval(Sums.of(by_text(scores.log_probabilities(each).numpy(), scores), sizes), "perplexity")
            for name, each in weighings.items()
        }


def sampled(model: LanguageModel, documents: Sequence[Document], budget: int | None) -> list[Text]:
    """What a model reads of some documents, within a budget of tokens."""
    return measure.sample(documents, Mixture(model), budget)


def rows_of(store: Store) -> list[DocumentRow]:
    """The documents of a store, shard by shard."""
    return [row for rows in store.rows().values() for row in rows]


def by_text(values: np.ndarray, scores: Scores) -> list[np.ndarray]:
    """Values (n,) of all tokens, cut into those of each text."""
    return np.split(values, np.cumsum(scores.lengths)[:-1])


def take(scores: Scores, texts: Sequence[int]) -> Scores:
    """The scores of some of the texts, by their numbers, in that order."""
    ends = np.cumsum([0, *scores.lengths])
    where = np.concatenate([np.arange(ends[number], ends[number + 1]) for number in texts])
    return scores.rows(torch.from_numpy(where), [scores.lengths[number] for number in texts])


def most(names: Sequence[str]) -> str:
    """Of some mixtures, that of most methods."""
    return max(names, key=lambda name: (name in ("all", "gate"), name != "lm", -_place(name)))


def _place(name: str) -> int:
    method = name.removeprefix("lm+")
    return METHODS.index(method) if method in METHODS else len(METHODS)
