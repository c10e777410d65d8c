"""Where the loss of a mixture lies: tokens by how long a suffix of their context the store knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from render_model import columns

from silo.readings import SUFFIX_BOUNDS, Evidence


def by_suffix(evidence: Evidence, logs: Mapping[str, torch.Tensor]) -> list[dict[str, Any]]:
    """Tokens of each class of suffix, and what each contestant loses of them.

    Args:
        evidence: what was known of n tokens, by an ∞-gram among others.
        logs: by contestant the tokens' log-probabilities, (n,) each.

    Returns:
        For each class with any token: the shortest of its suffixes, tokens, and mean nats a token by contestant.
    """
    of_token = evidence["ngram_class"].long() // 2
    rows = []
    for number, shortest in enumerate((0, *SUFFIX_BOUNDS)):
        chosen = of_token == number
        if chosen.any():
            nats = {name: -each[chosen].mean().item() for name, each in logs.items()}
            rows.append({"suffix": shortest, "tokens": int(chosen.sum()), **nats})
    return rows


def merged(domains: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """The rows of several texts as those of one."""
    found: dict[int, dict[str, Any]] = {}
    for row in (row for rows in domains for row in rows):
        of = found.setdefault(row["suffix"], dict.fromkeys(row, 0) | {"suffix": row["suffix"]})
        tokens = of["tokens"] + row["tokens"]
        for name in row.keys() - {"suffix", "tokens"}:
            of[name] += (row[name] - of[name]) * row["tokens"] / tokens
        of["tokens"] = tokens
    return [found[suffix] for suffix in sorted(found)]


def table(rows: Sequence[Mapping[str, Any]], titles: Mapping[str, str]) -> str:
    """Those as Markdown; the share of the loss is that of the contestant who is titled last."""
    last = list(titles)[-1]
    tokens = sum(row["tokens"] for row in rows)
    loss = sum(row["tokens"] * row[last] for row in rows)
    head = columns("suffix, tokens", "share of tokens", *titles.values(), f"share of the loss of {titles[last]}")
    lines = [
        columns(
            f"from {row['suffix']}" if row["suffix"] else "none",
            f"{100 * row['tokens'] / tokens:.1f} %",
            *(f"{row[name]:.2f}" for name in titles),
            f"{100 * row['tokens'] * row[last] / loss:.1f} %",
        )
        for row in rows
    ]
    return "\n".join([head, f"|:---|{'---:|' * (len(titles) + 2)}", *lines])
