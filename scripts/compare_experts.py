"""Dense, top-2 of 8 experts, product-key memory and PEER at equal floating-point operations, on the same text.

    python scripts/compare_experts.py CORPUS/{books_pd,gov_pd,docs_sw,docs_by}.jsonl.zst --out DIR > experts.json

As in the paper (He 2024, section 4.1), one feed-forward layer is replaced, in the middle, by each of the three; all
else is dense and alike. Its sizes are chosen so that it costs what the dense one costs: 6 · 128 · 448 operations a
token. Two experts of half the width (and a router); queries, half keys and 96 neurons; the same and 192 values.
So the models differ in parameters, not in operations; these are counted as they run (``training.flops``).

All see the same sequences in the same order, with one tokenizer, trained once. All have one learning rate; PEER's
experts and the memory's values, which learn in few of the steps, have greater ones. They were chosen on validation
text in short runs of another seed (``--tokens``, ``--learning-rate`` and ``--expert-learning-rate`` repeat them).
Training documents are the files' ``train`` split; curves come from a sample of ``val``, what is reported from ``test``.

The seed is the outermost loop. A run that was stopped goes on where it stood when the same command is given again, and
a finished one is not repeated; ``--report`` prints what is there. Prints one JSON document.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import torch
from experiment import LENGTH, MIDDLE, VOCABULARY, open_samples, prepare, run_once, say, shape
from recording import command, commit, files_hash, machine

from silo.modeling import SiloConfig, SiloForCausalLM
from training.flops import flops_per_token

KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 224},
    "pkm": {"pkm_num_values": 256**2},
    "peer": {"peer_num_experts": 256**2},
}
LEARNING_RATE = 3e-3
EXPERT_LEARNING_RATES = {"pkm": 3e-2, "peer": 3e-2}


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Where texts, models and curves are kept.")
@click.option("--tokens", default=384 * 8 * LENGTH, show_default=True, help="Of a run.")
@click.option("--batch", default=8, show_default=True, help="Sequences a step.")
@click.option("--points", default=4, show_default=True, help="Points of each curve.")
@click.option("--seed", "seeds", multiple=True, type=int, default=(0, 1, 2), show_default=True)
@click.option("--kind", "kinds", multiple=True, type=click.Choice(list(KINDS)), default=tuple(KINDS))
@click.option("--learning-rate", default=LEARNING_RATE, show_default=True)
@click.option("--expert-learning-rate", type=float, help="In place of the ones that were chosen.")
@click.option("--report", is_flag=True, help="Train nothing; print what there is.")
def main(
    files: tuple[Path, ...], out: Path, tokens: int, batch: int, points: int, seeds: tuple[int, ...],
    kinds: tuple[str, ...], learning_rate: float, expert_learning_rate: float | None, report: bool,
) -> None:  # fmt: skip
    """Train what is missing, and print one JSON document."""
    torch.set_num_threads(1)
    corpus, others = prepare(files, out)
    samples, data = open_samples(corpus, others)
    common = {
        "corpus": corpus,
        "token_budget": tokens,
        "vocab_size": VOCABULARY,
        "sequence_length": LENGTH,
        "batch_size": batch,
        "learning_rate": learning_rate,
        "checkpoint_every": 100,
    }
    runs = []
    for seed in seeds:
        for kind in kinds:
            directory = out / "runs" / f"{seed}-{kind}"
            if not report or (directory / "run.json").exists():
                rate = expert_learning_rate if kind in EXPERT_LEARNING_RATES else None
                settings = {
                    **common,
                    "model": shape(kind) | KINDS[kind],
                    "expert_learning_rate": rate or EXPERT_LEARNING_RATES.get(kind),
                    "seed": seed,
                }
                found = run_once(directory, settings, samples, points, say(f"{kind}, seed {seed}"))
                runs.append({"kind": kind, **found})
    record = {
        "machine": machine(),
        "command": command(),
        "commit": commit(),
        "seeds": sorted({run["seed"] for run in runs}),
        "data": files_hash(files),
        "result": {**data, "kinds": {kind: counted(kind) for kind in kinds}, "runs": runs},
    }
    print(json.dumps(record, indent=1))


def counted(kind: str) -> dict[str, Any]:
    """Parameters and forward operations a token of a kind."""
    model = SiloForCausalLM(SiloConfig(vocab_size=VOCABULARY, **shape(kind), **KINDS[kind]))
    layer = model.model.layers[MIDDLE].mlp
    return {
        "parameters": model.num_parameters(),
        "parameters_of_the_layer": sum(each.numel() for each in layer.parameters()),
        "flops_per_token": flops_per_token(model, LENGTH),
        "settings": KINDS[kind],
    }


if __name__ == "__main__":
    main()
