"""Training sequences out of a tokenised corpus: which documents, in what order, and how often.

Documents of one domain are laid end to end, in an order that the seed decides, and cut into sequences of one length;
when they are used up they are laid out again, in another order. A step draws its sequences from the domains by weight.
Everything is worked out from each document's range of tokens: the tokens themselves stay on disk until they are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch

from silo.errors import UsageError
from training.tokens import Tokens

IGNORED = -100
"""The label of a token that is read but not learnt, such as a prompt's."""
RARE_SHARE, RARE_REPEATS = 0.05, 3
"""SILO (section 3.2) counts a domain with less than this share of the tokens three times."""


KEPT_DOCUMENTS = 16_000_000
"""Passes over a domain are kept, in case a step goes back to them, while they hold so many documents: 256 MB."""


class Domain:
    """The documents of one domain, in an endless, seeded order."""

    def __init__(self, begins: np.ndarray, prompts: np.ndarray, ends: np.ndarray, *, length: int, seed: int) -> None:
        self._begins, self._prompts, self._ends = begins, prompts, ends
        self._length, self._seed = length, seed
        self._passes: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    @property
    def tokens(self) -> int:
        """How many tokens it has."""
        return int((self._ends - self._begins).sum())

    @property
    def sequences(self) -> int:
        """How many whole sequences one pass over it gives."""
        return self.tokens // self._length

    def spans(self, index: int) -> list[tuple[int, int, int, int]]:
        """The pieces of sequence ``index``: (begin, end) of each, and of the prompt in it, in positions of the split.

        Pass after pass is cut into whole sequences; what is left of a pass is not used.
        """
        number, within = divmod(index, self.sequences)
        order, starts = self._laid_out(number)
        at, stop = within * self._length, (within + 1) * self._length
        pieces = []
        place = int(np.searchsorted(starts, at, side="right")) - 1
        while at < stop:
            document = order[place]
            first = int(self._begins[document])
            begin = first + at - int(starts[place])
            end = min(int(self._ends[document]), begin + stop - at)
            pieces.append((begin, end, first + 1, first + 1 + int(self._prompts[document])))
            at += end - begin
            place += 1
        return pieces

    def documents(self, index: int) -> np.ndarray:
        """Which of its documents gave a token to sequence ``index``, in their order there."""
        number, within = divmod(index, self.sequences)
        order, starts = self._laid_out(number)
        first = np.searchsorted(starts, within * self._length, side="right") - 1
        return order[first : np.searchsorted(starts, (within + 1) * self._length, side="left")]

    def teaches(self, index: int) -> bool:
        """Whether a sequence has a token to learn behind its first, which is not predicted. Without one, its loss would
        be no number."""
        learnt = 0
        for place, (begin, end, hidden, shown) in enumerate(self.spans(index)):
            begin += place == 0
            learnt += end - begin - max(0, min(end, shown) - max(begin, hidden))
        return learnt > 0

    def used(self, sequences: int) -> np.ndarray:
        """Which of its documents gave a token to the first ``sequences`` sequences, (documents,) bool."""
        seen = np.zeros(len(self._begins), dtype=bool)
        for number in range(-(-sequences // max(1, self.sequences))):
            order, starts = self._laid_out(number)
            last = min(self.sequences, sequences - number * self.sequences) * self._length
            seen[order[starts[: len(order)] < last]] = True
        return seen

    def _laid_out(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of one pass, and where each document begins in it."""
        found = self._passes.pop(number, None)
        if found is None:
            order = np.random.default_rng([self._seed, number]).permutation(len(self._begins))
            found = order, np.concatenate([[0], np.cumsum((self._ends - self._begins)[order])])
        self._passes[number] = found
        if len(self._passes) * len(self._begins) > KEPT_DOCUMENTS and len(self._passes) > 1:
            del self._passes[next(iter(self._passes))]  # that which was not asked for longest
        return found


class Mixture:
    """The domains of a tokenised corpus, and how much each counts."""

    def __init__(self, tokens: Tokens, split: str, *, by: str | None, length: int, seed: int) -> None:
        """Sort the documents of a split into domains.

        Args:
            tokens: the corpus.
            split: ``train`` or ``val``.
            by: the field of a document that names its domain, such as ``source``; None for one domain of all.
            length: tokens a sequence.
            seed: decides the order of documents.
        """
        self._tokens, self._split, self._array = tokens, split, tokens.array(split)
        rows: dict[str, list[tuple[int, int, int]]] = {}
        self._members: dict[str, list[int]] = {}
        for number, row in enumerate(row for row in tokens.rows if row.split == split):
            name = str(getattr(row, by)) if by else "all"
            rows.setdefault(name, []).append((row.begin, row.prompt, row.end))
            self._members.setdefault(name, []).append(number)
        self.length = length
        self.domains = {
            name: Domain(*np.asarray(rows[name], dtype=np.int64).T, length=length, seed=seed + index)
            for index, name in enumerate(sorted(rows))
        }
        self._taken = dict.fromkeys(self.domains, 0)
        self._random = np.random.default_rng([seed, 0x51])

    def natural_weights(self, *, upsample: bool) -> dict[str, float]:
        """Each domain by its number of tokens, rare ones three times if ``upsample``; they sum to 1."""
        sizes = {name: domain.tokens if domain.sequences else 0 for name, domain in self.domains.items()}
        total = sum(sizes.values()) or 1
        if upsample:
            sizes = {name: size * (RARE_REPEATS if size < RARE_SHARE * total else 1) for name, size in sizes.items()}
        return _normalized(sizes)

    def given_weights(self, shares: Mapping[str, float]) -> dict[str, float]:
        """Weights by pattern of a domain's name; domains of one pattern share its weight by their tokens.

        Raises:
            UsageError: a pattern fits no domain with a whole sequence, or nothing is left to train on.
        """
        weights = dict.fromkeys(self.domains, 0.0)
        for pattern, share in shares.items():
            fit = {name: d.tokens for name, d in self.domains.items() if fnmatchcase(name, pattern) and d.sequences}
            if not fit:
                known = ", ".join(sorted(self.domains)[:5])
                raise UsageError(f"mixture: {pattern!r} fits no domain; there are {len(self.domains)}, such as {known}")
            for name, part in _normalized(fit).items():
                weights[name] += share * part
        return _normalized(weights)

    def draw(self, count: int, weights: Mapping[str, float]) -> list[tuple[str, int]]:
        """The next ``count`` sequences, from the domains by weight, in random order; domain and index of each.

        As many come from each domain as its weight asks for, rounded at random. A sequence that lies within a prompt
        has nothing to learn, and the next takes its place.
        """
        names = sorted(weights)
        exact = np.asarray([weights[name] for name in names]) * count
        shares = np.floor(exact).astype(int)
        rest = exact - shares
        missing = count - int(shares.sum())
        if missing:
            np.add.at(shares, self._random.choice(len(names), missing, p=rest / rest.sum()), 1)
        chosen = []
        for name, share in zip(names, shares, strict=True):
            chosen += [(name, index) for index in self._take(name, int(share))]
        return [chosen[index] for index in self._random.permutation(len(chosen))]

    def _take(self, name: str, count: int) -> Iterator[int]:
        """The next ``count`` sequences of a domain that have something to learn."""
        domain, given = self.domains[name], self._taken[name]
        while count:
            if self._taken[name] - given > 2 * domain.sequences:
                raise UsageError(f"domain {name!r} has nothing but prompts; leave it out of the mixture")
            if domain.teaches(self._taken[name]):
                yield self._taken[name]
                count, given = count - 1, self._taken[name]
            self._taken[name] += 1

    def used(self) -> np.ndarray:
        """The documents that gave a token to what was drawn so far: their numbers in the split, sorted."""
        found = [
            np.asarray(self._members[name])[domain.used(self._taken[name])] for name, domain in self.domains.items()
        ]
        return np.sort(np.concatenate(found)) if found else np.zeros(0, dtype=np.int64)

    def state(self) -> dict[str, Any]:
        """How far it was drawn, as JSON: what :meth:`restore` needs to draw the same again."""
        return {"taken": dict(self._taken), "random": self._random.bit_generator.state}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go back to where :meth:`state` was asked for."""
        self._taken = dict(state["taken"])
        self._random.bit_generator.state = state["random"]

    def documents(self, sequences: Sequence[tuple[str, int]]) -> list[str]:
        """The ids of the documents that gave a token to some sequences, (domain, index) each, in the corpus's order."""
        numbers = {
            self._members[name][each] for name, index in sequences for each in self.domains[name].documents(index)
        }
        rows = (row for row in self._tokens.rows if row.split == self._split)
        return [row.id for number, row in enumerate(rows) if number in numbers]

    def batch(self, sequences: Sequence[tuple[str, int]]) -> dict[str, torch.Tensor]:
        """Some sequences, (domain, index) each, as a model takes them: ``input_ids`` and ``labels``, (sequences,
        length) int64."""
        ids, labels = zip(*(self.sequence(*each) for each in sequences), strict=True)
        return {"input_ids": torch.from_numpy(np.stack(ids)), "labels": torch.from_numpy(np.stack(labels))}

    def first(self, name: str, count: int) -> list[tuple[str, int]]:
        """The first sequences of a domain, at most one pass, to measure on."""
        domain = self.domains[name]
        return [(name, index) for index in range(min(count, domain.sequences)) if domain.teaches(index)]

    def sequence(self, domain: str, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and labels of one sequence, each (length,) int64."""
        ids, labels = [], []
        for begin, end, hidden, shown in self.domains[domain].spans(index):
            piece = self._array[begin:end].astype(np.int64)
            positions = np.arange(begin, end)
            ids.append(piece)
            labels.append(np.where((positions >= hidden) & (positions < shown), IGNORED, piece))
        return np.concatenate(ids), np.concatenate(labels)


def _normalized(weights: Mapping[str, float]) -> dict[str, float]:
    total = sum(weights.values())
    if not total > 0:
        raise UsageError(
            "no domain with a weight above 0 has a whole training sequence; collect more text, lower "
            "sequence_length, or give such a domain a weight"
        )
    return {name: weight / total for name, weight in weights.items()}
