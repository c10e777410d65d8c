"""Dots with whiskers: values with their intervals, one below the other on one scale, as SVG that follows the page.

Marks differ in shape, so that they are told apart without colour, and every row has its name and its number.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from silo.markup import Html, number, tag, visible

WIDTH, LEFT, RIGHT, ROW, HEAD = 340.0, 112.0, 292.0, 17.0, 16.0
"""In units of the drawing: names stand left of LEFT, numbers right of RIGHT, the scale between."""
NAME_LETTERS = 21
MOST_TICKS = 6
MARKS = {
    "lm": "M-4 0A4 4 0 1 1 4 0A4 4 0 1 1 -4 0Z",
    "lm+knn": "M-3.7 -3.7H3.7V3.7H-3.7Z",
    "lm+ric": "M0 -5L5 0L0 5L-5 0Z",
    "lm+ngram": "M0 -4.8L4.8 3.6H-4.8Z",
    "gate": "M0 4.8L4.8 -3.6H-4.8Z",
    "all": "M0 -5.8L1.4 -1.9L5.5 -1.8L2.3 0.7L3.4 4.7L0 2.4L-3.4 4.7L-2.3 0.7L-5.5 -1.8L-1.4 -1.9Z",
}
"""Outlines about a mark's middle: circle, square, rhombus, triangles up and down, star."""


@dataclass(frozen=True)
class Dot:
    """One row."""

    name: str
    value: float | None
    low: float | None
    """The ends of the interval, if one is known."""
    high: float | None
    mark: str
    """One of :data:`MARKS`."""
    hollow: bool = False
    label: str = ""
    """What is written in place of the name, a little to the right: the row belongs to one above."""


@dataclass(frozen=True)
class Scale:
    """Where numbers stand between ``low`` and ``high``."""

    low: float
    high: float
    log: bool

    @classmethod
    def over(cls, dots: Iterable[Dot], *, log: bool, shown: Sequence[float] = ()) -> Scale:
        """A scale on which all of some dots, and some other numbers, have room."""
        ends = [end for dot in dots for end in (dot.value, dot.low, dot.high)]
        known = [end for end in (*ends, *shown) if end is not None and math.isfinite(end) and (end > 0 or not log)]
        low, high = min(known, default=1.0), max(known, default=1.0)
        if log:
            room = max((high / low) ** 0.06, 1.01)
            return cls(low / room, high * room, True)
        room = (high - low) * 0.06 or 1.0
        return cls(low - room, high + room, False)

    def place(self, value: float) -> float:
        """Where a number stands, in units of the drawing; at the end if it is beyond."""
        inside = min(max(value, self.low), self.high)
        low, at, high = (math.log(each) if self.log else each for each in (self.low, inside, self.high))
        return LEFT + (RIGHT - LEFT) * (at - low) / (high - low)

    def ticks(self) -> list[float]:
        """Round numbers on it.

        >>> Scale(0.9, 1100.0, True).ticks(), Scale(-0.1, 1.3, False).ticks()
        ([1.0, 10.0, 100.0, 1000.0], [0.0, 0.5, 1.0])
        """
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for steps, every in (((1, 2, 5), 1), ((1,), 1), ((1,), 3)):
                marks = [step * 10.0**power for power in powers if power % every == 0 for step in steps]
                marks = [mark for mark in marks if self.low <= mark <= self.high]
                if len(marks) <= MOST_TICKS:
                    break
            if len(marks) >= 2:
                return marks
        rough = (self.high - self.low) / 4
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * each for each in (1, 2, 5, 10) if unit * each >= rough)
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        return [round(at * step, 12) for at in range(first, last + 1)]


def draw_dots(title: str, dots: Sequence[Dot], scale: Scale, *, digits: int, marked: float | None = None) -> Html:
    """Rows under a title and over their scale; ``marked`` is a number that a thicker line stands at."""
    bottom = HEAD + ROW * len(dots) + 4
    parts = [tag("text", shortened(title, 52), x="0", y="10", class_="head")]
    for tick in scale.ticks():
        at = f"{scale.place(tick):.1f}"
        parts.append(tag("line", x1=at, x2=at, y1=f"{HEAD}", y2=f"{bottom}", class_="grid"))
        parts.append(tag("text", f"{tick:,.6g}", x=at, y=f"{bottom + 10}", class_="tick", text_anchor="middle"))
    if marked is not None:
        at = f"{scale.place(marked):.1f}"
        parts.append(tag("line", x1=at, x2=at, y1=f"{HEAD}", y2=f"{bottom}", class_="marked"))
    for index, dot in enumerate(dots):
        parts += _row(dot, HEAD + ROW * (index + 0.5) + 2, scale, digits)
    spoken = f"{title}: " + "; ".join(_spoken(dot, digits) for dot in dots)
    box = f"0 0 {WIDTH:g} {bottom + 14:g}"
    return tag("svg", *parts, viewBox=box, role="img", aria_label=spoken, class_="dots")


def _row(dot: Dot, y: float, scale: Scale, digits: int) -> list[Html]:
    parts = [
        tag("text", shortened(dot.label or dot.name, NAME_LETTERS), x="10" if dot.label else "0", y=f"{y + 3.4:.1f}"),
        tag("text", number(dot.value, digits), x=f"{WIDTH:g}", y=f"{y + 3.4:.1f}", text_anchor="end"),
    ]
    if dot.value is None or not math.isfinite(dot.value):
        return parts
    if dot.low is not None and dot.high is not None:
        ends = [f"{scale.place(end):.1f}" for end in (dot.low, dot.high)]
        across = "".join(f"M{end} {y - 3:.1f}v6" for end in ends)
        parts.append(tag("path", d=f"M{ends[0]} {y:.1f}H{ends[1]}{across}", class_="whisker"))
    look = "mark hollow" if dot.hollow else f"mark {dot.mark.removeprefix('lm+')}"
    place = f"translate({scale.place(dot.value):.1f} {y:.1f})"
    parts.append(tag("path", d=MARKS.get(dot.mark, MARKS["lm"]), transform=place, class_=look))
    return parts


def _spoken(dot: Dot, digits: int) -> str:
    between = f", {number(dot.low, digits)} to {number(dot.high, digits)}" if dot.low is not None else ""
    return f"{dot.name} {number(dot.value, digits)}{between}"


def shortened(text: str, letters: int) -> str:
    """A name in one line of at most so many letters.

    >>> shortened("Jeff\\nForcier", 7)
    'Jeff F…'
    """
    plain = " ".join(visible(text).split())
    return plain if len(plain) <= letters else f"{plain[: letters - 1]}…"
