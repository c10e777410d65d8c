"""Where a token came from: its probability split into the model's share and one share a document."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from eval.perplexity import Text
from silo.mixture import Mixture, Share
from silo.weights import Weights

CONTEXT_TOKENS = 24
"""Tokens of context that are shown before an explained one."""
SHOWN_SHARES = 6
APART = 16
"""Explained tokens of one text are at least this many positions apart."""


class Pick(NamedTuple):
    """One token to explain: which text, and where in it."""

    text: int
    position: int


def most_gained(texts: Sequence[Text], gain: torch.Tensor, mixture: Mixture, count: int) -> list[Pick]:
    """The tokens whose log-probability gained most, spread over texts; ``gain`` is (tokens of all texts,).

    White space, signs and short pieces of words are passed over: they gain, but tell a reader nothing. No token is
    taken twice.
    """
    where = [Pick(number, position) for number, text in enumerate(texts) for position in range(len(text.tokens))]
    picks: list[Pick] = []
    seen: set[int] = set()
    for index in torch.argsort(gain, descending=True, stable=True).tolist():
        pick = where[index]
        token = int(texts[pick.text].tokens[pick.position])
        word = str(mixture.model.tokenizer.decode([token])).strip()
        near = any(pick.text == other.text and abs(pick.position - other.position) < APART for other in picks)
        if token not in seen and not near and len(word) > 3 and word.isidentifier():
            seen.add(token)
            picks.append(pick)
            if len(picks) == count:
                break
    return sorted(picks)


def explain(mixture: Mixture, texts: Sequence[Text], picks: Sequence[Pick], weights: Weights) -> list[dict[str, Any]]:
    """Split the probability of each picked token; the shares of all documents sum to it exactly."""
    explained = []
    for number in sorted({pick.text for pick in picks}):
        tokens = texts[number].tokens
        wanted = [pick.position for pick in picks if pick.text == number]
        for parts in mixture.parts(tokens):
            for position in (at for at in wanted if parts.begin <= at < parts.end):
                shares = mixture.attribute(parts, position - parts.begin, int(tokens[position]), weights)
                explained.append({**_place(mixture, texts[number], position), **_split(shares)})
    return explained


def share_of(owner: str, explained: dict[str, Any]) -> float:
    """How much of an explained token's probability comes from one owner's documents, of those shown."""
    return sum(share["probability"] for share in explained["shares"] if share["owner"] == owner)


def _place(mixture: Mixture, text: Text, position: int) -> dict[str, Any]:
    decode = mixture.model.tokenizer.decode
    return {
        "document": text.document.id,
        "owner": text.document.owner,
        "position": text.begin + position,
        "context": decode(text.tokens[max(0, position - CONTEXT_TOKENS) : position].tolist()),
        "token": decode([int(text.tokens[position])]),
    }


def _split(shares: Sequence[Share]) -> dict[str, Any]:
    return {
        "probability": sum(share.probability for share in shares),
        "documents": len({share.document.id for share in shares if share.document}),
        "shares": [_share(share) for share in shares[:SHOWN_SHARES]],
    }


def _share(share: Share) -> dict[str, Any]:
    document = share.document
    return {
        "method": share.method,
        "probability": share.probability,
        "document": document.id if document else None,
        "owner": document.owner if document else None,
        "license": document.license if document else None,
        "title": document.title if document else None,
    }
