"""How fast texts are scored by a model alone, beside lm-evaluation-harness on the same model and windows.

    pip install '.[bench]'
    python scripts/bench evaluation --model MODEL test.jsonl > scripts/results/evaluation.json

Both are given the same model in memory, each document alone and windows that do not overlap, which is how the peer
reads (``loglikelihood_rolling``). They take turns, the peer with each batch size; its best one counts. Time is that of
the processor, on one thread, since other work on the machine stretches the clock's.

Ours must be within 1e-5 a token of what the peer says with its softmax in float64, which is not timed, or there are no
results. As it comes, its softmax is the model's float32, which sums tens of thousands of tokens: of a large vocabulary
1e-5 is less than its own rounding.

Prints one JSON document: machine, command, commit, model, data hash, result.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from recording import files_hash

from bench import ceiling
from bench.harness import Judge, WrongResult, compete, say, subject
from bench.profiling import operations
from eval.perplexity import PASSAGE_TOKENS
from eval.protocols import Protocol
from eval.scoring import Scorer
from silo.documents import read_documents
from silo.language_model import LanguageModel
from training.flops import flops_per_token

BATCHES = (1, 4, 16)
"""Batch sizes that the peer is given."""
APART, ROUNDED = 1e-5, 1e-4
"""By how much the sum of a text may differ, a token: from the peer's in float64, and as it comes."""


@click.command()
@click.argument("data", type=click.Path(path_type=Path, exists=True))
@click.option("--model", "path", required=True, type=click.Path(path_type=Path), help="Directory of the model.")
@click.option("--tokens", default=6000, show_default=True, help="Tokens that are scored a round.")
@click.option("--context", default=1024, show_default=True, help="Tokens of a window.")
@click.option("--rounds", default=3, show_default=True, help="Counted rounds.")
@subject
def main(data: Path, path: Path, tokens: int, context: int, rounds: int) -> dict[str, Any]:
    """Scoring by the model alone beside lm-evaluation-harness."""
    torch.set_num_threads(1)
    roof = ceiling.measure()
    model = LanguageModel.load(path)
    texts = whole_texts(model, data, tokens)
    result = measure(model, texts, Protocol("alone", context, context), rounds)
    work = ceiling.Work(flops=flops_per_token(model.model, context, batch=1))
    reached = roof.share(work, 1 / statistics.median(result["tokens_per_second"]["silo"]), 1)
    return {
        "data": files_hash([data]),
        "model": model.fingerprint,
        "context": context,
        "documents": len(texts),
        "rounds": rounds,
        "ceiling": roof.told(),
        "result": result | {"ceiling": reached},
    }


def whole_texts(model: LanguageModel, data: Path, tokens: int) -> list[str]:
    """Documents of at least a passage each, until so many tokens are there."""
    found: list[str] = []
    count = 0
    for document in read_documents(data):
        size = len(model.tokenize(document))
        if size >= PASSAGE_TOKENS:
            found.append(document.full_text)
            count += size
        if count >= tokens:
            break
    if not found:
        raise click.ClickException(f"{data} has no document of {PASSAGE_TOKENS} tokens; give longer ones")
    return found


def measure(model: LanguageModel, texts: list[str], protocol: Protocol, rounds: int) -> dict[str, Any]:
    """Tokens a second of all in turn."""
    peers = {size: harness(model, protocol.context, size) for size in BATCHES}
    ids = [
        np.asarray(model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], np.int64)
        for text in texts
    ]
    count = sum(map(len, ids))
    scorer = Scorer(model.model, next(iter(peers.values()))[0])
    contestants: dict[str, Callable[[], list[float]]] = {
        "silo": lambda: [math.fsum(each) for each in scorer.score(ids, protocol)],
        **{f"lm_eval, batches of {size}": partial(peer, texts) for size, (_, peer) in peers.items()},
    }
    lengths = [len(each) for each in ids]
    apart: list[float] = []
    rounded: list[float] = []
    _, in_float64 = harness(model, protocol.context, 1, "float64")
    if problem := agreed(lengths, apart)({"silo": contestants["silo"](), "lm_eval in float64": in_float64(texts)}):
        raise WrongResult(problem)
    told = compete(
        contestants,
        rounds,
        units=dict.fromkeys(contestants, count),
        judge=agreed(lengths, rounded, ROUNDED),
        clocks={"processor": time.process_time},
    )
    rates = {name: [1 / each for each in of] for name, of in told.seconds["processor"].items()}
    middle = {name: told.rate(name, "processor") for name in contestants}
    say(f"{ {name: f'{each.value:,.0f}' for name, each in middle.items()} } tokens/s")
    best = max((name for name in middle if name != "silo"), key=lambda name: middle[name].value)
    return {
        "tokens": count,
        "tokens_per_second": rates,
        "best_peer": best,
        "times_the_best_peer": middle["silo"].value / middle[best].value,
        "profile": {name: operations(contestants[name]) for name in ("silo", best)},
        "largest_difference_a_token": max(apart),
        "largest_difference_as_it_comes": max(rounded),
    }


def agreed(lengths: list[int], seen: list[float], bound: float = APART) -> Judge:
    """A judge who wants the same sum of each text, a token, and writes down by how much they differed."""

    def judge(sums: dict[str, list[float]]) -> str:
        (first, wanted), *others = sums.items()
        for name, found in others:
            apart = [abs(a - b) / count for a, b, count in zip(wanted, found, lengths, strict=True)]
            seen.append(max(apart))
            if not seen[-1] <= bound:
                return f"{name} and {first} differ by {seen[-1]:.1e} a token in text {apart.index(seen[-1])}"
        return ""

    return judge


def harness(
    model: LanguageModel, context: int, batch: int, softmax: str | None = None
) -> tuple[int, Callable[[Sequence[str]], list[float]]]:
    """The peer's start token, and its rolling log-likelihood of some texts, with the softmax in some type."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    peer = HFLM(
        pretrained=model.model, tokenizer=model.tokenizer, batch_size=batch, max_length=context, device="cpu",
        softmax_dtype=softmax,
    )  # fmt: skip

    def score(texts: Sequence[str]) -> list[float]:
        asked = [Instance("loglikelihood_rolling", {}, (text,), number) for number, text in enumerate(texts)]
        return peer.loglikelihood_rolling(asked, disable_tqdm=True)

    return peer.prefix_token_id, score
