"""A suite's result, and a comparison of two, as one HTML page that needs nothing but itself."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from eval.dots import Dot, Scale, draw_dots
from eval.leakage import LENGTHS
from eval.suite_report import EXACTNESS, exact_cells, notes, spread
from eval.terms import METHODS, mixture_title
from silo.files import write_file
from silo.markup import Html, count, number, page, section, some, table, tag

PAGE = "result.html"


def write_page(value: dict[str, Any], out: Path) -> None:
    """Write a result as ``result.html``, whole or not at all."""
    write_file(out / PAGE, render_suite_page(value).encode())


def render_suite_page(value: dict[str, Any]) -> str:
    """The page of a result. Equal results give equal pages."""
    parts = [summary, perplexities, gaps, bits, leaks, exactness, weights, reading, origin]
    main = tag("main", *(part(value) for part in parts))
    return page(f"Suite {value['suite']['name']} · {headline(value)}", main)


# What is on it


def named(row: dict[str, Any], models: Sequence[str]) -> str:
    """What a row is called: by its mixture, and its model where there are several."""
    title = mixture_title(row["mixture"])
    if len(models) == 1:
        return title
    return {"lm": row["model"], "all": f"{row['model']}, all together"}.get(row["mixture"], f"{row['model']} {title}")


def models_of(value: dict[str, Any]) -> list[str]:
    """The models, in the order of the suite."""
    return list(dict.fromkeys(row["model"] for row in value["rows"]))


def by_domain(rows: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The rows of each domain, in the order of the suite."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["domain"], []).append(row)
    return found


def typical(rows: Iterable[dict[str, Any]], model: str, mixture: str) -> float:
    """The geometric mean over domains of a mixture's perplexity; there must be some."""
    own = [row["perplexity"][0] for row in rows if row["model"] == model and row["mixture"] == mixture]
    return math.exp(fmean(map(math.log, own)))


def fullest(value: dict[str, Any]) -> tuple[str, str] | None:
    """The first model with a store, and its mixture of most methods."""
    for row in reversed(value["rows"]):
        if row["mixture"] != "lm":
            model = next(each["model"] for each in value["rows"] if each["mixture"] != "lm")
            return model, [each for each in value["rows"] if each["model"] == model][-1]["mixture"]
    return None


def headline(value: dict[str, Any]) -> str:
    """The result in one sentence."""
    chosen, rows = fullest(value), [row for row in value["rows"] if not row["permissive"]]
    if chosen is None or not rows:
        return f"{count(len(models_of(value)), 'model')} on {count(len(by_domain(value['rows'])), 'domain')}."
    alone, mixed = (number(typical(rows, chosen[0], mixture)) for mixture in ("lm", chosen[1]))
    where = count(len(by_domain(rows)), "domain")
    return f"Perplexity of {chosen[0]} over {where} of restricted text: {alone} alone, {mixed} with the store."


def summary(value: dict[str, Any]) -> Html:
    """The headline and the key figures."""
    suite, chosen = value["suite"], fullest(value)
    facts: list[tuple[str, str]] = []
    for permissive, of in (
        (False, "restricted text"),
        (True, "permissive text, which the store should not make worse"),
    ):
        rows = [row for row in value["rows"] if row["permissive"] == permissive]
        if chosen is not None and rows:
            alone, mixed = (typical(rows, chosen[0], mixture) for mixture in ("lm", chosen[1]))
            domains = count(len(by_domain(rows)), "domain")
            facts.append((f"{number(mixed / alone, 3)} ×", f"the model's own perplexity, over {domains} of {of}"))
    for gap in value["gap"]:
        if chosen == (gap["model"], gap["mixture"]) and gap["geometric"] is not None:
            facts.append((share(gap["geometric"][0]), "of the gap to the reference closed, by geometric mean"))
    found = [row["leakage"]["shares"][str(LENGTHS[-1])] for row in value["rows"] if row["leakage"] is not None]
    if found:
        facts.append(
            (
                share(max(found)),
                f"of a domain's test text at most is in the store in runs of {LENGTHS[-1]} tokens or more",
            )
        )
    cells = value["cells"]
    lead = (
        f"{count(len(models_of(value)), 'model')} on {count(len(by_domain(value['rows'])), 'domain')}, "
        f"{count(sum(len(cell['documents']) for cell in cells if cell['name'] == cells[0]['name']), 'document')} of "
        "test text. Lower perplexity is better. Bars are 95 % intervals over documents."
    )
    return tag(
        "header",
        tag(
            "p",
            f"SILO {value['made']['version']} · suite {suite['name']}, version {suite['version']}",
            class_="eyebrow",
        ),
        tag("h1", headline(value)),
        tag("p", lead),
        tag("dl", *(tag("div", tag("dt", shown), tag("dd", text)) for shown, text in facts), class_="facts"),
    )


def share(value: float) -> str:
    """A share in percent."""
    return f"{number(100 * value)} %"


def perplexities(value: dict[str, Any]) -> Html:
    """Perplexity by domain, drawn and as a table."""
    caption = "Perplexity on one logarithmic scale for all domains."
    return section(
        "Perplexity by domain",
        plots(value, "perplexity", digits=1, caption=caption),
        measured_table(value, "Perplexity of a token", "perplexity", 2),
    )


def bits(value: dict[str, Any]) -> Html:
    """Bits per byte, which compare between tokenizers."""
    said = "Perplexities of a token compare between models with one tokenizer only; bits per byte between all."
    return section("Bits per byte", tag("p", said), measured_table(value, "Bits per byte of text", "bits_per_byte", 4))


def plots(value: dict[str, Any], measure: str, *, digits: int, caption: str) -> Html:
    """One drawing for each domain, all on one scale."""
    models, domains = models_of(value), by_domain(value["rows"])
    stored = {row["model"] for row in value["rows"] if row["mixture"] != "lm"}
    dots = {
        domain: [dot(row, measure, models, hollow=row["model"] not in stored) for row in rows]
        for domain, rows in domains.items()
    }
    scale = Scale.over((each for own in dots.values() for each in own), log=True)
    drawn = (
        draw_dots(domain + (" (permissive)" if domains[domain][0]["permissive"] else ""), own, scale, digits=digits)
        for domain, own in dots.items()
    )
    return tag("figure", tag("div", *drawn, class_="plots"), tag("figcaption", caption))


def dot(row: dict[str, Any], measure: str, models: Sequence[str], *, hollow: bool = False) -> Dot:
    """A row's measure; of several models, mixtures stand below the row of the model alone."""
    below = len(models) > 1 and row["mixture"] != "lm"
    label = mixture_title(row["mixture"]) if below else ""
    value, low, high = row[measure]
    return Dot(named(row, models), value, low, high, row["mixture"], hollow, label)


def measured_table(value: dict[str, Any], caption: str, measure: str, digits: int) -> Html:
    """A measure with its intervals, by domain."""
    models = models_of(value)
    groups = {
        domain: [
            [
                named(row, models),
                *(number(each, digits) for each in row[measure]),
                number(row["documents"], 0),
                number(row["tokens"], 0),
            ]
            for row in rows
        ]
        for domain, rows in by_domain(value["rows"]).items()
    }
    names = ("", "Value", "From", "To", "Documents", "Tokens")
    return table(caption, columns(names), groups)


def columns(names: Sequence[str]) -> dict[str, str]:
    """The headings of a table of numbers, whose first column is a name."""
    return {name: "number" if index else "words" for index, name in enumerate(names)}


def gaps(value: dict[str, Any]) -> Html:
    """Which share of the way to the reference each mixture goes."""
    if not value["gap"]:
        return Html("")
    several = len({row["model"] for row in value["gap"]}) > 1
    models = models_of(value) if several else models_of(value)[:1]
    ways = {"geometric": "by geometric mean (●)", "arithmetic": "by arithmetic mean (□)"}
    dots = []
    for row in value["gap"]:
        for way in ways:
            if row[way] is not None:
                percent, low, high = (100 * each for each in row[way])
                mark = "lm" if way == "geometric" else "lm+knn"
                dots.append(Dot(named(row, models), percent, low, high, mark, way != "geometric"))
    rows = [
        [
            named(row, models),
            number(row["domains"], 0),
            *(spread([100 * each for each in row[way]] if row[way] is not None else None, 1) for way in ways),
            row["why"] or f"of a {row['unit']}",
        ]
        for row in value["gap"]
    ]
    kinds = {
        "": "words",
        "Domains": "number",
        "Geometric, %": "number",
        "Arithmetic, %": "number",
        "Perplexity": "words",
    }
    drawn: list[Html] = []
    if dots:
        scale = Scale.over(dots, log=False, shown=(0.0, 100.0))
        title = "Gap closed, in %: ● geometric mean, □ arithmetic"
        drawn = [tag("figure", tag("div", draw_dots(title, dots, scale, digits=1, marked=100.0), class_="plots"))]
    said = (
        "0 % is the model alone, 100 % the reference, over the domains that are not permissive. The geometric mean "
        "counts all domains alike; in the arithmetic one, which SILO reports, those of high perplexity weigh more."
    )
    return section("Gap closed", tag("p", said), *drawn, table("Gap closed", kinds, {"": rows}))


def leaks(value: dict[str, Any]) -> Html:
    """What the stores hold of the test text word for word."""
    rows = [row for row in value["rows"] if row["leakage"] is not None]
    groups: dict[str, list[list[str]]] = {}
    for domain, own in by_domain(rows).items():
        found = {row["model"]: row["leakage"] for row in own}
        groups[domain] = [
            [
                model,
                *(number(100 * leaked["shares"][str(least)], 2) for least in LENGTHS),
                number(leaked["longest"], 0),
                number(leaked["tokens"], 0),
            ]
            for model, leaked in found.items()
        ]
    if not rows:
        return Html("")
    names = ("Store of", *(f"≥ {least} tokens, %" for least in LENGTHS), "Longest run", "Tokens")
    said = (
        "A low perplexity is worth less where the store has the test text itself. This is the share of the test tokens "
        "inside runs of so many tokens that the store has word for word."
    )
    return section("What the store has of the test text", tag("p", said), table("Leakage", columns(names), groups))


def exactness(value: dict[str, Any]) -> Html:
    """How exact the perplexities are, and how much text would make them so."""
    said = (
        "The widest interval of a domain's perplexities, as a share of the perplexity to both sides, and the smallest "
        "sample of which every one of them would be exact to ± 1 %: what to set as the domain's tokens in the suite."
    )
    rows = [exact_cells(row) for row in value["exactness"]]
    names = [name[0].upper() + name[1:] for name in EXACTNESS]
    return section(
        "How exact this is", tag("p", said), table("The smallest sample for ± 1 %", columns(names), {"": rows})
    )


def weights(value: dict[str, Any]) -> Html:
    """λ and τ of every mixture."""
    models, rows = models_of(value), [row for row in value["rows"] if row["mixture"] != "lm"]
    groups = {
        domain: [
            [
                named(row, models),
                *(number(row["weights"].get(method), 3) for method in METHODS),
                number(row["temperature"] if "knn" in row["weights"] else None, 3),
            ]
            for row in own
        ]
        for domain, own in by_domain(rows).items()
    }
    if not rows:
        return Html("")
    names = ("", *(f"λ\N{NO-BREAK SPACE}{title}" for title in METHODS.values()), "τ")
    return section("Weights, fitted on validation text or given", table("λ and τ", columns(names), groups))


def reading(value: dict[str, Any]) -> Html:
    """How to read the numbers."""
    windows = {named_windows(cell["windows"]) for cell in value["cells"]}
    items = [
        notes(),
        f"How text was read: {'; '.join(sorted(windows))}.",
        "Nothing was fitted on test text: a document that weights are fitted on is refused as test text.",
        "Intervals are over documents. They say nothing of other seeds, or of other text than the domain's.",
    ]
    return section("How to read this", tag("ul", *(tag("li", item) for item in items), class_="limits"))


def named_windows(windows: dict[str, Any]) -> str:
    """How a model reads, in words."""
    kinds = {"alone": "each document by itself", "stream": "all documents of a domain in one stream"}
    return (
        f"{kinds[windows['kind']]}, in windows of {windows['context']:,} tokens that advance by {windows['stride']:,}"
    )


def origin(value: dict[str, Any]) -> Html:
    """Command, commit, and the fingerprints of suite, models, stores, texts and weights."""
    made = value["made"]
    entries = {**made_entries(made), "Suite": value["suite"]["digest"]}
    for cell in value["cells"]:
        entries[f"Model of {cell['name']}"] = cell["model"]
        if cell["store"] is not None:
            entries[f"Store of {cell['name']}, read by {', '.join(cell['use'])}"] = cell["store"]
    rows = [
        [
            cell["domain"],
            cell["name"],
            some(cell["licenses"]),
            *(tag("code", cell[key] or "—") for key in ("text", "data", "weights")),
        ]
        for cell in value["cells"]
    ]
    names = ("Domain", "Model", "Licences", "All test text", "What was scored", "Weights")
    return section(
        "What made these numbers",
        entry_list(entries),
        table("SHA-256 of the texts, and of the files of weights", dict.fromkeys(names, "words"), {"": rows}),
        tag(
            "p", "The numbers with all their digits, and the sums of each document, are in result.json.", class_="note"
        ),
    )


def made_entries(made: dict[str, Any]) -> dict[str, str]:
    """Command, version and commit."""
    return {"Command": made["command"], "Version": made["version"], "Commit": made["commit"] or "not under git"}


def entry_list(entries: dict[str, str]) -> Html:
    """Names and what is exactly so called."""
    rows = (tag("div", tag("dt", name), tag("dd", tag("code", text))) for name, text in entries.items())
    return tag("dl", *rows, class_="proof")


# The comparison of two


def render_comparison_page(value: dict[str, Any]) -> str:
    """The page of what :func:`eval.suite_report.compare` found."""
    rows = value["rows"]
    models = list(dict.fromkeys(row["model"] for row in rows))
    suites = " against ".join(
        f"{each['name']}, version {each['version']}" for each in (value["first"], value["second"])
    )
    head = tag(
        "header",
        tag("p", "SILO · comparison of two results", class_="eyebrow"),
        tag("h1", suites),
        tag("p", "Differences are paired, document by document. Below 1, and below 0, the first is better."),
    )
    sides = []
    for title, suite, made in zip(("First", "Second"), (value["first"], value["second"]), value["made"], strict=True):
        sides += [tag("h3", title), entry_list({**made_entries(made), "Suite": suite["digest"]})]
    made_of = section("What made these numbers", *sides)
    main = tag("main", head, ratios(rows, models), compared_table(rows, models), made_of)
    return page(f"Comparison · {suites}", main)


def ratios(rows: Sequence[dict[str, Any]], models: Sequence[str]) -> Html:
    """The ratios of perplexities with their intervals, by domain."""
    known = [row for row in rows if row["why"] is None and row["perplexity_ratio"] is not None]
    dots = {domain: [dot(row, "perplexity_ratio", models) for row in own] for domain, own in by_domain(known).items()}
    if not dots:
        return Html("")
    scale = Scale.over((each for own in dots.values() for each in own), log=True, shown=(1.0,))
    drawn = (draw_dots(domain, own, scale, digits=3, marked=1.0) for domain, own in dots.items())
    caption = tag("figcaption", "Perplexity of the first over that of the second, on one logarithmic scale.")
    return section("Perplexity, first ÷ second", tag("figure", tag("div", *drawn, class_="plots"), caption))


def compared_table(rows: Sequence[dict[str, Any]], models: Sequence[str]) -> Html:
    """All differences."""
    groups = {
        domain: [
            [named(row, models), row["why"], *["—"] * 3]
            if row["why"] is not None
            else [
                named(row, models),
                number(row["documents"], 0),
                spread(row["perplexity_ratio"], 4),
                spread(row["bits_per_byte"], 4),
                share(row["better"]),
            ]
            for row in own
        ]
        for domain, own in by_domain(rows).items()
    }
    names = ("", "Documents", "Perplexity, first ÷ second", "Bits per byte, first − second", "First better on")
    return section("All differences", table("With 95 % intervals over documents", columns(names), groups))
