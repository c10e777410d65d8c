"""A trained model with its tokenizer, as the datastore and the evaluation use it: documents in, probabilities and
keys out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import silo.modeling  # registers our model with the Auto classes
from silo.documents import Document
from silo.errors import DataError, UsageError
from silo.files import canonical_json, sha256, sha256_file
from silo.windows import Window, windows

WINDOWS_PER_BATCH = 8
MAX_CONTEXT = 1024
"""Inputs a window at most, in tokens, however many a model could read."""
REQUIRED = ("config.json", "tokenizer.json")
FINGERPRINTED = (*REQUIRED, "tokenizer_config.json", "*.safetensors", "pytorch_model*.bin", "*.gguf")


@dataclass(frozen=True, slots=True)
class KeySpec:
    """How keys are made; part of a store, since keys of another kind cannot be searched together."""

    layer: str
    """``last_ffn_input`` (our models) or ``last_hidden_state`` (any other)."""
    dimension: int
    context: int
    """Inputs a window, in tokens."""
    stride: int
    """Inputs by which windows advance, in tokens."""


class LanguageModel:
    """A causal language model in evaluation mode.

    Each document goes through the model alone, in batches whose shapes depend on its length only. That is what makes
    a key a function of its document, bit for bit, whatever else is in the store (law 3).
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, fingerprint: str) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.fingerprint = fingerprint
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if start is None:
            raise UsageError("the model's tokenizer has neither a start nor an end token; one is needed to begin with")
        self.start_token: int = start
        config = model.config
        context = min(getattr(config, "max_position_embeddings", None) or MAX_CONTEXT, MAX_CONTEXT)
        layer = "last_ffn_input" if isinstance(config, silo.modeling.SiloConfig) else "last_hidden_state"
        self.key_spec = KeySpec(layer, config.hidden_size, context, context * 3 // 4)

    @classmethod
    def load(cls, path: Path) -> LanguageModel:
        """Load a directory of ours or of any Hugging Face causal model.

        Raises:
            UsageError: the directory holds no model, or only a part of one.
        """
        for name in REQUIRED:
            if not (path / name).is_file():
                raise UsageError(f"{path} is not a model directory: {name} is missing; train one with `silo train`")
        try:
            with quiet_transformers():
                loaded: Any = AutoModelForCausalLM.from_pretrained(
                    path, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
                )
                tokenizer = AutoTokenizer.from_pretrained(path)
        except UsageError:
            raise
        except Exception as error:  # Each architecture and file format fails in its own way.
            raise UsageError(f"{path} cannot be loaded as a causal language model: {error}") from None
        model, loading = loaded
        unfit = sorted({*loading["missing_keys"], *(name for name, *_ in loading["mismatched_keys"])})
        if unfit:  # transformers has filled them with random numbers.
            raise UsageError(
                f"{path} has no weights, or such of another shape than its config.json says, for {len(unfit)} "
                f"parameters of the model: {', '.join(unfit[:3])}; restore the directory or train the model again"
            )
        return cls(model, tokenizer, fingerprint(path))

    @property
    def vocab_size(self) -> int:
        """Number of columns of a distribution."""
        return self.model.config.vocab_size

    def tokenize(self, document: Document) -> np.ndarray:
        """Token ids of a document's whole text, (n,) int32. Raises :class:`DataError` if there are none."""
        ids = self.tokenizer(document.full_text, add_special_tokens=False, verbose=False)["input_ids"]
        if not ids:
            raise DataError(f"document {document.id!r} has no tokens; remove it from the input")
        return np.asarray(ids, dtype=np.int32)

    def inputs(self, tokens: np.ndarray) -> torch.Tensor:
        """The inputs that predict ``tokens``: the start token, then all but the last. (n,) int64."""
        return torch.from_numpy(np.concatenate(([self.start_token], tokens[:-1])).astype(np.int64))

    def keys(self, tokens: np.ndarray) -> np.ndarray:
        """The key of every position of a document, (n, dimension) float32."""
        return np.concatenate(list(self.key_batches(tokens)))

    @torch.inference_mode()
    def key_batches(self, tokens: np.ndarray) -> Iterator[np.ndarray]:
        """The same, some positions at a time."""
        for keys, _ in self._run(tokens, logits=False):
            yield keys

    @torch.inference_mode()
    def score(self, tokens: np.ndarray) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """Read a document; for each batch of positions give keys (n, dimension) and log-probabilities (n, vocabulary).
        Positions come in order, each once."""
        for keys, logits in self._run(tokens, logits=True):
            yield keys, torch.log_softmax(logits.float(), dim=-1)

    @torch.inference_mode()
    def log_probabilities(self, inputs: torch.Tensor, keep: int) -> torch.Tensor:
        """Log-probabilities (batch, keep, vocabulary) after each of the last ``keep`` of some inputs (batch, time)."""
        return torch.log_softmax(self.model(inputs, logits_to_keep=keep, use_cache=False).logits.float(), dim=-1)

    def _run(self, tokens: np.ndarray, *, logits: bool) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        inputs = self.inputs(tokens)
        cut = windows(len(tokens), context=self.key_spec.context, stride=self.key_spec.stride)
        for at in range(0, len(cut), WINDOWS_PER_BATCH):
            batch = cut[at : at + WINDOWS_PER_BATCH]
            keys, scores = self._forward(torch.stack([inputs[w.begin : w.end] for w in batch]), logits=logits)
            yield _kept(keys, batch).numpy(), _kept(scores, batch) if logits else scores

    def _forward(self, batch: torch.Tensor, *, logits: bool) -> tuple[torch.Tensor, torch.Tensor]:
        if self.key_spec.layer == "last_ffn_input":
            if not logits:
                return self.model.retrieval_keys(batch).float(), batch.new_empty(0)
            out = self.model(batch, output_keys=True, use_cache=False)
            return out.retrieval_keys.float(), out.logits
        out = self.model(batch, output_hidden_states=True, logits_to_keep=0 if logits else 1, use_cache=False)
        return out.hidden_states[-1].float(), out.logits

    def describe(self) -> dict[str, object]:
        """What a store remembers of the model that made its keys."""
        return {"fingerprint": self.fingerprint, "key_spec": asdict(self.key_spec)}


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' progress bars and reports from stderr: what matters of them becomes an error of ours."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _kept(tensor: torch.Tensor, batch: list[Window]) -> torch.Tensor:
    """Of each window's rows, those that it is there for."""
    return torch.cat([row[w.first - w.begin :] for row, w in zip(tensor, batch, strict=True)])


def fingerprint(path: Path) -> str:
    """One hash for weights, configuration and tokenizer of a model directory."""
    files = [file for pattern in FINGERPRINTED for file in sorted(path.glob(pattern))]
    return sha256(canonical_json({file.name: sha256_file(file) for file in files}))
