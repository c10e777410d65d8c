"""Some of a store's documents, searched as if there were no others."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

import numpy as np

from datastore.blocks import BlockIndex, selected_blocks
from datastore.bm25 import K1, B
from datastore.group_texts import GroupTexts
from datastore.keys import KeyGroup
from silo.errors import StoreError
from silo.retrieval import PROBES, Metric

if TYPE_CHECKING:
    from datastore.control import ControlPlane
    from datastore.knn import NeighbourIndex
    from datastore.ngrams import NgramIndex
    from silo.in_context import InContext
    from silo.language_model import LanguageModel
    from silo.mixture import Mixture
    from silo.nearest import Nearest


OfKind = TypeVar("OfKind", bound=GroupTexts)


class Part(NamedTuple, Generic[OfKind]):
    """A group, or a part of one."""

    directory: Path
    texts: OfKind
    """Its documents, with what this kind of group knows of them."""
    selected: np.ndarray | None
    """(documents,) bool, which of them count; None for all."""


class View:
    """What some documents answer: the same as a store that holds only these, bit for bit.

    Making one costs next to nothing. Neighbours and n-grams are masked where they lie. BM25 counts in how many blocks a
    word stands, so of a group of which only a part is selected this part is cut out, in memory, when it is first asked
    (about a second for four million tokens); groups that are selected as a whole are read from disk.
    """

    def __init__(
        self, groups: Sequence[Part[KeyGroup]], ngrams: Sequence[Part[GroupTexts]], control: ControlPlane
    ) -> None:
        """Look at the same documents in groups of both kinds, as :mod:`datastore.groups` has them; ``control`` is the
        store's."""
        self._groups, self._ngrams, self._control = _narrowed(groups), _narrowed(ngrams), control

    @property
    def num_documents(self) -> int:
        """How many documents there are."""
        return sum(len(each.texts.ids) if each.selected is None else int(each.selected.sum()) for each in self._groups)

    @contextlib.contextmanager
    def _as_chosen(self) -> Iterator[None]:
        """Say so if files are gone that are opened, because the store was changed before or meanwhile."""
        self._require_files()
        try:
            yield
        except (OSError, StoreError):
            self._require_files()
            raise

    def _require_files(self) -> None:
        """Raise :class:`silo.errors.StoreError` where they are gone: what is mapped could be read all the same."""
        for directory in (*(each.directory for each in self._groups), *(each.directory for each in self._ngrams)):
            if not directory.is_dir():
                raise StoreError(f"{directory.parents[1]} was changed since it was opened; open it again")

    def neighbours(self, *, probes: int = PROBES, metric: Metric = "l2") -> NeighbourIndex:
        """The kNN index, mapped from disk; ``probes`` and ``metric`` are as in :class:`silo.nearest.Nearest`."""
        from datastore.knn import NeighbourIndex  # which needs torch

        with self._as_chosen():
            groups, selected = [each.texts for each in self._groups], [each.selected for each in self._groups]
            return NeighbourIndex(groups, self._control, selected, probes=probes, metric=metric)

    def blocks(self, *, k1: float = K1, b: float = B) -> BlockIndex:
        """The BM25 index; starts a JVM. Of ``k1`` and ``b`` see :class:`datastore.bm25.BM25Searcher`."""
        with self._as_chosen():
            indexes = [
                directory / "blocks" if mask is None else selected_blocks(directory / "blocks", keys, mask)
                for directory, keys, mask in self._groups
            ]
            return BlockIndex(indexes, [each.texts for each in self._groups], k1=k1, b=b)

    def ngrams(self) -> NgramIndex:
        """The ∞-gram, mapped from disk."""
        from datastore.ngrams import NgramIndex  # which needs numba
        from datastore.suffixes import Suffixes

        with self._as_chosen():
            groups = [Suffixes.open(each.texts, each.directory / "suffixes") for each in self._ngrams]
            return NgramIndex(groups, [each.selected for each in self._ngrams])

    def mixture(
        self,
        model: LanguageModel,
        use: Sequence[str],
        in_context: InContext | None = None,
        nearest: Nearest | None = None,
    ) -> Mixture:
        """A model beside what these documents answer.

        Args:
            model: the one whose keys the store holds.
            use: ``lm``, and of ``knn``, ``ric`` and ``ngram`` what is wanted; a JVM starts for ``ric`` only.
            in_context: how blocks are looked up and read.
            nearest: how neighbours are looked up.
        """
        from silo.mixture import Mixture
        from silo.nearest import USUAL

        way = nearest or USUAL
        return Mixture(
            model,
            neighbours=self.neighbours(probes=way.probes, metric=way.metric) if "knn" in use else None,
            blocks=self.blocks() if "ric" in use else None,
            ngrams=self.ngrams() if "ngram" in use else None,
            in_context=in_context,
            nearest=way,
        )


def _narrowed(parts: Sequence[Part[OfKind]]) -> list[Part[OfKind]]:
    """Those that have any documents; those that have all say so."""
    filled = [each for each in parts if each.selected is None or each.selected.any()]
    whole = [each.selected is None or each.selected.all() for each in filled]
    return [each._replace(selected=None) if all else each for all, each in zip(whole, filled, strict=True)]
