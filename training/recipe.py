"""What a training run is: one YAML file, whose fields are described here."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from silo.errors import UsageError

LIMITS = {
    "vocab_size": (257, math.inf),  # every byte, and the token between documents
    "sequence_length": (2, math.inf),
    "batch_size": (1, math.inf),
    "learning_rate": (0, math.inf),
    "warmup_fraction": (0, 1),
    "weight_decay": (0, math.inf),
    "max_grad_norm": (0, math.inf),
    "reweight_rate": (0, math.inf),
    "seed": (0, 2**32 - 1),
}
"""The least and the greatest value of a setting."""


DOMAIN_FIELDS = ("source", "owner", "license", "tier")


@dataclass(frozen=True)
class Recipe:
    """Settings of ``silo train``."""

    corpus: Path
    """The permissive side of a collected corpus."""
    output: Path
    """Directory of the finished model; it must not exist yet."""
    token_budget: int
    """Tokens to train on, in whole batches; documents are drawn in a seeded order until it is filled."""
    model: dict[str, Any] = field(default_factory=dict)
    """Fields of SiloConfig; vocabulary size and special tokens come from the tokenizer."""
    vocab_size: int = 4096
    """Entries of the byte-level BPE vocabulary, which is trained on the same documents."""
    sequence_length: int = 256
    """Tokens a training sequence."""
    batch_size: int = 16
    """Sequences a step and process."""
    learning_rate: float = 2e-3
    """Peak of the schedule."""
    warmup_fraction: float = 0.05
    """Share of the steps in which the learning rate rises; after it, a cosine falls to a tenth of the peak."""
    weight_decay: float = 0.1
    """AdamW's decay, on matrices only."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    mixed_precision: str = "no"
    """``no`` or ``bf16``, as accelerate calls them."""
    seed: int = 0
    """Seeds weights, the order of documents and the order of sequences."""
    policy: Path | None = None
    """Licence policy file; the default policy if absent."""
    domains: str | None = None
    """The field that names a document's domain: ``source``, ``owner``, ``license`` or ``tier``. None: all in one."""
    mixture: dict[str, Any] | None = None
    """Pattern of a domain → its share of the training sequences. None: as many as it has tokens."""
    upsample: bool = False
    """Whether a domain with under 5 % of the tokens counts three times, as in SILO (2023)."""
    reweight_every: int | None = None
    """Steps after which domains are weighted anew by their validation loss (Skill-It, Chen 2023). None: never."""
    reweight_rate: float = 0.2
    """How strongly: a weight grows by exp(rate · nats of loss) before all are scaled to sum to 1."""

    def __post_init__(self) -> None:
        for name, (least, greatest) in LIMITS.items():
            value = getattr(self, name)
            if not least <= value <= greatest:  # which is how nan is refused, too
                expected = f"at least {least}" if greatest == math.inf else f"{least} to {greatest}"
                raise UsageError(f"{name} is {value}; expected {expected}")
        if self.token_budget < self.sequence_length * self.batch_size:
            raise UsageError(
                f"token_budget is {self.token_budget}; expected at least one step of "
                f"{self.sequence_length} x {self.batch_size} tokens"
            )
        if self.mixed_precision not in ("no", "bf16"):
            raise UsageError(f"mixed_precision is {self.mixed_precision!r}; expected no or bf16")
        self._check_domains()
        if self.output.exists():
            raise UsageError(f"{self.output} exists already; choose another output or remove it")

    def _check_domains(self) -> None:
        if self.domains not in (None, *DOMAIN_FIELDS):
            raise UsageError(f"domains is {self.domains!r}; expected one of {', '.join(DOMAIN_FIELDS)}")
        for name in ("mixture", "upsample", "reweight_every"):
            if getattr(self, name) and self.domains is None:
                raise UsageError(f"{name} is set and domains is not; name the field that tells domains apart")
        if self.mixture is not None and self.upsample:
            raise UsageError("mixture and upsample are both set; a mixture has all weights already: choose one")
        for pattern, share in (self.mixture or {}).items():
            if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < math.inf:
                raise UsageError(f"mixture: {pattern!r} has share {share!r}; expected a number from 0")
        if self.reweight_every is not None and self.reweight_every < 1:
            raise UsageError(f"reweight_every is {self.reweight_every}; expected at least 1 step")

    @property
    def steps(self) -> int:
        """Optimizer steps of one process."""
        return self.token_budget // (self.sequence_length * self.batch_size)
