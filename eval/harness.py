"""Mixtures in lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness): its tasks, unchanged.

    lm = silo.load("model", store="store", weights="gate.json")
    lm_eval.simple_evaluate(model=MixtureLM(lm), tasks=["arc_easy"])

The harness is an extra: ``pip install 'silo-lm[harness]'``. Importing this module without it raises
:class:`silo.errors.UsageError`; nothing else of ours imports it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch

from eval import perplexity as measure
from eval.continuations import Pair, Progress, score_pairs
from silo.causal_lm import MixtureForCausalLM
from silo.documents import Document
from silo.errors import UsageError
from silo.progress import progress_bar

try:
    from lm_eval.api.model import TemplateLM
except ImportError as error:
    raise UsageError(
        f"lm-evaluation-harness cannot be imported ({error}); install it with: pip install 'silo-lm[harness]'"
    ) from None

MAX_NEW_TOKENS = 256
"""Tokens that a task gets which names no other number; the harness's own default."""


class MixtureLM(TemplateLM):
    """A mixture as a model of the harness.

    It differs in two ways from the harness's own class for models of transformers. The start token stands before every
    context, as it stood before every document that the model learnt from. And nothing is cut off: what is longer than
    the model's context is read in the windows in which documents are, where the harness keeps the end only and says
    nothing.
    """

    def __init__(self, lm: MixtureForCausalLM) -> None:
        """Take what :func:`silo.load` gives."""
        super().__init__()
        self.lm = lm
        self.model = lm.mixture.model
        self.tokenizer = lm.tokenizer
        self._device = torch.device("cpu")

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document."""
        end = self.tokenizer.eos_token_id
        return int(self.model.start_token if end is None else end)

    @property
    def prefix_token_id(self) -> int:
        """What stands before the first token of a text."""
        return self.model.start_token

    @property
    def tokenizer_name(self) -> str:
        """What the harness names its caches by; other models, and other mixtures, have other names."""
        return f"silo-{self.model.fingerprint}-{'-'.join(self.lm.weighing.methods)}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; special tokens come from the mixture, so that there is one start token and not two."""
        ids: list[int] = self.tokenizer(string, add_special_tokens=bool(add_special_tokens), verbose=False)["input_ids"]
        return ids

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        """Score continuations; an empty context comes as the start token."""
        start = [self.model.start_token]
        pairs = [
            Pair(tuple(context[1:] if context[:1] == start else context), tuple(continuation))
            for _, context, continuation in requests
        ]
        with _bar(disable_tqdm) as progress:
            found = score_pairs(self.lm.mixture, {"": self.lm.weighing}, pairs, progress=progress)
        answers = [(each[""].log_probability, each[""].greedy) for each in found]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", request[0], answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts, each as a document: every token once, with the fullest context that the windows give.

        Where a text fits into the model's context that is exactly what the harness asks for. In longer ones, windows
        advance by three quarters of it and leave each token at least a quarter, where the harness's leave it one token.
        """
        asked = [request.args for request in requests]
        documents = [Document(id=str(number), text=text) for number, (text,) in enumerate(asked)]
        texts = [measure.Text(each, self.model.tokenize(each)) for each in documents if self.tok_encode(each.text)]
        with _bar(disable_tqdm) as progress:
            scores = measure.score(self.lm.mixture, texts, progress=progress) if texts else None
        sums = dict.fromkeys((each.id for each in documents), 0.0)
        if scores is not None:
            parts = scores.log_probabilities(self.lm.weighing).split(scores.lengths)
            sums |= {text.document.id: float(part.sum()) for text, part in zip(texts, parts, strict=True)}
        for arguments, answer in zip(asked, sums.values(), strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", arguments, answer)
        return list(sums.values())

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Write on until one of the task's stop strings, or the end token; the stop string is not part of the text."""
        answers = []
        with _bar(disable_tqdm) as progress:
            for number, (context, settings) in enumerate((request.args for request in requests), start=1):
                answer = self._write(context, **settings)
                self.cache_hook.add_partial("generate_until", (context, settings), answer)
                answers.append(answer)
                progress(number, len(requests))
        return answers

    def _write(
        self,
        context: str,
        *,
        until: str | Sequence[str] | None = None,
        max_gen_toks: int = MAX_NEW_TOKENS,
        do_sample: bool | None = None,
        temperature: float | None = None,
        **drawing: Any,
    ) -> str:
        """Write after one context. What is not named here is an argument of transformers' ``generate``."""
        stops = [each for each in ([until] if isinstance(until, str) else until or ()) if each]
        sampled = bool(temperature) if do_sample is None else do_sample and temperature != 0
        if sampled:
            drawing |= {"temperature": 1.0 if temperature is None else temperature}
        if stops:
            drawing |= {"stop_strings": stops, "tokenizer": self.tokenizer}
        ids = torch.tensor([[self.model.start_token, *self.tok_encode(context)]])
        out: Any = self.lm.generate(  # type: ignore[misc]
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_gen_toks,
            pad_token_id=self.eot_token_id,
            do_sample=sampled,
            **drawing,
        )
        text: str = self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        return text[: min((at for at in map(text.find, stops) if at >= 0), default=len(text))]


def _bar(hidden: bool) -> Any:
    """A progress bar on stderr, or nothing that can be told the same."""
    silent: Progress = lambda done, total: None  # noqa: E731 (a value, as the bar's own)
    return nullcontext(silent) if hidden else progress_bar("harness")
