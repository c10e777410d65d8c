"""A trained model with its tokenizer, as the datastore and the evaluation use it: documents in, probabilities and
keys out."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicCache

import silo.modeling  # registers our model with the Auto classes
from silo.documents import Document
from silo.errors import DataError, UsageError
from silo.files import canonical_json, sha256, sha256_file
from silo.windows import Window, windows

WINDOWS_PER_BATCH = 8
MAX_CONTEXT = 1024
"""Inputs a window at most, in tokens, however many a model could read."""
KEY_LAYERS = ("last_ffn_input", "last_hidden_state")
"""The input of the last feed-forward layer after its norm, which kNN-LM found to retrieve best (Khandelwal 2020,
section 5), and the last layer's output, as transformers gives it."""
FFN_NAMES = ("mlp", "feed_forward", "ffn")
"""What transformers' decoders call the feed-forward part of a layer."""
REQUIRED = ("config.json", "tokenizer.json")
FINGERPRINTED = (*REQUIRED, "tokenizer_config.json", "*.safetensors", "pytorch_model*.bin", "*.gguf")


Head = Callable[[torch.Tensor], torch.Tensor]
Cut = Callable[[int], list[Window]]
"""From the length of a document to the windows that it is read in."""


@dataclass(frozen=True, slots=True)
class KeySpec:
    """How keys are made; part of a store, since keys of another kind cannot be searched together."""

    layer: str
    """One of :data:`KEY_LAYERS`."""
    dimension: int
    context: int
    """Inputs a window, in tokens."""
    stride: int
    """Inputs by which windows advance, in tokens."""


@dataclass(frozen=True)
class Unread:
    """Some positions that a model has read, but for its head, whose logits are many times as wide as its states."""

    states: torch.Tensor
    """(n, hidden); or logits where the head is more than one matrix."""
    head: Head | None

    @torch.inference_mode()
    def logits(self) -> torch.Tensor:
        """(n, vocabulary), not normalised."""
        return self.states if self.head is None else self.head(self.states)


class LanguageModel:
    """A causal language model in evaluation mode.

    Each document goes through the model alone, in batches whose shapes depend on its length only. That is what makes
    a key a function of its document, bit for bit, whatever else is in the store (law 3).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        fingerprint: str,
        key_layer: str | None = None,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.fingerprint = fingerprint
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if start is None:
            raise UsageError("the model's tokenizer has neither a start nor an end token; one is needed to begin with")
        self.start_token: int = start
        config = model.config
        context = min(getattr(config, "max_position_embeddings", None) or MAX_CONTEXT, MAX_CONTEXT)
        self.ours = isinstance(model, silo.modeling.SiloForCausalLM)
        self.last_ffn = None if self.ours else last_ffn(model)
        layer = key_layer or ("last_ffn_input" if self.ours or self.last_ffn is not None else "last_hidden_state")
        self._check_key_layer(layer)
        stride = max(1, context * 3 // 4)
        self.key_spec = KeySpec(layer, config.hidden_size, context, stride)
        self.cut: Cut = partial(windows, context=context, stride=stride)

    def _check_key_layer(self, layer: str) -> None:
        if layer not in KEY_LAYERS:
            raise UsageError(f"the key layer is {layer!r}; expected one of {', '.join(KEY_LAYERS)}")
        if self.ours and layer != "last_ffn_input":
            raise UsageError(f"the key layer is {layer!r}; expected last_ffn_input, which is what our models give")
        if layer == "last_ffn_input" and not self.ours and self.last_ffn is None:
            raise UsageError(
                f"in a {type(self.model).__name__} the last feed-forward layer was not found; expected it to be named "
                f"{' or '.join(FFN_NAMES)}: choose the key layer last_hidden_state"
            )

    @classmethod
    def load(cls, path: Path, key_layer: str | None = None) -> LanguageModel:
        """Load a directory of ours or of any Hugging Face causal model.

        Args:
            path: the directory.
            key_layer: one of :data:`KEY_LAYERS`; if absent the first that the model can give.

        Raises:
            UsageError: the directory holds no model, or only a part of one, or its model does not give such keys.
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
        return cls(model, tokenizer, fingerprint(path), key_layer)

    @property
    def vocab_size(self) -> int:
        """Number of columns of a distribution."""
        return self.model.config.vocab_size

    def reading_by(self, cut: Cut) -> LanguageModel:
        """The same model, which cuts what it reads into other windows; for evaluation, since keys hang on them."""
        other = copy.copy(self)
        other.cut = cut
        return other

    def tokenize(self, document: Document) -> np.ndarray:
        """Token ids of a document's whole text, (n,) int32. Raises :class:`DataError` if there are none, or the model
        does not know one."""
        ids = self.tokenizer(document.full_text, add_special_tokens=False, verbose=False)["input_ids"]
        if not ids:
            raise DataError(f"document {document.id!r} has no tokens; remove it from the input")
        if (most := max(ids)) >= self.vocab_size:
            raise DataError(
                f"document {document.id!r} has token {most}, and the model knows {self.vocab_size}; the tokenizer is "
                "another model's: restore the directory"
            )
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
        inputs = self.inputs(tokens)
        for batch in _batches(self.cut(len(inputs))):
            keys, _ = self._forward(_stacked(inputs, batch), logits=False)
            yield _kept(keys, batch).numpy()

    @torch.inference_mode()
    def score(self, tokens: np.ndarray) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """Read a document; for each batch of positions give keys (n, dimension) and log-probabilities (n, vocabulary).
        Positions come in order, each once."""
        for keys, logits in self.logits(tokens):
            yield keys, torch.log_softmax(logits.float(), dim=-1)

    def logits(self, tokens: np.ndarray) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """The same with logits, which are not normalised."""
        for keys, unread in self.ahead(tokens):
            yield keys, unread.logits()

    def ahead(self, tokens: np.ndarray) -> Iterator[tuple[np.ndarray, Unread]]:
        """The same with logits that are made when they are asked for."""
        yield from self._run(self.inputs(tokens))

    @torch.inference_mode()
    def log_probabilities(self, inputs: torch.Tensor, keep: int, states: Cache | None = None) -> torch.Tensor:
        """Log-probabilities (batch, keep, vocabulary) after each of the last ``keep`` of some inputs (batch, time).

        ``states`` are what the model kept of the inputs before these; it is made longer.
        """
        out = self.model(inputs, logits_to_keep=keep, past_key_values=states, use_cache=states is not None)
        return torch.log_softmax(out.logits.float(), dim=-1)

    def read(self, inputs: torch.Tensor, first: int = 0) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """As :meth:`logits`, after each of some inputs (n,) of any kind, from number ``first`` on."""
        for keys, unread in self._run(inputs, first):
            yield keys, unread.logits()

    @torch.inference_mode()
    def read_on(
        self, inputs: torch.Tensor, states: Cache, mask: torch.Tensor, keep: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Read some more inputs of several texts.

        Args:
            inputs: (batch, time).
            states: what the model kept of the inputs before these; it is made longer.
            mask: (batch, all inputs so far and these), 0 for padding, which stands on the left.
            keep: so many of the last inputs are asked for.

        Returns:
            Keys (batch, keep, dimension) and logits (batch, keep, vocabulary).
        """
        places = (mask.cumsum(dim=1) - 1).clamp_min(0)[:, -inputs.shape[1] :]
        padding = {} if bool(mask.all()) else {"attention_mask": mask}
        keys, logits = self._forward(
            inputs, logits=True, keep=keep, past_key_values=states, use_cache=True, position_ids=places, **padding
        )
        return keys[:, -keep:], logits

    def states(self) -> Cache:
        """An empty memory of what the model reads, for :meth:`read_on` and :meth:`log_probabilities`."""
        return DynamicCache(config=self.model.config)

    @torch.inference_mode()
    def _run(self, inputs: torch.Tensor, first: int = 0) -> Iterator[tuple[np.ndarray, Unread]]:
        cut = [w._replace(first=max(w.first, first)) for w in self.cut(len(inputs)) if w.end > first]
        for batch in _batches(cut):
            keys, states = self._states(_stacked(inputs, batch))
            yield _kept(keys, batch).numpy(), Unread(_kept(states, batch), self._head)

    @cached_property
    def _head(self) -> Head | None:
        """What makes logits of the last states, if that is one matrix and nothing more."""
        return self.model.get_output_embeddings() if has_plain_head(self.model) else None

    def _states(self, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys (batch, time, dimension), and the last states, or logits where there is no plain head."""
        if self._head is None:
            return self._forward(batch, logits=True)
        body: Any = self.model.base_model
        if self.ours:
            states, keys, *_ = body(batch, use_cache=False)
            return keys.float(), states
        if self.key_spec.layer == "last_hidden_state":
            out = body(batch, use_cache=False, output_hidden_states=True)
            return out.hidden_states[-1].float(), out[0]
        with input_of(self.last_ffn) as seen:
            out = body(batch, use_cache=False)
        return seen[0].float(), out[0]

    def _forward(
        self, batch: torch.Tensor, *, logits: bool, keep: int = 0, use_cache: bool = False, **reading: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.ours:
            if not logits:
                return self.model.retrieval_keys(batch).float(), batch.new_empty(0)
            out = self.model(batch, output_keys=True, logits_to_keep=keep, use_cache=use_cache, **reading)
            return out.retrieval_keys.float(), out.logits
        reading |= {"logits_to_keep": keep if logits else 1, "use_cache": use_cache}
        if self.key_spec.layer == "last_hidden_state":
            out = self.model(batch, output_hidden_states=True, **reading)
            return out.hidden_states[-1].float(), out.logits
        with input_of(self.last_ffn) as seen:
            out = self.model(batch, **reading)
        return seen[0].float(), out.logits

    def describe(self) -> dict[str, object]:
        """What a store remembers of the model that made its keys."""
        return {"fingerprint": self.fingerprint, "key_spec": asdict(self.key_spec)}


@torch.inference_mode()
def has_plain_head(model: Any) -> bool:
    """Whether logits are states times a matrix and nothing more; some models scale them or cap them."""
    head = model.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None or model.base_model is model:
        return False
    ids = torch.arange(8).unsqueeze(0) % model.config.vocab_size
    states = model.base_model(ids, use_cache=False)[0]
    logits = model(ids, use_cache=False).logits
    ours = states @ head.weight.t() if states.shape[-1] == head.weight.shape[1] else None
    return ours is not None and ours.shape == logits.shape and torch.allclose(ours, logits, rtol=1e-4, atol=1e-4)


def last_ffn(model: PreTrainedModel) -> nn.Module | None:
    """The feed-forward part of the last decoder layer of a model of transformers', or None if it has none by a known
    name. Layers are the one list of modules that is as long as the model has layers."""
    depth = getattr(model.config, "num_hidden_layers", None)
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == depth]
    parts = [dict(layers[-1].named_children()) for layers in lists]
    found = [part[name] for part in parts for name in FFN_NAMES if name in part]
    return found[0] if len(found) == 1 else None


@contextlib.contextmanager
def input_of(module: nn.Module | None) -> Iterator[list[torch.Tensor]]:
    """Collect what a module is given while the context lasts. transformers returns the states between layers but none
    within one, so this takes a hook; it is gone afterwards."""
    seen: list[torch.Tensor] = []

    def remember(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.append(inputs[0])

    if module is None:
        raise UsageError("there is no module to read; expected a model whose last feed-forward layer was found")
    handle = module.register_forward_pre_hook(remember)
    try:
        yield seen
    finally:
        handle.remove()


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


def _batches(cut: list[Window]) -> Iterator[list[Window]]:
    """Windows of one length that follow each other, as many as go through the model at once."""
    for _, same in itertools.groupby(cut, key=lambda window: window.end - window.begin):
        run = list(same)
        for at in range(0, len(run), WINDOWS_PER_BATCH):
            yield run[at : at + WINDOWS_PER_BATCH]


def _stacked(inputs: torch.Tensor, batch: list[Window]) -> torch.Tensor:
    """The inputs (n,) of windows of one length, (windows, time)."""
    return torch.stack([inputs[w.begin : w.end] for w in batch])


def _kept(tensor: torch.Tensor, batch: list[Window]) -> torch.Tensor:
    """Of each window's rows, those that it is there for."""
    return torch.cat([row[w.first - w.begin :] for row, w in zip(tensor, batch, strict=True)])


def fingerprint(path: Path) -> str:
    """One hash for weights, configuration and tokenizer of a model directory."""
    files = [file for pattern in FINGERPRINTED for file in sorted(path.glob(pattern))]
    return sha256(canonical_json({file.name: sha256_file(file) for file in files}))
