"""The report's chart: bars of perplexities on a log scale, drawn as SVG that follows the page's colours."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from typing import Any

from eval.terms import mixture_title, owners
from silo.markup import Html, count, escape, number, visible

HATCHES = {"lm": "", "lm+knn": "////", "lm+ric": "||||", "lm+ngram": "----", "all": "xxxx"}


def chart_groups(report: dict[str, Any]) -> list[tuple[str, dict[str, float]]]:
    """What the chart compares: all owners, permissive text, and the removed owner before and after."""
    found = report["perplexity"]
    groups = [(f"Text of {count(len(owners(report)), 'owner')}", found["restricted"])]
    groups.append(("Permissive text", found["permissive"]))
    for each in owners(report):
        if each["removed"]:
            name = " ".join(visible(each["owner"]).split())
            name = name if len(name) <= 22 else f"{name[:21]}…"
            groups += [(f"{name}, {when} the removal", each[when]) for when in ("before", "after")]
    return groups


def draw_chart(groups: Sequence[tuple[str, dict[str, float]]], names: Sequence[str]) -> Html:
    """Bars of perplexities as inline SVG, each with its name and its value, told apart by hatches as well as colours.

    Text stays text, in the page's font. Colours are drawn as numbers that stand for the page's own and are replaced by
    them, so that the chart follows the page into the dark.
    """
    from matplotlib import style
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    colours = {name: f"#0102{index:02x}" for index, name in enumerate(["ink", "muted", "rule", *names])}
    settings = {"svg.hashsalt": "silo", "svg.fonttype": "none", "text.parse_math": False, "hatch.linewidth": 0.7}
    file = io.StringIO()
    with style.context(["default", settings]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=(4.1, 0.215 * (len(names) + 1.7) * len(groups) + 0.2))
        FigureCanvasSVG(figure)
        _draw_bars(figure.subplots(), groups, names, colours)
        figure.subplots_adjust(left=0.245, right=0.985, top=0.995, bottom=0.3 / figure.get_figheight())
        undated = dict.fromkeys(["Date", "Creator", "Format", "Type"])
        figure.savefig(file, format="svg", transparent=True, metadata=undated)
    drawn = file.getvalue()
    for name, colour in colours.items():
        drawn = drawn.replace(colour, f"var(--{name.removeprefix('lm+')}, var(--rest))")
    box = drawn[drawn.index('viewBox="') :].split('"')[1]
    content = drawn[drawn.index(">", drawn.index("<svg")) + 1 :].strip()
    spoken = "; ".join(
        f"{title}: " + ", ".join(f"{mixture_title(name)} {number(values.get(name))}" for name in names)
        for title, values in groups
    )
    return Html(f'<svg viewBox="{box}" role="img" aria-label="{escape(spoken)}">{content}')


def _draw_bars(
    axes: Any, groups: Sequence[tuple[str, dict[str, float]]], names: Sequence[str], colours: dict[str, str]
) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    step = len(names) + 1.7
    longest = max([10.0, *(v for _, values in groups for v in values.values() if v is not None and math.isfinite(v))])
    axes.set(xscale="log", xlim=(1, longest**1.25), ylim=(step * len(groups) - 1.9, -1.7))
    ticks = {}
    for group, (title, values) in enumerate(groups):
        heading = {"transform": axes.get_yaxis_transform(), "weight": "bold", "size": 10, "va": "center"}
        axes.text(-0.32, group * step - 1.05, title, color=colours["ink"], **heading)
        for index, name in enumerate(names):
            value, y = values.get(name), group * step + index
            end = max(value, 1.0) if value is not None and math.isfinite(value) else 1.0
            look = {"facecolor": colours[name], "edgecolor": colours["ink"], "hatch": HATCHES.get(name, "\\\\")}
            axes.barh(y, end - 1, left=1, height=0.78, linewidth=0.8, **look)[0].set_gid(f"bar-{group}-{index}")
            beside = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "size": 9}
            axes.annotate(number(value), (end, y), color=colours["ink"], **beside)
            ticks[y] = mixture_title(name)
    axes.set_yticks(list(ticks), list(ticks.values()), size=9)
    axes.tick_params(axis="both", length=0, labelsize=9, labelcolor=colours["muted"])
    axes.xaxis.set_major_locator(LogLocator(numticks=6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(axis="x", color=colours["rule"], linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
