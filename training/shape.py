"""The model that a recipe describes, and what a run would be, before anything is trained."""

from __future__ import annotations

import inspect
from collections import Counter
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from silo.config import convert
from silo.errors import UsageError
from silo.modeling import SiloConfig, SiloForCausalLM
from training.continued import Origin
from training.plan import Plan
from training.recipe import Recipe
from training.tokens import Tokens

DECIDED_BY_TOKENIZER = {"vocab_size", "bos_token_id", "eos_token_id", "pad_token_id"}


def model_config(recipe: Recipe, tokenizer: PreTrainedTokenizerFast | None = None) -> SiloConfig:
    """The recipe's model, with the vocabulary of a tokenizer; without one, with as many entries as the recipe allows.

    Raises:
        UsageError: a field is unknown, has the wrong type or is the tokenizer's, or the fields do not fit together.
    """
    fields = inspect.get_annotations(SiloConfig, eval_str=True)
    known = sorted(set(fields) - DECIDED_BY_TOKENIZER)
    for name in recipe.model:
        if name not in known:
            raise UsageError(f"unknown setting 'model.{name}'; known are {', '.join(known)}")
    settings = {name: convert(value, fields[name], f"model.{name}") for name, value in recipe.model.items()}
    decided: dict[str, Any] = {"vocab_size": recipe.vocab_size}
    if tokenizer is not None:
        start = tokenizer.bos_token_id
        decided = {"vocab_size": len(tokenizer), "bos_token_id": start, "eos_token_id": start}
    return SiloConfig(**{"max_position_embeddings": recipe.sequence_length, **settings, **decided})


def parameter_count(config: SiloConfig) -> int:
    """How many parameters a model has, without making any of them."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in SiloForCausalLM(config).parameters())


def outline(recipe: Recipe, origin: Origin | None, tokens: Tokens) -> dict[str, Any]:
    """What a run would train, and on what: parameters, steps, tokens, and the documents that would be drawn from.

    Raises:
        UsageError: the corpus is too small for one step, or the recipe's mixture does not fit it.
    """
    plan = Plan.make(recipe, tokens)
    rows = [row for row in tokens.rows if row.split == "train"]
    sequences = recipe.steps * recipe.batch_size
    return {
        "parameters": parameter_count(model_config(recipe, tokens.tokenizer))
        if origin is None
        else origin.model.num_parameters(),
        "steps": recipe.steps,
        "tokens": sequences * recipe.sequence_length,
        "tokens_a_step": recipe.batch_size * recipe.sequence_length,
        "warmup_steps": max(1, round(recipe.steps * recipe.warmup_fraction)),
        "corpus": tokens.manifest["corpus"],
        "documents": len(rows),
        "documents_by_license": dict(sorted(Counter(row.license for row in rows).items())),
        "domains": {
            name: {
                "tokens": domain.tokens,
                "sequences": domain.sequences,
                "weight": round(plan.weights[name], 6),
                "passes": round(plan.weights[name] * sequences / domain.sequences, 3) if domain.sequences else 0.0,
            }
            for name, domain in plan.mixture.domains.items()
        },
    }
