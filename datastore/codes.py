"""How a key is kept in a shard: the codes that a control plane may use.

    sq8     8 bits a coordinate, between ends that are fitted for each
    fp16    half precision; nothing is fitted
    pqM     M bytes a key: product quantisation (Jégou 2011), a codebook of 256 for each of M runs of coordinates

A code depends on its key and the fitted numbers alone, never on the inverted list that the key falls into, so that the
lists of many groups can be searched as one index.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np

from silo.errors import UsageError

_SCALAR = {"sq8": faiss.ScalarQuantizer.QT_8bit, "fp16": faiss.ScalarQuantizer.QT_fp16}
_PRODUCT = re.compile(r"pq([1-9]\d*)")
_BITS = 8
WHOLE_SQUARES = 1 << 38
"""What the squares of all steps are rounded to be together. Times 128², the largest code's, it is 2 ^ 52: float64 has
such whole numbers, and their sum is the same in whatever order they are added."""


@dataclass(frozen=True)
class Codes:
    """A way to code keys, with what was fitted for it."""

    name: str
    dimension: int
    """Width of a key."""
    fitted: np.ndarray
    """float32. Of ``sq8``: (2 · dimension,), lower ends and widths. Of ``pqM``: (M · 256 · dimension / M,), the
    codebooks. Of ``fp16``: empty."""

    @classmethod
    def fit(cls, name: str, keys: np.ndarray) -> Codes:
        """Fit codes on keys (n, dimension).

        Raises:
            UsageError: there are no such codes, or they do not fit the keys' width or number.
        """
        codes = cls(name, keys.shape[1], np.zeros(0, np.float32))
        quantizer: Any = codes._bare()
        if isinstance(quantizer, faiss.ProductQuantizer):
            if len(keys) < quantizer.ksub:
                raise UsageError(
                    f"{name} needs at least {quantizer.ksub} keys to be fitted on, and there are {len(keys)}; give "
                    "a larger control corpus, or use sq8"
                )
            quantizer.train(np.ascontiguousarray(keys))
            return cls(name, codes.dimension, faiss.vector_to_array(quantizer.centroids))
        if name != "fp16":
            quantizer.train(np.ascontiguousarray(keys))
        return cls(name, codes.dimension, faiss.vector_to_array(quantizer.trained))

    def _bare(self) -> faiss.ScalarQuantizer | faiss.ProductQuantizer:
        if self.name in _SCALAR:
            return faiss.ScalarQuantizer(self.dimension, _SCALAR[self.name])
        matched = _PRODUCT.fullmatch(self.name)
        if matched is None:
            raise UsageError(f"there are no codes {self.name!r}; use sq8, fp16 or pqM, such as pq64 for 64 bytes a key")
        if self.dimension % int(matched[1]):
            raise UsageError(
                f"{self.name} cuts a key into {matched[1]} equal runs, and {self.dimension} coordinates are no "
                "multiple of that; choose a divisor"
            )
        return faiss.ProductQuantizer(self.dimension, int(matched[1]), _BITS)

    @property
    def size(self) -> int:
        """Bytes a key."""
        return int(self._bare().code_size)

    def quantizer(self) -> faiss.ScalarQuantizer | faiss.ProductQuantizer:
        """The codec: ``compute_codes`` from (n, dimension) float32 to (n, bytes) uint8, and ``decode`` back."""
        quantizer: Any = self._bare()
        scalar = isinstance(quantizer, faiss.ScalarQuantizer)
        faiss.copy_array_to_vector(self.fitted, quantizer.trained if scalar else quantizer.centroids)
        return quantizer

    @property
    def step(self) -> np.ndarray:
        """(dimension,) float32: how far the values of a coordinate of ``sq8`` are apart."""
        return self.fitted[self.dimension :] / np.float32(255)

    def squares(self, codes: np.ndarray) -> np.ndarray:
        """What :class:`datastore.queries.Queries` wants of keys besides their products: (n,) float32 of codes (n,
        bytes), each a function of its code alone, bit for bit: Σ (step · c)², c a code less 128."""
        if self.name != "sq8":
            return np.zeros(len(codes), dtype=np.float32)
        from datastore.choosing import whole_squares  # what is compiled takes time to import

        squares = self.step.astype(np.float64) ** 2
        unit = max(squares.sum(), np.finfo(np.float64).tiny) / WHOLE_SQUARES
        sums = np.empty(len(codes))
        whole_squares(np.rint(squares / unit), codes, sums)
        return (sums * unit).astype(np.float32)
