"""What a corpus or a model holds, for people: documents by tier, licence and owner, and what was found on the way."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from silo.corpus import FORMAT, MODEL_CARD, SIDES, TRAINED_ON, Corpus
from silo.documents import Document
from silo.files import check_digest, read_sealed, sha256_file
from silo.findings import OUTCOMES, Finding
from silo.licensing import Policy, Tier
from silo.overlap import Overlap, Role, batches

_EXAMPLES = 5
"""Findings that a summary shows of each reason; ``findings.jsonl`` lists them all."""
_TOKENIZER_BATCH = 256
"""Documents encoded at once, which the tokenizer spreads over the processor's cores."""


class Tally:
    """Counts documents, pairs and characters (and tokens, if they are given) by tier, licence and owner."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._counts: dict[tuple[Tier, str, str], Counter[str]] = {}

    def add(self, document: Document, tier: Tier, tokens: int | None = None) -> str:
        """Count a document. A pair that was drawn from a file is counted as such, and its text not again."""
        kind = "pairs" if is_drawn_pair(document) else "documents"
        count = self._counts.setdefault((tier, document.license, document.owner), Counter())
        count[kind] += 1
        if kind == "documents":
            count["characters"] += len(document.prompt) + len(document.text)
            if tokens is not None:
                count["tokens"] += tokens
        return kind

    def rows(self) -> list[dict[str, Any]]:
        """One row a tier and licence, with its owners."""
        names = ["documents", "pairs", "characters"]
        names += ["tokens"] if any("tokens" in count for count in self._counts.values()) else []
        table = []
        for (tier, license), group in itertools.groupby(sorted(self._counts), key=lambda key: key[:2]):
            counts = {owner: self._counts[tier, license, owner] for _, _, owner in group}
            total = {name: sum(count[name] for count in counts.values()) for name in names}
            owners = {owner: {name: count[name] for name in names} for owner, count in sorted(counts.items())}
            table.append(
                {"tier": tier.value, "license": license, **total, "owners": sorted(owners), "by_owner": owners}
            )
        return table


def is_drawn_pair(document: Document) -> bool:
    """Whether a document was drawn from another, and is no text of its own: a user's own pairs have no file."""
    return bool(document.prompt) and "#" in document.id


def summarize(tally: Tally, findings: Iterable[Finding]) -> dict[str, Any]:
    """What ``silo corpus audit --json`` prints: the table, the tiers' totals, and findings grouped by reason."""
    table = tally.rows()
    names = [name for name in ("documents", "pairs", "characters", "tokens") if table and name in table[0]]
    totals = {
        tier.value: {name: sum(line[name] for line in table if line["tier"] == tier.value) for name in names}
        for tier in Tier
        if tier is not Tier.REFUSED
    }
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    for finding in findings:
        empty = {"reason": finding.reason, "documents": 0, "examples": []}
        group = groups.setdefault((finding.outcome, finding.reason), empty)
        group["documents"] += 1
        if len(group["examples"]) < _EXAMPLES:
            group["examples"].append({"id": finding.id, "detail": finding.detail})
    ordered = sorted(groups.items(), key=lambda item: (-item[1]["documents"], item[0]))
    by_outcome = {outcome: [group for (found, _), group in ordered if found == outcome] for outcome in OUTCOMES}
    return {"licenses": table, "tiers": totals, **by_outcome}


def audit(path: Path, tokenizer: Any = None) -> dict[str, Any]:
    """What a corpus holds, by tier and licence, read from its text with every checksum checked; and what was found.

    Args:
        path: what :func:`silo.collect.collect` wrote, one side of it, or the directory of a model of ours.
        tokenizer: a ``tokenizers.Tokenizer``, to count tokens as well.
    """
    if (path / TRAINED_ON).is_file():
        return audit_model(path)
    sides = [path / side for side in SIDES if (path / side / "manifest.json").is_file()]
    corpora = [Corpus.open(side) for side in sides or [path]]
    tally = Tally(Policy.from_json(corpora[0].manifest["policy"], where=str(path)))
    for corpus in corpora:
        for split in SIDES[corpus.manifest["side"]]:
            _count(corpus.documents(split), tally, tokenizer)
    return summarize(tally, read_findings(path) if sides else [])


def audit_model(path: Path) -> dict[str, Any]:
    """What taught the weights and the tokenizer of a model, by tier and licence."""
    card = read_sealed(path / MODEL_CARD, FORMAT)
    check_digest(path / TRAINED_ON, sha256_file(path / TRAINED_ON), card["trained_on_sha256"])
    policy = Policy.from_json(card["policy"], where=str(path / MODEL_CARD))
    counts: dict[tuple[Tier, str], Counter[str]] = {}
    owners: dict[tuple[Tier, str], set[str]] = {}
    with open(path / TRAINED_ON, "rb") as file:
        for line in file:
            row = json.loads(line)
            tier = policy.tier(Document(**{key: row[key] for key in ("id", "license", "owner", "source")}, text="-"))
            counts.setdefault((tier, row["license"]), Counter()).update([*row["taught"], "documents"])
            owners.setdefault((tier, row["license"]), set()).add(row["owner"])
    names = ("documents", "tokenizer", "weights")
    table = [
        {"tier": tier.value, "license": license, **{name: count[name] for name in names}}
        | {"owners": sorted(owners[tier, license])}
        for (tier, license), count in sorted(counts.items())
    ]
    return {"licenses": table, "collected": card["corpus"], "trained_on_sha256": card["trained_on_sha256"]}


def repeated(path: Path, others: Iterable[Document]) -> dict[str, Any]:
    """Passages of a corpus's permissive side that stand in other text as well, such as a store's.

    Returns:
        How many documents repeat something, and each with its longest passage and whose that is.
    """
    side = path / "permissive" if (path / "permissive" / "manifest.json").is_file() else path
    corpus, names, roles = Corpus.open(side), [], []

    def texts() -> Iterator[bytes]:
        mine = (document for split in SIDES[corpus.manifest["side"]] for document in corpus.documents(split))
        for role, documents in ((Role.TRAINING, mine), (Role.RESTRICTED, others)):
            for document in documents:
                names.append((document.id, document.license))
                roles.append(role)
                yield document.full_text.encode()

    with tempfile.TemporaryDirectory() as scratch:
        overlap = Overlap(Path(scratch) / "overlap")
        for batch in batches(texts()):
            overlap.add(batch)
        overlap.compare(np.asarray(roles), np.arange(len(roles)))
        rows = []
        for number, passages in overlap.passages():
            worst = max(passages, key=lambda passage: (passage.words, -passage.begin))
            theirs, license = names[worst.other]
            words = sum(passage.words for passage in passages)
            longest = {"words": worst.words, "begin": worst.begin, "end": worst.end}
            rows.append({"id": names[number][0], "words": words, "longest": longest, "of": theirs, "license": license})
    return {"documents": len(rows), "compared_with": roles.count(Role.RESTRICTED), "rows": sorted(rows, key=_by_id)}


def _by_id(row: dict[str, Any]) -> str:
    return str(row["id"])


def read_findings(path: Path) -> Iterator[Finding]:
    """All findings of a collected corpus, checked. Raises :class:`silo.errors.IntegrityError`."""
    expected = read_sealed(path / "audit.json", FORMAT)["findings"]["sha256"]
    check_digest(path / "findings.jsonl", sha256_file(path / "findings.jsonl"), expected)
    with open(path / "findings.jsonl", "rb") as file:
        for line in file:
            yield Finding(**json.loads(line))


def _count(documents: Iterator[Document], tally: Tally, tokenizer: Any) -> None:
    while batch := list(itertools.islice(documents, _TOKENIZER_BATCH)):
        if tokenizer is None:
            lengths: list[int | None] = [None] * len(batch)
        else:
            texts = ["" if is_drawn_pair(document) else document.full_text for document in batch]
            lengths = [len(encoded) for encoded in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        for document, length in zip(batch, lengths, strict=True):
            tally.add(document, tally.policy.tier(document), length)
