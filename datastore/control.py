"""The control plane: what a store shares between its shards, and therefore must not learn from any of them (law 2).

It holds the coarse centroids of the inverted lists and the ranges of the 8-bit codes, both fitted on permissive text
that the model's weights did not train on, with the list of the documents that taught it. A quantizer fitted on
restricted keys would keep a centroid on a document after its deletion.

Without a control corpus nothing is fitted: one list, and half-precision codes that need no ranges.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import faiss
import numpy as np

from silo.corpus import Corpus
from silo.documents import Document
from silo.errors import LicenseError, UsageError
from silo.files import canonical_json, read_array, read_checked, sha256, write_array, write_file
from silo.licensing import Policy

if TYPE_CHECKING:
    from silo.language_model import LanguageModel

KEYS_PER_LIST = 128
"""Fitting keys a centroid, at least: between the 39 and 256 that FAISS asks for."""
MAX_LISTS = 1024
FITTING_KEYS = MAX_LISTS * KEYS_PER_LIST
"""No more keys than this are made to fit on; documents are taken in the order of their hashed ids."""
SEED = 0


@dataclass(frozen=True)
class ControlPlane:
    """Centroids and codes for keys of one dimension."""

    centroids: np.ndarray
    """(lists, dimension) float32."""
    ranges: np.ndarray
    """(2 · dimension,) float32: lower ends and widths of the 8-bit codes; empty for half precision."""
    provenance: Sequence[dict[str, str]]
    """id, licence, source and content hash of each document that taught it."""

    @property
    def dimension(self) -> int:
        """Width of a key."""
        return self.centroids.shape[1]

    @property
    def codes(self) -> str:
        """``sq8`` or ``fp16``."""
        return "sq8" if len(self.ranges) else "fp16"

    @classmethod
    def unfitted(cls, dimension: int) -> ControlPlane:
        """The control plane that learns from nothing: exhaustive search over half-precision keys."""
        return cls(np.zeros((1, dimension), np.float32), np.zeros(0, np.float32), [])

    @classmethod
    def fit(cls, keys: np.ndarray, provenance: Sequence[dict[str, str]]) -> ControlPlane:
        """Fit on permissive keys (n, dimension), by k-means with a fixed seed."""
        lists = 1 << max(0, min(MAX_LISTS, len(keys) // KEYS_PER_LIST).bit_length() - 1)
        kmeans = faiss.Kmeans(keys.shape[1], lists, niter=10, seed=SEED, max_points_per_centroid=256)
        kmeans.train(keys)
        quantizer = faiss.ScalarQuantizer(keys.shape[1], faiss.ScalarQuantizer.QT_8bit)
        quantizer.train(keys)
        return cls(np.asarray(kmeans.centroids), faiss.vector_to_array(quantizer.trained), provenance)

    def quantizer(self) -> faiss.ScalarQuantizer:
        """The codec between keys and codes."""
        kind = faiss.ScalarQuantizer.QT_8bit if len(self.ranges) else faiss.ScalarQuantizer.QT_fp16
        quantizer = faiss.ScalarQuantizer(self.dimension, kind)
        faiss.copy_array_to_vector(self.ranges, quantizer.trained)
        return quantizer

    def encode(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Give the list (n,) int32 and the code (n, bytes) uint8 of each key (n, dimension).

        One key at a time reaches the nearest-centroid search, whose result for a key would otherwise depend, in its
        last bits, on the keys that share a matrix product with it.
        """
        lists = np.empty(len(keys), dtype=np.int32)
        flat = self.coarse_index()
        for start in range(0, len(keys), BATCH_BELOW_BLAS):
            chunk = keys[start : start + BATCH_BELOW_BLAS]
            lists[start : start + len(chunk)] = flat.search(chunk, 1)[1][:, 0]
        return lists, self.quantizer().compute_codes(np.ascontiguousarray(keys))

    def coarse_index(self) -> faiss.IndexFlatL2:
        """The index over the centroids."""
        index = faiss.IndexFlatL2(self.dimension)
        index.add(self.centroids)
        return index

    def save(self, directory: Path) -> str:
        """Write the files of ``control/`` and return the hash of ``control.json``, which lists the others."""
        rows = b"".join(canonical_json(row) for row in self.provenance)
        write_file(directory / "provenance.jsonl", rows)
        files = {"provenance.jsonl": sha256(rows)}
        for name in ("centroids", "ranges"):
            files[f"{name}.npy"] = write_array(directory / f"{name}.npy", getattr(self, name))
        data = canonical_json({"codes": self.codes, "files": files})
        write_file(directory / "control.json", data)
        return sha256(data)

    @classmethod
    def load(cls, directory: Path, expected_hash: str) -> ControlPlane:
        """Read the files of ``control/``, each checked. Raises :class:`silo.errors.IntegrityError`."""
        files = json.loads(read_checked(directory / "control.json", expected_hash))["files"]
        rows = read_checked(directory / "provenance.jsonl", files["provenance.jsonl"])
        return cls(
            read_array(directory / "centroids.npy", files["centroids.npy"]),
            read_array(directory / "ranges.npy", files["ranges.npy"]),
            [json.loads(line) for line in rows.splitlines()],
        )


BATCH_BELOW_BLAS = 16
"""FAISS searches so few queries without a matrix product: its threshold was 20, and is 128,000 coordinates in 1.15."""


def fit_control_plane(model: LanguageModel, corpus: Path, policy: Policy, trained_on: set[str]) -> ControlPlane:
    """Fit a control plane on the ``control`` split of a permissive corpus.

    Args:
        model: makes the keys.
        corpus: directory of the corpus's permissive side.
        policy: judges the licences, anew.
        trained_on: content hashes of the documents that taught the model.

    Raises:
        LicenseError: a document is restricted.
        UsageError: the split is empty, or the model trained on one of its documents.
    """
    opened = Corpus.open(corpus)
    opened.require_permissive(policy)
    documents = list(opened.documents("control"))
    if not documents:
        raise UsageError(f"{corpus} has no documents in its control split; collect more text, or leave --control out")
    for document in documents:
        if document.content_hash in trained_on:
            raise LicenseError(
                f"{corpus}: the model trained on {document.id!r}; a control plane needs permissive text "
                "that the weights did not see"
            )
    keys: list[np.ndarray] = []
    used: list[Document] = []
    for document in sorted(documents, key=lambda document: sha256(document.id.encode())):
        if sum(map(len, keys)) >= FITTING_KEYS:
            break
        keys.append(model.keys(model.tokenize(document)))
        used.append(document)
    return ControlPlane.fit(np.concatenate(keys), provenance(used))


def provenance(documents: Iterable[Document]) -> list[dict[str, str]]:
    """What a control plane remembers of its teachers."""
    return [
        {
            "id": document.id,
            "license": document.license,
            "source": document.source,
            "content_hash": document.content_hash,
        }
        for document in documents
    ]


def describe(control: ControlPlane) -> dict[str, Any]:
    """Numbers for a person."""
    return {"lists": len(control.centroids), "codes": control.codes, "documents": len(control.provenance)}
