"""What a licence itself permits: a use, by purpose, and whether it asks for the author's name.

A purpose asks what the licences say, and nothing else. Whoever reads a text under an exception of copyright law, such
as the one for text and data mining, has no need of a purpose: without one nothing is left out. A licence that is
unknown, unparsable or missing permits nothing, and neither does "all rights reserved".

A leaf module: it imports nothing of ours but licences.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

import license_expression

from silo.licensing import Tier, parse_expression, tier_of

_FREE = frozenset({"Public Domain", "Permissive", "Copyleft", "Copyleft Limited"})
"""Categories of ScanCode whose licences permit any field of use, some under conditions."""

PURPOSES = {
    "commercial": (_FREE, re.compile(r"CC-BY-SA-\d.*", re.IGNORECASE)),
    "research": (
        _FREE | {"Source-available", "Free Restricted"},
        re.compile(r"CC-BY(-NC)?(-SA|-ND)?-\d.*", re.IGNORECASE),
    ),
}
"""Purpose → what permits it: categories of ScanCode's, for licences that SPDX lists, and names besides, since SPDX does
not list all of Creative Commons' versions for one country. What :mod:`silo.licensing` calls permissive is permitted to
both. So ``commercial`` leaves out what is for non-commercial use, what may not be changed (ScanCode calls both
source-available) and what is for some fields only; ``research`` takes those in."""

_NO_ATTRIBUTION = re.compile(r"0BSD|MIT-0|Unlicense|WTFPL", re.IGNORECASE)
"""Licences outside the public-domain tier that ask for no notice."""

_COMPOSED = re.compile(r"[\s()]")
"""What the name of a single licence does not have."""


def permits(license: str, purpose: str) -> bool:
    """Whether an SPDX expression permits one of :data:`PURPOSES`: for ``A OR B`` one side must, for ``A AND B`` both.

    >>> permits("CC-BY-NC-4.0", "commercial"), permits("CC-BY-NC-4.0", "research"), permits("NOASSERTION", "research")
    (False, True, False)
    """
    categories, names = PURPOSES[purpose]

    def of_name(name: str) -> bool:
        base = _base(name)
        if tier_of(base).permissive and base != name:
            return tier_of(name).permissive  # An exception may take back what the licence gave.
        if tier_of(name).permissive or names.fullmatch(base):
            return True
        return not base.startswith("LicenseRef-") and _categories().get(base) in categories

    return holds(license, of_name)


def asks_for_attribution(license: str) -> bool:
    """Whether an answer that rests on a text should name it. Of a licence that nobody knows, nobody can say that it
    does not ask."""
    return not holds(license, lambda name: tier_of(name) == Tier.PD or bool(_NO_ATTRIBUTION.fullmatch(name)))


@functools.lru_cache(maxsize=1 << 16)
def matches(license: str, pattern: str) -> bool:
    """Whether a pattern such as ``CC-BY-*`` holds for an expression: of "A OR B" for one side, of "A AND B" for both.

    Were the whole string to be matched, ``MIT*`` would allow "MIT AND GPL-3.0-only". What is no expression is matched
    as it is. Case does not matter, as in SPDX.
    """
    pattern = pattern.lower()
    return license.lower() == pattern or holds(license, lambda name: fnmatchcase(_base(name).lower(), pattern))


@functools.lru_cache(maxsize=1 << 16)
def touches(license: str, pattern: str) -> bool:
    """The same for what is denied or removed: for ``A OR B`` on both sides, for ``A AND B`` on one.

    A pattern that names more than one licence, such as ``MIT AND *``, is matched with the whole expression too.
    """
    pattern = pattern.lower()
    if license.lower() == pattern or (_COMPOSED.search(pattern) and fnmatchcase(license.lower(), pattern)):
        return True
    return not holds(license, lambda name: not fnmatchcase(_base(name).lower(), pattern))


def holds(license: str, of_name: Callable[[str], bool]) -> bool:
    """Whether something that is said of single licences holds for an expression; of ``A WITH B`` the
    function is given all."""
    expression = parse_expression(license.strip()) if license.strip() else None
    return of_name(license.strip()) if expression is None else _holds(expression, of_name)


def _holds(expression: Any, of_name: Callable[[str], bool]) -> bool:
    parts = getattr(expression, "args", ())
    if not parts or isinstance(expression, license_expression.LicenseWithExceptionSymbol):
        return of_name(expression.render())
    operator = any if expression.operator.strip() == "OR" else all
    return operator(_holds(part, of_name) for part in parts)


def _base(name: str) -> str:
    """A licence without its exception."""
    return name.partition(" WITH ")[0]


@functools.cache
def _categories() -> dict[str, str]:
    """SPDX id → ScanCode's category."""
    index = license_expression.get_license_index()
    return {entry["spdx_license_key"]: entry["category"] for entry in index if entry["spdx_license_key"]}
