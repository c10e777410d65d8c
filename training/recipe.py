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
    "seed": (0, 2**32 - 1),
}
"""The least and the greatest value of a setting."""


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
        if self.output.exists():
            raise UsageError(f"{self.output} exists already; choose another output or remove it")

    @property
    def steps(self) -> int:
        """Optimizer steps of one process."""
        return self.token_budget // (self.sequence_length * self.batch_size)
