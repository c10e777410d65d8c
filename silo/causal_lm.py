"""A mixture as a causal language model of transformers: its ``generate``, and whatever else takes such a model, run on
the mixture unchanged."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.generation import BaseStreamer, GenerationMixin, LogitsProcessorList
from transformers.modeling_outputs import CausalLMOutputWithPast

from silo.copying import CopyLimit
from silo.errors import UsageError
from silo.explanation import Answer, ExplainedToken, Explanation, pieces
from silo.leaving import Leaving, concerned
from silo.mixture import Mixture, Parts, attribute_all
from silo.retrieval import NgramSource
from silo.streaming import MixtureCache, Reader, Row
from silo.weights import Weighing

EXPLAINED_TOKENS = 512
"""What would change if a document left is asked of the documents that matter to so many tokens."""


class MixtureForCausalLM(PreTrainedModel, GenerationMixin):
    """The log-probabilities of a mixture, as logits.

    The model reads what it is given. If that begins with the start token, as it should, ``logits[:, t]`` is what
    :meth:`silo.mixture.Mixture.parts` says of position t of the text after it. If it does not, the model and the
    neighbours see a text that begins nowhere, as the model alone would; n-grams and blocks are those of the same text
    with a start token, since neither knows one.

    Inputs beyond the model's context are read as :class:`silo.streaming.Reader` says.
    """

    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, mixture: Mixture, weighing: Weighing, copied: Callable[[], NgramSource] | None = None) -> None:
        """Weigh a mixture.

        Args:
            mixture: of all methods that are weighed.
            weighing: of some or all of its methods.
            copied: opens the text of which no more than so much may be copied, where that is asked for.

        Raises:
            UsageError: the mixture lacks a method.
        """
        missing = [method for method in weighing.methods if method not in mixture.methods]
        if missing:
            raise UsageError(
                f"weights for {', '.join(weighing.methods)}, but the mixture has {', '.join(mixture.methods)} only; "
                "open a store, and use what is weighed"
            )
        inner = mixture.model.model
        super().__init__(copy.deepcopy(inner.config))
        self.generation_config = copy.deepcopy(inner.generation_config)
        self.lm = inner
        self.all_tied_weights_keys: dict[str, str] = {}
        self.mixture = mixture
        self.weighing = weighing
        self.reader = Reader(mixture, weighing.history)
        self._copied = cache(copied) if copied else None  # which is opened once, however much is written
        self.eval()

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.mixture.model.tokenizer

    @torch.no_grad()
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Give the logarithm of the mixture's next-token distributions.

        Args:
            input_ids: (batch, time).
            attention_mask: (batch, time so far), 0 for padding on the left or, in a first call, on the right. What
                is said of padding is that every token is as likely.
            past_key_values: of the call before; only the inputs since then are given.
            use_cache: whether more inputs will come.
            logits_to_keep: answer for this many last inputs only; 0 for all.

        Returns:
            Logits (batch, time, vocabulary) float32 and, with ``use_cache``, ``past_key_values``. No gradient.

        Raises:
            UsageError: the mask has holes, or the cache is another model's.
        """
        keep = logits_to_keep or input_ids.shape[1]
        if isinstance(past_key_values, MixtureCache) and past_key_values.rows:
            cache = past_key_values
            read = self.reader.read_on(cache, input_ids, keep)
            ends = [input_ids.shape[1]] * len(cache.rows)
        else:
            cache = _cache(past_key_values)
            begins, ends = spans(input_ids, attention_mask)
            start = self.mixture.model.start_token
            for row, begin, end in zip(input_ids, begins, ends, strict=True):
                cache.rows.append(Row(row[begin:end].numpy(), started=int(row[begin]) == start))
            cache.width = input_ids.shape[1]
            read = self.reader.start(cache, keep)
        vocab_size, width = self.mixture.model.vocab_size, min(keep, input_ids.shape[1])
        logits = torch.full((len(read), width, vocab_size), 1 / vocab_size).log_()
        for row, said, out, end in zip(cache.rows, read, logits, ends, strict=True):
            for parts in said:
                place = end - row.position(len(row.inputs)) + parts.begin - (input_ids.shape[1] - width)
                mixed = parts.distribution(self.weighing).clamp_min_(1e-300).log_()
                if place + len(mixed) > 0:  # of a row padded on the right, all may lie before what is kept
                    out[max(0, place) : place + len(mixed)] = mixed[max(0, -place) :]
        keeps = self.config.use_cache if use_cache is None else use_cache
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache if keeps else None)

    def explain(self, text: str) -> Explanation:
        """Split the probability of each token of a text, from the start token on, into the model's share and one share
        a document, and say what would change without each. Raises :class:`UsageError` if the text has no token."""
        tokens = self._tokens(text)
        if not tokens:
            raise UsageError("the text is empty; give one with at least one token")
        return self._explain(tokens)

    def generate_with_sources(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        seed: int = 0,
        longest_copy: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Answer:
        """Write on, and say what each token rests on.

        Args:
            prompt: may be empty.
            max_new_tokens: tokens at most; it ends before an end token.
            temperature: tokens are drawn from the mixture to the power of 1 / temperature; 0 takes the likeliest.
                The explanation is of the mixture itself.
            seed: of the drawing.
            longest_copy: so many tokens in a row that are written may stand in a document of the store; see
                :class:`silo.copying.CopyLimit`. The explanation is of the mixture without this limit.
            progress: is told of each token how many there are, and how many there may be.

        Raises:
            UsageError: there is no store from which something could be copied, or nothing could be written.
        """
        if max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {max_new_tokens}; expected at least 1")
        tokens = self._tokens(prompt)
        ids = torch.tensor([[self.mixture.model.start_token, *tokens]])
        drawing: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            drawing = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
            torch.manual_seed(seed)
        ends = self.generation_config.eos_token_id
        ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
        out: Any = self.generate(  # type: ignore[misc]
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            pad_token_id=ends[0] if ends else 0,
            streamer=_Count(progress, max_new_tokens) if progress else None,
            logits_processor=self._limits(longest_copy, ids.shape[1]),
            **drawing,
        )
        written = out[0, ids.shape[1] :].tolist()
        if written and written[-1] in ends:
            written.pop()
        explanation = self._explain([*tokens, *written], first=len(tokens))
        return Answer(prompt, "".join(each.text for each in explanation.tokens), explanation)

    def _limits(self, longest_copy: int | None, prompt: int) -> LogitsProcessorList:
        """What is forbidden to be written after a prompt of so many tokens."""
        if longest_copy is None:
            return LogitsProcessorList()
        if self._copied is None:
            raise UsageError("a limit on copies without a store, whose text would be copied; give one")
        return LogitsProcessorList([CopyLimit(self._copied(), longest_copy, prompt)])

    def _tokens(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    @torch.no_grad()
    def _explain(self, tokens: Sequence[int], first: int = 0) -> Explanation:
        """Explain the tokens of a text from number ``first`` on."""
        if len(tokens) == first:
            return Explanation(())
        row = Row(self.mixture.model.inputs(np.asarray(tokens)).numpy(), started=True)
        texts = pieces(self.tokenizer.decode, tokens[first:])
        found = []
        for several in _together(self.reader.read(row, first)):
            numbers = concerned(several, np.asarray(tokens))
            for parts in several:
                own = torch.tensor(tokens[parts.begin : parts.end])
                leaving = Leaving(parts, np.asarray(tokens), self.weighing, numbers)
                for index, split in enumerate(attribute_all(parts, own, self.weighing)):
                    at = parts.begin + index
                    found.append(ExplainedToken.of(tokens[at], texts[at - first], split, leaving.at(index)))
        return Explanation(tuple(found))


def _together(read: Iterable[Parts]) -> Iterator[list[Parts]]:
    """So many parts of a text at a time that they have :data:`EXPLAINED_TOKENS`, or a little more."""
    several: list[Parts] = []
    for parts in read:
        several.append(parts)
        if several[-1].end - several[0].begin >= EXPLAINED_TOKENS:
            yield several
            several = []
    if several:
        yield several


class _Count(BaseStreamer):
    """Tells how far a generation is."""

    def __init__(self, progress: Callable[[int, int], None], total: int) -> None:
        self._progress, self._total, self._seen = progress, total, -1  # the prompt comes first

    def put(self, value: torch.Tensor) -> None:
        self._seen += 1
        self._progress(max(0, self._seen), self._total)

    def end(self) -> None:
        self._progress(self._total, self._total)


def _cache(given: Any) -> MixtureCache:
    """An empty cache in place of what was given, which must be empty too."""
    if given is not None and given.get_seq_length():
        raise UsageError(
            f"past_key_values is a {type(given).__name__} that holds {given.get_seq_length()} tokens of another "
            "model; give the one that the mixture returned"
        )
    return given if isinstance(given, MixtureCache) else MixtureCache()


def spans(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> tuple[list[int], list[int]]:
    """Where the text of each row (batch, time) begins and ends. Raises :class:`UsageError` if it is not one piece."""
    if input_ids.dim() != 2 or not input_ids.numel():
        raise UsageError(f"input_ids of shape {tuple(input_ids.shape)}; expected (batch, time) with at least one token")
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
    if mask.shape != input_ids.shape:
        raise UsageError(f"an attention_mask {tuple(mask.shape)} for input_ids {tuple(input_ids.shape)}; give one size")
    counts, begins = mask.sum(dim=1), mask.argmax(dim=1)
    places = torch.arange(mask.shape[1])
    whole = (places >= begins.unsqueeze(1)) & (places < (begins + counts).unsqueeze(1))
    if not counts.min() or (mask.bool() != whole).any():
        raise UsageError("the attention_mask of a row is not one run of ones; pad on the left or on the right")
    return begins.tolist(), (begins + counts).tolist()
