"""What a training run is: one YAML file, whose fields are described here."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from silo.errors import UsageError

LIMITS = {
    "vocab_size": (257, math.inf),  # every byte, and the token between documents
    "sequence_length": (2, math.inf),
    "batch_size": (1, math.inf),
    "micro_batch_size": (1, math.inf),
    "learning_rate": (0, math.inf),
    "expert_learning_rate": (0, math.inf),
    "warmup_fraction": (0, 1),
    "decay_fraction": (0, 1),
    "weight_decay": (0, math.inf),
    "max_grad_norm": (0, math.inf),
    "reweight_every": (1, math.inf),
    "reweight_rate": (0, math.inf),
    "validate_every": (1, math.inf),
    "log_every": (1, math.inf),
    "checkpoint_every": (1, math.inf),
    "seed": (0, 2**32 - 1),
}
"""The least and the greatest value of a setting, where it is set."""
CHOICES = {
    "domains": (None, "source", "owner", "license", "tier"),
    "mixed_precision": ("no", "bf16"),
    "schedule": ("cosine", "wsd"),
}
"""The values that a setting may have."""
WATCHED_ONLY = ("output", "trackers", "log_every", "validate_every", "checkpoint_every")
"""Settings that do not change the weights: a run may be resumed with others."""
GROWS = "peer_num_experts"
"""The one field of a model to begin with that may be changed."""
RECIPES = Path(__file__).with_name("recipes")


@dataclass(frozen=True)
class Recipe:
    """Settings of ``silo train``."""

    corpus: Path
    """The permissive side of a collected corpus."""
    output: Path
    """Directory of the finished model; it must not exist yet. Checkpoints stand beside it until then."""
    token_budget: int
    """Tokens to train on, in whole batches; documents are drawn in a seeded order until it is filled."""
    init: Path | None = None
    """A model directory of ours to begin with, in place of random weights. Its tokenizer is kept, its teachers stay
    listed, and the learning rate rises anew (re-warming, Gupta 2023)."""
    model: dict[str, Any] = field(default_factory=dict)
    """Fields of SiloConfig; vocabulary size and special tokens come from the tokenizer. With ``init`` only
    ``peer_num_experts``, which grows its PEER layers: 4, 9, 16, … times the experts, and the function of before until
    the first step (:func:`silo.surgery.grow`)."""
    vocab_size: int = 4096
    """Entries of the byte-level BPE vocabulary, which is trained on the same documents. With ``init``, its own."""
    sequence_length: int = 256
    """Tokens a training sequence."""
    batch_size: int = 16
    """Sequences a step, of all processes together."""
    micro_batch_size: int | None = None
    """Sequences that go through the model at once, in each process; gradients are accumulated until a step is full.
    None: a process's whole share of the step."""
    learning_rate: float = 2e-3
    """Peak of the schedule."""
    expert_learning_rate: float | None = None
    """Peak for PEER's experts and the values of product-key memories, each of which learns in few of the steps only.
    None: as all else."""
    schedule: str = "cosine"
    """``cosine``, or ``wsd`` for warm-up, a stable plateau and a decay."""
    warmup_fraction: float = 0.05
    """Share of the steps in which the learning rate rises."""
    decay_fraction: float = 0.2
    """Share of the steps in which ``wsd`` brings it down again."""
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
    validate_every: int | None = None
    """Steps after which the loss on validation text is measured, by licence tier and by domain. None: never."""
    trackers: list[str] = field(default_factory=list)
    """Trackers of accelerate, such as ``tensorboard``. Files go to a directory beside the output, named OUTPUT-logs."""
    log_every: int = 10
    """Steps after which trackers are told loss, learning rate, gradient norm and how routers use their experts."""
    checkpoint_every: int | None = 500
    """Steps after which all that a run needs to go on is saved. None: never."""

    def __post_init__(self) -> None:
        for name, (least, greatest) in LIMITS.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= greatest:  # which is how nan is refused, too
                expected = f"at least {least}" if greatest == math.inf else f"{least} to {greatest}"
                raise UsageError(f"{name} is {value}; expected {expected}")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                expected = ", ".join(choice for choice in choices if choice is not None)
                raise UsageError(f"{name} is {getattr(self, name)!r}; expected one of {expected}")
        self._check_sizes()
        self._check_domains()
        if self.init is not None and not set(self.model) <= {GROWS}:
            kept = ", ".join(f"model.{name}" for name in sorted(set(self.model) - {GROWS}))
            raise UsageError(
                f"init and {kept} are both set; a model to begin with has its own shape: leave one out. Only "
                f"model.{GROWS} may be set, to grow it"
            )
        if self.output.exists():
            raise UsageError(f"{self.output} exists already; choose another output or remove it")

    def _check_sizes(self) -> None:
        if self.token_budget < self.sequence_length * self.batch_size:
            raise UsageError(
                f"token_budget is {self.token_budget}; expected at least one step of "
                f"{self.sequence_length} x {self.batch_size} tokens"
            )
        if self.schedule == "wsd" and self.warmup_fraction + self.decay_fraction > 1:
            raise UsageError(
                f"warmup_fraction {self.warmup_fraction} and decay_fraction {self.decay_fraction} exceed the run; "
                "expected a sum of at most 1"
            )

    def _check_domains(self) -> None:
        for name in ("mixture", "upsample", "reweight_every"):
            if getattr(self, name) and self.domains is None:
                raise UsageError(f"{name} is set and domains is not; name the field that tells domains apart")
        if self.mixture is not None and self.upsample:
            raise UsageError("mixture and upsample are both set; a mixture has all weights already: choose one")
        for pattern, share in (self.mixture or {}).items():
            if not isinstance(pattern, str):
                raise UsageError(f"mixture: {pattern!r} is a {type(pattern).__name__}; put the domain's name in quotes")
            if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < math.inf:
                raise UsageError(f"mixture: {pattern!r} has share {share!r}; expected a number from 0")

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return self.token_budget // (self.sequence_length * self.batch_size)

    def micro_batches(self, processes: int) -> tuple[int, int]:
        """Sequences a forward pass, and how many passes a process makes for one step.

        Raises:
            UsageError: the batch cannot be dealt out evenly.
        """
        size = self.micro_batch_size or max(1, self.batch_size // processes)
        passes, rest = divmod(self.batch_size, size * processes)
        if rest or not passes:
            raise UsageError(
                f"batch_size {self.batch_size} is no multiple of micro_batch_size {size} x {processes} processes; "
                "change one of them"
            )
        return size, passes

    def settings(self) -> dict[str, Any]:
        """All settings as JSON values."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}

    def decisive_settings(self) -> dict[str, Any]:
        """Those that decide the weights, which a resumed run must share."""
        return {name: value for name, value in self.settings().items() if name not in WATCHED_ONLY}


def find_recipe(path: Path) -> Path:
    """The file of a recipe: ``path``, or the one of that name that comes with SILO if there is no such file."""
    own = RECIPES / f"{path}.yaml"
    return own if not path.is_file() and len(path.parts) == 1 and own.is_file() else path
