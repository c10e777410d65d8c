"""Restricted text beside the model: shards that can be searched, removed and verified."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datastore.store import Selection, Store

__all__ = ["Selection", "Store"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        import datastore.store

        return getattr(datastore.store, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
