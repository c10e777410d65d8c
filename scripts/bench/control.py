"""Which codes lose how much, fitted on permissive or on the store's own text: recall and perplexity.

    python scripts/bench control CORPUS/*.jsonl.zst --model MODEL --name NAME > scripts/results/control.json

The permissive documents of the files' validation split teach centroids and codes; beside them, as a system without
law 2 would, the store's own keys do. The store is restricted text of the training split, the queries are positions of
restricted documents of the other splits: τ and λ are fitted on positions of the validation split, for exact search,
and every row reports the test split with those. Recall is the share of the k exact nearest keys that are found. With
re-ranking, four times k neighbours are fetched by their codes and ordered by their exact distances.

Prints one JSON document: machine, command, commit, seed, data hash, result.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import faiss
import numpy as np
import torch
from recording import files_hash

from bench.harness import say, subject
from silo.documents import Document
from silo.files import sha256
from silo.language_model import LanguageModel
from silo.licensing import DEFAULT_POLICY
from silo.mixing import fit_weights, interpolate, neighbour_probability, neighbour_weights, perplexity
from silo.sources import open_source

K = 256
PROBES = 16
TEMPERATURES = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""τ, as shares of the mean squared distance to the k-th neighbour."""
PER_DOCUMENT = 512
"""Positions that one document gives at most, so that no long one decides."""


@dataclass(frozen=True)
class Positions:
    """Keys with the tokens that follow them, and what the model alone gives these."""

    keys: np.ndarray
    tokens: np.ndarray
    model: np.ndarray


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--model", required=True, type=click.Path(path_type=Path, exists=True), help="Directory of the model.")
@click.option("--name", required=True, help="What the model is called in RESULTS.md.")
@click.option("--keys", default=1_000_000, show_default=True, help="Keys of the store.")
@click.option("--control-keys", default=160_000, show_default=True, help="Permissive keys to fit on.")
@click.option("--queries", default=4_000, show_default=True, help="Positions to fit on, and to report.")
@click.option("--lists", default=1024, show_default=True, help="Inverted lists of the default setting.")
@subject
def main(
    files: tuple[Path, ...], model: Path, name: str, keys: int, control_keys: int, queries: int, lists: int
) -> dict[str, Any]:
    """Codes fitted on permissive or the store's own text: recall and perplexity."""
    lm = LanguageModel.load(model)
    documents = sorted((d for file in files for d in read(file)), key=lambda pair: sha256(pair[1].id.encode()))
    permissive = [d for split, d in documents if split == "val" and DEFAULT_POLICY.tier(d).permissive]
    restricted = {
        wanted: [d for split, d in documents if split == wanted and not DEFAULT_POLICY.tier(d).permissive]
        for wanted in ("train", "val", "test")
    }
    taught = gather(lm, permissive, control_keys)
    store = gather(lm, restricted["train"], keys)
    fitting, reported = (gather(lm, restricted[split], queries, scored=True) for split in ("val", "test"))
    say(f"{len(store.keys):,} keys of {store.keys.shape[1]} dimensions, {len(taught.keys):,} to fit on")
    exact = faiss.IndexFlatL2(store.keys.shape[1])
    exact.add(store.keys)
    settings = fit(exact, store, fitting)
    truth = exact.search(reported.keys, K)
    return {
        "seed": 0,
        "data": files_hash(files),
        "model": {"name": name, "fingerprint": lm.fingerprint},
        "result": {
            "keys": len(store.keys),
            "dimension": store.keys.shape[1],
            "fitted_on": len(taught.keys),
            "lists": lists,
            "k": K,
            "probes": PROBES,
            **settings,
            "perplexity": {
                "lm": perplexity(torch.from_numpy(reported.model).log()),
                "exact": mixed(*truth, store, reported, settings),
            },
            "codes": [
                row
                for factory, count in candidates(store.keys.shape[1], lists)
                for row in measured(factory, count, taught.keys, store, reported, truth, settings)
            ],
        },
    }


def read(file: Path) -> Iterator[tuple[str, Document]]:
    """Documents of a file with the splits that it names."""
    import pyarrow as pa

    with pa.OSFile(str(file)) as raw, pa.CompressedInputStream(raw, "zstd") as lines:
        splits = {row["id"]: row["split"] for row in map(json.loads, lines.read().splitlines())}
    for document in open_source(str(file)):
        yield splits[document.id], document


def gather(lm: LanguageModel, documents: list[Document], count: int, *, scored: bool = False) -> Positions:
    """Positions of some documents, until there are so many."""
    keys, tokens, model, held = [], [], [], 0
    for document in documents:
        if held >= count:
            break
        of = lm.tokenize(document)[:PER_DOCUMENT] if scored else lm.tokenize(document)[: 8 * PER_DOCUMENT]
        if scored:
            pairs = list(lm.score(of))
            scores = torch.cat([each for _, each in pairs])
            model.append(scores[torch.arange(len(of)), torch.from_numpy(of).long()].exp().double().numpy())
            keys.append(np.concatenate([each for each, _ in pairs]))
        else:
            keys.append(lm.keys(of))
        tokens.append(of.astype(np.int64))
        held += len(of)
    scores_of = np.concatenate(model) if model else np.zeros(0)
    return Positions(np.concatenate(keys)[:count], np.concatenate(tokens)[:count], scores_of[:count])


def fit(exact: Any, store: Positions, fitting: Positions) -> dict[str, float]:
    """τ and λ that are best on the validation split, with exact neighbours."""
    distances, rows = exact.search(fitting.keys, K)
    scale = float(np.mean(distances[:, -1]))
    found = []
    for share in TEMPERATURES:
        knn = probability(distances, rows, store, fitting, share * scale)
        weight = fit_weights([torch.from_numpy(fitting.model), knn])[1]
        mixture = interpolate({"lm": torch.from_numpy(fitting.model), "knn": knn}, {"lm": 1 - weight, "knn": weight})
        found.append((perplexity(mixture.log()), share * scale, weight))
    best = min(found)
    return {"temperature": best[1], "weight": best[2]}


def probability(
    distances: np.ndarray, rows: np.ndarray, store: Positions, asked: Positions, temperature: float
) -> torch.Tensor:
    """What the neighbours give the token that follows, (n,) float64."""
    found = torch.from_numpy(np.where(rows >= 0, distances, np.inf))
    values = torch.from_numpy(store.tokens[np.maximum(rows, 0)])
    return neighbour_probability(neighbour_weights(found, temperature), values, torch.from_numpy(asked.tokens))


def mixed(
    distances: np.ndarray, rows: np.ndarray, store: Positions, asked: Positions, settings: dict[str, float]
) -> float:
    """Perplexity of the mixture."""
    knn = probability(distances, rows, store, asked, settings["temperature"])
    parts = {"lm": torch.from_numpy(asked.model), "knn": knn}
    return perplexity(interpolate(parts, {"lm": 1 - settings["weight"], "knn": settings["weight"]}).log())


def candidates(dimension: int, lists: int) -> list[tuple[str, int]]:
    """FAISS's names of what is compared, with the number of lists."""
    small = dimension // 6  # Bytes of the smaller product codes: 32 of 192 coordinates, 96 of 576.
    return [
        ("SQfp16", lists),
        ("SQ8", lists),
        ("SQ4", lists),
        ("PQ64", lists),
        ("OPQ64,PQ64", lists),
        (f"PQ{small}", lists),
        (f"OPQ{small},PQ{small}", lists),
        ("RaBitQ4", lists),
        ("RaBitQ", lists),
        ("PQ64", 4096),
    ]


def measured(
    factory: str,
    lists: int,
    taught: np.ndarray,
    store: Positions,
    asked: Positions,
    truth: tuple[np.ndarray, np.ndarray],
    settings: dict[str, float],
) -> Iterator[dict[str, Any]]:
    """One row for each text that the quantizers are fitted on."""
    before, _, codes = factory.rpartition(",")
    for teacher, keys in (("permissive", taught), ("the store's own", store.keys[: len(taught)])):
        name = f"{before + ',' if before else ''}IVF{lists},{codes}"
        index: Any = faiss.index_factory(store.keys.shape[1], name)
        ivf: Any = faiss.extract_index_ivf(index)
        ivf.cp.max_points_per_centroid, ivf.cp.seed = 256, 0
        if before:  # OPQ alternates between rotation and codebooks, by default 50 times on 65,536 keys: hours here
            rotation: Any = faiss.downcast_VectorTransform(index.chain.at(0))
            rotation.niter, rotation.max_train_points = 10, 16_384
        index.train(keys)
        index.add(store.keys)
        ivf.nprobe = PROBES * lists // 1024 if lists > 1024 else PROBES
        distances, rows = index.search(asked.keys, 4 * K)
        best = rerank(rows, store.keys, asked.keys)
        yield {
            "codes": factory,
            "lists": lists,
            "bytes": int(ivf.code_size),
            "fitted_on": teacher,
            "recall": recall(rows[:, :K], truth[1]),
            "perplexity": mixed(distances[:, :K], rows[:, :K], store, asked, settings),
            "recall_reranked": recall(best[1], truth[1]),
            "perplexity_reranked": mixed(*best, store, asked, settings),
        }
        say(f"{factory} {lists} {teacher}")


def rerank(rows: np.ndarray, stored: np.ndarray, asked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The k of the found rows that are nearest by their exact keys."""
    distances = np.full(rows.shape, np.inf, dtype=np.float32)
    for number, (found, key) in enumerate(zip(rows, asked, strict=True)):
        there = found >= 0
        distances[number, there] = ((stored[found[there]] - key) ** 2).sum(axis=1)
    order = np.argsort(distances, axis=1, kind="stable")[:, :K]
    return np.take_along_axis(distances, order, axis=1), np.take_along_axis(rows, order, axis=1)


def recall(found: np.ndarray, truth: np.ndarray) -> float:
    """Share of the true neighbours that were found."""
    return float(np.mean([np.isin(wanted, got).mean() for got, wanted in zip(found, truth, strict=True)]))
