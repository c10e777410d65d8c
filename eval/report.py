"""The quickstart's report as one HTML page that needs nothing but itself.

The page loads nothing and runs nothing: style and chart are inside it, and its content policy forbids the rest.

Where a claim can be worked out from the report's numbers and hashes it is, and where it fails the page says so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eval.chart import chart_groups, draw_chart
from eval.terms import METHODS, methods, mixture_title, mixtures, owners, ratio
from silo.audit_page import TITLES
from silo.files import write_file
from silo.markup import (
    Html,
    count,
    join,
    label,
    number,
    page,
    probability,
    section,
    size,
    some,
    table,
    tag,
    verdict,
    visible,
)

NOTES = {
    "knn": "the nearest neighbours of its hidden state",
    "ric": "its own answer after reading blocks that BM25 found",
    "ngram": "what follows the longest matching suffix",
}
CONTEXT_CHARACTERS = 320


def write_report(report: dict[str, Any], path: Path) -> None:
    """Write a report as one HTML page, whole or not at all."""
    write_file(path, render_html(report).encode())


def render_html(report: dict[str, Any]) -> str:
    """The page of a report. Equal reports give equal pages, whatever the order of their keys."""
    sections = [summary, training, perplexities, attribution, removal, limits]
    main = tag("main", *(section(report) for section in sections))
    return page(f"SILO report · {headline(report)}", main, colophon(report))


# What the page claims


def foreign_licenses(report: dict[str, Any]) -> list[str]:
    """Licences that the weights were trained on and that the audit does not list as permissive: there must be none."""
    permitted = {each["license"] for each in report["audit"]["permissive"]}
    return sorted(set(report["training"]["documents_by_license"]) - permitted)


def same_store(removed: dict[str, Any]) -> bool:
    """Whether the store after the removal is the store that never held the owner."""
    return bool(removed["store_after"] == removed["fresh_store"])


def same_answers(removed: dict[str, Any]) -> bool:
    """Whether both give the same distributions."""
    return bool(removed["distributions_after"] == removed["distributions_fresh"])


def headline(report: dict[str, Any]) -> str:
    """The result in one sentence."""
    best, found, number_of = mixtures(report)[-1], report["perplexity"], len(owners(report))
    text = (
        f"Perplexity on {'one owner’s' if number_of == 1 else f'{number_of:,} owners’'} held-out text: "
        f"{number(found['restricted']['lm'])} with the model alone, {number(found['restricted'][best])} with the store"
    )
    for each in owners(report):
        if each["removed"]:
            change = f"{number(each['before'][best])} to {number(each['after'][best])}"
            text += f"; {each['owner']}’s goes from {change} when it is removed"
    return f"{text}."


# The sections


def summary(report: dict[str, Any]) -> Html:
    """The headline, what the project is, and four key figures."""
    best, found, removed = mixtures(report)[-1], report["perplexity"], report["removal"]
    exact = same_store(removed) and same_answers(removed) and removed["equal"] and removed["verified"]
    clean = not foreign_licenses(report)
    facts = [
        (ratio(found["restricted"], best), "the perplexity of the model alone, on text of the owners in the store"),
        (ratio(found["permissive"], best), "the same on permissive text, which the store should not make worse"),
        (
            verdict(clean, "permissive only", "not only permissive"),
            f"{count(report['training']['documents'], 'document')} taught the weights, by the licences below",
        ),
        (
            verdict(exact, "removed exactly", "not removed exactly"),
            f"{count(removed['positions'], 'distribution')} and the hash compared with a store that never held it",
        ),
    ]
    lead = (
        "The weights learn from permissively licensed text alone. Everything else stays in a store beside the model, "
        "one shard for each rights holder, is read when an answer is computed, and is gone when the holder says so. "
        "Lower perplexity is better."
    )
    return tag(
        "header",
        tag("p", f"SILO {report['version']} · quickstart report · seed {report['seed']}", class_="eyebrow"),
        tag("h1", headline(report)),
        tag("p", lead),
        tag("dl", *(tag("div", tag("dt", value), tag("dd", text)) for value, text in facts), class_="facts"),
    )


def training(report: dict[str, Any]) -> Html:
    """What was trained on what, and what went to the store."""
    found, store, foreign = report["training"], report["store"], foreign_licenses(report)
    by_license = sorted(found["documents_by_license"].items(), key=lambda item: (-item[1], item[0]))
    weights = (
        f"The weights: {count(found['parameters'], 'parameter')}, trained on {count(found['documents'], 'document')} "
        f"for {count(found['steps'], 'step')} and {count(found['tokens'], 'token')}, to a loss of "
        f"{number(found['loss'], 3)}. By licence: {', '.join(f'{name} {held:,}' for name, held in by_license)}. "
    )
    check = verdict(
        not foreign,
        "Each of these licences is on the permissive side of the audit.",
        f"Not on the permissive side of the audit: {', '.join(foreign)}.",
    )
    shards = (
        f"The store: {count(len(store['shards']), 'shard')}, one for each owner, with keys as {store['codes']} codes "
        f"in {count(store['lists'], 'list')} whose centroids were learnt from "
        f"{count(store['documents'], 'permissive document')} that the weights did not train on. What is held "
        "out for validation and test is not in it."
    )
    return section(
        "What was trained on what",
        tag("p", weights, check),
        *_audit(report["audit"]),
        tag("p", shards),
        _shards(report),
    )


def _audit(audit: dict[str, Any]) -> list[Html]:
    def rows(side: str) -> list[list[str]]:
        return [
            [
                each["license"] if each["tier"] == side else join([each["license"], label(each["tier"])]),
                *(number(each[key], 0) for key in ("documents", "pairs", "tokens")),
                some(each["owners"]),
            ]
            for each in audit[side]
        ]

    columns = {"Licence": "words", "Documents": "number", "Pairs": "number", "Tokens": "number", "Owners": "words"}
    groups = {
        "Permissive: the weights may learn it": rows("permissive"),
        "Restricted: the store only": rows("restricted"),
    }
    tables = [table("The audit: all that was collected, held-out text included", columns, groups)]
    found = {
        title: [
            [
                each["reason"],
                number(each["documents"], 0),
                f"{each['examples'][0]['id']}: {each['examples'][0]['detail']}",
            ]
            for each in audit["found"][outcome]
        ]
        for outcome, (title, _) in TITLES.items()
    }
    why = {"Reason": "words", "Documents": "number", "For example": "words"}
    return tables + ([table("What the audit found", why, found)] if any(found.values()) else [])


def _shards(report: dict[str, Any]) -> Html:
    gone = report["removal"]["owner"]
    rows = [
        [
            join([each["owner"], label("removed later")]) if each["owner"] == gone else each["owner"],
            number(each["documents"], 0),
            number(each["tokens"], 0),
            size(each["bytes"]),
            ", ".join(each["licenses"]),
        ]
        for each in report["store"]["shards"]
    ]
    columns = {"Owner": "words", "Documents": "number", "Tokens": "number", "On disk": "number", "Licences": "words"}
    return table("The shards", columns, {"": rows})


def perplexities(report: dict[str, Any]) -> Html:
    """The table, the chart and the fitted weights."""
    names, found = mixtures(report), report["perplexity"]

    def cells(title: str, values: dict[str, float], tokens: int) -> list[str]:
        lowest = min((values[name] for name in names if values.get(name) is not None), default=None)
        shown = [
            tag("b", number(values[name])) if values.get(name) == lowest else number(values.get(name)) for name in names
        ]
        return [title, *shown, ratio(values, names[-1]), number(tokens, 0)]

    tokens = sum(each["test_tokens"] for each in owners(report))
    before = [cells("All owners", found["restricted"], tokens)]
    after = [cells("All owners", found["after_removal"], tokens)]
    for each in sorted(report["owners"], key=lambda each: bool(each.get("permissive"))):
        title = join([each["owner"], label("removed")]) if each["removed"] else each["owner"]
        before.append(cells(title, each["before"], each["test_tokens"]))
        after.append(cells(title, each["after"], each["test_tokens"]))
    headings = ["Held-out text of", *map(mixture_title, names), "÷ alone", "Tokens"]
    columns = {name: "number" if index else "words" for index, name in enumerate(headings)}
    legend = "; ".join(f"{METHODS[name]}, {NOTES[name]}" for name in methods(report) if name in NOTES)
    caption = (
        "On a logarithmic scale that starts at 1, which is certainty. The last group is the same text as the third."
    )
    return section(
        "Perplexity",
        tag("p", f"What is added to the model: {legend}. The lowest of a row is bold."),
        table("Perplexity of held-out text", columns, {"With the whole store": before, "After the removal": after}),
        tag("figure", draw_chart(chart_groups(report), names), tag("figcaption", caption), class_="chart"),
        _fitted(report),
    )


def _fitted(report: dict[str, Any]) -> Html:
    name, used = mixtures(report)[-1], methods(report)

    def rows(key: str) -> list[list[str]]:
        fitted = [(each["owner"], each[key][name]) for each in report["owners"] if name in each.get(key, {})]
        return [
            [
                owner,
                *(number(one["weights"].get(method), 3) for method in used),
                number(one["temperature"] if "knn" in one["weights"] else None),
            ]
            for owner, one in fitted
        ]

    before, after = rows("weights_before"), rows("weights_after")
    groups = {
        "With the whole store": before,
        "After the removal, where they changed": [r for r in after if r not in before],
    }
    headings = ["Text of", *(f"λ\N{NO-BREAK SPACE}{METHODS.get(method, method)}" for method in used), "τ"]
    columns = {name: "number" if index else "words" for index, name in enumerate(headings)}
    return table("The weights of all methods together, fitted on validation text", columns, groups)


def attribution(report: dict[str, Any]) -> Html:
    """Some tokens with the documents behind them, before and after the removal."""
    gone, tokens = report["removal"]["owner"], report["attribution"]
    cited = any(share["owner"] == gone for each in tokens for share in each["after"]["shares"])
    kinds = {f"of-{name}": METHODS[name] for name in methods(report)} | {"of-rest": "all the rest"}
    text = (
        "These are tokens that gained much from the removed owner’s documents, not typical ones. The probability of a "
        "token splits exactly into the model’s share and one share for each document. The frame of a bar is a "
        "probability of 1, and its pieces stand in the order of the list below it. "
    )
    yes, no = f"After the removal no listed share is {gone}’s.", f"After the removal a listed share is still {gone}’s."
    return section(
        f"{count(len(tokens), 'token')} and the documents behind them",
        tag("p", text, verdict(not cited, yes, no)),
        tag("ul", *(tag("li", _swatch(kind), name) for kind, name in kinds.items()), class_="legend"),
        *(_token(each, gone) for each in tokens),
    )


def _token(each: dict[str, Any], gone: str) -> Html:
    context, token = each["context"], visible(each["token"], spaces=True) or "(empty)"
    if len(context) > CONTEXT_CHARACTERS:
        context = "…" + context[-CONTEXT_CHARACTERS:]
    sides = (_side("Before the removal", each["before"], gone), _side("After the removal", each["after"], gone))
    return tag(
        "article",
        tag("h3", tag("code", token)),
        tag("p", f"position {each['position']:,} of {each['document']} · {each['owner']}", class_="note"),
        tag("pre", context, tag("mark", token), class_="context"),
        tag("div", *sides, class_="sides"),
        class_="token",
    )


def _side(title: str, side: dict[str, Any], gone: str) -> Html:
    parts = [
        (
            f"of-{share['method']}" if share["method"] in METHODS else "of-rest",
            _source(share, gone),
            share["probability"],
        )
        for share in side["shares"]
    ]
    rest = side["probability"] - sum(value for _, _, value in parts)
    if rest > 1e-6:
        others = side["documents"] - len({share["document"] for share in side["shares"]} - {None})
        names = [count(others, "other document")] if others > 0 else []
        names += [] if any(share["method"] == "lm" for share in side["shares"]) else ["the model"]
        parts.append(("of-rest", join([" and ".join(names) or "smaller shares of the same"]), rest))
    pieces = [tag("i", class_=kind, style=f"width:{100 * min(max(value, 0), 1):.3f}%") for kind, _, value in parts]
    items = [
        tag("li", _swatch(kind), tag("span", text), tag("span", probability(value))) for kind, text, value in parts
    ]
    total = probability(side["probability"])
    spoken = f"probability {total}, {count(side['documents'], 'document')}"
    return tag(
        "div",
        tag("h4", tag("span", title), tag("b", total)),
        tag("div", *pieces, class_="bar", role="img", aria_label=spoken),
        tag("ul", *items, class_="shares"),
    )


def _source(share: dict[str, Any], gone: str) -> Html:
    method = METHODS.get(share["method"], share["method"])
    if share["document"] is None:
        return join([method, tag("small", "no document: the weights themselves")])
    mark = label("removed later") if share["owner"] == gone else ""
    source = " · ".join([method, *(share[key] for key in ("owner", "license", "document") if share[key])])
    return join([share["title"] or share["document"], mark, tag("small", source)])


def _swatch(kind: str) -> Html:
    return tag("span", class_=f"swatch {kind}")


def removal(report: dict[str, Any]) -> Html:
    """The proof that the removed owner is gone: hashes side by side, the receipt, and how to check it again."""
    found = report["removal"]
    stores = verdict(same_store(found), "the same store", "not the same store")
    answers = verdict(same_answers(found), "equal in every bit", "not equal")
    files = verdict(found["verified"], "every file is as its checksum says", "a file is not as its checksum says")
    entries = {
        "Store before the removal": [tag("code", found["store_before"])],
        "Store after the removal": [tag("code", found["store_after"])],
        "Store that never held the owner": [tag("code", found["fresh_store"]), stores],
        f"{count(found['positions'], 'distribution')} after the removal": [tag("code", found["distributions_after"])],
        "The same from the store that never held the owner": [tag("code", found["distributions_fresh"]), answers],
        "Verification": [files],
        "Receipt": [tag("code", found["receipt"])],
    }
    done = (
        f"{count(found['documents'], 'document')} and {count(found['tokens'], 'token')} were removed. A second store "
        "was built from the same text without that owner, and the two were compared by SHA-256."
    )
    again = tag("code", "silo datastore verify STORE"), " and ", tag("code", "silo datastore hash STORE"), "."
    listed = (tag("div", tag("dt", name), *(tag("dd", text) for text in texts)) for name, texts in entries.items())
    return section(
        f"The removal of {found['owner']}",
        tag("p", done),
        tag("dl", *listed, class_="proof"),
        tag("p", "To check it again: ", *again),
    )


def limits(report: dict[str, Any]) -> Html:
    """What the page does not show."""
    tested = sum(each["test_tokens"] for each in report["owners"])
    documents = sum(each["test_documents"] for each in report["owners"])
    items = [
        "The model is small and was trained for minutes. Its perplexities are per token of its own tokenizer: compare "
        "them with each other, not with published ones.",
        f"They are measured on {count(tested, 'token')} of {count(documents, 'document')}, with one seed and without "
        "intervals. Small differences mean nothing.",
        "λ and τ are fitted on validation text, never on test text, but for each row apart: whoever asks must know "
        "whose text it is.",
        "Held-out files come from the same projects as the stored ones and resemble them. Text with nothing like it in "
        "the store gains less.",
        "The shares of a token say how its probability was added up. The model’s own share is not traced to documents.",
        "The removal concerns the store. It says nothing of copies elsewhere: downloads, backups, earlier answers.",
        "This page and its report.json quote the removed text. Delete them too where that must go.",
        "Licences are those that the packages declare. Nobody checked them by hand, and this is no legal advice.",
    ]
    return section("Limits", tag("ul", *(tag("li", item) for item in items), class_="limits"))


def colophon(report: dict[str, Any]) -> Html:
    """What it took, and what identifies the model and the store."""
    times, model = report["times"], report["training"]
    stages = sorted((name for name in times if name != "total"), key=lambda name: (-times[name], name))
    listed = ", ".join(f"{name} {number(times[name])} s" for name in stages)
    took = f"{number(times['total'])} s in all: {listed}. Peak memory {size(report['peak_memory_bytes'])}."
    return tag(
        "footer",
        tag("p", took),
        tag("p", "Model ", tag("code", model["fingerprint"]), " in ", tag("code", model["model"])),
        tag("p", "Store before the removal ", tag("code", report["store"]["hash"])),
        tag("p", "The numbers of this page, with all their digits, are in report.json."),
    )
