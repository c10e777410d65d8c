"""Markup by construction, and numbers and names as a reader wants them.

What a page quotes is other people's text, so escaping is not left to care: :func:`tag` escapes every child that is not
:class:`Html`, and only :func:`tag`, the chart and the style sheet make that.
"""

from __future__ import annotations

import html
import math
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

BLANKS = {" ": "␣", "\n": "↵", "\t": "⇥"}
UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


class Html(str):
    """Text that is markup already. Formatting or adding to it gives a plain ``str`` again, which is escaped."""

    __slots__ = ()


def tag(name: str, *children: str, **attributes: str) -> Html:
    """An element. Children and attributes are escaped, except children that are :class:`Html`.

    >>> tag("p", "1 < 2 & ", tag("b", "so"), class_="a")
    '<p class="a">1 &lt; 2 &amp; <b>so</b></p>'
    """
    given = "".join(f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"' for key, value in attributes.items())
    return Html(f"<{name}{given}>{join(children)}</{name}>")


def join(children: Iterable[str]) -> Html:
    """Markup and text one after the other, the text escaped."""
    return Html("".join(child if isinstance(child, Html) else escape(child) for child in children))


def escape(text: str) -> str:
    """Text as it may stand in an element or an attribute, with no character left that cannot be seen."""
    return html.escape(visible(text))


def visible(text: str, *, spaces: bool = False) -> str:
    """Spell out what has no shape of its own: controls, direction marks, lone surrogates; with ``spaces`` blanks too.

    >>> visible(" if\\n\\0", spaces=True), visible("a\\u202eb")
    ('␣if↵⟨U+0000⟩', 'a⟨U+202E⟩b')
    """

    def shown(character: str) -> str:
        if character in BLANKS:
            return BLANKS[character] if spaces else character
        category = unicodedata.category(character)
        if category[0] == "C" or category in ("Zl", "Zp") or (spaces and category == "Zs"):
            return f"⟨U+{ord(character):04X}⟩"
        return character

    return "".join(map(shown, text))


CONTENT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def page(title: str, *body: str) -> str:
    """A whole page. It loads and runs nothing: its style is inside it, and its content policy forbids the rest."""
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    head = tag(
        "head",
        Html('<meta charset="utf-8">'),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{CONTENT_POLICY}">'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Html('<meta name="color-scheme" content="light dark">'),
        tag("title", title),
        Html(f"<style>\n{style}</style>"),
    )
    return f"<!DOCTYPE html>\n{tag('html', head, tag('body', *body), lang='en')}\n"


def section(title: str, *children: str) -> Html:
    """A section under its heading."""
    return tag("section", tag("h2", title), *children)


def table(caption: str, columns: dict[str, str], groups: dict[str, list[list[str]]]) -> Html:
    """A table in a box of its own that scrolls, so that the page never does.

    ``columns`` gives each heading its kind, ``words`` or ``number``. ``groups`` are rows under a title; an empty title
    is left out, and so is a group without rows.
    """
    kinds = list(columns.values())
    head = tag("tr", *(tag("th", name, scope="col", class_=kind) for name, kind in columns.items()))
    bodies = []
    for title, rows in groups.items():
        over = [tag("tr", tag("th", title, class_="group", colspan=str(len(kinds)), scope="rowgroup"))] if title else []
        made = [
            tag(
                "tr",
                tag("th", cells[0], scope="row", class_=kinds[0]),
                *(tag("td", cell, class_=kind) for cell, kind in zip(cells[1:], kinds[1:], strict=True)),
            )
            for cells in rows
        ]
        bodies += [tag("tbody", *over, *made)] if made else []
    whole = tag("table", tag("caption", caption), tag("thead", head), *bodies)
    return tag("div", whole, class_="scroll", tabindex="0", role="region", aria_label=caption)


def verdict(holds: bool, yes: str, no: str) -> Html:
    """What a check found, told by sign and word as well as by colour."""
    return tag("span", f"✓ {yes}" if holds else f"✗ {no}", class_="good" if holds else "bad")


def label(text: str) -> Html:
    """A small label after a name."""
    return join([" ", tag("span", text, class_="tag")])


def number(value: float | None, digits: int = 1) -> str:
    """A number with thousands apart; what is missing or not finite is shown as what it is."""
    if value is None or math.isnan(value):
        return "—"
    return f"{value:,.{digits}f}" if math.isfinite(value) else "∞"


def count(value: int, noun: str) -> str:
    """A number and its noun.

    >>> count(1, "owner"), count(1200, "owner")
    ('1 owner', '1,200 owners')
    """
    return f"{value:,} {noun}{'' if value == 1 else 's'}"


def size(value: float) -> str:
    """A number of bytes in decimal units."""
    unit, scale = next(((unit, scale) for unit, scale in UNITS if value >= scale), UNITS[-1])
    return f"{value / scale:,.1f} {unit}"


def probability(value: float) -> str:
    """A probability with enough digits that what is above zero does not look like zero."""
    return f"{value:.3f}" if value >= 0.001 or value <= 0 else f"{value:.1e}"


def some(names: Sequence[str], shown: int = 3) -> str:
    """The first names of many."""
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest:,} more" if rest > 0 else "")
