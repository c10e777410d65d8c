"""Blocks of text for retrieval in context: how documents are cut, and Lucene's answer turned back into tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from datastore.bm25 import K1, B, BM25Searcher, CutIndex
from datastore.bm25 import Block as IndexedBlock
from datastore.group_texts import id_hash
from datastore.keys import KeyGroup
from datastore.shard import DocumentRow, Shard
from silo.errors import IntegrityError, UsageError
from silo.retrieval import Block

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
                tokens = encoded.tokens[start : start + BLOCK_TOKENS].tolist()
                text = tokenizer.decode(tokens, skip_special_tokens=False)
                yield IndexedBlock(block_key(encoded.document.id, start), text)


def selected_blocks(index: Path, group: KeyGroup, selected: np.ndarray) -> CutIndex:
    """An index of the blocks of some of a group's documents, (documents,) bool, as if it had no others."""
    fewer = bool(group.lengths[selected].sum() < group.lengths[~selected].sum())
    named = np.flatnonzero(selected == fewer).tolist()
    return CutIndex(index, lambda: block_keys(group.document(number) for number in named), stay=fewer)


def block_keys(documents: Iterable[DocumentRow]) -> Iterator[str]:
    """The names of all blocks of some documents."""
    return (block_key(row.id, start) for row in documents for start in block_starts(row.end - row.begin))


def block_key(document_id: str, start: int) -> str:
    """The name of a block in Lucene."""
    return f"{document_id}\x00{start:09d}"


class BlockIndex:
    """BM25 over the blocks of some groups."""

    def __init__(
        self, indexes: Sequence[Path | CutIndex], groups: Sequence[KeyGroup], *, k1: float = K1, b: float = B
    ) -> None:
        """``indexes`` are those of the blocks of each of ``groups``, which have the tokens; of ``k1`` and ``b`` see
        :class:`datastore.bm25.BM25Searcher`."""
        self._searcher = BM25Searcher(indexes, k1=k1, b=b)
        self._groups = list(groups)
        hashes = [group.ids for group in groups]
        self._hashes = np.concatenate([np.zeros(0, np.uint64), *hashes])
        self._of_group = np.repeat(np.arange(len(groups)), [len(each) for each in hashes])
        self._in_group = np.concatenate([np.zeros(0, np.int64), *(np.arange(len(each)) for each in hashes)])
        order = np.argsort(self._hashes)
        self._hashes, self._of_group, self._in_group = (
            array[order] for array in (self._hashes, self._of_group, self._in_group)
        )

    def search(
        self, queries: Sequence[str], k: int, *, tokens: int = BLOCK_TOKENS, exclude: str | None = None
    ) -> list[list[Block]]:
        """The ``k`` best blocks for each query, best first, equal scores by document id and start; fewer where fewer
        share a word with the query.

        Args:
            queries: bags of words.
            k: blocks a query.
            tokens: how far a block goes from where it begins, within its document. The words that it is found by are
                those of its first :data:`BLOCK_TOKENS`.
            exclude: the id of a document that is passed over. Its words still count in the statistics.

        Raises:
            UsageError: ``k`` or ``tokens`` is below 1.
        """
        if tokens < 1:
            raise UsageError(f"a block of {tokens} tokens, expected at least 1")
        found = self._searcher.search(queries, k)
        if exclude is not None:
            found = [self._without(exclude, query, hits, k) for query, hits in zip(queries, found, strict=True)]
        return [[self._block(*hit, tokens) for hit in hits] for hits in found]

    def _without(self, document_id: str, query: str, hits: list[tuple[str, float]], k: int) -> list[tuple[str, float]]:
        """The best hits that are not of a document, looking ever deeper while it holds the first places."""
        depth = k
        while True:
            others = [hit for hit in hits if hit[0].rpartition("\x00")[0] != document_id]
            if len(others) >= k or len(hits) < depth:
                return others[:k]
            depth *= 4
            [hits] = self._searcher.search([query], depth)

    def _block(self, key: str, score: float, tokens: int) -> Block:
        document_id, _, start = key.rpartition("\x00")
        group, number = self._find(document_id)
        begin = int(group.begins[number]) + int(start)
        end = min(begin + tokens, int(group.begins[number + 1]))
        source = group.document(number).described()
        return Block(source, int(start), group.tokens[begin:end].astype(np.int64), score)

    def _find(self, document_id: str) -> tuple[KeyGroup, int]:
        """The group that holds a document, and its number there."""
        wanted = id_hash(document_id)
        for place in range(int(np.searchsorted(self._hashes, np.uint64(wanted))), len(self._hashes)):
            group, number = self._groups[self._of_group[place]], int(self._in_group[place])
            if int(self._hashes[place]) != wanted:
                break
            if group.document(number).id == document_id:  # two ids may share a hash
                return group, number
        raise IntegrityError(f"the BM25 index names a document {document_id!r} that no shard has; verify the store")
