"""What a training step costs beside forward, backward and optimizer.

    python scripts/bench training_step corpus/permissive > scripts/results/training_step.json

Two models of one shape take turns on the same sequences: one in our loop (reading, schedule, token-weighted loss,
clipping, the check for numbers, and with a tracker the routers' counts), the other bare: ``loss.backward()`` and
AdamW's ``step()`` on batches that are tensors already. The learning rate is next to nothing, so that both stay alike.
Given is the median over pairs of (ours / bare), which noise of
the machine hits alike; a checkpoint is given in steps.

Prints one JSON document: machine, command, commit, data hash, result.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from accelerate import Accelerator

from bench.harness import subject
from silo.config import load_config
from silo.modeling import SiloForCausalLM
from training.checkpoint import Checkpoints
from training.loop import make_accelerator, open_inputs
from training.optimizer import make_optimizer
from training.plan import Plan
from training.recipe import RECIPES, Recipe
from training.run import Run
from training.shape import model_config
from training.tokens import Tokens

SHAPES = {
    "nano": [],
    "nano, 2 sequences a step": ["batch_size=2"],
    "nano, dense": ["model.ffn=dense"],
    "nano, 4 passes a step": ["micro_batch_size=4"],
    "nano, with a tracker": ["trackers=[tensorboard]", "log_every=10"],
}


@click.command()
@click.argument("corpus", type=click.Path(path_type=Path, exists=True))
@click.option("--pairs", default=30, show_default=True, help="Steps of each model.")
@subject
def main(corpus: Path, pairs: int) -> dict[str, Any]:
    """The trainer's step beside a bare one."""
    torch.set_num_threads(1)
    result, fingerprint = {}, ""
    for name, overrides in SHAPES.items():
        with tempfile.TemporaryDirectory() as root:
            settings = [f"corpus={corpus}", f"output={root}/model", "token_budget=1000000000", "learning_rate=1e-6"]
            settings += overrides
            recipe = load_config(Recipe, RECIPES / "nano.yaml", settings)
            _, _, tokens = open_inputs(recipe)
            fingerprint = tokens.manifest["corpus"]
            result[name] = measured(recipe, tokens, make_accelerator(recipe), pairs)
            click.echo(f"{name}: {result[name]}", err=True)
    return {"data": fingerprint, "result": result}


def measured(recipe: Recipe, tokens: Tokens, accelerator: Accelerator, pairs: int) -> dict[str, Any]:
    """The ratio of our step to a bare one, and what a checkpoint costs in steps."""
    models = [SiloForCausalLM(model_config(recipe, tokens.tokenizer)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    plan = Plan.make(recipe, tokens)
    run = Run(recipe, accelerator, models[0], plan, tokens)
    run.start_trackers()
    checkpoints = Checkpoints(recipe.output, {}, accelerator)
    optimizer = make_optimizer(models[1], recipe.learning_rate, recipe.weight_decay)
    size, _ = recipe.micro_batches(1)

    def bare(batches: list[dict[str, torch.Tensor]]) -> None:
        for batch in batches:
            models[1](**batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    ratios, ours, saves = [], [], []
    with checkpoints.held():
        for number in range(pairs + 3):
            sequences = plan.next_batch()
            batches = [plan.mixture.batch(sequences[at : at + size]) for at in range(0, len(sequences), size)]
            turns: list[Callable[[], None]] = [lambda s=sequences: run.step(s), lambda b=batches: bare(b)]  # type: ignore
            seconds = [0.0, 0.0]
            for which in (0, 1) if number % 2 else (1, 0):
                seconds[which] = timed(turns[which])
            if number >= 3:  # which warm up
                ratios.append(seconds[0] / seconds[1])
                ours.append(seconds[0])
            if number % 10 == 9:
                saves.append(timed(lambda: checkpoints.save(plan.state(), run.model, run.optimizer, run.losses)))
        accelerator.end_training()
    step = statistics.median(ours)
    return {
        "ratio": round(statistics.median(ratios), 4),
        "quartiles": [round(each, 4) for each in statistics.quantiles(ratios, n=4)[::2]],
        "seconds_a_step": round(step, 4),
        "checkpoint_in_steps": round(statistics.median(saves) / step, 2),
    }


def timed(action: Callable[[], None]) -> float:
    """Seconds of the processor that something takes: others may be using the machine."""
    begin = time.process_time()
    action()
    return time.process_time() - begin
