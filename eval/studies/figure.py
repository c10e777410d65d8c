"""Figures of studies, as SVG that can be read in black and white: series differ by dashes and marks, never by colour
alone."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Scale = Literal["linear", "log"]

LOOKS = (("o", "-"), ("s", "--"), ("^", ":"), ("D", "-."), ("v", (0, (5, 1, 1, 1, 1, 1))), ("x", (0, (1, 2))))
"""A mark and a dash for each series; after the last it begins anew with hollow marks."""
INKS = ("#000000", "#1f4e9c", "#9c3d1f", "#4d4d4d", "#1f7a4d", "#7a1f6e")
"""All dark enough to be told from paper, whatever becomes of their colour."""


@dataclass(frozen=True)
class Series:
    """One line, or one set of marks."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    marks_only: bool = False
    line_only: bool = False


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    x_label: str
    y_label: str
    series: Sequence[Series]
    x_scale: Scale = "linear"
    y_scale: Scale = "linear"
    x_names: Sequence[str] = field(default=())
    """What stands at x = 0, 1, 2, … in place of numbers."""
    y_names: Sequence[str] = field(default=())
    """What stands at y = 0, 1, 2, … in place of numbers, from above to below."""


def draw(title: str, panels: Sequence[Panel]) -> str:
    """Draw panels below each other. Equal panels give equal bytes."""

    def fill(figure: Any) -> None:
        figure.suptitle(title, fontsize=11)
        for axes, panel in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
            _plot(axes, panel)

    return _svg(fill, 6.4, sum(_height(panel) for panel in panels) + 0.4)


@dataclass(frozen=True)
class Tiles:
    """A matrix as grey tiles, dark where high."""

    name: str
    values: Sequence[Sequence[float]]
    low: float
    high: float
    row_names: Sequence[str] = field(default=())


def draw_tiles(title: str, tiles: Sequence[Tiles], *, columns: int = 2) -> str:
    """Draw matrices row by row, each value in its tile where there is room."""
    rows = math.ceil(len(tiles) / columns)

    def fill(figure: Any) -> None:
        figure.suptitle(title, fontsize=11)
        grid = figure.subplots(rows, columns, squeeze=False).flatten()
        for axes, each in zip(grid, tiles, strict=False):
            _tile(axes, each)
        for axes in grid[len(tiles) :]:
            axes.set_visible(False)

    return _svg(fill, 6.4, 2.4 * rows + 0.5)


def _tile(axes: Any, tiles: Tiles) -> None:
    axes.imshow(tiles.values, cmap="Greys", vmin=tiles.low, vmax=tiles.high, aspect="auto", interpolation="none")
    axes.set_title(tiles.name, fontsize=9)
    axes.tick_params(labelsize=7)
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
    if tiles.row_names:
        axes.set_yticks(range(len(tiles.row_names)), tiles.row_names, size=7)
    if max(len(tiles.values), len(tiles.values[0])) > 10:
        return
    for row, of_row in enumerate(tiles.values):
        for column, value in enumerate(of_row):
            dark = value - tiles.low > 0.6 * (tiles.high - tiles.low)
            ink = "#ffffff" if dark else "#000000"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", size=6, color=ink)


def _height(panel: Panel) -> float:
    return max(2.8, 0.36 * len(panel.y_names) + 1.2) + 0.2 * len(panel.series) / 2


def _plot(axes: Any, panel: Panel) -> None:
    for number, each in enumerate(panel.series):
        mark, dash = LOOKS[number % len(LOOKS)]
        look: dict[str, Any] = {"color": INKS[number % len(INKS)], "linewidth": 1.3, "markersize": 5}
        look |= {"marker": None if each.line_only else mark, "linestyle": "none" if each.marks_only else dash}
        if number >= len(LOOKS) or (each.marks_only and number % 2):
            look["markerfacecolor"] = "none"
        axes.plot(each.x, each.y, label=each.name, **look)[0].set_gid(f"series-{number}")
    axes.set(xlabel=panel.x_label, ylabel=panel.y_label, xscale=panel.x_scale, yscale=panel.y_scale)
    if panel.x_names:
        axes.set_xticks(range(len(panel.x_names)), panel.x_names, size=8)
    if panel.y_names:
        axes.set_yticks(range(len(panel.y_names)), panel.y_names, size=8)
        axes.invert_yaxis()
    for axis, scale, names in ((axes.xaxis, panel.x_scale, panel.x_names), (axes.yaxis, panel.y_scale, panel.y_names)):
        if scale == "log" and not names:
            _plain_numbers(axis)
    axes.grid(color="#d0d0d0", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    # Above the axes, where no mark can be under it.
    axes.legend(fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)


def _plain_numbers(axis: Any) -> None:
    """Numbers as they are said, not as powers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(NullFormatter())


def _svg(fill: Any, width: float, height: float) -> str:
    """Text stays text; nothing of the day or of the user's settings enters."""
    from matplotlib import style
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings = {"svg.hashsalt": "silo", "svg.fonttype": "none", "text.parse_math": False}
    file = io.StringIO()
    with style.context(["default", settings]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        fill(figure)
        figure.savefig(file, format="svg", metadata=dict.fromkeys(["Date", "Creator", "Format", "Type"]))
    return file.getvalue()
