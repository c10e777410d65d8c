"""What a collection found out about a document, and what it did: the rows of an audit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

REFUSED = "refused"
"""The document is in neither side of the corpus."""
RESTRICTED = "restricted"
"""It was declared permissive, and stands on the restricted side."""
STRICTER = "stricter"
"""It is permissive still, in a stricter tier than was declared."""
CUT = "cut"
"""Passages of it were cut out."""
OUTCOMES = (RESTRICTED, CUT, STRICTER, REFUSED)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing found about one document."""

    id: str
    reason: str
    """One of a few, so that an audit can count them."""
    detail: str = ""
    """The evidence: the offending line, the other document's id."""
    outcome: str = REFUSED


Note = Callable[[Finding], None]
"""Takes a finding."""
