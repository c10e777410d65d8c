"""Neighbours, blocks and ∞-grams over the same restricted text, apart and together, weighed in three ways.

    python scripts/compare_at_equal_text.py CORPUS/*.jsonl.zst --model MODEL --name NAME > equal_text.json

One store holds text of the training split of all restricted files, the same amount of each; a file is a domain. Each
domain's test split is read beside the whole store, and that of the permissive files, which have nothing in it. Weights:

- one for all: λ and τ fitted on the validation text of all restricted domains together;
- tuned: λ (with the ∞-gram: for each class of suffix) and τ fitted on the domain's own validation text, so that one has
  to know whose text it is;
- gate: learnt from permissive text of the training split only (`silo eval gate`), the same for all.

Blocks are read in three ways: ours (two blocks every 64 tokens), In-Context RALM's (Ram 2023: one block every 4 tokens,
looked up by 32) and SILO's (one block a window of text).

With --bare-tokens, the store has much more text than it has keys for: for the ∞-gram and for blocks, which need no
call of the model; so has the store from which the gate learns. How much of each test text the store has word for word
is reported.

With --keep, a run that was stopped goes on where it stood. Prints one JSON document: machine, command, commit, seed,
data hash, result.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import click
import numpy as np
import torch
from bench.control import read
from recording import files_hash, made, require_same_run
from where_loss_lies import by_suffix

from datastore.control import ControlPlane, provenance
from datastore.store import Store
from eval.leakage import leakage
from eval.options import nearest_options, parse_methods
from eval.perplexity import Scores, Text, described, fit, sample, score
from eval.rehearsal import rehearse, taken
from silo.documents import Document
from silo.files import sha256
from silo.gate import Gate
from silo.in_context import InContext
from silo.language_model import LanguageModel
from silo.licensing import DEFAULT_POLICY
from silo.mixture import Mixture
from silo.nearest import USUAL, Nearest
from silo.weights import METHODS, Weights

CHARACTERS = 24_000
"""A document gives the store and the samples its beginning only, so that no long one decides."""
MIXTURES = (["lm", "knn"], ["lm", "ngram"], ["lm", "ric"], ["lm", "knn", "ngram"], list(METHODS))
WAYS = {
    "In-Context RALM": InContext(query_tokens=32, stride=4, blocks=1),
    "SILO": InContext(query_tokens=512, stride=512, blocks=1, block_tokens=512),
}
Splits = dict[str, dict[str, list[Document]]]
"""Domain → split → documents."""
T = TypeVar("T")


def say(text: str) -> None:
    """Progress, on stderr."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--model", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--name", required=True, help="What the model is called in RESULTS.md.")
@click.option("--keep", type=click.Path(path_type=Path), help="Where what is done is kept.  [default: nowhere]")
@click.option("--store-tokens", default=200_000, show_default=True, help="Of each restricted domain.")
@click.option("--bare-tokens", default=0, show_default=True, help="The same, without keys, beside them.")
@click.option("--rehearsal-tokens", default=400_000, show_default=True, help="Of the rehearsal's store.")
@click.option("--rehearsal-bare-tokens", default=0, show_default=True, help="The same, without keys, beside them.")
@click.option("--asked-tokens", default=80_000, show_default=True, help="That teach the gate.")
@click.option("--tokens", default=8_000, show_default=True, help="Of each domain, to fit on and to report.")
@click.option("--ways-tokens", default=2_000, show_default=True, help="The same, for other ways to read blocks.")
@click.option("--use", default=",".join(METHODS), show_default=True, callback=parse_methods, help="Methods.")
@click.option("--control-tokens", default=60_000, show_default=True)
@nearest_options
def main(
    files: tuple[Path, ...], model: Path, name: str, keep: Path | None, store_tokens: int, bare_tokens: int,
    rehearsal_tokens: int, rehearsal_bare_tokens: int, asked_tokens: int, tokens: int, ways_tokens: int,
    use: list[str], control_tokens: int, nearest: Nearest | None,
) -> None:  # fmt: skip
    """Measure, and print one JSON document."""
    if use not in MIXTURES:
        expected = "; ".join(",".join(each) for each in MIXTURES)
        raise click.BadParameter(f"{','.join(use)}; expected one of {expected}", param_hint="--use")
    lm = LanguageModel.load(model)
    permissive, restricted = split(files)
    with nullcontext(keep) if keep else tempfile.TemporaryDirectory(prefix="silo-equal-text-") as directory:
        root = Path(directory)
        root.mkdir(parents=True, exist_ok=True)
        sizes = [rehearsal_tokens, rehearsal_bare_tokens, asked_tokens]
        others = [store_tokens, bare_tokens, tokens, ways_tokens, control_tokens]
        way, data = nearest or USUAL, files_hash(files)
        of = {"model": lm.fingerprint, "data": data, "sizes": [*sizes, *others], "use": use, "nearest": way.to_json()}
        require_same_run(root, of)
        store = build(root / "store", lm, model, permissive, restricted, (store_tokens, bare_tokens), control_tokens)
        gate, taught = kept(root / "gate", taught_gate, lm, store, permissive, use, way, *sizes)
        say(f"gate: {taught['nats_gained']}")
        mixture = store.mixture(lm, use, nearest=way)
        domains = {**restricted, **permissive}
        scores = {each: kept(root / f"{each} read", scored, mixture, of, tokens) for each, of in domains.items()}
        for_all = fitted(joined([scores[each]["val"] for each in restricted]), use)
        rows = {
            each: measured(scores[each], for_all, gate, use) | in_store(store, mixture, of["test"], tokens)
            for each, of in domains.items()
        }
        ways = {
            way: {
                each: kept(root / f"{each} by {way}", in_context, lm, store, settings, of, ways_tokens)
                for each, of in restricted.items()
            }
            for way, settings in ({"ours": InContext(), **WAYS} if "ric" in use else {}).items()
        }
    report = {
        **made(files),
        "model": {"name": name, "fingerprint": lm.fingerprint},
        "result": {
            "store_tokens": store.describe()["tokens"],
            "store_keys": store.describe()["keys"],
            "owners": len(store.manifest.shards),
            "nearest": way.to_json(),
            "restricted": list(restricted),
            "permissive": list(permissive),
            "gate": {key: value for key, value in taught.items() if key != "teachers"},
            "domains": rows,
            "ways_to_read_blocks": {"tokens": ways_tokens, **ways},
        },
    }
    print(json.dumps(report, indent=1))


def kept(path: Path, make: Callable[..., T], *args: Any) -> T:
    """What was made in a run before, or is made now."""
    if path.exists():
        return torch.load(path, weights_only=False)
    found = make(*args)
    partial = path.with_name(f"{path.name}.partial")
    torch.save(found, partial)
    partial.rename(path)
    return found


def split(files: Sequence[Path]) -> tuple[Splits, Splits]:
    """The permissive and the restricted domains."""
    sides: tuple[Splits, Splits] = ({}, {})
    for file in files:
        domain: dict[str, list[Document]] = {"train": [], "val": [], "test": []}
        for name, document in read(file):
            domain[name].append(replace(document, text=document.text[:CHARACTERS]))
        for documents in domain.values():
            documents.sort(key=lambda document: sha256(document.id.encode()))
        sides[0 if DEFAULT_POLICY.tier(domain["train"][0]).permissive else 1][file.name.partition(".")[0]] = domain
    return sides


def build(
    path: Path,
    lm: LanguageModel,
    model: Path,
    permissive: Splits,
    restricted: Splits,
    tokens: tuple[int, int],
    control: int,
) -> Store:
    """One store of all restricted domains, so many tokens of each with keys and without, with a control plane from
    permissive validation text; finished, if a run before left it half done."""
    if not path.exists():
        teachers = [d for domain in permissive.values() for d in taken(lm, domain["val"], control // len(permissive))]
        keys = np.concatenate([lm.keys(lm.tokenize(document)) for document in teachers])
        Store.create(path, lm, model / "tokenizer.json", ControlPlane.fit(keys, provenance(teachers)))
    store = Store.open(path)
    if not store.manifest.shards:
        store.add([d for domain in restricted.values() for d in taken(lm, domain["train"], tokens[0])], lm)
    if tokens[1] and store.describe()["keys"] == store.describe()["tokens"]:
        known = {row.id for rows in store.rows().values() for row in rows}
        rest = ([each for each in domain["train"] if each.id not in known] for domain in restricted.values())
        store.add([document for train in rest for document in taken(lm, train, tokens[1])], lm, keyed=False)
    say(f"{store.describe()['tokens']:,} tokens of {len(store.manifest.shards)} owners in the store")
    return store


def taught_gate(
    lm: LanguageModel,
    store: Store,
    permissive: Splits,
    use: list[str],
    nearest: Nearest,
    store_tokens: int,
    bare_tokens: int,
    asked_tokens: int,
) -> tuple[Gate, dict[str, Any]]:
    """A gate, from the training split of the permissive domains: not the text that teaches the store's centroids."""
    teachers = [document for domain in permissive.values() for document in domain["train"]]
    return rehearse(
        lm, store, teachers, use, policy=DEFAULT_POLICY, trained_on=set(),
        store_tokens=store_tokens, bare_tokens=bare_tokens, asked_tokens=asked_tokens, nearest=nearest,
    )  # fmt: skip


def scored(mixture: Mixture, domain: dict[str, list[Document]], tokens: int) -> dict[str, Scores]:
    """Samples of the validation and the test split, read by all methods."""
    found = {name: score(mixture, sample(domain[name], mixture, tokens)) for name in ("val", "test")}
    say(f"{len(found['test']):,} tokens")
    return found


def in_store(store: Store, mixture: Mixture, documents: list[Document], tokens: int) -> dict[str, Any]:
    """How much of the test sample the store has word for word."""
    return {"leakage": leakage(store.ngrams(), [text.tokens for text in sample(documents, mixture, tokens)])}


def joined(scores: Sequence[Scores]) -> Scores:
    """The tokens of several samples as one."""
    first = scores[0]
    near = [(each.distances, each.hits) for each in scores if each.distances is not None and each.hits is not None]
    return Scores(
        {name: torch.cat([each.given[name] for each in scores]) for name in first.given},
        torch.cat([distances for distances, _ in near]) if near else None,
        torch.cat([hits for _, hits in near]) if near else None,
        {name: torch.cat([each.evidence[name] for each in scores]) for name in first.evidence},
        [length for each in scores for length in each.lengths],
        first.nearest,
    )


def fitted(scores: Scores, use: list[str]) -> dict[str, Weights]:
    """Weights of each mixture of methods in use."""
    return {"+".join(methods[1:]): fit(scores, methods) for methods in MIXTURES if set(methods) <= set(use)}


def measured(scores: dict[str, Scores], for_all: dict[str, Weights], gate: Gate, use: list[str]) -> dict[str, Any]:
    """Test perplexity by each mixture and each way to weigh it."""
    test, own = scores["test"], fitted(scores["val"], use)

    def perplexity(logs: torch.Tensor) -> float:
        return math.exp(-logs.mean().item())

    return {
        "tokens": len(test),
        "lm": perplexity(test.lm.log()),
        "one for all": {name: perplexity(test.log_probabilities(weights)) for name, weights in for_all.items()},
        "tuned": {name: perplexity(test.log_probabilities(weights)) for name, weights in own.items()},
        "gate": perplexity(test.log_probabilities(gate)),
        **({"loss": where_it_lies(test, own, gate)} if "ngram" in use else {}),
        "weights": {
            "tuned": {key: value for key, value in own["+".join(use[1:])].to_json().items() if key != "by_suffix"},
            "gate": described(gate, test.evidence),
        },
    }


def where_it_lies(test: Scores, own: dict[str, Weights], gate: Gate) -> list[dict[str, Any]]:
    """The loss of the model, of each tuned mixture and of the gate, by how long a suffix the store knows."""
    mixed = {name: test.log_probabilities(weights) for name, weights in own.items()}
    return by_suffix(test.evidence, {"lm": test.lm.log(), **mixed, "gate": test.log_probabilities(gate)})


def in_context(
    lm: LanguageModel, store: Store, settings: InContext, domain: dict[str, list[Document]], tokens: int
) -> dict[str, float]:
    """Test perplexity of the model alone and with blocks that are read in some way, and what that costs."""
    mixture = store.mixture(lm, ["lm", "ric"], in_context=settings)
    texts: dict[str, list[Text]] = {name: sample(domain[name], mixture, tokens) for name in ("val", "test")}
    begin = time.process_time()
    found = {name: score(mixture, each) for name, each in texts.items()}
    seconds = time.process_time() - begin
    weights = fit(found["val"], ["lm", "ric"])
    return {
        "lm": math.exp(-found["test"].lm.log().mean().item()),
        "lm+ric": math.exp(-found["test"].log_probabilities(weights).mean().item()),
        "weight": weights.by_method["ric"],
        "processor_seconds": seconds,
    }


if __name__ == "__main__":
    main()
