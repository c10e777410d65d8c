"""What an answer rests on: for each token the model's share and each document's, their sums, what would change if a
document left, and the notice that attribution licences ask for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import fsum, inf, log
from typing import TYPE_CHECKING, Any

from silo.purposes import asks_for_attribution
from silo.retrieval import SourceDocument

if TYPE_CHECKING:
    from silo.mixture import Share

NAMED_TOKENS = 0.1
"""A document that an answer owes less to, in tokens, is not named in the notice."""


@dataclass(frozen=True)
class DocumentShare:
    """What one document gives to a token's probability."""

    document: SourceDocument
    probability: float
    by_method: dict[str, float]
    """The same by ``knn``, ``ric`` and ``ngram``, as far as they found the document."""


@dataclass(frozen=True)
class ExplainedToken:
    """One token and what its probability is the sum of."""

    token: int
    text: str
    """What it adds to the text; empty for a token that ends within a character."""
    probability: float
    """The sum of the model's share and of all documents'."""
    lm: float
    """The model's share."""
    shares: tuple[DocumentShare, ...]
    """Largest first."""
    without: Mapping[SourceDocument, float]
    """What the probability would be without each document that matters (:mod:`silo.leaving`), also those that say
    something else."""

    @classmethod
    def of(
        cls, token: int, text: str, split: Sequence[Share], without: Mapping[SourceDocument, float]
    ) -> ExplainedToken:
        """Sum up the shares of methods."""
        lm = fsum(share.probability for share in split if share.document is None)
        found: dict[SourceDocument, dict[str, float]] = defaultdict(dict)
        for share in split:
            if share.document is not None:
                found[share.document][share.method] = share.probability
        shares = [DocumentShare(document, fsum(parts.values()), parts) for document, parts in found.items()]
        shares.sort(key=lambda share: (-share.probability, share.document.id))
        return cls(token, text, fsum([lm, *(share.probability for share in shares)]), lm, tuple(shares), without)


@dataclass(frozen=True)
class Contribution:
    """What a document or an owner gives to a whole answer."""

    name: str
    """The document's id, or the owner."""
    probability: float
    """The sum of its shares of all tokens' probabilities."""
    tokens: float
    """The sum of what part of each token's probability its share is: so many of the answer's tokens are owed to it. The
    model's and all documents' together are the number of tokens."""


@dataclass(frozen=True)
class Explanation:
    """The tokens of an answer, or of any text."""

    tokens: tuple[ExplainedToken, ...]

    @property
    def lm(self) -> Contribution:
        """What the model itself gives."""
        likely = [each for each in self.tokens if each.probability > 0]
        return Contribution("lm", fsum(each.lm for each in likely), fsum(each.lm / each.probability for each in likely))

    def documents(self) -> list[tuple[SourceDocument, Contribution]]:
        """What each document gives, most first."""
        named = {share.document.id: share.document for each in self.tokens for share in each.shares}
        return [(named[each.name], each) for each in self._sums(lambda document: document.id)]

    def owners(self) -> list[Contribution]:
        """What each owner's documents give, most first."""
        return self._sums(lambda document: document.owner)

    def changes(self) -> dict[SourceDocument, float]:
        """By how much the logarithm of the whole answer's probability would change, in nats, if a document left, for
        each that was found: below zero where it helps."""
        found: dict[SourceDocument, list[float]] = defaultdict(list)
        for each in self.tokens:
            for document, left in each.without.items() if each.probability > 0 else ():
                found[document].append(log(left) - log(each.probability) if left > 0 else -inf)
        return {document: fsum(changes) for document, changes in found.items()}

    def _sums(self, name: Callable[[SourceDocument], str]) -> list[Contribution]:
        found: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for each in self.tokens:
            for share in each.shares:
                if share.probability > 0:
                    found[name(share.document)].append((share.probability, share.probability / each.probability))
        sums = [Contribution(of, *(fsum(part) for part in zip(*parts, strict=True))) for of, parts in found.items()]
        return sorted(sums, key=lambda each: (-each.tokens, each.name))

    def notice(self, least: float = NAMED_TOKENS) -> str:
        """Title, owner, licence and source of each document that the answer owes more than ``least`` tokens to, unless
        its licence asks for no attribution; empty if there is none."""
        lines = []
        for document, given in self.documents():
            if given.tokens > least and asks_for_attribution(document.license):
                by = f" by {document.owner}" if document.owner else ""
                source = f", {document.source}" if document.source else ""
                lines.append(f"- {document.title or document.id}{by} ({document.license}){source}")
        return "\n".join(["This text draws on:", *lines]) if lines else ""

    def to_json(self) -> dict[str, Any]:
        """Sums, notice and tokens; a ``change`` in nats is absent where nothing would be left, or where a document
        gives so little that it was not asked."""
        changes = self.changes()
        return {
            "lm": {"probability": self.lm.probability, "tokens": self.lm.tokens},
            "documents": [
                {
                    "document": document.id,
                    **_described(document),
                    **_numbers(given),
                    **_change(changes.get(document, -inf)),
                }
                for document, given in self.documents()
            ],
            "owners": [{"owner": given.name, **_numbers(given)} for given in self.owners()],
            "notice": self.notice(),
            "tokens": [
                {
                    "token": each.token,
                    "text": each.text,
                    "probability": each.probability,
                    "lm": each.lm,
                    "shares": [
                        {"document": share.document.id, "probability": share.probability, **share.by_method}
                        for share in each.shares
                    ],
                }
                for each in self.tokens
            ],
        }


@dataclass(frozen=True)
class Answer:
    """A text that was written, and what it rests on."""

    prompt: str
    text: str
    explanation: Explanation


def _described(document: SourceDocument) -> dict[str, str]:
    return {name: value for name, value in asdict(document).items() if name != "id"}


def _numbers(given: Contribution) -> dict[str, float]:
    return {"probability": given.probability, "tokens": given.tokens}


def _change(change: float) -> dict[str, float]:
    return {"change": change} if change > -inf else {}


def pieces(decode: Callable[[list[int]], str], tokens: Sequence[int]) -> list[str]:
    """What each token adds to a decoded text: pieces that join to the whole.

    A token that ends within a character adds nothing, and the one that completes it the character. Some tokens before
    are decoded with each, since tokenizers treat the first of a text unlike others.
    """
    found, before, done = [], 0, 0
    for end in range(1, len(tokens) + 1):
        known, text = decode(list(tokens[before:done])), decode(list(tokens[before:end]))
        if text.endswith("\N{REPLACEMENT CHARACTER}") and end < len(tokens):
            found.append("")
            continue
        found.append(text[len(known) :])
        before, done = done, end
    return found
