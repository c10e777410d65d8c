"""From a corpus on disk to training batches, through the licence gate."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from silo.corpus import Corpus
from silo.documents import Document
from silo.errors import DataError
from silo.licensing import Policy

DOCUMENT_TOKEN = "<|document|>"
"""Stands before every document; id 0."""
IGNORED = -100
"""The label of a token that is read but not learnt, such as a prompt's."""


def permissive_documents(path: Path, policy: Policy) -> list[Document]:
    """The training documents of a corpus, once every one of them is known to be permissive.

    The gate goes first: licences are read from the corpus's index, which holds no text, and judged anew by the
    policy. Only then is the first byte of text read.

    Raises:
        LicenseError: a document is not permissive; it is named.
    """
    corpus = Corpus.open(path)
    corpus.require_permissive(policy)
    documents = list(corpus.documents("train"))
    if not documents:
        raise DataError(f"{path} has no training documents; collect more text")
    return documents


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
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=DOCUMENT_TOKEN,
        eos_token=DOCUMENT_TOKEN,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,  # A text that spells out the document token does not end its document.
    )


def tokenize_documents(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerFast, budget: int
) -> tuple[np.ndarray, np.ndarray, list[Document]]:
    """Lay documents end to end until ``budget`` tokens are there.

    Returns:
        Token ids and labels, each (budget,) int64 or shorter if the documents are, and the documents that were used.
        A pair's prompt has the label :data:`IGNORED`.
    """
    ids: list[int] = []
    labels: list[int] = []
    used: list[Document] = []
    for document in documents:
        if len(ids) >= budget:
            break
        prompt, text = tokenizer([document.prompt, document.text], add_special_tokens=False, verbose=False)["input_ids"]
        ids += [tokenizer.bos_token_id, *prompt, *text]
        labels += [tokenizer.bos_token_id, *[IGNORED] * len(prompt), *text]
        used.append(document)
    return np.asarray(ids[:budget], dtype=np.int64), np.asarray(labels[:budget], dtype=np.int64), used


def shuffled(documents: list[Document], seed: int) -> Iterator[Document]:
    """The documents in an order that depends on the seed and their ids alone."""
    order = sorted(documents, key=lambda document: document.id)
    random.Random(seed).shuffle(order)
    return iter(order)


class Sequences(Dataset):
    """Token ids and labels cut into training sequences of one length.

    A shorter rest is left out, and so is a sequence with nothing to learn, of which a batch would have no mean loss.
    """

    def __init__(self, ids: np.ndarray, labels: np.ndarray, length: int) -> None:
        whole = len(ids) // length * length
        cut, of_cut = (torch.from_numpy(array[:whole]).view(-1, length) for array in (ids, labels))
        teaches = (of_cut[:, 1:] != IGNORED).any(dim=1)  # the first token of a sequence is not predicted
        self.ids, self.labels = cut[teaches], of_cut[teaches]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.labels[index]}
