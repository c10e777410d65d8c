"""What a training step costs beside forward, backward and optimizer, and beside accelerate's own example loop.

    python scripts/bench training_step corpus/permissive > scripts/results/training_step.json

Three models of one shape take turns on the same sequences:

- one in our loop: reading, schedule, token-weighted loss, clipping, the check for numbers, and with a tracker the
  routers' counts;
- one bare: ``loss.backward()`` and AdamW's ``step()`` on batches that are tensors already;
- one as in accelerate's examples: model, optimizer, a data loader of tensors that are there, and a schedule go through
  ``prepare``, and a step is forward, ``accelerator.backward``, ``step`` of both, ``zero_grad``.

The learning rate is next to nothing, so that all stay alike and must have the same losses. Given is the median over
rounds of (ours / theirs), which noise of the machine hits alike; a checkpoint is given in steps.

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

from bench import ceiling
from bench.ceiling import Ceiling
from bench.harness import alike, compete, subject
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

Batch = dict[str, torch.Tensor]
LOSSES_APART, OF_PASSES = 1e-4, 1e-2
"""What is allowed, relatively, of steps of one pass and of several: ours weighs these by their tokens. Other sequences
are several thousandths apart."""
CHECKPOINTS = 3
SHAPES = {
    "nano": [],
    "nano, 2 sequences a step": ["batch_size=2"],
    "nano, dense": ["model.ffn=dense"],
    "nano, 4 passes a step": ["micro_batch_size=4"],
    "nano, with a tracker": ["trackers=[tensorboard]", "log_every=10"],
}


@click.command()
@click.argument("corpus", type=click.Path(path_type=Path, exists=True))
@click.option("--rounds", default=30, show_default=True, help="Counted steps of each model.")
@subject
def main(corpus: Path, rounds: int) -> dict[str, Any]:
    """The trainer's step beside a bare one."""
    torch.set_num_threads(1)
    roof = ceiling.measure()
    result, fingerprint = {}, ""
    for name, overrides in SHAPES.items():
        with tempfile.TemporaryDirectory() as root:
            settings = [f"corpus={corpus}", f"output={root}/model", "token_budget=1000000000", "learning_rate=1e-9"]
            settings += overrides
            recipe = load_config(Recipe, RECIPES / "nano.yaml", settings)
            _, _, tokens = open_inputs(recipe)
            fingerprint = tokens.manifest["corpus"]
            result[name] = measured(recipe, tokens, make_accelerator(recipe), rounds, roof)
            click.echo(f"{name}: {result[name]}", err=True)
    return {"data": fingerprint, "ceiling": roof.told(), "result": result}


def measured(recipe: Recipe, tokens: Tokens, accelerator: Accelerator, rounds: int, roof: Ceiling) -> dict[str, Any]:
    """The ratios of our step to others, and what a checkpoint costs in steps."""
    models = [SiloForCausalLM(model_config(recipe, tokens.tokenizer)) for _ in range(3)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    plan = Plan.make(recipe, tokens)
    run = Run(recipe, accelerator, models[0], plan, tokens)
    run.start_trackers()
    checkpoints = Checkpoints(recipe.output, {}, accelerator)
    steps = batches(Plan.make(recipe, tokens), recipe, rounds + 1)
    sequences: list[tuple[str, int]] = []

    def next_sequences() -> None:
        sequences[:] = plan.next_batch()

    def ours() -> float:
        run.step(sequences)
        return float(run.losses[-1])

    contestants = {
        "ours": ours,
        "bare": bare_loop(models[1], recipe, steps),
        "accelerate": example_loop(models[2], recipe, accelerator, steps),
    }
    clock = {"processor": time.process_time}  # others may be using the machine
    judge = alike(LOSSES_APART if recipe.micro_batches(1)[1] == 1 else OF_PASSES)
    contest = compete(contestants, rounds, judge=judge, prepare=next_sequences, clocks=clock)
    next_sequences()
    work = ceiling.products_of(ours)
    with checkpoints.held():
        save = {"save": lambda: checkpoints.save(plan.state(), run.model, run.optimizer, run.losses)}
        saved = compete(save, CHECKPOINTS, clocks=clock).taken("save", "processor")
        accelerator.end_training()
    step = contest.taken("ours", "processor").value
    beside = {name: contest.times("ours", name, "processor") for name in ("bare", "accelerate")}
    return {
        "ratio": round(beside["bare"].value, 4),
        "quartiles": [round(each, 4) for each in beside["bare"][1:]],
        "beside_accelerate": beside["accelerate"],
        "seconds_a_step": round(step, 4),
        "ceiling": roof.share(work, step, 1),
        "checkpoint_in_steps": round(saved.value / step, 2),
    }


def batches(plan: Plan, recipe: Recipe, steps: int) -> list[list[Batch]]:
    """The tensors of so many steps, pass by pass."""
    size, _ = recipe.micro_batches(1)
    planned = [plan.next_batch() for _ in range(steps)]
    return [
        [plan.mixture.batch(sequences[at : at + size]) for at in range(0, len(sequences), size)]
        for sequences in planned
    ]


def of_text(out: Any) -> float:
    """The loss of the text alone, as ours tells it, without what routers add."""
    return float(out.loss.detach() - (0.0 if out.aux_loss is None else out.aux_loss.detach()))


def bare_loop(model: SiloForCausalLM, recipe: Recipe, steps: list[list[Batch]]) -> Callable[[], float]:
    """Nothing but the model and its optimizer; gives the loss of a step."""
    optimizer = make_optimizer(model, recipe.learning_rate, recipe.weight_decay)
    turns = iter(steps)

    def step() -> float:
        losses = []
        for batch in next(turns):
            out = model(**batch, use_cache=False)
            out.loss.backward()
            losses.append(of_text(out))
        optimizer.step()
        optimizer.zero_grad()
        return statistics.fmean(losses)

    return step


def example_loop(
    model: SiloForCausalLM, recipe: Recipe, accelerator: Accelerator, steps: list[list[Batch]]
) -> Callable[[], float]:
    """The loop of accelerate's examples, with as many passes a step as ours has."""
    rows = [
        {name: of[row] for name, of in batch.items()} for step in steps for batch in step for row in range(_rows(batch))
    ]
    optimizer = make_optimizer(model, recipe.learning_rate, recipe.weight_decay)
    loader: Any = torch.utils.data.DataLoader(rows, batch_size=_rows(steps[0][0]))  # type: ignore[arg-type]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    turns = iter(loader)

    def step() -> float:
        losses = []
        for _ in steps[0]:
            out = model(**next(turns), use_cache=False)
            accelerator.backward(out.loss)
            losses.append(of_text(out))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        return statistics.fmean(losses)

    return step


def _rows(batch: Batch) -> int:
    return len(next(iter(batch.values())))
