"""The training loop, with accelerate: the same code on one CPU, and on many GPUs under ``accelerate launch``."""

from __future__ import annotations

import inspect
import math
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from silo.config import convert
from silo.corpus import Corpus
from silo.documents import Document
from silo.errors import SiloError, UsageError
from silo.files import canonical_json, remove_tree, sha256, sync_directory, write_file, write_json
from silo.language_model import TRAINED_ON, quiet_transformers
from silo.licensing import DEFAULT_POLICY, load_policy
from silo.modeling import SiloConfig, SiloForCausalLM
from silo.progress import progress_bar
from training.data import Sequences, permissive_documents, shuffled, tokenize_documents, train_tokenizer
from training.recipe import Recipe

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
    documents = permissive_documents(recipe.corpus, policy)
    accelerator = Accelerator(mixed_precision=recipe.mixed_precision)
    set_seed(recipe.seed)
    tokenizer = train_tokenizer(
        (document.full_text for document in shuffled(documents, recipe.seed)), recipe.vocab_size
    )
    ids, labels, used = tokenize_documents(shuffled(documents, recipe.seed), tokenizer, recipe.token_budget)
    sequences = Sequences(ids, labels, recipe.sequence_length)
    step_size = recipe.batch_size * accelerator.num_processes
    if len(sequences) < step_size:
        raise UsageError(
            f"{recipe.corpus} gives {len(sequences)} training sequences of {recipe.sequence_length} tokens, and a step "
            f"takes {step_size}; collect more text, or lower batch_size or sequence_length"
        )
    start = tokenizer.bos_token_id
    model = SiloForCausalLM(
        model_config(recipe, vocab_size=len(tokenizer), bos_token_id=start, eos_token_id=tokenizer.eos_token_id)
    )
    losses = optimize(recipe, accelerator, model, sequences)
    summary = {
        "loss": round(sum(losses[-20:]) / len(losses[-20:]), 4),
        "steps": len(losses),
        "tokens": len(losses) * step_size * recipe.sequence_length,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "documents": len(used),
        "documents_by_license": dict(sorted(Counter(document.license for document in used).items())),
        "corpus": Corpus.open(recipe.corpus).fingerprint,
    }
    if accelerator.is_main_process:
        save(recipe, model, tokenizer, documents, {document.id for document in used}, summary)
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


def optimize(recipe: Recipe, accelerator: Accelerator, model: SiloForCausalLM, sequences: Sequences) -> list[float]:
    """One pass over the sequences; the model's weights change in place. Returns the loss of each step."""
    generator = torch.Generator().manual_seed(recipe.seed)
    loader = DataLoader(sequences, recipe.batch_size, shuffle=True, drop_last=True, generator=generator)
    groups = parameter_groups(model, recipe.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95))
    batches = len(loader)  # Of all processes: accelerate moves the schedule on by one for each of them.
    schedule = LambdaLR(optimizer, lambda step: learning_rate_factor(step, batches, recipe.warmup_fraction))
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    model.train()
    losses: list[float] = []
    with progress_bar("train") as progress:
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
            progress(len(losses), len(loader))
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


def save(
    recipe: Recipe,
    model: SiloForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    documents: list[Document],
    used: set[str],
    summary: dict[str, Any],
) -> None:
    """Write the model directory whole or not at all: into a neighbour first, then by one rename."""
    recipe.output.parent.mkdir(parents=True, exist_ok=True)
    directory = recipe.output.with_name(f".{recipe.output.name}.partial")
    remove_tree(directory)  # what a killed run left
    try:
        with quiet_transformers():
            model.save_pretrained(directory)
            tokenizer.save_pretrained(directory)
        rows = b"".join(canonical_json(provenance(document, document.id in used)) for document in documents)
        write_file(directory / TRAINED_ON, rows)
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(recipe).items()}
        write_json(directory / "training.json", {**summary, "trained_on_sha256": sha256(rows), "recipe": settings})
        directory.rename(recipe.output)
    except BaseException:
        remove_tree(directory)
        raise
    sync_directory(recipe.output.parent)


def provenance(document: Document, in_weights: bool) -> dict[str, Any]:
    """What is kept of a document that taught the tokenizer, and the weights too if ``in_weights``."""
    return {
        "id": document.id,
        "license": document.license,
        "owner": document.owner,
        "source": document.source,
        "content_hash": document.content_hash,
        "taught": ["tokenizer", "weights"] if in_weights else ["tokenizer"],
    }
