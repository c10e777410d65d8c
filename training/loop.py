"""The training loop, with accelerate: the same code on one CPU, and on many GPUs under ``accelerate launch``."""

from __future__ import annotations

import math
import tempfile
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

from silo.corpus import Corpus
from silo.documents import Document
from silo.errors import SiloError, UsageError
from silo.files import canonical_json, sha256, write_file, write_json
from silo.language_model import TRAINED_ON
from silo.licensing import DEFAULT_POLICY, load_policy
from silo.modeling import SiloConfig, SiloForCausalLM
from silo.progress import progress_bar
from training.data import Sequences, permissive_documents, shuffled, tokenize_documents, train_tokenizer
from training.recipe import Recipe

FINAL_LEARNING_RATE = 0.1
"""Where the cosine ends, as a share of the peak."""


def train(recipe: Recipe) -> dict[str, Any]:
    """Train tokenizer and model, and write both with the list of the documents that taught them.

    Returns:
        Summary with the loss in nats a token, tokens, steps and documents by licence.

    Raises:
        LicenseError: the corpus holds a document that may not teach weights; nothing is read or written.
        SiloError: the loss is not finite.
    """
    policy = load_policy(recipe.policy) if recipe.policy else DEFAULT_POLICY
    documents = permissive_documents(recipe.corpus, policy)
    set_seed(recipe.seed)
    tokenizer = train_tokenizer((document.full_text for document in shuffled(documents, recipe.seed)), recipe.vocab_size)
    ids, labels, used = tokenize_documents(shuffled(documents, recipe.seed), tokenizer, recipe.token_budget)
    sequences = Sequences(ids, labels, recipe.sequence_length)
    if len(sequences) < recipe.batch_size:
        raise UsageError(
            f"{recipe.corpus} gives {len(ids)} training tokens, fewer than one step of "
            f"{recipe.batch_size} x {recipe.sequence_length}; collect more text or lower batch_size"
        )
    model = SiloForCausalLM(model_config(recipe, tokenizer))
    losses = optimize(recipe, model, sequences)
    summary = {
        "loss": round(sum(losses[-20:]) / len(losses[-20:]), 4),
        "steps": len(losses),
        "tokens": len(losses) * recipe.batch_size * recipe.sequence_length,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "documents": len(used),
        "documents_by_license": dict(sorted(Counter(document.license for document in used).items())),
        "corpus": Corpus.open(recipe.corpus).fingerprint,
    }
    save(recipe, model, tokenizer, documents, {document.id for document in used}, summary)
    return {"model": str(recipe.output), **summary}


def model_config(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> SiloConfig:
    """The recipe's model with what the tokenizer decides. Raises :class:`UsageError` for an unknown field."""
    for name in recipe.model:
        if name not in SiloConfig.__dataclass_fields__ or name == "vocab_size":
            raise UsageError(f"model.{name} is no field that a recipe may set; see silo.SiloConfig (vocab_size is a top-level setting)")
    settings = {"max_position_embeddings": recipe.sequence_length, **recipe.model}
    return SiloConfig(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **settings,
    )


def optimize(recipe: Recipe, model: SiloForCausalLM, sequences: Sequences) -> list[float]:
    """One pass over the sequences; the model's weights change in place. Returns the loss of each step."""
    accelerator = Accelerator(mixed_precision=recipe.mixed_precision)
    generator = torch.Generator().manual_seed(recipe.seed)
    loader = DataLoader(sequences, recipe.batch_size, shuffle=True, drop_last=True, generator=generator)
    optimizer = torch.optim.AdamW(parameter_groups(model, recipe.weight_decay), lr=recipe.learning_rate, betas=(0.9, 0.95))
    schedule = LambdaLR(optimizer, lambda step: learning_rate_factor(step, len(loader), recipe.warmup_fraction))
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
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise SiloError(f"the loss is {losses[-1]} at step {len(losses)}; lower learning_rate or check the text")
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
    with tempfile.TemporaryDirectory(dir=recipe.output.parent, prefix=f".{recipe.output.name}.") as staging:
        directory = Path(staging) / "model"
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        rows = b"".join(canonical_json(provenance(document, document.id in used)) for document in documents)
        write_file(directory / TRAINED_ON, rows)
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(recipe).items()}
        write_json(directory / "training.json", {**summary, "trained_on_sha256": sha256(rows), "recipe": settings})
        directory.rename(recipe.output)


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
