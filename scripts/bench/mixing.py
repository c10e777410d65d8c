"""How fast held-out text is scored by the model alone and by its mixtures, over one store of some million tokens.

    python scripts/bench mixing CORPUS/*.jsonl.zst --model MODEL [--peers DIR] > scripts/results/mixing.json

The store holds restricted text of the training split; what is scored are passages of the validation split, in rounds in
which all contestants take turns. Blocks are read where their look-up is among the best, so many of a hundred
(``--read``): the threshold is that quantile on half of the passages, on which the weights are fitted too; perplexities
are of the other half. With ``--encoded`` below ``--tokens`` most keys are borrowed (see mixing_store.py), no perplexity
with neighbours is told, and no search spared.

Beside that: neighbours by how many lists are read (``probes``) and how many are taken (``k``), and with fewer and fewer
searches (``spared``); the ∞-gram over the same documents as one owner's and as 200 owners'; and with --peers,
neighbours beside SILO's and knn-transformers' own loops (see mixing_peers.py), with the same keys, codes, probes and k.

Prints one JSON document: machine, command, commit, seed, data hash, result.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from recording import files_hash

from bench import ceiling
from bench.harness import compete, say, subject
from bench.mixing_peers import SILO, TRANSFORMERS, K, merged_index, silo_loop, transformers_loop
from bench.mixing_store import make_store, read_corpus
from bench.ngram import dealt
from bench.profiling import functions
from bench.ratios import PREFIXES
from datastore.store import Store
from eval.perplexity import PASSAGE_TOKENS, Scores, Text, data_hash, fit, perplexities, sample, score
from silo.in_context import InContext, find_blocks
from silo.language_model import LanguageModel
from silo.mixing import interpolate
from silo.mixture import Mixture
from silo.nearest import Nearest, Spare
from silo.readings import NeighbourReading
from silo.retrieval import PROBES, NeighbourSource, NgramSource
from silo.weights import METHODS
from training.flops import flops_per_token

IN_CONTEXT = InContext(blocks=1, text_tokens=128)
CURVE = ((1, 256), (2, 256), (3, 256), (4, 64), (4, 256), (8, 256), (16, 256))
"""Probes and k."""
SPARED = {
    "none": None,
    "p ≥ 0.9": Spare(sure=0.9),
    "p ≥ 0.5": Spare(sure=0.5),
    "suffix ≥ 9": Spare(suffix=9),
    "suffix ≥ 4": Spare(suffix=4),
    "p ≥ 0.5 or suffix ≥ 4": Spare(sure=0.5, suffix=4),
    "p ≥ 0.3 or suffix ≥ 2": Spare(sure=0.3, suffix=2),
    "1 step": Spare(steps=1),
    "3 steps": Spare(steps=3),
    "7 steps": Spare(steps=7),
    "7 steps, 2 pointers": Spare(steps=7, pointers=2),
    "3 steps, p ≥ 0.5 or suffix ≥ 4": Spare(sure=0.5, suffix=4, steps=3),
}
"""Searches that are spared: where the model is that sure, or one token always follows so long a suffix; and where the
neighbours of the last search are followed for some steps (RetoMaton)."""
OWNERS = (1, 200)


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--model", required=True, type=click.Path(path_type=Path, exists=True), help="Directory of the model.")
@click.option("--store", "kept", type=click.Path(path_type=Path), help="Made if it is not there.  [default: for now]")
@click.option("--tokens", default=4_200_000, show_default=True, help="Tokens of the store.")
@click.option("--encoded", default=4_200_000, show_default=True, help="Tokens with keys of their own.")
@click.option("--text", default=12_288, show_default=True, help="Tokens that are scored.")
@click.option("--read", default=15, show_default=True, help="Look-ups whose block is read, of a hundred.")
@click.option("--rounds", default=5, show_default=True, help="Counted rounds, after one that warms up.")
@click.option("--peers", type=click.Path(path_type=Path, exists=True), help="Their sources.")
@click.option("--peer-queries", default=256, show_default=True, help="Queries that peers score a round.")
@click.option("--quick", is_flag=True, help="Try it out: a small store, little text, one round.")
@subject
def main(
    files: tuple[Path, ...], model: Path, kept: Path | None, peers: Path | None, quick: bool, **sizes: int
) -> dict[str, Any]:
    """Scoring by the model and its mixtures, beside others' loops."""
    if quick:
        sizes |= {"tokens": 300_000, "encoded": 60_000, "text": 2_048, "rounds": 1, "peer_queries": 128}
    roof = ceiling.measure()
    lm = LanguageModel.load(model)
    corpus = read_corpus(files)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        store = make_store(kept or root / "store", lm, model, corpus, sizes["tokens"], sizes["encoded"])
        texts = sample(corpus.held_out, Mixture(lm), sizes["text"])
        own_keys = sizes["encoded"] >= sizes["tokens"]
        result: dict[str, Any] = {
            "store": {name: store.describe()[name] for name in ("tokens", "documents", "groups", "control_lists")},
            "own_keys": min(sizes["encoded"], sizes["tokens"]),
            "scored": {
                "tokens": sum(len(each.tokens) for each in texts),
                "texts": len(texts),
                "data": data_hash(texts),
            },
            "mixtures": mixtures(lm, store, texts, sizes["read"], sizes["rounds"], own_keys),
            "neighbours": curve(lm, store, texts, sizes["rounds"], own_keys),
            **({"spared": spared(lm, store, texts, sizes["rounds"])} if own_keys else {}),
            "ngram": owners(root, lm, store, texts, sizes["rounds"]),
        }
        work = ceiling.Work(flops=flops_per_token(lm.model, PASSAGE_TOKENS, batch=1))
        result["ceiling"] = {
            name: roof.share(work, 1 / result["mixtures"]["tokens_per_second"][name])
            for name in ("forward pass", "all")
        }
        if peers:
            result["peers"] = beside_peers(peers, lm, store, texts, sizes["peer_queries"], sizes["rounds"])
    return {
        "threads": torch.get_num_threads(),
        "seed": 0,
        "data": files_hash(files),
        "model": lm.fingerprint,
        "rounds": sizes["rounds"],
        "ceiling": roof.told(),
        "result": result,
    }


def in_turns(
    calls: Mapping[str, Callable[[], Any]], counts: dict[str, int], base: str, rounds: int, profiled: Sequence[str] = ()
) -> dict[str, Any]:
    """Tokens a second of each call, and how many times the base's time a token takes, round by round; by the clock, and
    by the processor's time, which suffers less from whoever else uses the machine. And where the time of some goes."""
    contest = compete(calls, rounds, units=counts)
    out: dict[str, Any] = {"tokens_per_second": {name: contest.rate(name).value for name in calls}}
    for clock, prefix in PREFIXES.items():
        times = {name: contest.times(name, base, clock) for name in calls}
        out[f"{prefix}times_{base}"] = {name: each.value for name, each in times.items()}
        out[f"{prefix}spread"] = {name: [each.low, each.high] for name, each in times.items()}
    say(f"{ {name: f'{rate:.0f}/s' for name, rate in out['tokens_per_second'].items()} }")
    return out | ({"profile": {name: functions(calls[name]) for name in profiled}} if profiled else {})


def mixtures(
    lm: LanguageModel, store: Store, texts: list[Text], read: int, rounds: int, own_keys: bool
) -> dict[str, Any]:
    """The model alone, with each method, and with all; time and perplexity."""
    use = {"lm": METHODS[:1], **{f"lm+{name}": ("lm", name) for name in METHODS[1:]}, "all": METHODS}
    threshold = quantile_of_lookups(lm, store, texts[::2], read)
    chosen = replace(IN_CONTEXT, min_score_per_word=threshold)
    named = {name: store.mixture(lm, of, in_context=chosen) for name, of in use.items()}
    named["lm+ric, every block"] = store.mixture(lm, ("lm", "ric"), in_context=IN_CONTEXT)
    forward = {"forward pass": lambda: [len(keys) for each in texts for keys, _ in lm.logits(each.tokens)]}
    scores: dict[str, Scores] = {}
    calls = {name: lambda name=name, of=of: scores.update({name: score(of, texts)}) for name, of in named.items()}
    tokens = sum(len(each.tokens) for each in texts)
    timed = in_turns({**forward, **calls}, dict.fromkeys([*forward, *calls], tokens), "lm", rounds, ["lm", "all"])
    told = [name for name, of in named.items() if own_keys or "knn" not in of.methods]
    return {
        "in_context": {
            "read": read,
            "min_score_per_word": threshold,
            "blocks": chosen.blocks,
            "stride": chosen.stride,
        },
        "perplexity": {name: perplexity_of(scores[name], named[name].methods) for name in told},
        **timed,
    }


def perplexity_of(scores: Scores, methods: Sequence[str]) -> float:
    """Perplexity on every second text, with weights that are fitted on the others."""
    second = torch.arange(len(scores.lengths)) % 2 == 1
    of_token = second.repeat_interleave(torch.tensor(scores.lengths))
    asked, others = (scores.rows(which, [int(which.sum())]) for which in (of_token, ~of_token))
    return perplexities(asked, {"it": fit(others, methods)})["it"]


def quantile_of_lookups(lm: LanguageModel, store: Store, texts: list[Text], read: int) -> float:
    """The score by the word that so many of a hundred look-ups have at least."""
    blocks, found = store.blocks(), []
    for text in texts:
        lookups = find_blocks(lm, blocks, text.tokens, 0, len(text.tokens), IN_CONTEXT)
        found.append(lookups.of_stride["score_per_word"])
    return float(np.quantile(np.concatenate(found), 1 - read / 100))


def curve(lm: LanguageModel, store: Store, texts: list[Text], rounds: int, own_keys: bool) -> dict[str, Any]:
    """Searches, of all texts together, by how many lists are read and how many neighbours are taken; the perplexity is
    that of the model, neighbours and the ∞-gram."""
    keys = np.concatenate([of for each in texts for of, _ in lm.logits(each.tokens)])
    calls: dict[str, Callable[[], Any]] = {}
    found: dict[str, float] = {}

    def search(index: NeighbourSource, k: int) -> np.ndarray:
        return index.search(keys, k).values

    for probes, k in CURVE:
        index = store.neighbours(probes=probes)
        calls[f"{probes} probes, k = {k}"] = partial(search, index, k)
        if own_keys:
            mixture = Mixture(lm, neighbours=index, ngrams=store.ngrams())
            found[f"{probes} probes, k = {k}"] = perplexity_of(nearest(score(mixture, texts), k), mixture.methods)
    tokens = len(keys)
    timed = in_turns(calls, dict.fromkeys(calls, tokens), f"{PROBES} probes, k = {Nearest().k}", rounds)
    return {"perplexity": found, **timed}


def spared(lm: LanguageModel, store: Store, texts: list[Text], rounds: int) -> dict[str, Any]:
    """The model, neighbours and the ∞-gram, with fewer and fewer searches; weights are fitted with those alone."""
    index = store.neighbours()
    named = {
        name: Mixture(lm, neighbours=index, ngrams=store.ngrams(), nearest=Nearest(spare=rule))
        for name, rule in SPARED.items()
    }
    tokens = sum(len(each.tokens) for each in texts)
    scores: dict[str, Scores] = {}
    searched: dict[str, float] = {}

    def run(name: str, mixture: Mixture) -> None:
        before = index.searches
        scores[name] = score(mixture, texts)
        searched[name] = (index.searches - before) / tokens

    calls = {name: partial(run, name, of) for name, of in named.items()}
    timed = in_turns(calls, dict.fromkeys(calls, tokens), "none", rounds)
    told = {name: perplexity_of(of, named[name].methods) for name, of in scores.items()}
    return {"searched": searched, "perplexity": told, **timed}


def nearest(scores: Scores, k: int) -> Scores:
    """Scores as they are with fewer neighbours."""
    if scores.distances is None or scores.hits is None:
        return scores
    return replace(scores, distances=scores.distances[:, :k], hits=scores.hits[:, :k])


def owners(root: Path, lm: LanguageModel, store: Store, texts: list[Text], rounds: int) -> dict[str, Any]:
    """The ∞-gram alone, the store's documents dealt out to few owners and to many."""
    bare = [
        replace(each, lists=np.zeros_like(each.lists), codes=np.zeros((len(each.tokens), 1), np.uint8))
        for name in sorted(store.manifest.shards)
        for each in store.shard(name).documents()
    ]
    windows = [each.tokens.astype(np.int64) for each in texts]
    opened = {n: dealt(bare, n, root / f"ngram-{n}") for n in OWNERS}

    def match(index: NgramSource) -> np.ndarray:
        return index.match(windows).single

    calls = {f"{n} owners": partial(match, of) for n, of in opened.items()}
    tokens = sum(map(len, windows))
    return in_turns(calls, dict.fromkeys(calls, tokens), f"{OWNERS[0]} owners", rounds, list(calls))


def beside_peers(
    sources: Path, lm: LanguageModel, store: Store, texts: list[Text], queries: int, rounds: int
) -> dict[str, Any]:
    """Our neighbours alone, and the peers' loops: all get keys and the model's answers, and give log-probabilities."""
    runs = [run for each in texts for run in lm.logits(each.tokens)]
    keys, logits = np.concatenate([of for of, _ in runs]), torch.cat([of for _, of in runs[:8]])[:queries]
    tokens = np.concatenate([each.tokens for each in texts]).astype(np.int64)
    given = logits.double().softmax(dim=1)[range(queries), tokens[:queries]]
    lm_given = torch.full((len(keys),), 0.01, dtype=torch.float64)  # what it is takes no other time
    index, values = merged_index(store, PROBES)
    own = store.neighbours()

    def ours() -> None:
        found = own.search(keys, K)
        for begin in range(0, len(keys), PASSAGE_TOKENS):
            at = slice(begin, min(len(keys), begin + PASSAGE_TOKENS))
            reading = NeighbourReading(found.part(at.start, at.stop), own)
            given_by = {"lm": lm_given[at], "knn": reading.probability(torch.from_numpy(tokens[at]), 1.0)}
            interpolate(given_by, {"lm": 0.75, "knn": 0.25}).log()

    first = keys[:queries], tokens[:queries]
    calls: dict[str, Callable[[], Any]] = {
        "ours": ours,
        SILO: silo_loop(sources, index, values, first[0], given.numpy(), first[1]),
        TRANSFORMERS: transformers_loop(sources, index, values, first[0], logits, first[1]),
    }
    counts = {"ours": len(keys), SILO: queries, TRANSFORMERS: queries - 1}  # the hook leaves out the last position
    theirs, rows = index.search(first[0], K)
    theirs[rows < 0] = np.inf
    near = own.search(
        first[0], K
    ).distances  # of queries that are rounded to the codes' grid, which moves them a little
    return {
        "probes": PROBES,
        "k": K,
        "same_distances": float(np.isclose(np.sqrt(near), np.sqrt(theirs), rtol=1e-3, atol=1e-3).mean()),
        **in_turns(calls, counts, "ours", rounds, list(calls)),
    }
