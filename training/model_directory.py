"""What is written beside the weights: who taught them, under which licences, by which recipe."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from silo.corpus import FORMAT, MODEL_CARD, TRAINED_ON
from silo.files import (
    canonical_json,
    remove_tree,
    sealed,
    sha256_file,
    sync_directory,
    sync_file,
    write_file,
    write_json,
)
from silo.language_model import fingerprint, quiet_transformers
from silo.licensing import Policy
from silo.modeling import SiloForCausalLM
from training.continued import Origin, Teacher, united
from training.measure import evaluating
from training.recipe import Recipe
from training.tokens import TokenRow, Tokens


@dataclass(frozen=True)
class Lesson:
    """What a run taught a model, and what it had learnt before."""

    tokens: Tokens
    numbers: np.ndarray
    """Which training documents taught the weights, sorted."""
    origin: Origin | None = None
    """The model that the run began with. Without one, all training documents taught the tokenizer."""

    def rows(self) -> Iterator[tuple[TokenRow, bool]]:
        """Each training document of this run's corpus, and whether the weights saw it."""
        taught = np.zeros(int(self.numbers[-1]) + 1 if len(self.numbers) else 0, dtype=bool)
        taught[self.numbers] = True
        for number, row in enumerate(row for row in self.tokens.rows if row.split == "train"):
            yield row, number < len(taught) and bool(taught[number])

    def teachers(self) -> list[Teacher]:
        """Every document that ever taught this model's weights or tokenizer."""
        here = []
        for row, in_weights in self.rows():
            taught = ([] if self.origin else ["tokenizer"]) + (["weights"] if in_weights else [])
            if taught:
                here.append(Teacher(row.id, row.license, row.owner, row.source, row.content, taught))
        return united(self.origin.teachers, here) if self.origin else here

    def table(self) -> list[tuple[str, str, int, int, int]]:
        """Tier, licence, documents in the weights, their tokens, and owners, of this run's corpus; sorted."""
        counts: Counter[tuple[str, str]] = Counter()
        sizes: Counter[tuple[str, str]] = Counter()
        owners: dict[tuple[str, str], set[str]] = {}
        for row, in_weights in self.rows():
            if in_weights:
                key = (row.tier, row.license)
                counts[key] += 1
                sizes[key] += row.end - row.begin
                owners.setdefault(key, set()).add(row.owner)
        return [(*key, counts[key], sizes[key], len(owners[key])) for key in sorted(counts)]


def save(
    recipe: Recipe,
    policy: Policy,
    model: SiloForCausalLM,
    weights: dict[str, Any],
    lesson: Lesson,
    summary: dict[str, Any],
) -> None:
    """Write the model directory whole or not at all: into a neighbour first, then by one rename."""
    recipe.output.parent.mkdir(parents=True, exist_ok=True)
    directory = recipe.output.with_name(f".{recipe.output.name}.partial")
    remove_tree(directory)  # what a killed run left
    try:
        with quiet_transformers(), evaluating(model):  # that is, with a router that can evaluate
            model.save_pretrained(directory, state_dict=weights)
            lesson.tokens.tokenizer.save_pretrained(directory)
        with open(directory / TRAINED_ON, "wb") as file:
            for teacher in lesson.teachers():
                file.write(canonical_json(asdict(teacher)))
        card = {
            "format": FORMAT,
            **summary,
            "audit": lesson.tokens.manifest["audit"],
            "policy": policy.to_json(),
            "trained_on_sha256": sha256_file(directory / TRAINED_ON),
            "fingerprint": fingerprint(directory),
            "recipe": recipe.settings(),
        }
        write_file(directory / "README.md", model_card(card, lesson).encode())
        write_json(directory / MODEL_CARD, sealed(card))
        for path in sorted(path for path in directory.rglob("*") if path.is_file()):
            sync_file(path)  # of which transformers has synced none, and the checkpoints go when this is there
        sync_directory(directory)
        directory.rename(recipe.output)
    except BaseException:
        remove_tree(directory)
        raise
    sync_directory(recipe.output.parent)


def model_card(card: dict[str, Any], lesson: Lesson) -> str:
    """The model card: what it is, and the licences of what taught it."""
    table = lesson.table()
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [silo, permissive]",
        "---",
        "",
        "# A SILO model",
        "",
        f"{card['parameters']:,} parameters, trained on {card['tokens']:,} tokens of "
        f"{sum(count for _, _, count, _, _ in table):,} documents in {card['steps']:,} steps, to a loss of "
        f"{card['loss']:.3f} nats a token.",
        "",
        "Weights and tokenizer learned from permissively licensed text alone. A licence gate judged every document "
        f"before its text was read. `{TRAINED_ON}` lists each of them, with licence, owner, source and hash; "
        "`silo corpus audit DIR` checks the list and counts it.",
        "",
        "| tier | licence | documents | tokens | owners |",
        "|:---|:---|---:|---:|---:|",
        *(f"| {tier} | {name} | {documents:,} | {tokens:,} | {owners:,} |" for tier, name, documents, tokens, owners
          in table),
        "",
        "Tiers: PD public domain, SW permissive software licences, BY attribution licences. Whoever passes on text of "
        "the tiers SW and BY owes its notice or its author's name.",
        "",
        f"- Corpus: sha256 `{card['corpus']}`",
        f"- Its audit: sha256 `{card['audit']}`",
        f"- Documents: sha256 `{card['trained_on_sha256']}`",
        *continued(card),
        "",
    ]  # fmt: skip
    return "\n".join(lines)


def continued(card: dict[str, Any]) -> list[str]:
    """Lines on the model that a run began with, and on those before it."""
    lines, before = [], card.get("init")
    while before:
        licenses = ", ".join(f"{name} ({count:,})" for name, count in before["documents_by_license"].items())
        lines.append(f"- Continued from: sha256 `{before['fingerprint']}`, {before['tokens']:,} tokens of {licenses}")
        before = before.get("init")
    return lines
