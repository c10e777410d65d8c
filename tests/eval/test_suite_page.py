"""The page of a suite's result: every number is on it, nothing is loaded or run, and marks stand where they should."""

import math

import numpy as np
import pytest
import yaml

from eval.dots import MARKS, Dot, Scale, draw_dots
from eval.suite import load_suite
from eval.suite_page import render_comparison_page, render_suite_page
from eval.suite_report import compare, markdown, result, spread
from eval.suite_run import Cell

MIXTURES = ("lm", "lm+knn", "lm+ngram", "all")
HOSTILE = "</style>\"'><script>alert(1)</script><img src=http://x.example/y>"


def cell(model, domain, level, *, documents=12, stored=True):
    """A cell whose numbers are drawn: ``level`` nats a token for the model alone, and less for every mixture."""
    generator = np.random.default_rng([*domain.encode()])  # the same text for every model
    tokens = generator.integers(100, 400, size=documents)
    noise = generator.normal(0, 0.2, size=documents)
    names = MIXTURES if stored else MIXTURES[:1]
    sums = {name: (-(level - 0.4 * at + noise) * tokens).tolist() for at, name in enumerate(names)}
    by = {name: {"lm": 0.123 + at / 10, "knn": 0.0456, "ngram": 0.789} for at, name in enumerate(names)}
    record = {
        "model": model * 8,
        "store": "5" * 64 if stored else None,
        "use": ["lm", "knn", "ngram"] if stored else ["lm"],
        "windows": {"kind": "stream", "context": 1024, "stride": 512},
        "data": f"data of {domain}",
        "text": f"text of {domain}",
        "weights": f"weights of {domain}" if stored else None,
        "documents": [f"{domain} {number}" for number in range(documents)],
        "licenses": ["MPL-2.0"],
        "tokens": tokens.tolist(),
        "bytes": (tokens * 4).tolist(),
        "log_probability": sums,
        "mixtures": {name: {"weights": by[name], "temperature": 6.543} for name in names},
        "leakage": {"tokens": 4321, "longest": 87, "shares": {"13": 0.0512, "32": 0.0234, "50": 0.0107}}
        if stored
        else None,
    }
    return Cell(model, domain, domain == "free", record)


def found(tmp_path, *, shift=0.0, documents=12, reference="everything", prefix=""):
    """The result of a suite of two models and three domains."""
    plan = {
        "name": f"{prefix}small",
        "version": 7,
        "reference": reference,
        "models": {"mixed": {"path": "m", "store": "s", "use": ["lm", "knn", "ngram"]}, "everything": {"path": "r"}},
        "domains": {name: {"test": {"source": "x"}} for name in ("novels", "news", "free")},
    }
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))
    levels = {"novels": 5.1, "news": 6.2, "free": 4.3}
    cells = [
        cell("mixed", f"{prefix}{name}" if name != "free" else name, level + shift, documents=documents)
        for name, level in levels.items()
    ]
    cells += [
        cell(
            "everything", each.domain, levels[each.domain.removeprefix(prefix)] - 0.9, stored=False, documents=documents
        )
        for each in cells
    ]
    return result(load_suite(tmp_path / "suite.yaml"), cells)


def test_every_number_is_on_the_page(tmp_path, page_of):
    """Each number of each row and gap, and all that identifies models, stores, texts, weights and the run."""
    value = found(tmp_path)
    text = page_of(render_suite_page(value)).text
    for row in value["rows"]:
        shown = [f"{each:,.2f}" for each in row["perplexity"]] + [f"{each:,.4f}" for each in row["bits_per_byte"]]
        shown += [f"{row['documents']:,}", f"{row['tokens']:,}", row["model"], row["domain"]]
        if row["mixture"] != "lm":
            shown += [f"{each:.3f}" for each in (*row["weights"].values(), row["temperature"])]
        if row["leakage"]:
            shown += [f"{100 * each:.2f}" for each in row["leakage"]["shares"].values()]
            shown += [f"{row['leakage']['longest']:,}", f"{row['leakage']['tokens']:,}"]
        for each in shown:
            assert each in text, (row["model"], row["mixture"], each)
    assert len(value["gap"]) == 3
    for gap in value["gap"]:
        for way in ("arithmetic", "geometric"):
            assert spread([100 * each for each in gap[way]], 1) in text
    for each in value["exactness"]:
        needed = (
            f"{each['documents_needed']:,}",
            f"{each['tokens_needed']:,}",
            f"{100 * each['relative_error']:.1f} %",
        )
        assert all(shown in text for shown in needed)
    for each in value["cells"]:
        for key in ("model", "store", "text", "data", "weights"):
            assert each[key] is None or each[key] in text
    for each in (value["suite"]["digest"], value["made"]["version"], value["made"]["command"], "MPL-2.0"):
        assert each in text
    assert value["made"]["commit"] in text
    assert "one stream, in windows of 1,024 tokens that advance by 512" in text


def test_the_sample_that_is_needed_is_the_smallest(tmp_path):
    """Of as many documents as are said to be needed, and of no fewer, every perplexity is exact to ± 1 %."""
    value = found(tmp_path)
    for row in value["exactness"]:
        pilots = [
            Cell(each["name"], each["domain"], False, each).sums(mixture)
            for each in value["cells"]
            if each["domain"] == row["domain"]
            for mixture in each["log_probability"]
        ]
        worst = max(pilot.standard_error() for pilot in pilots)
        halves = [1.96 * worst * math.sqrt(12 / (row["documents_needed"] - less)) for less in (0, 1)]
        assert halves[0] <= 0.01 < halves[1]
        assert row["relative_error"] == pytest.approx(1.96 * worst, rel=1e-4)
        assert row["tokens_needed"] == math.ceil(row["documents_needed"] * pilots[0].tokens.mean())
    assert "documents for ± 1 %" in markdown(value)


def test_headline_is_worked_out(tmp_path):
    """The first line is the geometric mean over restricted domains of the model alone and of its fullest mixture."""
    value = found(tmp_path)
    means = [
        math.exp(
            np.mean(
                [
                    math.log(row["perplexity"][0])
                    for row in value["rows"]
                    if row["model"] == "mixed" and row["mixture"] == name and not row["permissive"]
                ]
            )
        )
        for name in ("lm", "all")
    ]
    assert f"over 2 domains of restricted text: {means[0]:.1f} alone, {means[1]:.1f} with" in render_suite_page(value)


@pytest.mark.parametrize("kind", ["suite", "comparison"])
def test_the_page_needs_nothing_but_itself(tmp_path, kind, page_of):
    """No element loads or runs anything, whatever names say; title, language and viewport are there."""
    value = found(tmp_path, prefix=HOSTILE)
    source = render_suite_page(value) if kind == "suite" else render_comparison_page(compare(value, value))
    page = page_of(source)
    names = {name for name, _ in page.elements}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "video", "audio", "use", "image"}
    for name, attributes in page.elements:
        assert not set(attributes) & {"src", "href", "xlink:href", "srcset", "data", "background", "onload"}, name
    style = source[source.index("<style>") : source.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    first = dict(page.elements[0][1])
    assert page.elements[0][0] == "html"
    assert first["lang"] == "en"
    metas = {each.get("name"): each["content"] for name, each in page.elements if name == "meta" and "content" in each}
    assert "width=device-width" in metas["viewport"]
    assert "small" in source[source.index("<title>") : source.index("</title>")]
    assert "alert(1)" in page.text


def test_marks_differ_in_shape_and_stand_in_their_intervals(tmp_path, page_of):
    """Each domain has a mark a row, whose outline says the mixture, on a log scale and between its whisker's ends."""
    assert len(set(MARKS.values())) == len(MARKS)
    value = found(tmp_path)
    page = page_of(render_suite_page(value))
    marks = [each for name, each in page.elements if name == "path" and each["class"].startswith("mark")]
    whiskers = [each["d"] for name, each in page.elements if name == "path" and each["class"] == "whisker"]
    drawn = sum(name == "svg" for name, _ in page.elements)
    assert drawn == 4  # three domains and the gap
    assert len(marks) == len(whiskers) == len(value["rows"]) + 2 * len(value["gap"])
    by_domain = [row for domain in ("novels", "news", "free") for row in value["rows"] if row["domain"] == domain]
    assert [each["d"] for each in marks[: len(by_domain)]] == [MARKS[row["mixture"]] for row in by_domain]
    places = []
    for mark, whisker in zip(marks, whiskers, strict=True):
        at = float(mark["transform"].partition("(")[2].split()[0])
        low, high = whisker.removeprefix("M").replace("H", " ").replace("M", " ").split()[0:3:2]
        assert float(low) <= at <= float(high)
        places.append(at)
    logs = [math.log(row["perplexity"][0]) for row in by_domain]
    slope, start = np.polyfit(logs, places[: len(logs)], 1)
    assert slope > 0
    assert np.abs(np.array(logs) * slope + start - places[: len(logs)]).max() < 0.2


def test_ticks_are_round_and_few():
    """Every scale, wide or narrow, has two to six ticks inside it."""
    for low, high in ((1.5, 9.0), (20.0, 900.0), (3.0, 2e9), (0.97, 1.04), (0.2, 0.29), (48.0, 51.0)):
        ticks = Scale(low, high, True).ticks()
        assert 2 <= len(ticks) <= 6, (low, high, ticks)
        assert all(low <= tick <= high for tick in ticks)


def test_what_is_unknown_is_shown_as_unknown(tmp_path, page_of):
    """Without intervals, reference or store there is a page, with dashes, and no section that says nothing."""
    value = found(tmp_path, documents=1, reference=None)
    value["rows"] = [row | {"leakage": None} for row in value["rows"] if row["mixture"] == "lm"]
    page = page_of(render_suite_page(value))
    assert "—" in page.text
    for title in ("Gap closed", "word for word", "fitted on validation"):
        assert title not in page.text.partition("How to read this")[0]
    assert not any(each.get("class") == "whisker" for _, each in page.elements)
    missing = Dot("none", None, None, None, "lm")
    assert page_of(draw_dots("t", [missing], Scale.over([missing], log=True), digits=1)).text.endswith("none —")


def test_a_gap_that_cannot_be_said_says_why(tmp_path, page_of):
    """A reference that is no better than the model alone leaves the reason in the table."""
    page = page_of(render_suite_page(found(tmp_path, shift=-2.0)))
    assert "the reference is not better than the model alone" in page.text


def test_a_comparison_has_its_numbers(tmp_path, page_of):
    """Ratios, differences and both runs are on the comparison's page."""
    value = compare(found(tmp_path), found(tmp_path, shift=0.25))
    text = page_of(render_comparison_page(value)).text
    assert len(value["rows"]) == 15
    for row in value["rows"]:
        assert spread(row["perplexity_ratio"], 4) in text
        assert spread(row["bits_per_byte"], 4) in text
    assert f"{math.exp(-0.25):.3f}" in text
    assert text.count(value["first"]["digest"]) == 2
