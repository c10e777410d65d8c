"""Does a store make up for the text that the weights may not learn from?

    python scripts/reference_experiment.py train permissive CORPUS/*.jsonl.zst --out DIR
    python scripts/reference_experiment.py train everything CORPUS/*.jsonl.zst --out DIR
    python scripts/reference_experiment.py measure CORPUS/*.jsonl.zst --out DIR > scripts/results/reference.json

Two models of one shape, with one tokenizer (of the permissive text), the same first weights, steps and tokens: one is
taught by the permissive files only, the other by all of them, under a policy that says so. Each then gets a store of
the same restricted text, with keys of its own, and reads the test split of every file, which is a domain:

    (a) permissive    (b) everything    (c) permissive + store    (d) everything + store

Training text is the files' ``train`` split, from which passages and near-duplicates of the others were cut. Weights of
the mixtures are fitted on each domain's validation text; a gate, which is the same for all, learns from permissive
validation text only. Centroids are taught by the permissive ``val`` split too.

The two trainings may run side by side, and go on where they were stopped. Prints one JSON document.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import yaml
from bench.control import read
from experiment import LENGTH, VOCABULARY, open_samples, prepare, run_once, say
from recording import files_hash, made, require_same_run
from where_loss_lies import by_suffix

from datastore.control import ControlPlane, provenance, read_trained_on
from datastore.store import Store
from eval.options import nearest_options
from eval.perplexity import sample, weighings_from_json
from eval.rehearsal import rehearse, taken
from eval.suite import Suite, load_suite, read_domains
from eval.suite_report import result
from eval.suite_run import Contestant, run, weights_file
from silo.collect import collect
from silo.corpus import Corpus
from silo.documents import Document
from silo.files import read_json, remove_tree, sha256
from silo.gate import Gate
from silo.language_model import LanguageModel
from silo.licensing import DEFAULT_POLICY, load_policy
from silo.nearest import USUAL, Nearest
from training.loop import train as train_model
from training.recipe import Recipe

MODEL = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "ffn": "moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 192,
}
SEQUENCE, BATCH = 512, 8
CONTROL_TOKENS = 100_000
"""Of the permissive validation text; they teach the centroids."""
SAMPLES = {"val": 48 * LENGTH, "test": 48 * LENGTH}
"""Tokens of each domain that the curves are of; the smallest has no more."""
METHODS = ["lm", "knn", "ngram"]
SIDES = ("permissive", "everything")
files_argument = click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
out_option = click.option("--out", required=True, type=click.Path(path_type=Path), help="Where everything is kept.")


@click.group()
def main() -> None:
    """Train both models, then measure."""


@main.command("train")
@click.argument("side", type=click.Choice(SIDES))
@files_argument
@out_option
@click.option("--tokens", default=8_388_608, show_default=True, help="Of each model.")
@click.option("--learning-rate", default=3e-3, show_default=True)
@click.option("--points", default=8, show_default=True, help="Points of each curve.")
@click.option("--seed", default=0, show_default=True)
def train(
    side: str, files: tuple[Path, ...], out: Path, tokens: int, learning_rate: float, points: int, seed: int
) -> None:  # fmt: skip
    """Train one of the two models. The first call lays out text, policy and the first weights for both."""
    corpora, others = prepared(files, out)
    samples, _ = open_samples(corpora["permissive"], others, SAMPLES)
    common = {
        "sequence_length": SEQUENCE,
        "batch_size": BATCH,
        "vocab_size": VOCABULARY,
        "seed": seed,
        "checkpoint_every": 200,
    }
    first = out / "first-weights"
    if not first.exists():
        # One step at no learning rate: random weights, and the tokenizer of the permissive text.
        blank = {"token_budget": SEQUENCE * BATCH, "learning_rate": 0.0, "model": MODEL, "schedule": "wsd"}
        train_model(Recipe(corpus=corpora["permissive"], output=first, **common, **blank), say("first weights"))  # type: ignore[arg-type]
    settings = {
        **common,
        "corpus": corpora[side],
        "init": first,
        "policy": out / "policy.yaml" if side == "everything" else None,
        "token_budget": tokens,
        "learning_rate": learning_rate,
        "expert_learning_rate": None,
    }
    run_once(out / "runs" / side, settings, samples, points, say(side))


def prepared(files: Sequence[Path], out: Path) -> tuple[dict[str, Path], dict[str, list[Path]]]:
    """The text of either model as a corpus, and the files of the other splits."""
    permissive, others = prepare(files, out)
    everything = out / "everything"
    if not everything.exists():
        training = sorted((out / "text" / "train").glob("*.jsonl"))
        restricted = {row.license for row in Corpus.open(permissive.with_name("restricted")).rows}
        (out / "policy.yaml").write_text(yaml.safe_dump({"licenses": dict.fromkeys(sorted(restricted), "PD")}))
        against = [str(file) for split in others.values() for file in split]
        collect([*map(str, training)], everything, policy=load_policy(out / "policy.yaml"), against=against)
    return {"permissive": permissive, "everything": everything / "permissive"}, others


@main.command("measure")
@files_argument
@out_option
@click.option("--store-tokens", default=1_000_000, show_default=True, help="Of each restricted domain.")
@click.option("--tokens", default=20_000, show_default=True, help="Of each domain, to report.")
@click.option("--fit-tokens", default=10_000, show_default=True, help="Of each domain, to fit on.")
@click.option("--rehearsal-tokens", default=400_000, show_default=True, help="Of the store that teaches the gate.")
@nearest_options
def measure(
    files: tuple[Path, ...], out: Path, store_tokens: int, tokens: int, fit_tokens: int, rehearsal_tokens: int,
    nearest: Nearest | None,
) -> None:  # fmt: skip
    """Build both stores, score all domains, and print one JSON document."""
    nearest = nearest or USUAL
    sizes = {"store_tokens": store_tokens, "rehearsal_tokens": rehearsal_tokens}
    require_same_run(out / "runs", {"data": files_hash(files), **sizes})  # the suite's cells know what they are of
    domains = {file.name.partition(".")[0]: file for file in files}
    permissive = [name for name, file in domains.items() if is_permissive(file)]
    for side in SIDES:
        build_store(out, side, domains, permissive, store_tokens)
    teach_gate(out, [domains[name] for name in permissive], rehearsal_tokens, nearest)
    plan = out / "suite.yaml"
    plan.write_text(yaml.safe_dump(suite_of(domains, permissive, tokens, fit_tokens, nearest)))
    suite = load_suite(plan)
    cells = run(suite, out / "measured", out, lambda done, total: say("measure")(f"{done} of {total}"))
    found = result(suite, cells)
    runs = {side: json.loads((out / "runs" / side / "run.json").read_bytes()) for side in SIDES}
    store = Store.open(out / "runs" / "permissive" / "store")
    report = {
        **made(files, runs["permissive"]["seed"]),
        "result": {
            "runs": runs,
            "store": {
                "tokens": sum(s.tokens for s in store.manifest.shards.values()),
                "owners": len(store.manifest.shards),
            },
            "permissive": permissive,
            "nearest": nearest.to_json(),
            "rows": found["rows"],
            "gap": found["gap"],
            "ratios": ratios(found["rows"], permissive),
            "remaining": remaining(suite, out),
        },
    }
    print(json.dumps(report, indent=1))


def is_permissive(file: Path) -> bool:
    """Whether a file's first document may teach weights."""
    return DEFAULT_POLICY.tier(next(read(file))[1]).permissive


def build_store(out: Path, side: str, domains: dict[str, Path], permissive: list[str], tokens: int) -> None:
    """A model's store of the restricted training text; permissive validation text teaches its centroids."""
    path = out / "runs" / side / "store"
    if path.exists():
        return
    lm = LanguageModel.load(path.with_name("model"))
    share = CONTROL_TOKENS // len(permissive)
    teachers = [d for name in permissive for d in taken(lm, of_split(domains[name], "val"), share)]
    control = ControlPlane.fit(np.concatenate([lm.keys(lm.tokenize(each)) for each in teachers]), provenance(teachers))
    partial = path.with_name("store.partial")
    remove_tree(partial)
    store = Store.create(partial, lm, path.with_name("model") / "tokenizer.json", control)
    text = restricted_text(out, {name: file for name, file in domains.items() if name not in permissive})
    store.add([d for name in sorted(text) for d in taken(lm, text[name], tokens)], lm)
    partial.rename(path)
    say(side)("store built")


def teach_gate(out: Path, files: Sequence[Path], tokens: int, nearest: Nearest) -> None:
    """The gate of (c)'s store, from permissive validation text of a rehearsal's size."""
    model = out / "runs" / "permissive" / "model"
    store = Store.open(model.with_name("store"))
    path = store.gate_path() if store.manifest.gate else None
    if path is None or Gate.from_json(read_json(path), where=str(path)).nearest != nearest:
        teachers = [document for file in files for document in of_split(file, "val")]
        gate, source = rehearse(
            LanguageModel.load(model), store, teachers, METHODS, policy=DEFAULT_POLICY,
            trained_on=read_trained_on(model), store_tokens=tokens, asked_tokens=tokens // 7, nearest=nearest,
        )  # fmt: skip
        store.keep_gate(gate, source)


def of_split(file: Path, split: str) -> list[Document]:
    """The documents of one split of a file, in the order of their ids' hashes."""
    return sorted((each for name, each in read(file) if name == split), key=lambda each: sha256(each.id.encode()))


def restricted_text(out: Path, files: dict[str, Path]) -> dict[str, list[Document]]:
    """By domain, the restricted side of the corpus that the model of everything was taught from."""
    names = {document.id: name for name, file in files.items() for document in of_split(file, "train")}
    corpus = Corpus.open(out / "everything" / "permissive")
    found: dict[str, list[Document]] = {name: [] for name in files}
    for document in corpus.documents("train"):
        if document.id in names:
            found[names[document.id]].append(document)
    return {name: sorted(each, key=lambda each: sha256(each.id.encode())) for name, each in found.items()}


def suite_of(
    domains: dict[str, Path], permissive: list[str], tokens: int, fit_tokens: int, nearest: Nearest
) -> dict[str, Any]:
    """Both models with their stores on all domains, weighed per domain; and the first by its gate."""
    common = {"use": METHODS, "nearest": nearest.to_json()}
    entries = {side: {"path": f"runs/{side}/model", "store": f"runs/{side}/store", **common} for side in SIDES}
    gated = {**entries["permissive"], "weights": "gate"}
    return {
        "name": "reference",
        "version": 1,
        "tokens": tokens,
        "fit_tokens": fit_tokens,
        "models": {**entries, "gated": gated},
        "reference": "everything",
        "domains": {
            name: {
                "permissive": name in permissive,
                "test": {"source": f"text/test/{name}.jsonl"},
                "validation": {"source": f"text/val/{name}.jsonl"},
            }
            for name in sorted(domains)
        },
    }


def ratios(rows: list[dict[str, Any]], permissive: list[str]) -> dict[str, dict[str, Any]]:
    """By domain: the four perplexities, and the two ratios that the experiment is about."""
    value = {(row["model"], row["domain"], row["mixture"]): row["perplexity"][0] for row in rows}
    found = {}
    for name in sorted({domain for _, domain, _ in value}):
        a, b = (value[side, name, "lm"] for side in SIDES)
        c, d = (value[side, name, "all"] for side in SIDES)
        gated = value["gated", name, "gate"]
        found[name] = {
            "permissive": name in permissive, "a": a, "b": b, "c": c, "d": d, "gated": gated,
            "c / b": c / b, "c / d": c / d, "gated / a": gated / a,
        }  # fmt: skip
    return found


def remaining(suite: Suite, out: Path) -> list[dict[str, Any]]:
    """Where the loss of all four lies, token by token, on the restricted domains together."""
    contestants = {name: Contestant.open(name, suite.models[name], suite.protocol, out) for name in SIDES}
    evidence: list[torch.Tensor] = []
    logs: dict[str, list[torch.Tensor]] = {name: [] for name in "abcd"}
    for domain in read_domains(suite, out):
        if domain.permissive:
            continue
        for contestant, alone, mixed in zip(contestants.values(), "ab", "cd", strict=True):
            scores = contestant.score(sample(domain.test, contestant.mixture, domain.tokens))
            weights = weights_file(contestant, domain, out / "measured", out)
            value = read_json(weights) if weights is not None else None
            fitted = weighings_from_json(value, METHODS, contestant.mixture.model, where=str(weights))
            logs[alone].append(scores.lm.log())
            logs[mixed].append(scores.log_probabilities(fitted["all"]))
        evidence.append(scores.evidence["ngram_class"])  # Of either model: the stores have the same text.
    given = {name: torch.cat(each) for name, each in logs.items()}
    return by_suffix({"ngram_class": torch.cat(evidence)}, given)


if __name__ == "__main__":
    main()
