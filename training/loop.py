"""The training loop, with accelerate: the same code on one CPU, and on many GPUs under ``accelerate launch``."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from silo.config import convert
from silo.errors import SiloError, UsageError
from silo.licensing import DEFAULT_POLICY, load_policy
from silo.modeling import SiloConfig, SiloForCausalLM
from silo.progress import progress_bar
from training.checkpoint import Teachers, save
from training.data import Drawn, Mixture
from training.recipe import Recipe
from training.reweighting import reweighted, validation_loss
from training.tokens import Tokens, open_tokens

FINAL_LEARNING_RATE = 0.1
"""Where the cosine ends, as a share of the peak."""
DECIDED_BY_TOKENIZER = {"vocab_size", "bos_token_id", "eos_token_id", "pad_token_id"}


def train(recipe: Recipe) -> dict[str, Any]:
    """Train tokenizer and model, and write both with the list of the documents that taught them.

    Under ``accelerate launch`` every process trains, and the main one writes.

    Returns:
        Summary with the loss in nats a token, tokens, steps and documents by licence.

    Raises:
        LicenseError: the corpus holds a document that may not teach weights; nothing is read or written.
        UsageError: the recipe's model is none, or the corpus is too small for one step.
        SiloError: the loss is not finite.
    """
    model_config(recipe)  # What makes no model is refused before the work of hours.
    policy = load_policy(recipe.policy) if recipe.policy else DEFAULT_POLICY
    tokens = open_tokens(recipe.corpus, policy, recipe.vocab_size)
    accelerator = Accelerator(mixed_precision=recipe.mixed_precision)
    set_seed(recipe.seed)
    start = tokens.tokenizer.bos_token_id
    model = SiloForCausalLM(
        model_config(recipe, vocab_size=len(tokens.tokenizer), bos_token_id=start, eos_token_id=start)
    )
    plan = Plan.make(recipe, tokens, accelerator.num_processes)
    losses = optimize(recipe, accelerator, model, plan)
    teachers = Teachers.of(tokens, plan.mixture.used())
    summary = {
        "loss": round(sum(losses[-20:]) / len(losses[-20:]), 4),
        "steps": len(losses),
        "tokens": len(losses) * plan.step_size * recipe.sequence_length,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "documents": len(teachers.numbers),
        "documents_by_license": teachers.by_license,
        "corpus": tokens.manifest["corpus"],
    }
    if recipe.domains:
        summary["domain_weights"] = {name: round(weight, 6) for name, weight in plan.weights.items()}
    if accelerator.is_main_process:
        save(recipe, policy, model, tokens, teachers, summary)
    accelerator.end_training()
    return {"model": str(recipe.output), **summary}


def model_config(recipe: Recipe, **decided: Any) -> SiloConfig:
    """The recipe's model, with what is ``decided`` by its tokenizer.

    Raises:
        UsageError: a field is unknown, has the wrong type or is the tokenizer's, or the fields do not fit together.
    """
    fields = inspect.get_annotations(SiloConfig, eval_str=True)
    known = sorted(set(fields) - DECIDED_BY_TOKENIZER)
    for name in recipe.model:
        if name not in known:
            raise UsageError(f"unknown setting 'model.{name}'; known are {', '.join(known)}")
    settings = {name: convert(value, fields[name], f"model.{name}") for name, value in recipe.model.items()}
    return SiloConfig(**{"max_position_embeddings": recipe.sequence_length, **settings, **decided})


@dataclass
class Plan:
    """Which sequences a run trains on, round by round."""

    mixture: Mixture
    validation: Mixture
    """The same domains' held-back text."""
    weights: dict[str, float]
    """Share of each domain in the next round."""
    total: int
    """Sequences of the whole run."""
    step_size: int
    """Sequences a step, of all processes together."""

    @classmethod
    def make(cls, recipe: Recipe, tokens: Tokens, processes: int) -> Plan:
        """Plan a run.

        Raises:
            UsageError: the corpus is too small for one step, or the recipe's mixture does not fit it.
        """
        mixture, validation = (
            Mixture(tokens, split, by=recipe.domains, length=recipe.sequence_length, seed=recipe.seed)
            for split in ("train", "val")
        )
        step_size = recipe.batch_size * processes
        found = sum(domain.sequences for domain in mixture.domains.values())
        if found < step_size:
            raise UsageError(
                f"{recipe.corpus} gives {found} training sequences of {recipe.sequence_length} tokens, and a step "
                f"takes {step_size}; collect more text, or lower batch_size or sequence_length"
            )
        if recipe.mixture is not None:
            weights = mixture.given_weights(recipe.mixture)
        else:
            weights = mixture.natural_weights(upsample=recipe.upsample)
        return cls(mixture, validation, weights, recipe.token_budget // recipe.sequence_length, step_size)

    def rounds(self, every: int | None) -> Iterator[Drawn]:
        """The sequences of one round after the other; weights may be changed in between."""
        left = self.total
        while left > 0:
            count = left if every is None else min(left, every * self.step_size)
            yield self.mixture.draw(count, self.weights)
            left -= count


def optimize(recipe: Recipe, accelerator: Accelerator, model: SiloForCausalLM, plan: Plan) -> list[float]:
    """Train by a plan; the model's weights change in place. Returns the loss of each step."""
    groups = parameter_groups(model, recipe.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95))
    batches = plan.total // recipe.batch_size  # Of all processes: accelerate moves the schedule on by one for each.
    schedule = LambdaLR(optimizer, lambda step: learning_rate_factor(step, batches, recipe.warmup_fraction))
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    losses: list[float] = []
    steps = plan.total // plan.step_size
    with progress_bar("train") as progress:
        for sequences in plan.rounds(recipe.reweight_every):
            loader = accelerator.prepare(DataLoader(sequences, recipe.batch_size, drop_last=True))
            model.train()
            for batch in loader:
                loss = model(**batch, use_cache=False).loss
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                losses.append(accelerator.reduce(loss.detach(), "mean").item())
                if not math.isfinite(losses[-1]):
                    raise SiloError(
                        f"the loss is {losses[-1]} at step {len(losses)}; lower learning_rate or check the text"
                    )
                progress(len(losses), steps)
            if recipe.reweight_every is not None:
                plan.weights = reweighted(plan.weights, validation_loss(model, plan.validation), recipe.reweight_rate)
    return losses


def parameter_groups(model: SiloForCausalLM, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay, gains do not."""
    parameters = list(model.parameters())
    return [
        {"params": [parameter for parameter in parameters if parameter.dim() > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in parameters if parameter.dim() <= 1], "weight_decay": 0.0},
    ]


def learning_rate_factor(step: int, steps: int, warmup_fraction: float) -> float:
    """Linear rise, then a cosine down to :data:`FINAL_LEARNING_RATE`."""
    warmup = max(1, round(steps * warmup_fraction))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return FINAL_LEARNING_RATE + (1 - FINAL_LEARNING_RATE) * 0.5 * (1 + math.cos(math.pi * progress))
