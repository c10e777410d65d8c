"""Which documents of a store someone means: by id, owner, source, licence or shard."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from functools import cached_property
from typing import Any

from datastore.shard import DocumentRow
from silo.documents import require_unicode
from silo.errors import UsageError
from silo.purposes import touches

KINDS = {"documents": "document", "owners": "owner", "sources": "source", "licenses": "license", "shards": "shard"}
"""Field of a selection → what one of it is called."""

Licensed = Callable[[str, str], bool]
"""Whether a pattern of licences holds for an expression: :func:`silo.purposes.touches` for what is to go,
:func:`silo.purposes.matches`, which is stricter, for what may be used."""


@dataclass(frozen=True)
class Selection:
    """Documents that any of these names."""

    documents: tuple[str, ...] = ()
    owners: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    shards: tuple[str, ...] = ()
    licenses: tuple[str, ...] = ()
    """SPDX expressions, or patterns of the licences in them such as ``CC-BY-NC-*``."""

    def __post_init__(self) -> None:
        for kind, names in asdict(self).items():
            for name in names:
                require_unicode(name, f"the {KINDS[kind]}")

    @cached_property
    def _ids(self) -> frozenset[str]:
        """The same as :attr:`documents`, of which there may be thousands."""
        return frozenset(self.documents)

    def holds(self, shard: str, row: DocumentRow, licensed: Licensed = touches) -> bool:
        """Whether a document is among them."""
        return (
            row.id in self._ids
            or row.owner in self.owners
            or row.source in self.sources
            or shard in self.shards
            or any(licensed(row.license, pattern) for pattern in self.licenses)
        )

    def of_all(self, shard: str, manifest: dict[str, Any], licensed: Licensed = touches) -> bool | None:
        """Whether all documents of a shard are among those named by owner, source, shard or licence, or none is, by
        what its manifest lists; None if only its rows can tell."""
        named = [any(licensed(license, each) for each in self.licenses) for license in manifest["licenses"]]
        sourced = [source in self.sources for source in manifest["sources"]]
        if shard in self.shards or all(named) or all(sourced):
            return True
        return None if any(named) or any(sourced) or shard in self.owners else False

    def may_concern(self, manifest: dict[str, Any]) -> bool:
        """Whether a shard can hold a document of one of the sources or licences, by what its own manifest lists.

        Owners need no look: a shard has its owner's name.
        """
        return not set(self.sources).isdisjoint(manifest["sources"]) or any(
            touches(license, pattern) for license in manifest["licenses"] for pattern in self.licenses
        )

    def request(self) -> dict[str, list[str]]:
        """What was asked for, for a receipt."""
        return {kind: sorted(names) for kind, names in asdict(self).items() if names}

    def require_found(
        self,
        found: Iterable[tuple[str, DocumentRow]],
        known: Callable[[], dict[str, list[str]]],
        lost: Iterable[str] = (),
    ) -> None:
        """Raise :class:`UsageError` if anything named was not found: a misspelt takedown must not pass.

        Args:
            found: the documents that were found, with their shards.
            known: gives for each kind some names that the store does have, to tell in the error.
            lost: shards that are there, and whose documents cannot be read.
        """
        if not self.request():
            options = ", ".join(f"--{name}" for name in KINDS.values())
            raise UsageError(f"nothing to remove was named; give one of {options}")
        seen = list(found)
        present = {
            "documents": {row.id for _, row in seen},
            "owners": {row.owner for _, row in seen},
            "sources": {row.source for _, row in seen},
            "shards": {*lost, *(shard for shard, _ in seen)},
        }
        licenses = {row.license for _, row in seen}
        for kind, names in asdict(self).items():
            for name in names:
                if kind == "licenses":
                    missing = not any(touches(license, name) for license in licenses)
                else:
                    missing = name not in present[kind]
                if missing:
                    raise unknown(kind, name, known()[kind])


def unknown(kind: str, name: str, known: Sequence[str]) -> UsageError:
    """The error for a name that a store does not have, of a kind of which it has others."""
    return UsageError(f"no {KINDS[kind]} {name!r} is in the store; {suggestion(name, known)}")


def suggestion(name: str, known: Sequence[str]) -> str:
    """The first few of some names, and those that someone may have meant who misspelt one."""
    folded = {each.casefold(): each for each in reversed(known)}
    like = [folded[each] for each in get_close_matches(name.casefold(), folded)]
    some = f"it has such as {', '.join(known[:5]) or 'none'}"
    return f"{some}; did you mean {' or '.join(map(repr, like))}?" if like else some
