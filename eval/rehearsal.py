"""A rehearsal with permissive text, from which a gate learns how far to trust a store (law 2).

Some permissive text, which the weights did not see, plays the part of the restricted text: it goes into a store of its
own, with the control plane of the real one. Other text of the same owners is then read beside it, and text of owners
that this store does not have. So the gate meets what it will meet: text that the store knows well, a little, and not at
all. Afterwards the rehearsal's store is deleted.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datastore.control import provenance
from datastore.store import Store
from eval.perplexity import Scores, Text, sample, score
from silo.documents import Document
from silo.errors import LicenseError, UsageError
from silo.files import canonical_json, sha256
from silo.gate import Gate, fit_gate
from silo.language_model import LanguageModel
from silo.licensing import Policy
from silo.nearest import Nearest

ABSENT, ASKED, CHECKED = 3, 5, 4
"""Of so many owners one is not in the rehearsal's store; of so many documents one is asked about; and of so many of
those one is kept back to tell when to stop learning."""
ENOUGH = "some 50 documents of a dozen owners are nearly always enough"
"""By the shares above: of a hundred such sets less than two leave a part without a document."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Cast:
    """Which documents play which part."""

    stored: list[Document]
    asked: list[Document]
    """Of owners that have text in the store."""
    strangers: list[Document]
    """Of owners that have none."""

    @classmethod
    def of(cls, documents: Iterable[Document]) -> Cast:
        """Deal documents out by the hashes of their names, so that it needs no seed.

        Raises:
            UsageError: there are too few documents or owners.
        """
        cast = cls([], [], [])
        for document in sorted(documents, key=lambda document: sha256(document.id.encode())):
            owner = document.owner or document.source
            if _number(f"owner {owner}") % ABSENT == 0:
                cast.strangers.append(document)
            else:
                (cast.asked if _number(document.id) % ASKED == 0 else cast.stored).append(document)
        if not (cast.stored and cast.asked and cast.strangers):
            raise UsageError(
                f"{len(cast.stored)} documents to store, {len(cast.asked)} to ask about and {len(cast.strangers)} of "
                f"other owners are too few for a rehearsal; give more permissive text, of several owners: {ENOUGH}"
            )
        return cast


def rehearse(
    model: LanguageModel,
    store: Store,
    documents: Sequence[Document],
    methods: Sequence[str],
    *,
    policy: Policy,
    trained_on: set[str],
    store_tokens: int,
    asked_tokens: int,
    bare_tokens: int = 0,
    nearest: Nearest | None = None,
    progress: Progress | None = None,
) -> tuple[Gate, dict[str, Any]]:
    """Fit a gate for a store.

    Args:
        model: that of the store.
        store: gives the control plane; its documents are not read.
        documents: permissive text that the weights did not see.
        methods: what to weigh, the model first.
        policy: judges the licences.
        trained_on: content hashes of the documents that taught the model.
        store_tokens: so many go into the rehearsal's store.
        asked_tokens: so many are asked about, half of them of owners that the store does not have.
        bare_tokens: so many more go into the rehearsal's store without keys, where the real one has text without keys.
        nearest: how neighbours are looked up, here and wherever the gate is to weigh.
        progress: called while the store is built.

    Returns:
        The gate and its provenance.

    Raises:
        LicenseError: a document is restricted, or taught the weights.
        UsageError: there are too few documents.
    """
    store.require_model(model)
    require_teachers(documents, policy, trained_on)
    cast = Cast.of(documents)
    stored = list(taken(model, cast.stored, store_tokens))
    bare = list(taken(model, cast.stored[len(stored) :], bare_tokens))
    with tempfile.TemporaryDirectory(prefix="silo-rehearsal-") as directory:
        stage = _stage(Path(directory) / "store", model, store, stored, bare, progress)
        mixture = stage.mixture(model, methods, nearest=nearest)
        sides = [sample(each, mixture, asked_tokens // 2) for each in (cast.asked, cast.strangers)]
        learnt, held_out = _split([text for side in sides for text in side])
        scores = [score(mixture, each) for each in (learnt, held_out)]
    gate = fit_gate(scores[0].lessons, scores[1].lessons, methods, nearest=nearest)
    teachers = [*stored, *bare, *(text.document for side in sides for text in side)]
    taught = provenance(teachers)
    gained = [_gain(each, gate) for each in scores]
    return gate, {
        "model": model.fingerprint,
        "control": store.manifest.control,
        "fitted_on": sha256(canonical_json(taught)),
        "teachers": _with_owners(taught, teachers),
        "store_tokens": sum(shard.tokens for shard in stage.manifest.shards.values()),
        "asked_tokens": sum(map(len, scores)),
        "nats_gained": {"learnt": gained[0], "held_out": gained[1]},
    }


def _with_owners(rows: Sequence[dict[str, str]], teachers: Sequence[Document]) -> list[dict[str, str]]:
    """Rows about teachers with their owners, by which a policy may judge when the store takes the gate."""
    return [{**row, "owner": each.owner} for row, each in zip(rows, teachers, strict=True)]


def _stage(
    path: Path,
    model: LanguageModel,
    store: Store,
    stored: Sequence[Document],
    bare: Sequence[Document],
    progress: Progress | None,
) -> Store:
    """The rehearsal's store, with the control plane of the real one: some documents with keys, others without."""
    stage = Store.create(path, model, store.path / "tokenizer.json", store.control)
    stage.add(stored, model, progress=progress)
    if bare:
        stage.add(bare, model, keyed=False)
    return stage


def taken(model: LanguageModel, documents: Iterable[Document], tokens: int) -> Iterator[Document]:
    """The first of some documents, until they have so many tokens."""
    for document in documents:
        if tokens <= 0:
            return
        tokens -= len(model.tokenize(document))
        yield document


def require_teachers(documents: Iterable[Document], policy: Policy, trained_on: set[str]) -> None:
    """Raise :class:`LicenseError` for a document that may not teach what all owners share."""
    for document in documents:
        if not policy.tier(document).permissive:
            raise LicenseError(
                f"document {document.id!r} under {document.license or 'no licence'} is restricted; a gate is fitted on "
                "permissive text only: take it out"
            )
        if document.content_hash in trained_on:
            raise LicenseError(
                f"the model trained on {document.id!r}; a gate needs text that the weights did not see: take it out"
            )


def _split(texts: Sequence[Text]) -> tuple[list[Text], list[Text]]:
    """Texts to learn from, and others to tell when to stop."""
    held_out = [text for text in texts if _number(f"held out {text.document.id}") % CHECKED == 0]
    learnt = [text for text in texts if _number(f"held out {text.document.id}") % CHECKED != 0]
    if not (learnt and held_out):
        raise UsageError(
            f"{len(texts)} documents to ask about are too few for a rehearsal; give more permissive text: {ENOUGH}"
        )
    return learnt, held_out


def _gain(scores: Scores, gate: Gate) -> float:
    """By how much the mixture is better than the model alone, in nats a token."""
    return float((scores.log_probabilities(gate) - scores.lm.log()).mean())


def _number(name: str) -> int:
    return int(sha256(name.encode())[:8], 16)
