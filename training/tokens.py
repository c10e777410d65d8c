"""A corpus as tokens: made once behind the licence gate, then memory-mapped, with each document's rights beside it.

    CORPUS/tokens/bpe-4096/
        manifest.json      the corpus, the audit and the policy behind it, the tokenizer, and every file's checksum
        tokenizer.json     trained on the corpus's own training documents
        documents.jsonl    one row a document: tier, licence, owner, source, and its range of tokens
        train.bin val.bin  token ids, uint16 or uint32, documents end to end, a start token before each

Whoever opens it judges every document's licence anew, and holds its rows against the corpus's index, before a token is
read. So no forged manifest, none of another corpus, and no policy that became stricter since lets a document through.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from silo.corpus import Corpus, Row, require_permissive
from silo.documents import Document
from silo.errors import DataError, IntegrityError
from silo.files import (
    canonical_json,
    check_digest,
    exclusive_lock,
    read_sealed,
    remove_tree,
    sealed,
    sha256,
    sha256_file,
    sync_directory,
    write_json,
)
from silo.licensing import Policy

FORMAT = 1
SPLITS = ("train", "val")
DOCUMENT_TOKEN = "<|document|>"
"""Stands before every document; id 0."""

_BATCH, _BATCH_CHARACTERS = 256, 1 << 19
"""Documents encoded at once, which the tokenizer spreads over the processor's cores: so many, or so much text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRow:
    """One document of a tokenised corpus."""

    id: str
    tier: str
    license: str
    owner: str
    source: str
    content: str
    """The document's content hash."""
    split: str
    begin: int
    """Its start token stands here in ``<split>.bin``."""
    prompt: int
    """How many tokens of a prompt follow the start token. They are read and not learnt."""
    end: int


@dataclass(frozen=True)
class Tokens:
    """A tokenised corpus, checked; its arrays are mapped, not read."""

    path: Path
    manifest: dict[str, Any]
    tokenizer: PreTrainedTokenizerFast

    @property
    def rows(self) -> Iterator[TokenRow]:
        """One row a document, in the order of the corpus's index, read anew each time."""
        with open(self.path / "documents.jsonl", "rb") as file:
            for line in file:
                yield TokenRow(**json.loads(line))

    def array(self, split: str) -> np.ndarray:
        """The token ids of a split, mapped from disk."""
        if not self.manifest["tokens"][split]:
            return np.zeros(0, dtype=self.manifest["dtype"])
        return np.memmap(self.path / f"{split}.bin", dtype=self.manifest["dtype"], mode="r")


def open_tokens(
    path: Path, policy: Policy, vocab_size: int, *, tokenizer: PreTrainedTokenizerFast | None = None
) -> Tokens:
    """Tokenise a corpus, or open what an earlier run made of it.

    Args:
        path: the permissive side of a corpus.
        policy: judges every document, here and now.
        vocab_size: entries of the tokenizer, which is trained on the corpus's training documents if need be.
        tokenizer: one that exists already, in place of that.

    Raises:
        LicenseError: a document is not permissive; it is named, and no text was read.
        IntegrityError: the tokens are damaged, or are not those of this corpus.
        DataError: the corpus has no training documents.
    """
    corpus = Corpus.open(path)
    corpus.require_permissive(policy)
    directory = path / "tokens" / (f"bpe-{vocab_size}" if tokenizer is None else f"bpe-{digest_of(tokenizer)[:12]}")
    directory.parent.mkdir(exist_ok=True)
    with exclusive_lock(directory.with_name(f".{directory.name}.lock"), wait=True):
        if not directory.exists():
            if not corpus.manifest["counts"]["train"]:
                raise DataError(f"{path} has no training documents; collect more text")
            texts = (document.full_text for document in corpus.documents("train"))
            tokenize(corpus, policy, tokenizer or train_tokenizer(texts, vocab_size), directory)
    tokens = _opened(corpus, policy, directory)
    if tokenizer is not None and digest_of(tokens.tokenizer) != digest_of(tokenizer):
        raise IntegrityError(f"{directory} was made by another tokenizer; delete it, so that it is made again")
    return tokens


def digest_of(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 of a tokenizer: of how it cuts a text, wherever it is stored."""
    return sha256(tokenizer.backend_tokenizer.to_str().encode())


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE (Sennrich 2016, on bytes as in GPT-2): any text round-trips, none is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[DOCUMENT_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return wrap_tokenizer(tokenizer)


def wrap_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer as transformers uses it."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=DOCUMENT_TOKEN,
        eos_token=DOCUMENT_TOKEN,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,  # A text that spells out the document token does not end its document.
    )


def tokenize(corpus: Corpus, policy: Policy, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Write the tokens of a corpus into a directory that is whole or absent."""
    partial = directory.with_name(f".{directory.name}.partial")
    remove_tree(partial)  # what a killed run left
    partial.mkdir()
    try:
        dtype = "<u2" if len(tokenizer) <= 1 << 16 else "<u4"
        counts = dict.fromkeys(SPLITS, 0)
        with open(partial / "documents.jsonl", "wb") as rows:
            for split in SPLITS:
                with open(partial / f"{split}.bin", "wb") as file:
                    for document, prompt, ids in _encoded(corpus.documents(split), tokenizer):
                        begin = counts[split]
                        counts[split] += len(ids)
                        ids.astype(dtype).tofile(file)
                        row = _row(document, policy, split, begin, prompt, counts[split])
                        rows.write(canonical_json(asdict(row)))
                    _sync(file)
            _sync(rows)
        tokenizer.backend_tokenizer.save(str(partial / "tokenizer.json"))
        names = ["documents.jsonl", "tokenizer.json", *(f"{split}.bin" for split in SPLITS)]
        manifest = {
            "format": FORMAT,
            "corpus": corpus.fingerprint,
            "audit": corpus.manifest["audit"],
            "policy": policy.to_json(),
            "policy_fingerprint": policy.fingerprint,
            "dtype": dtype,
            "tokens": counts,
            "files": {name: sha256_file(partial / name) for name in names},
        }
        write_json(partial / "manifest.json", sealed(manifest))
        sync_directory(partial)
        partial.rename(directory)
    except BaseException:
        remove_tree(partial)
        raise
    sync_directory(directory.parent)


def _encoded(
    documents: Iterator[Document], tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[Document, int, np.ndarray]]:
    """Each document with the number of its prompt's tokens and its ids, start token first.

    The tokenizer works on the next documents while the caller writes these.
    """
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True  # as split_special_tokens, which the wrapper applies call by call

    def encoded(batch: list[Document]) -> list[Any]:
        texts = [part for document in batch for part in (document.prompt, document.text) if part]
        return backend.encode_batch_fast(texts, add_special_tokens=False)

    with ThreadPoolExecutor(max_workers=1) as pool:
        batch = _batch(documents)
        waiting = pool.submit(encoded, batch)
        while batch:
            following = _batch(documents)
            parts, waiting = iter(waiting.result()), pool.submit(encoded, following)
            for document in batch:
                prompt = next(parts).ids if document.prompt else []
                ids = [tokenizer.bos_token_id, *prompt, *next(parts).ids]
                yield document, len(prompt), np.asarray(ids, dtype=np.int64)
            batch = following


def _batch(documents: Iterator[Document]) -> list[Document]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.full_text)
        if len(batch) == _BATCH or characters >= _BATCH_CHARACTERS:
            break
    return batch


def _row(document: Document, policy: Policy, split: str, begin: int, prompt: int, end: int) -> TokenRow:
    return TokenRow(
        id=document.id,
        tier=policy.tier(document).value,
        license=document.license,
        owner=document.owner,
        source=document.source,
        content=document.content_hash,
        split=split,
        begin=begin,
        prompt=prompt,
        end=end,
    )


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _opened(corpus: Corpus, policy: Policy, directory: Path) -> Tokens:
    """Open tokens: rows first, held against the corpus and the policy; then every checksum."""
    manifest = read_sealed(directory / "manifest.json", FORMAT)
    tokens = Tokens(directory, manifest, PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE())))
    _require_rows(tokens, corpus, policy)
    for name, expected in manifest["files"].items():
        if not (directory / name).is_file():
            raise IntegrityError(f"{directory / name} is missing; delete {directory}, so that it is made again")
        check_digest(directory / name, sha256_file(directory / name), expected)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    return Tokens(directory, manifest, wrap_tokenizer(tokenizer))


def _require_rows(tokens: Tokens, corpus: Corpus, policy: Policy) -> None:
    """Raise unless every row is that of a permissive document which stands in the corpus, in its place."""
    where = tokens.path / "documents.jsonl"
    wanted = (row for split in SPLITS for row in corpus.rows if row.split == split)
    try:
        for found, row in itertools.zip_longest(tokens.rows, wanted):
            if found is not None:
                require_permissive(found, policy, where=where)
            if found is None or row is None or not _same(found, row):
                one = found or row
                raise IntegrityError(
                    f"{where}: document {one.id!r} is not what the corpus says of it; "
                    f"delete {tokens.path}, so that it is made again"
                )
    except (OSError, TypeError, ValueError) as error:
        raise IntegrityError(f"{where} is damaged ({error}); delete {tokens.path}, so that it is made again") from None
    if tokens.manifest["corpus"] != corpus.fingerprint:
        first = next(corpus.rows, None)
        raise IntegrityError(
            f"{tokens.path} was made from another corpus than the one with document {first.id if first else ''!r}; "
            "delete it, so that it is made again"
        )


def _same(found: TokenRow, row: Row) -> bool:
    names = ("id", "license", "owner", "source", "content", "split")
    return all(getattr(found, name) == getattr(row, name) for name in names)
