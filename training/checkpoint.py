"""What is written beside the weights: who taught them, under which licences, by which recipe."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from silo.corpus import FORMAT, MODEL_CARD, TRAINED_ON
from silo.files import canonical_json, remove_tree, sealed, sha256_file, sync_directory, write_file, write_json
from silo.language_model import quiet_transformers
from silo.licensing import Policy
from silo.modeling import SiloForCausalLM
from training.recipe import Recipe
from training.tokens import TokenRow, Tokens


@dataclass(frozen=True)
class Teachers:
    """The documents that taught a model."""

    tokens: Tokens
    numbers: np.ndarray
    """Which training documents taught the weights, sorted; all of them taught the tokenizer."""

    @classmethod
    def of(cls, tokens: Tokens, numbers: np.ndarray) -> Teachers:
        """Those that gave a token to a training sequence."""
        return cls(tokens, numbers)

    def rows(self) -> Iterator[tuple[TokenRow, bool]]:
        """Each training document, and whether the weights saw it."""
        taught = np.zeros(int(self.numbers[-1]) + 1 if len(self.numbers) else 0, dtype=bool)
        taught[self.numbers] = True
        for number, row in enumerate(row for row in self.tokens.rows if row.split == "train"):
            yield row, number < len(taught) and bool(taught[number])

    @property
    def by_license(self) -> dict[str, int]:
        """How many documents of each licence taught the weights."""
        return dict(sorted(Counter(row.license for row, in_weights in self.rows() if in_weights).items()))

    def table(self) -> list[tuple[str, str, int, int, int]]:
        """Tier, licence, documents in the weights, their tokens, and owners; sorted."""
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
    recipe: Recipe, policy: Policy, model: SiloForCausalLM, tokens: Tokens, teachers: Teachers, summary: dict[str, Any]
) -> None:
    """Write the model directory whole or not at all: into a neighbour first, then by one rename."""
    recipe.output.parent.mkdir(parents=True, exist_ok=True)
    directory = recipe.output.with_name(f".{recipe.output.name}.partial")
    remove_tree(directory)  # what a killed run left
    try:
        with quiet_transformers():
            model.save_pretrained(directory)
            tokens.tokenizer.save_pretrained(directory)
        with open(directory / TRAINED_ON, "wb") as file:
            for row, in_weights in teachers.rows():
                file.write(canonical_json(provenance(row, in_weights)))
        trained_on = sha256_file(directory / TRAINED_ON)
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(recipe).items()}
        card = {
            "format": FORMAT,
            **summary,
            "audit": tokens.manifest["audit"],
            "policy": policy.to_json(),
            "trained_on_sha256": trained_on,
            "recipe": settings,
        }
        write_file(directory / "README.md", model_card(card, teachers).encode())
        write_json(directory / MODEL_CARD, sealed(card))
        directory.rename(recipe.output)
    except BaseException:
        remove_tree(directory)
        raise
    sync_directory(recipe.output.parent)


def provenance(row: TokenRow, in_weights: bool) -> dict[str, Any]:
    """What is kept of a document that taught the tokenizer, and the weights too if ``in_weights``."""
    return {
        "id": row.id,
        "license": row.license,
        "owner": row.owner,
        "source": row.source,
        "content_hash": row.content,
        "taught": ["tokenizer", "weights"] if in_weights else ["tokenizer"],
    }


def model_card(card: dict[str, Any], teachers: Teachers) -> str:
    """The model card: what it is, and the licences of what taught it."""
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [silo, permissive]",
        "---",
        "",
        "# A SILO model",
        "",
        f"{card['parameters']:,} parameters, trained on {card['tokens']:,} tokens of {card['documents']:,} documents "
        f"in {card['steps']:,} steps, to a loss of {card['loss']:.3f} nats a token.",
        "",
        "Weights and tokenizer learned from permissively licensed text alone. A licence gate judged every document "
        f"before its text was read. `{TRAINED_ON}` lists each of them, with licence, owner, source and hash; "
        "`silo corpus audit DIR` checks the list and counts it.",
        "",
        "| tier | licence | documents | tokens | owners |",
        "|:---|:---|---:|---:|---:|",
        *(f"| {tier} | {name} | {documents:,} | {tokens:,} | {owners:,} |" for tier, name, documents, tokens, owners
          in teachers.table()),
        "",
        "Tiers: PD public domain, SW permissive software licences, BY attribution licences. Whoever passes on text of "
        "the tiers SW and BY owes its notice or its author's name.",
        "",
        f"- Corpus: sha256 `{card['corpus']}`",
        f"- Its audit: sha256 `{card['audit']}`",
        f"- Documents: sha256 `{card['trained_on_sha256']}`",
        "",
    ]  # fmt: skip
    return "\n".join(lines)
