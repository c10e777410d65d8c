"""Store size: perplexity while the store grows by doubling, and whether it falls by as much with every doubling.

Each size is a view of the one store (:meth:`datastore.snapshot.Snapshot.select`), which answers in every bit as a store
of its documents alone; nothing is built or encoded. Sizes are nested: documents come in the order of their hashed ids,
so that a smaller store is a part of every larger one. Weights are fitted on validation text at each size anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from datastore.selection import Selection
from datastore.shard import DocumentRow
from eval.perplexity import score
from eval.studies.figure import Panel, Series, draw
from eval.studies.subject import Progress, Subject, rows_of
from eval.terms import mixture_title
from silo.errors import UsageError
from silo.files import sha256


def nested(rows: Sequence[DocumentRow], sizes: int) -> list[list[DocumentRow]]:
    """Documents of so many stores, each a part of the next: the last has all, each other about half of the next one's
    tokens, and at least one document. Stores that would be the same, since one document fills both, are one.

    Raises:
        UsageError: there are fewer documents than sizes.
    """
    if len(rows) < sizes:
        raise UsageError(f"{sizes} sizes of a store of {len(rows)} documents; expected at most one for each document")
    ordered = sorted(rows, key=lambda row: sha256(row.id.encode()))
    ends = np.cumsum([row.end - row.begin for row in ordered])
    counts = [int(np.argmax(ends >= ends[-1] / 2**power)) + 1 for power in reversed(range(sizes))]
    return [ordered[:count] for count in sorted(set(counts))]


def study(subject: Subject, sizes: int, progress: Progress | None = None) -> dict[str, Any]:
    """Measure perplexity at each size.

    Returns:
        ``sizes``: tokens and documents of each, perplexity of each mixture with its interval, the weights.
        ``fits``: by mixture the log-linear fit, see :func:`log_linear`.
    """
    left_out = subject.left_out
    hidden = set(left_out.documents) if left_out else set()
    stores = nested([row for row in rows_of(subject.store) if row.id not in hidden], sizes)
    texts = subject.texts(subject.test)
    measured: list[dict[str, Any]] = []
    for number, documents in enumerate(stores, start=1):
        mixture = subject.mixture(allow=Selection(documents=tuple(row.id for row in documents)))
        weighings = subject.weighings(mixture)
        found = subject.perplexities(score(mixture, texts), texts, weighings)
        measured.append(
            {
                "tokens": sum(row.end - row.begin for row in documents),
                "documents": len(documents),
                "perplexity": found,
                "weights": {name: each.to_json() for name, each in weighings.items() if not subject.given},
            }
        )
        if progress:
            progress(number, len(stores))
    tokens = [each["tokens"] for each in measured]
    names = [name for name in measured[0]["perplexity"] if name != "lm"]
    fits = {name: log_linear(tokens, [each["perplexity"][name][0] for each in measured]) for name in names}
    return {"test_tokens": sum(len(text.tokens) for text in texts), "sizes": measured, "fits": fits}


def log_linear(tokens: Sequence[int], perplexity: Sequence[float]) -> dict[str, float]:
    """Fit log-perplexity as a straight line in the logarithm of the store's size, by least squares.

    Returns:
        ``nats_a_doubling``, below 0 if a larger store is better; ``at_one_token``, the line's perplexity there; and
        ``r2``, the share of the variance of the log-perplexities that the line explains.
    """
    x, y = np.log2(np.asarray(tokens, dtype=np.float64)), np.log(np.asarray(perplexity, dtype=np.float64))
    if len(np.unique(x)) < 2:
        raise UsageError(
            "a line needs two sizes that differ; give --sizes at least 2, and a store of several documents"
        )
    slope, start = np.polyfit(x, y, 1)
    rest, whole = np.sum((y - start - slope * x) ** 2), np.sum((y - y.mean()) ** 2)
    r2 = 1.0 - float(rest / whole) if whole > 0 else 1.0
    return {"nats_a_doubling": float(slope), "at_one_token": float(np.exp(start)), "r2": r2}


def figure(result: dict[str, Any]) -> str:
    """Perplexity against tokens, both on log scales, where a log-linear law is a straight line."""
    tokens = [each["tokens"] for each in result["sizes"]]
    series = [
        Series(_title(name, result["fits"]), tokens, [each["perplexity"][name][0] for each in result["sizes"]])
        for name in result["sizes"][0]["perplexity"]
    ]
    panel = Panel("tokens in the store", "perplexity of test text", series, x_scale="log", y_scale="log")
    return draw("Perplexity and the size of the store", [panel])


def _title(name: str, fits: dict[str, dict[str, float]]) -> str:
    title = mixture_title(name).replace("\N{NO-BREAK SPACE}", " ")
    return f"{title}, r² = {fits[name]['r2']:.3f}" if name in fits else title
