"""SILO's and knn-transformers' own search-and-score loops over the keys of a store, for the bench of mixing.

Both run from their authors' sources, unchanged, on one FAISS index in memory with the store's lists and codes:

    silo-lm/             https://github.com/kernelmachine/silo-lm, scripts/main.py: ``process`` for the task "inference"
                         with --approximate. It searches 128 queries at a time, writes neighbours as JSON, reads them
                         again, and goes through its grid of k, τ and λ for each token.
    knn-transformers/    https://github.com/neulab/knn-transformers, knnlm.py: ``KNNWrapper.post_forward_hook``, which
                         mixes whole distributions.

Neither is given the time of its model, nor that of loading the index. Stand-ins are made for what they import and this
does not use: SILO's model, data and index for GPUs.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import sys
import tempfile
import types
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import faiss
import numpy as np
import torch

from datastore.codes import Codes
from datastore.store import Store

K = 256
SILO, TRANSFORMERS = "silo-lm", "knn-transformers"


def merged_index(store: Store, probes: int) -> tuple[Any, np.ndarray]:
    """All keys of a store as one FAISS index in memory, and the tokens that follow them."""
    plane, lists = store.control, len(store.control.centroids)
    shards = [store.shard(name) for name in sorted(store.manifest.shards)]
    numbers, codes, tokens = (
        np.concatenate([getattr(shard, name) for shard in shards]) for name in ("lists", "codes", "tokens")
    )
    coarse: Any = plane.coarse_index()
    index = _empty_index(plane.codes, coarse, lists)
    index.nprobe, index.own_fields = probes, True
    coarse.this.disown()  # The index, which keeps no reference, frees it.
    order = np.argsort(numbers, kind="stable").astype(np.int64)
    for number, (begin, end) in enumerate(_runs(numbers[order], lists)):
        rows = order[begin:end]
        of_list = np.ascontiguousarray(codes[rows])
        if len(rows):
            index.invlists.add_entries(number, len(rows), faiss.swig_ptr(rows), faiss.swig_ptr(of_list))
    index.ntotal = len(numbers)
    return index, tokens.astype(np.int64)


def _empty_index(codes: Codes, coarse: faiss.IndexFlat, lists: int) -> Any:
    """A FAISS index of so many inverted lists of such codes; it keeps a pointer to ``coarse``, not a reference."""
    quantizer: Any = codes.quantizer()
    if isinstance(quantizer, faiss.ScalarQuantizer):
        index: Any = faiss.IndexIVFScalarQuantizer(
            coarse, codes.dimension, lists, quantizer.qtype, faiss.METRIC_L2, False
        )
        index.sq = quantizer
    else:
        index = faiss.IndexIVFPQ(coarse, codes.dimension, lists, quantizer.M, quantizer.nbits, faiss.METRIC_L2)
        index.pq, index.by_residual = quantizer, False
    index.is_trained = True
    return index


def _runs(ordered: np.ndarray, count: int) -> Iterator[tuple[int, int]]:
    cuts = np.searchsorted(ordered, np.arange(count + 1))
    yield from zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True)


def silo_loop(
    sources: Path, index: Any, values: np.ndarray, keys: np.ndarray, lm: np.ndarray, tokens: np.ndarray
) -> Callable[[], None]:
    """SILO's loop over queries (n, d) whose next tokens (n,) its model gives the probabilities ``lm`` (n,)."""
    for name in ("model", "data"):
        sys.modules.setdefault(name, types.ModuleType(name))
    sys.modules["model"].LanguageModel = object  # type: ignore[attr-defined]
    sys.modules["data"].load_pile = None  # type: ignore[attr-defined]
    module = _imported(sources / SILO / "scripts", "main")
    module.DIMENSION = keys.shape[1]
    options: dict[str, Any] = {
        "lm": "neo-1.3B",
        "split": "train",
        "val_split": "val",
        "val_subset": None,
        "max_n_sequences": None,
    }
    options |= {"max_seq_length": 1024, "stride": 512, "merge": True, "embed_idx": 0, "do_subset": False, "k": K}
    options |= {"probe": index.nprobe, "approximate": True, "remove_embed": False, "remove_prev_index": False}
    options |= {"skip_eval": False}

    # knn-transformers makes FAISS refuse memory maps, which SILO's queries are.
    searched = Namespace(search=lambda queries, k: index.search(np.asarray(queries), k), nprobe=index.nprobe)

    def run() -> None:
        silent = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
        with tempfile.TemporaryDirectory() as scratch, silent[0], silent[1]:
            root = Path(scratch)
            for split, of in (("train", values), ("val", tokens)):
                (root / split).mkdir()
                (root / split / "text-tokenized.pkl").write_bytes(pickle.dumps([]))
                np.save(root / split / "text-tokenized_flatten.npy", of)
            (root / "train" / "text-1024-512.index").touch()
            np.save(root / "val" / "text-1024-512-loss.npy", -np.log(lm))
            keys.astype(np.float16).tofile(root / "val" / "text-1024-512-embed.float16.npy")
            with patch.object(faiss, "read_index", lambda *_: searched):
                module.process(
                    Namespace(**options, output_dir=str(root / "train")), Namespace(pad_token=-1), "inference", "text"
                )

    return run


def transformers_loop(
    sources: Path, index: Any, values: np.ndarray, keys: np.ndarray, logits: torch.Tensor, tokens: np.ndarray
) -> Callable[[], None]:
    """knn-transformers' hook over queries (n, d), given what a model says after them (n, vocabulary)."""
    module = _imported(sources / TRANSFORMERS, "knnlm")
    wrapper = module.KNNWrapper(
        len(values), None, keys.shape[1], knn_sim_func=module.DIST.l2, knn_gpu=False, k=K, probe=index.nprobe
    )
    wrapper.index, wrapper.vals, wrapper.vocab_size = index, torch.from_numpy(values).unsqueeze(1), logits.shape[1]
    wrapper.is_encoder_decoder = False
    wrapper.labels = torch.from_numpy(np.concatenate([[0], tokens]))[: len(keys)].unsqueeze(0)
    wrapper.activation_capturer = Namespace(captured=torch.from_numpy(keys).unsqueeze(0))
    return lambda: wrapper.post_forward_hook(None, None, logits.clone().unsqueeze(0))


def _imported(directory: Path, name: str) -> Any:
    """A module of a peer's, from its own directory."""
    sys.path.insert(0, str(directory))
    try:
        return __import__(name)
    finally:
        sys.path.remove(str(directory))
