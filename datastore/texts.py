"""A store's documents as text, decoded from their tokens: for audits that compare other text with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from datastore.store import Store
from silo.documents import Document


def documents_of_store(path: Path) -> Iterator[Document]:
    """Every document of a store, shard by shard, in the order of their ids."""
    store = Store.open(path)
    for name in sorted(store.manifest.shards):
        for encoded in store.shard(name).documents():
            row, text = encoded.document, encoded.text(store.tokenizer)
            yield Document(
                id=row.id, text=text, license=row.license, owner=row.owner, source=row.source, title=row.title
            )
