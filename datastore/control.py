"""The control plane: what a store shares between its shards, and therefore must not learn from any of them (law 2).

It holds the coarse centroids of the inverted lists and what the codes need, both fitted on permissive text that the
model's weights did not train on, with the list of the documents that taught it. A quantizer fitted on restricted keys
would keep a centroid on a document after its deletion.

Without a control corpus nothing is fitted: one list, and half-precision codes that need no ranges.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import faiss
import numpy as np

from datastore.codes import Codes
from silo.corpus import TRAINED_ON, Corpus
from silo.documents import Document
from silo.errors import LicenseError, UsageError
from silo.files import canonical_json, read_array, read_checked, sha256, write_array, write_file
from silo.licensing import Policy
from silo.retrieval import Metric

if TYPE_CHECKING:
    from silo.language_model import LanguageModel

KEYS_PER_LIST = 128
"""Fitting keys a centroid, at least: between the 39 and 256 that FAISS asks for. No more than these are made to fit on;
documents are taken in the order of their hashed ids."""
MAX_LISTS = 1024
CODES = "sq8"
"""By the comparison in RESULTS.md."""
SEED = 0


@dataclass(frozen=True)
class ControlPlane:
    """Centroids and codes for keys of one dimension."""

    centroids: np.ndarray
    """(lists, dimension) float32."""
    codes: Codes
    provenance: Sequence[dict[str, str]]
    """id, licence, source and content hash of each document that taught it."""

    @property
    def dimension(self) -> int:
        """Width of a key."""
        return self.centroids.shape[1]

    @classmethod
    def unfitted(cls, dimension: int) -> ControlPlane:
        """The control plane that learns from nothing: exhaustive search over half-precision keys."""
        centroids = np.zeros((1, dimension), np.float32)
        return cls(centroids, Codes.fit("fp16", centroids), [])

    @classmethod
    def fit(
        cls, keys: np.ndarray, provenance: Sequence[dict[str, str]], *, codes: str = CODES, lists: int = MAX_LISTS
    ) -> ControlPlane:
        """Fit on permissive keys (n, dimension), by k-means with a fixed seed.

        Args:
            keys: (n, dimension) float32.
            provenance: the documents that they are of.
            codes: a name that :mod:`datastore.codes` knows.
            lists: so many centroids at most; the largest power of two for which there are keys enough.
        """
        lists = 1 << max(0, min(lists, len(keys) // KEYS_PER_LIST).bit_length() - 1)
        kmeans = faiss.Kmeans(keys.shape[1], lists, niter=10, seed=SEED, max_points_per_centroid=256)
        kmeans.train(keys)
        return cls(np.asarray(kmeans.centroids), Codes.fit(codes, keys), provenance)

    def quantizer(self) -> Any:
        """The codec between keys and codes."""
        return self.codes.quantizer()

    def encode(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Give the list (n,) int32 and the code (n, bytes) uint8 of each key (n, dimension), each a function of its key
        alone, bit for bit."""
        keys = np.ascontiguousarray(keys)
        return self.nearest(keys, 1)[:, 0].astype(np.int32), self.quantizer().compute_codes(keys)

    def nearest(self, keys: np.ndarray, count: int, metric: Metric = "l2") -> np.ndarray:
        """The ``count`` lists (n, count) whose centroids are nearest to each key (n, dimension), in any order.

        A product of matrices is quick, but the last bits of its sums depend on the keys that share it. So what the next
        centroid is nearer than only within what rounding may do is measured once more (for a product of n terms that
        is at most n units in the last place, Higham 2002, equation 3.5; here twice that for each of two distances).
        """
        count = min(count, len(self.centroids))
        lists = np.tile(np.arange(count), (len(keys), 1))
        if count == len(self.centroids):
            return lists
        import torch  # numpy's product has threads of its own, and they and torch's wait for each other, spinning

        from datastore.choosing import nearest_centroids  # which needs numba

        keys, centroids = np.ascontiguousarray(keys), torch.from_numpy(self.centroids).T
        squared = 1.0 if metric == "l2" else 0.0
        squares = np.float32(squared) * self._squares
        reach = (np.sqrt((keys.astype(np.float64) ** 2).sum(axis=1)) + np.sqrt(self._squares.max())) ** 2
        rounding = 4 * self.dimension * 2.0**-24 * reach
        for begin in range(0, len(keys), KEYS_AT_ONCE):
            at = slice(begin, begin + KEYS_AT_ONCE)
            products = (torch.from_numpy(keys[at]) @ centroids).numpy()
            nearest_centroids(products, squares, rounding[at], keys[at], self.centroids, squared, lists[at])
        return lists

    @cached_property
    def _squares(self) -> np.ndarray:
        """(lists,) float32, the centroids' squared norms."""
        return (self.centroids.astype(np.float64) ** 2).sum(axis=1).astype(np.float32)

    def coarse_index(self) -> faiss.IndexFlatL2:
        """A new index over the centroids, for FAISS's own inverted lists."""
        index = faiss.IndexFlatL2(self.dimension)
        index.add(self.centroids)
        return index

    def save(self, directory: Path) -> str:
        """Write the files of ``control/`` and return the hash of ``control.json``, which lists the others."""
        rows = b"".join(canonical_json(row) for row in self.provenance)
        write_file(directory / "provenance.jsonl", rows)
        files = {"provenance.jsonl": sha256(rows)}
        for name, array in (("centroids", self.centroids), ("codes", self.codes.fitted)):
            files[f"{name}.npy"] = write_array(directory / f"{name}.npy", array)
        data = canonical_json({"codes": self.codes.name, "files": files})
        write_file(directory / "control.json", data)
        return sha256(data)

    @classmethod
    def load(cls, directory: Path, expected_hash: str) -> ControlPlane:
        """Read the files of ``control/``, each checked. Raises :class:`silo.errors.IntegrityError`."""
        described = json.loads(read_checked(directory / "control.json", expected_hash))
        files = described["files"]
        rows = read_checked(directory / "provenance.jsonl", files["provenance.jsonl"])
        centroids, fitted = (
            read_array(directory / f"{each}.npy", files[f"{each}.npy"]) for each in ("centroids", "codes")
        )
        codes = Codes(described["codes"], centroids.shape[1], fitted)
        return cls(centroids, codes, [json.loads(line) for line in rows.splitlines()])


KEYS_AT_ONCE = 512
"""Keys that are multiplied with all centroids at a time, so that the products stay in the processor's cache."""


def fit_control_plane(
    model: LanguageModel,
    corpus: Path,
    policy: Policy,
    trained_on: set[str],
    *,
    codes: str = CODES,
    lists: int = MAX_LISTS,
) -> ControlPlane:
    """Fit a control plane on the ``control`` split of a permissive corpus.

    Args:
        model: makes the keys.
        corpus: directory of the corpus's permissive side.
        policy: judges the licences, anew.
        trained_on: content hashes of the documents that taught the model.
        codes: a name that :mod:`datastore.codes` knows.
        lists: so many inverted lists at most.

    Raises:
        LicenseError: a document is restricted.
        UsageError: there are no such codes, the split is empty, or the model trained on one of its documents.
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
        if sum(map(len, keys)) >= lists * KEYS_PER_LIST:
            break
        keys.append(model.keys(model.tokenize(document)))
        used.append(document)
    return ControlPlane.fit(np.concatenate(keys), provenance(used), codes=codes, lists=lists)


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
    return {"lists": len(control.centroids), "codes": control.codes.name, "documents": len(control.provenance)}


def read_trained_on(model_directory: Path) -> set[str]:
    """Content hashes of the documents that taught a model of ours; none for a model that does not say."""
    path = model_directory / TRAINED_ON
    if not path.is_file():
        return set()
    return {json.loads(line)["content_hash"] for line in path.read_bytes().splitlines()}
