"""Does a PEER layer that grows while it is trained learn more than one that does not?

    python scripts/grow_experts.py CORPUS/{books_pd,gov_pd,docs_sw,docs_by}.jsonl.zst --out DIR > grown_experts.json

A model with 16,384 experts is trained. From there it goes on twice, on the same further text in the same order, with
the same learning rate, which rises anew: as it is, and with 65,536 experts (`silo train init=MODEL
model.peer_num_experts=65536`), or from and to other numbers of them (--experts). Growing is to
leave the logits as they are; by how much they differ is reported.

The seed is the outermost loop. A run that was stopped goes on where it stood, a finished one is not repeated; with
--report what is there is printed. The directory may be that of ``compare_experts.py``, whose text and tokens serve.
Prints one JSON document.
"""

from __future__ import annotations

import json
from math import isqrt
from pathlib import Path
from typing import Any

import click
import torch
from compare_experts import EXPERT_LEARNING_RATES, LEARNING_RATE
from experiment import LENGTH, VOCABULARY, HeldOut, open_samples, prepare, run_once, say, shape
from recording import command, commit, files_hash, machine

from silo.modeling import SiloForCausalLM
from silo.surgery import grow

FURTHER_TEXT = 1000
"""What is added to the seed of a run that goes on: documents come in another order than before."""


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Where texts, models and curves are kept.")
@click.option("--experts", nargs=2, default=(128**2, 256**2), show_default=True, help="Before and after; squares.")
@click.option("--tokens", default=192 * 8 * LENGTH, show_default=True, help="Before the growth.")
@click.option("--further", default=4 * 192 * 8 * LENGTH, show_default=True, help="Tokens after it.")
@click.option("--batch", default=8, show_default=True, help="Sequences a step.")
@click.option("--points", default=8, show_default=True, help="Points of each curve.")
@click.option("--seed", "seeds", multiple=True, type=int, default=(0, 1, 2), show_default=True)
@click.option("--learning-rate", default=LEARNING_RATE, show_default=True)
@click.option("--expert-learning-rate", default=EXPERT_LEARNING_RATES["peer"], show_default=True)
@click.option("--report", is_flag=True, help="Train nothing; print what there is.")
def main(
    files: tuple[Path, ...], out: Path, experts: tuple[int, int], tokens: int, further: int, batch: int, points: int,
    seeds: tuple[int, ...], learning_rate: float, expert_learning_rate: float, report: bool,
) -> None:  # fmt: skip
    """Train what is missing, and print one JSON document."""
    torch.set_num_threads(1)
    corpus, others = prepare(files, out)
    samples, data = open_samples(corpus, others)
    few, many = experts
    factor = isqrt(many // few)
    common: dict[str, Any] = {
        "corpus": corpus,
        "vocab_size": VOCABULARY,
        "sequence_length": LENGTH,
        "batch_size": batch,
        "learning_rate": learning_rate,
        "expert_learning_rate": expert_learning_rate,
        "checkpoint_every": 100,
    }
    runs = []
    for seed in seeds:
        before = out / "growth" / f"{seed}-before"
        goes_on = {"init": before / "model", "seed": seed + FURTHER_TEXT, "token_budget": further}
        recipes = {
            "before": {"model": shape("peer") | {"peer_num_experts": few}, "seed": seed, "token_budget": tokens},
            "kept": goes_on,
            "grown": {**goes_on, "model": {"peer_num_experts": many}},
        }
        for name, settings in recipes.items():
            directory = before.with_name(f"{seed}-{name}")
            if not report or (directory / "run.json").exists():
                found = run_once(directory, {**common, **settings}, samples, points, say(f"{name}, seed {seed}"))
                if name == "before":
                    found["logits_changed_by"] = change(before / "model", factor, samples["val"])
                runs.append({"kind": name, **found, "seed": seed})
    record = {
        "machine": machine(),
        "command": command(),
        "commit": commit(),
        "seeds": sorted({run["seed"] for run in runs}),
        "data": files_hash(files),
        "result": {**data, "experts": experts, "runs": runs},
    }
    print(json.dumps(record, indent=1))


@torch.no_grad()
def change(path: Path, factor: int, sample: HeldOut) -> float:
    """The greatest difference of a logit before and after growing, on the first held-out sequences of each domain."""
    model = SiloForCausalLM.from_pretrained(path).eval()
    grown = grow(model, factor)
    batches = [sample.batch(sample.first(name, 4))["input_ids"] for name in sample.domains]
    return max(float((model(ids).logits - grown(ids).logits).abs().max()) for ids in batches)


if __name__ == "__main__":
    main()
