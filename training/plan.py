"""Which sequences a run trains on, step by step, and where it stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from silo.errors import UsageError
from training.data import Mixture
from training.recipe import Recipe
from training.tokens import Tokens

ROUND_SEQUENCES = 1 << 16
"""Sequences that are drawn at once, where no re-weighting asks for fewer; the list of a whole run would not fit."""


@dataclass
class Plan:
    """The sequences of a run, drawn round by round; between rounds the weights of the domains may change."""

    mixture: Mixture
    weights: dict[str, float]
    """Share of each domain in the next round."""
    steps: int
    batch_size: int
    """Sequences a step, of all processes together."""
    round_steps: int
    """Steps a round."""
    step: int = 0
    """Steps that were handed out."""
    _drawn: Sequence[tuple[str, int]] = ()
    _begin: int = 0
    """The step before this round."""
    _before: dict[str, Any] = field(default_factory=dict)
    """The mixture's state before this round was drawn."""

    @classmethod
    def make(cls, recipe: Recipe, tokens: Tokens) -> Plan:
        """Plan a run.

        Raises:
            UsageError: the corpus is too small for one step, or the recipe's mixture does not fit it.
        """
        mixture = Mixture(tokens, "train", by=recipe.domains, length=recipe.sequence_length, seed=recipe.seed)
        found = sum(domain.sequences for domain in mixture.domains.values())
        if found < recipe.batch_size:
            raise UsageError(
                f"{recipe.corpus} gives {found} training sequences of {recipe.sequence_length} tokens, and a step "
                f"takes {recipe.batch_size}; collect more text, or lower batch_size or sequence_length"
            )
        if recipe.mixture is not None:
            weights = mixture.given_weights(recipe.mixture)
        else:
            weights = mixture.natural_weights(upsample=recipe.upsample)
        round_steps = recipe.reweight_every or max(1, ROUND_SEQUENCES // recipe.batch_size)
        return cls(mixture, weights, recipe.steps, recipe.batch_size, round_steps)

    @property
    def between_rounds(self) -> bool:
        """Whether a round is over and the next is not drawn yet, so that weights may still be changed."""
        return self.step == self._begin + len(self._drawn) // self.batch_size

    def next_batch(self) -> Sequence[tuple[str, int]]:
        """The sequences of the next step, domain and index of each."""
        if self.between_rounds:
            self._begin, self._before = self.step, self.mixture.state()
            self._draw()
        at = (self.step - self._begin) * self.batch_size
        self.step += 1
        return self._drawn[at : at + self.batch_size]

    def state(self) -> dict[str, Any]:
        """Where the run stands, as JSON: what :meth:`restore` needs to hand out the same next batch."""
        return {"step": self.step, "round_begin": self._begin, "before": self._before, "weights": self.weights}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state` was asked for: the round under way is drawn again."""
        self.step, self._begin = state["step"], state["round_begin"]
        self._before, self.weights = state["before"], dict(state["weights"])
        self.mixture.restore(self._before)
        self._draw()

    def _draw(self) -> None:
        steps = min(self.round_steps, self.steps - self._begin)
        self._drawn = self.mixture.draw(steps * self.batch_size, self.weights)
