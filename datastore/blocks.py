"""Blocks of text for retrieval in context: how documents are cut, and Lucene's answer turned back into tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from datastore.bm25 import Block as IndexedBlock
from datastore.bm25 import BM25Searcher
from datastore.shard import Encoded, Shard
from silo.retrieval import Block, SourceDocument

BLOCK_TOKENS = 128
BLOCK_STRIDE = 64
"""Blocks overlap by half, so that a passage is whole in one of them. SILO's were 1,024 tokens, for a model of 2,048."""


def block_starts(length: int) -> range:
    """Where the blocks of a document of ``length`` tokens begin; a last block shorter than the overlap adds nothing."""
    return range(0, max(1, length - BLOCK_TOKENS + BLOCK_STRIDE), BLOCK_STRIDE)


def cut_blocks(shards: Iterable[Shard], tokenizer: Tokenizer) -> Iterator[IndexedBlock]:
    """The blocks of some shards, each within one document, with keys that sort by (document id, start)."""
    for shard in shards:
        for encoded in shard.documents():
            for start in block_starts(len(encoded.tokens)):
                tokens = encoded.tokens[start : start + BLOCK_TOKENS]
                text = tokenizer.decode(tokens.tolist(), skip_special_tokens=False)
                yield IndexedBlock(block_key(encoded.document.id, start), text)


def block_key(document_id: str, start: int) -> str:
    """The name of a block in Lucene."""
    return f"{document_id}\x00{start:09d}"


class BlockIndex:
    """BM25 over the blocks of all live shards."""

    def __init__(self, directories: Sequence[Path], shards: Sequence[Shard]) -> None:
        self._searcher = BM25Searcher(directories)
        self._documents: dict[str, Encoded] = {
            encoded.document.id: encoded for shard in shards for encoded in shard.documents()
        }

    def search(self, queries: Sequence[str]) -> list[Block | None]:
        """The best block for each query, or None where no block shares a word with it."""
        return [self._block(*hits[0]) if hits else None for hits in self._searcher.search(queries, 1)]

    def _block(self, key: str, score: float) -> Block:
        document_id, _, start = key.rpartition("\x00")
        encoded = self._documents[document_id]
        row, at = encoded.document, int(start)
        source = SourceDocument(row.id, row.owner, row.license, row.source, row.title)
        return Block(source, at, encoded.tokens[at : at + BLOCK_TOKENS].astype(np.int64), score)
