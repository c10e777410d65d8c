"""The audit of a corpus as one HTML page: licences by tier and owner, and everything found, with its evidence."""

from __future__ import annotations

from typing import Any

from silo.findings import CUT, OUTCOMES, REFUSED, RESTRICTED, STRICTER
from silo.markup import Html, count, number, page, section, table, tag

TITLES = {
    RESTRICTED: ("Conflicts", "Declared permissive, and restricted by what else is said of them; kept for the store."),
    CUT: ("Cut", "Passages of these documents stand in restricted or held-out text as well. They were cut out."),
    STRICTER: ("Stricter tiers", "Permissive, in a stricter tier than was declared."),
    REFUSED: ("Refused", "In neither side of the corpus."),
}  # fmt: skip
"""Outcome → heading, and what it means."""

_SHOWN = 1000
"""Findings of one kind that the page lists; ``findings.jsonl`` lists them all."""


def render_audit(summary: dict[str, Any], findings: dict[str, list[dict[str, str]]]) -> str:
    """The page of an audit.

    Args:
        summary: what ``silo corpus audit --json`` prints.
        findings: outcome → findings, as dictionaries.
    """
    permissive = sum(row["documents"] for row in summary["licenses"] if row["tier"] != "restricted")
    restricted = sum(row["documents"] for row in summary["licenses"] if row["tier"] == "restricted")
    header = tag(
        "header",
        tag("p", f"SILO · audit of {summary['corpus']}", class_="eyebrow"),
        tag("h1", f"{count(permissive, 'document')} may teach weights, {number(restricted, 0)} may only be retrieved."),
        tag("p", "A licence is read as an SPDX expression; what is unknown, missing or contradicted is restricted."),
    )
    lists = [_found(outcome, summary[outcome], findings.get(outcome, [])) for outcome in OUTCOMES if summary[outcome]]
    return page(f"SILO audit · {summary['corpus']}", tag("main", header, _licenses(summary), *lists))


def _licenses(summary: dict[str, Any]) -> Html:
    names = [
        name for name in ("documents", "pairs", "characters", "tokens") if name in (summary["licenses"] or [{}])[0]
    ]
    columns = {"Owner": "words"} | {name.capitalize(): "number" for name in names}
    groups = {}
    for row in summary["licenses"]:
        total = ["all owners", *(number(row[name], 0) for name in names)]
        owners = sorted(row["by_owner"].items(), key=lambda item: (-item[1]["characters"], item[0]))
        each = [[owner or "unknown", *(number(found[name], 0) for name in names)] for owner, found in owners]
        groups[f"{row['tier']} · {row['license']}"] = [total, *each[:50]] if len(each) > 1 else each
    return section("Licences, tiers and owners", table("Documents by tier, licence and owner", columns, groups))


def _found(outcome: str, groups: list[dict[str, Any]], findings: list[dict[str, str]]) -> Html:
    title, meaning = TITLES[outcome]
    rows: dict[str, list[list[str]]] = {}
    for group in groups:
        of_reason = [finding for finding in findings if finding["reason"] == group["reason"]]
        rows[f"{group['reason']}: {count(group['documents'], 'document')}"] = [
            [finding["id"], finding["detail"]] for finding in of_reason[:_SHOWN]
        ]
    return section(title, tag("p", meaning), table(title, {"Document": "words", "Evidence": "words"}, rows))
