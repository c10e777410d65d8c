"""A model under training: what one step is, and what is measured between steps."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list

from silo.errors import SiloError
from silo.experts import share_experts
from silo.modeling import SiloForCausalLM
from training.data import IGNORED, Mixture
from training.measure import Routing, experts_by_layer, validation_loss
from training.optimizer import clip_gradients, make_optimizer, set_learning_rate
from training.plan import Plan
from training.recipe import Recipe
from training.schedule import learning_rate_factor
from training.tokens import Tokens

VALIDATION_SEQUENCES = 32
"""Validation sequences of each tier and domain."""
NAMED_DOCUMENTS = 8
"""So many documents of a batch are named in an error."""


class Run:
    """A model under training: one step after the other, and what is measured in between."""

    def __init__(
        self, recipe: Recipe, accelerator: Accelerator, model: SiloForCausalLM, plan: Plan, tokens: Tokens
    ) -> None:
        self.recipe, self.accelerator, self.plan = recipe, accelerator, plan
        self.losses: list[float] = []
        """Of each step, in nats a token, without what routers add to balance their experts."""
        kinds = {"tier": "tier"} | ({"domain": recipe.domains} if recipe.domains else {})
        self.validation = {
            kind: Mixture(tokens, "val", by=field, length=recipe.sequence_length, seed=recipe.seed)
            for kind, field in kinds.items()
        }
        """The held-back text, by licence tier and by domain."""
        self._micro_batch, self._passes = recipe.micro_batches(accelerator.num_processes)
        every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self._tied = every - {name for name, _ in model.named_parameters()}
        optimizer = make_optimizer(model, recipe.learning_rate, recipe.weight_decay, recipe.expert_learning_rate)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.model.train()
        layers = map(model.config.ffn_of, range(model.config.num_hidden_layers))
        self._share_rate = model.config.share_rate if "averaged" in layers else 0.0
        self._routing = Routing(experts_by_layer(model.config)) if recipe.trackers else None

    def step(self, sequences: Sequence[tuple[str, int]]) -> None:
        """Change the weights once.

        The loss is the mean over the learnt tokens of the whole step, however they are spread over passes and
        processes: each pass counts by its share of them.

        Raises:
            SiloError: the loss or the gradient is not finite; the documents are named and the weights are as before.
        """
        accelerator, recipe = self.accelerator, self.recipe
        factor = learning_rate_factor(
            self.plan.step - 1,
            self.plan.steps,
            schedule=recipe.schedule,
            warmup_fraction=recipe.warmup_fraction,
            decay_fraction=recipe.decay_fraction,
        )
        set_learning_rate(self.optimizer, factor)
        batches = [self.plan.mixture.batch(part) for part in self._parts(sequences, accelerator.process_index)]
        counts = [int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches]
        total = self._sum(torch.tensor(sum(counts), device=accelerator.device))
        losses = []
        for number, (batch, count) in enumerate(zip(batches, counts, strict=True), start=1):
            last = number == len(batches)
            with contextlib.nullcontext() if last else accelerator.no_sync(self.model):
                batch = {key: value.to(accelerator.device) for key, value in batch.items()}
                out = self.model(**batch, use_cache=False)
                share = count / total
                accelerator.backward(out.loss * share * accelerator.num_processes)  # of which the mean is taken
            balance = 0.0 if out.aux_loss is None else out.aux_loss.detach()
            losses.append((out.loss.detach() - balance) * share)
            if self._routing is not None:
                self._routing.add(out.routings)
        self._finish(sequences, torch.stack(losses), self._clip(), factor)

    def _finish(self, sequences: Sequence[tuple[str, int]], losses: torch.Tensor, norm: Any, factor: float) -> None:
        """Check loss and gradient, and only then let the optimizer have it."""
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        loss, norm = self._sum(losses.sum()), float(norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._stop(sequences, losses, loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self._share_rate:
            share_experts(self.model, self._share_rate)
        self.losses.append(loss)
        if self.recipe.trackers and self.plan.step % self.recipe.log_every == 0:
            self._log_step(norm, factor)

    def weights(self) -> dict[str, torch.Tensor]:
        """All weights, wherever their parts lie, those that are tied once. Every process has to call it."""
        found = self.accelerator.get_state_dict(self.model)
        return {name: value for name, value in found.items() if name not in self._tied}

    def validate(self, kind: str, sequences: int = VALIDATION_SEQUENCES) -> dict[str, float]:
        """The loss on held-back text by ``tier`` or ``domain``, in nats a token; what the main process found counts,
        so that all of them go on with the same numbers."""
        found = [validation_loss(self.model, self.validation[kind], sequences)]
        return broadcast_object_list(found)[0]

    def start_trackers(self) -> None:
        """Begin to log, behind the step that the run stands at; what a killed run had logged after it is left out."""
        if self.recipe.trackers:
            settings = {"tensorboard": {"purge_step": self.plan.step + 1}} if self.plan.step else {}
            self.accelerator.init_trackers(self.recipe.output.name, init_kwargs=settings)

    def log_validation(self) -> None:
        """Tell the trackers the loss on held-back text."""
        figures = {
            f"validation/{kind}/{name}": loss for kind in self.validation for name, loss in self.validate(kind).items()
        }
        self.accelerator.log(figures, step=self.plan.step)

    def _log_step(self, norm: float, factor: float) -> None:
        recent = self.losses[-self.recipe.log_every :]
        figures = {
            "loss": sum(recent) / len(recent),
            "gradient norm": norm,
            "learning rate": self.recipe.learning_rate * factor,
            "tokens": self.plan.step * self.recipe.batch_size * self.recipe.sequence_length,
            **{f"domain weight/{name}": weight for name, weight in self.plan.weights.items()},
        }
        if self._routing is not None:
            figures |= self._routing.report(self.accelerator)
        self.accelerator.log(figures, step=self.plan.step)

    def _parts(self, sequences: Sequence[tuple[str, int]], process: int) -> Iterator[Sequence[tuple[str, int]]]:
        """A step's sequences that go through the model in one process, pass by pass. In each pass the processes take
        neighbouring runs of them, so that a step is the same however it is dealt out."""
        size, processes = self._micro_batch, self.accelerator.num_processes
        for number in range(self._passes):
            at = (number * processes + process) * size
            yield sequences[at : at + size]

    def _clip(self) -> Any:
        """Clip the gradient, and give its norm before. Sharded gradients need all processes; sparse ones, our own."""
        parameters = list(self.model.parameters())
        if self.accelerator.distributed_type == DistributedType.FSDP:
            return self.accelerator.clip_grad_norm_(parameters, self.recipe.max_grad_norm)
        return clip_gradients(parameters, self.recipe.max_grad_norm)

    def _sum(self, value: torch.Tensor) -> float:
        """The sum over all processes."""
        return self.accelerator.reduce(value, "sum").item()

    def _stop(self, sequences: Sequence[tuple[str, int]], losses: torch.Tensor, loss: float) -> None:
        """End a run whose loss or gradient is not finite, naming the documents of the passes to blame: those with such
        a loss, else the whole step's."""
        wrong = self.accelerator.gather((~losses.isfinite()).unsqueeze(0))
        passes = [
            part
            for process in range(self.accelerator.num_processes)
            for number, part in enumerate(self._parts(sequences, process))
            if bool(wrong[process, number]) or not wrong.any()
        ]
        names = self.plan.mixture.documents([each for part in passes for each in part])
        named = ", ".join(map(repr, names[:NAMED_DOCUMENTS]))
        more = f" and {len(names) - NAMED_DOCUMENTS} more" if len(names) > NAMED_DOCUMENTS else ""
        what = f"the loss is {loss}" if not math.isfinite(loss) else "the gradient is not finite"
        raise SiloError(
            f"{what} at step {self.plan.step}; lower learning_rate, or look at the batch's documents: {named}{more}"
        )
