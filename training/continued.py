"""Continued pre-training: a model directory of ours to begin with, and all who taught it.

Weights that go on learning keep what they learnt. So a model may only be continued if it is known who taught it, if all
of them may teach under today's policy, and if the weights are the ones that the list was written for; and its teachers
are listed again beside what is made of it.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, replace
from math import isqrt
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from silo.corpus import FORMAT, MODEL_CARD, TRAINED_ON, require_permissive
from silo.errors import IntegrityError, UsageError
from silo.files import check_digest, read_sealed, sha256_file
from silo.language_model import LanguageModel, fingerprint
from silo.licensing import Policy
from silo.modeling import SiloForCausalLM
from silo.surgery import grow
from training.tokens import wrap_tokenizer


@dataclass(frozen=True)
class Teacher:
    """One line of a model's list of teachers."""

    id: str
    license: str
    owner: str
    source: str
    content_hash: str
    taught: list[str]
    """``tokenizer``, ``weights`` or both."""


@dataclass(frozen=True)
class Origin:
    """A model to begin with, and its teachers."""

    fingerprint: str
    card: dict[str, Any]
    teachers: list[Teacher]
    model: SiloForCausalLM
    tokenizer: PreTrainedTokenizerFast

    @classmethod
    def open(cls, path: Path, policy: Policy, sequence_length: int) -> Origin:
        """Judge every teacher of a model, then load it.

        Raises:
            LicenseError: one of its teachers is restricted under this policy; the document is named.
            UsageError: it is no model of ours, or its sequences are shorter than those to come.
            IntegrityError: list, weights or tokenizer are not those that ``silo train`` wrote.
        """
        for name in (MODEL_CARD, TRAINED_ON):
            if not (path / name).is_file():
                raise UsageError(
                    f"{path} has no {name}, so it is not known who taught it; init wants a model that `silo train` made"
                )
        card = read_sealed(path / MODEL_CARD, FORMAT)
        check_digest(path / TRAINED_ON, sha256_file(path / TRAINED_ON), card["trained_on_sha256"])
        with open(path / TRAINED_ON, "rb") as file:
            teachers = [Teacher(**json.loads(line)) for line in file]
        for teacher in teachers:
            require_permissive(teacher, policy, where=path)
        found = fingerprint(path)
        if found != card.get("fingerprint"):
            raise IntegrityError(
                f"{path}: weights and tokenizer are not those that {TRAINED_ON} was written for; restore the directory "
                "or train the model again"
            )
        model = LanguageModel.load(path).model
        if not isinstance(model, SiloForCausalLM):
            raise UsageError(f"{path} is a {type(model).__name__}; init wants a model that `silo train` made")
        if model.config.max_position_embeddings < sequence_length:
            raise UsageError(
                f"sequence_length is {sequence_length}, and {path} reads {model.config.max_position_embeddings} "
                "tokens at most; lower sequence_length"
            )
        return cls(found, card, teachers, model, wrap_tokenizer(Tokenizer.from_file(str(path / "tokenizer.json"))))

    def grown(self, experts: int) -> Origin:
        """The same with so many experts in its PEER layers, and the same function.

        Raises:
            UsageError: it has no PEER layer, or the number is not 4, 9, 16, … times its own.
        """
        had = self.model.config.peer_num_experts
        factor = isqrt(experts // had)
        if factor < 2 or factor**2 * had != experts:
            raise UsageError(
                f"model.peer_num_experts is {experts}, and the model of init has {had}; expected 4, 9, 16 or another "
                f"square times as many, such as {4 * had}"
            )
        return replace(self, model=grow(self.model, factor))

    def summary(self) -> dict[str, Any]:
        """What is kept of it beside the new weights."""
        names = ("tokens", "steps", "corpus", "documents_by_license", "init")
        return {"fingerprint": self.fingerprint, **{name: self.card[name] for name in names if name in self.card}}


def united(earlier: list[Teacher], later: list[Teacher]) -> list[Teacher]:
    """All teachers, each once, sorted: whoever taught twice is listed with all that it taught."""
    taught: dict[tuple[str, ...], set[str]] = {}
    for teacher in (*earlier, *later):
        key = (teacher.id, teacher.content_hash, teacher.license, teacher.owner, teacher.source)
        taught.setdefault(key, set()).update(teacher.taught)
    return [
        Teacher(id, license, owner, source, content_hash, sorted(what))
        for (id, content_hash, license, owner, source), what in sorted(taught.items())
    ]


def by_license(teachers: list[Teacher]) -> dict[str, int]:
    """How many documents of each licence taught the weights."""
    return dict(sorted(Counter(each.license for each in teachers if "weights" in each.taught).items()))
