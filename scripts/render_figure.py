"""The figure of all ratios against peers, drawn from the recorded runs; equal records give equal bytes."""

from __future__ import annotations

import math
from typing import Any
from xml.sax.saxutils import escape

from bench.ratios import Ratio, ratios

TITLES = {
    "model": "Training steps",
    "training_step": "The trainer's loop",
    "collect": "Collecting",
    "store": "The store",
    "opening": "Opening",
    "bm25": "BM25",
    "ngram": "∞-gram",
    "mixing": "Mixtures, a model trained here",
    "mixing_smollm2": "Mixtures, SmolLM2-135M",
    "evaluation": "Evaluation, small model",
    "evaluation_smollm2": "Evaluation, SmolLM2-135M",
}
"""Records in the figure's order."""
WIDTH, LEFT, RIGHT, ROW, TOP = 920, 420, 80, 18, 64
LOW, HIGH = 0.05, 1000.0


def rows(records: dict[str, Any]) -> list[tuple[str, list[Ratio]]]:
    """What is drawn: by record, the ratios by the clock, or by processor time where there are no others. Calls of
    several windows at once are left out."""
    found = []
    for name, title in TITLES.items():
        of = ratios(records[name], name) if name in records else []
        clock = "wall" if any(each.clock == "wall" for each in of) else "processor"
        kept = [each for each in of if each.clock == clock and "windows a call" not in each.what]
        if kept:
            found.append((title, kept))
    return found


def figure(records: dict[str, Any]) -> str:
    """The figure as SVG, which needs neither colour nor script."""
    groups = rows(records)
    height = TOP + ROW * sum(len(kept) + 1.6 for _, kept in groups) + 12
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" '
        f'height="{height:.0f}" font-family="sans-serif" font-size="12" role="img" aria-labelledby="title">',
        '<title id="title">How many times as fast as its peers SILO is, by what was measured</title>',
        '<rect width="100%" height="100%" fill="white"/>',
        _text(8, 20, "Times as fast as the peer: median and spread of the rounds", weight="bold"),
        _text(
            8,
            38,
            "● reached its goal · ○ missed it · ◆ had none; a short stroke stands at the goal",
        ),
    ]
    for tick in (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000):
        x = _x(tick)
        colour, width = ("#777777", 1.4) if tick == 1 else ("#dddddd", 1)
        parts.append(_line(x, TOP - 8, x, height - 12, colour, width))
        parts.append(_text(x, TOP - 12, f"{tick:g}", anchor="middle"))
    y = float(TOP)
    for title, kept in groups:
        y += ROW
        parts.append(_text(8, y, title, weight="bold"))
        for each in kept:
            y += ROW
            parts += _row(each, y)
        y += 0.6 * ROW
    return "\n".join([*parts, "</svg>", ""])


def _row(each: Ratio, y: float) -> list[str]:
    """One ratio: its name, its spread as a line, its median as a mark, its goal as a stroke, and its number."""
    speed, middle = each.speed, y - 4
    marks = [
        _text(LEFT - 12, y, f"{each.what} / {each.peer}", anchor="end"),
        _line(_x(speed.low), middle, _x(speed.high), middle, "#000000", 1.6),
    ]
    if each.goal is not None:
        goal = _x(each.goal if each.better == "higher" else 1 / each.goal)
        marks.append(_line(goal, middle - 6, goal, middle + 6, "#000000", 2.5))
    x = _x(speed.value)
    if each.reached is None:
        corners = [(x, middle - 4.5), (x + 4.5, middle), (x, middle + 4.5), (x - 4.5, middle)]
        points = " ".join(f"{across:.1f},{down:.1f}" for across, down in corners)
        marks.append(f'<polygon points="{points}"/>')
    else:
        fill = "black" if each.reached else "white"
        marks.append(f'<circle cx="{x:.1f}" cy="{middle:.1f}" r="4" fill="{fill}" stroke="black" stroke-width="1.5"/>')
    return [*marks, _text(WIDTH - 8, y, f"{speed.value:.3g} ×", anchor="end")]


def _x(speed: float) -> float:
    """Where a speed stands, on a logarithmic scale; what lies beyond it stands at its end."""
    part = math.log(min(max(speed, LOW), HIGH) / LOW) / math.log(HIGH / LOW)
    return LEFT + part * (WIDTH - LEFT - RIGHT)


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="{width}"/>'


def _text(x: float, y: float, text: str, *, anchor: str = "start", weight: str = "normal") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}">{escape(text)}</text>'
