"""Policy at query time: which documents a caller may use, by licence, owner and source, and for which purpose.

It comes down to two selections, so that what may not be used enters no sum:
:meth:`datastore.snapshot.Snapshot.select` answers as a store without it.
"""

from __future__ import annotations

import glob
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from datastore.selection import Licensed, Selection, suggestion
from silo.errors import UsageError
from silo.purposes import PURPOSES, matches, permits, touches

if TYPE_CHECKING:
    from datastore.snapshot import Snapshot

Named = Selection | str | Sequence[str] | Mapping[str, Sequence[str]] | None
"""Documents as a caller names them: licences, or a selection, or a mapping of its fields."""


@dataclass(frozen=True)
class QueryPolicy:
    """Documents that ``allow`` names (all, where nothing is given), that ``deny`` does not, and whose licences permit
    the purpose.

    Licences are patterns, matched within SPDX expressions as :mod:`silo.purposes` says.
    """

    allow: Selection | None = None
    deny: Selection | None = None
    purpose: str | None = None
    """One of :data:`silo.purposes.PURPOSES`; None to leave out nothing."""

    def __post_init__(self) -> None:
        if self.purpose is not None and self.purpose not in PURPOSES:
            raise UsageError(f"the purpose is {self.purpose!r}; expected {' or '.join(PURPOSES)}")

    @classmethod
    def of(cls, allow: Named = None, deny: Named = None, purpose: str | None = None) -> QueryPolicy:
        """Make a policy of what a caller names. Raises :class:`UsageError` for a kind of names that there is not."""
        return cls(_selection(allow), _selection(deny), purpose)

    def without(self, documents: Sequence[str]) -> QueryPolicy:
        """The same without some documents, given by their ids."""
        denied = self.deny or Selection()
        return replace(self, deny=replace(denied, documents=(*denied.documents, *documents))) if documents else self

    def selections(self, store: Snapshot) -> dict[str, Selection | None]:
        """``allow`` and ``deny`` for :meth:`datastore.snapshot.Snapshot.select`, which denies those licences of the
        store, too, that do not permit the purpose.

        Raises:
            UsageError: an owner, a source or a shard that is named is not in the store: a misspelt one must not pass.
                Of a licence that no document has there is a warning alone, since a policy is written for many stores.
        """
        for way, named, licensed in (("allow", self.allow, matches), ("deny", self.deny, touches)):
            if named is not None:
                store.require_known(named)
                _warn_of_unmatched(way, named.licenses, licensed, store)
        deny = self.deny
        if self.purpose is not None:
            deny = deny or Selection()
            unfit = (glob.escape(each) for each in store.licenses() if not permits(each, self.purpose))
            deny = replace(deny, licenses=(*deny.licenses, *unfit))
        return {"allow": self.allow, "deny": deny}

    def to_json(self) -> dict[str, Any]:
        """What was asked for, as far as anything was."""
        named = {"allow": self.allow, "deny": self.deny}
        found: dict[str, Any] = {kind: each.request() for kind, each in named.items() if each is not None}
        return {**found, "purpose": self.purpose} if self.purpose else found


def _warn_of_unmatched(way: str, patterns: Sequence[str], licensed: Licensed, store: Snapshot) -> None:
    licenses = store.licenses() if patterns else []
    for pattern in patterns:
        if not any(licensed(each, pattern) for each in licenses):
            told = suggestion(pattern, licenses)
            warnings.warn(f"{way} {pattern!r} is of no licence that is in the store; {told}", stacklevel=4)


def _selection(named: Named) -> Selection | None:
    if named is None or isinstance(named, Selection):
        return named
    if isinstance(named, Mapping):
        kinds = [each.name for each in fields(Selection)]
        unknown = sorted(set(named) - set(kinds))
        if unknown:
            raise UsageError(f"documents are named by {', '.join(unknown)}; expected some of {', '.join(kinds)}")
        return Selection(**{kind: _names(names) for kind, names in named.items()})
    return Selection(licenses=_names(named))


def _names(names: str | Sequence[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)
