"""The training loop, with accelerate: the same code on one CPU, and on many GPUs under ``accelerate launch``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import distributed

from silo.errors import UsageError
from silo.licensing import DEFAULT_POLICY, Policy, load_policy
from silo.modeling import SiloForCausalLM
from silo.progress import progress_bar
from training.checkpoint import Checkpoints
from training.continued import Origin, by_license
from training.model_directory import Lesson, save
from training.plan import Plan
from training.recipe import GROWS, Recipe
from training.reweighting import SEQUENCES, reweighted
from training.run import Run
from training.shape import model_config, outline
from training.tokens import Tokens, open_tokens


def train(
    recipe: Recipe,
    note: Callable[[str], None] = lambda line: None,
    watch: Callable[[Run], None] = lambda run: None,
) -> dict[str, Any]:
    """Train tokenizer and model, and write both with the list of the documents that taught them.

    Under ``accelerate launch`` every process trains, and the main one writes. A run that was killed goes on from its
    latest checkpoint, to the same weights.

    Args:
        recipe: what to train.
        note: is told, line by line, what a person should know while it goes on.
        watch: is called after each step, before its checkpoint; it may measure, and must leave weights and random
            state as they are. After a kill it sees the steps since the last checkpoint again.

    Returns:
        Summary with the loss in nats a token, tokens, steps and documents by licence.

    Raises:
        LicenseError: the corpus holds a document that may not teach weights, or the model to begin with was taught by
            one; nothing is read or written.
        UsageError: the recipe's model is none, the corpus is too small for one step, or an unfinished run towards the
            same output is another one.
        SiloError: the loss is not finite.
    """
    model_config(recipe)  # What makes no model is refused before the work of hours.
    policy, origin, tokens = open_inputs(recipe)
    accelerator = make_accelerator(recipe)
    set_seed(recipe.seed)
    model = origin.model if origin else SiloForCausalLM(model_config(recipe, tokens.tokenizer))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    set_seed(recipe.seed, device_specific=True)  # Each process draws its own noise from here on.
    plan = Plan.make(recipe, tokens)
    checkpoints = Checkpoints(recipe.output, identity(recipe, policy, origin, tokens, accelerator), accelerator)
    with checkpoints.held():
        run = Run(recipe, accelerator, model, plan, tokens)
        optimize(run, checkpoints, note, watch)
        lesson = Lesson(tokens, plan.mixture.used(), origin)
        summary = summarize(run, lesson, parameters)
        weights = run.weights()
        if accelerator.is_main_process:
            save(recipe, policy, model, weights, lesson, summary)
        wait_for_everyone(accelerator)
    accelerator.end_training()
    return {"model": str(recipe.output), **summary}


def wait_for_everyone(accelerator: Accelerator) -> None:
    """Wait until all processes are here, the last time before what they share is let go.

    Gloo's usual barrier is done by a thread that needs Python's lock to let go of it. If the model is freed before it
    has, torch waits for that thread with the lock held, for ever (torch 2.13; seen once in some hundred runs). The
    monitored barrier has no such thread.
    """
    if distributed.is_initialized() and distributed.get_backend() == "gloo":
        distributed.monitored_barrier()
    else:
        accelerator.wait_for_everyone()


def describe(recipe: Recipe) -> dict[str, Any]:
    """What :func:`train` would do. The corpus is judged and tokenised, as it would be; nothing is trained.

    Raises:
        LicenseError, UsageError: as :func:`train`.
    """
    model_config(recipe)
    _, origin, tokens = open_inputs(recipe)
    return outline(recipe, origin, tokens)


def open_inputs(recipe: Recipe) -> tuple[Policy, Origin | None, Tokens]:
    """The policy, the model to begin with if any, and the corpus as tokens, each judged before it is read."""
    policy = load_policy(recipe.policy) if recipe.policy else DEFAULT_POLICY
    if recipe.init is None:
        return policy, None, open_tokens(recipe.corpus, policy, recipe.vocab_size)
    origin = Origin.open(recipe.init, policy, recipe.sequence_length)
    if GROWS in recipe.model:
        origin = origin.grown(recipe.model[GROWS])
    return policy, origin, open_tokens(recipe.corpus, policy, recipe.vocab_size, tokenizer=origin.tokenizer)


def make_accelerator(recipe: Recipe) -> Accelerator:
    """accelerate, with the recipe's precision and trackers.

    Raises:
        UsageError: a tracker is unknown to accelerate, or its package is not installed.
    """
    logs = recipe.output.with_name(f"{recipe.output.name}-logs")
    try:
        accelerator = Accelerator(
            mixed_precision=recipe.mixed_precision, log_with=recipe.trackers or None, project_dir=logs
        )
    except ValueError as error:
        asked = f"trackers is {recipe.trackers}: " if recipe.trackers else ""
        raise UsageError(f"{asked}accelerate refuses the recipe's settings or this process's state: {error}") from None
    if len(accelerator.log_with) < len(recipe.trackers):  # accelerate leaves out what is not installed.
        raise UsageError(
            f"trackers is {recipe.trackers}, and not all of them are installed; "
            "install what is missing, such as `pip install silo-lm[tensorboard]`"
        )
    return accelerator


def identity(
    recipe: Recipe, policy: Policy, origin: Origin | None, tokens: Tokens, accelerator: Accelerator
) -> dict[str, Any]:
    """All that decides a run's weights, as JSON. Files stand for what they hold, wherever they lie."""
    return {
        **recipe.decisive_settings(),
        "corpus": tokens.manifest["corpus"],
        "policy": policy.fingerprint,
        "init": origin.fingerprint if origin else None,
        "processes": accelerator.num_processes,
    }


def summarize(run: Run, lesson: Lesson, parameters: int) -> dict[str, Any]:
    """What is told of a finished run, and kept beside its model."""
    teachers = lesson.teachers()
    last = run.losses[-20:]
    summary = {
        "loss": round(sum(last) / len(last), 4),
        "steps": len(run.losses),
        "tokens": len(run.losses) * run.recipe.batch_size * run.recipe.sequence_length,
        "parameters": parameters,
        "documents": sum("weights" in teacher.taught for teacher in teachers),
        "documents_by_license": by_license(teachers),
        "corpus": lesson.tokens.manifest["corpus"],
    }
    if run.recipe.domains:
        summary["domain_weights"] = {name: round(weight, 6) for name, weight in run.plan.weights.items()}
    if run.recipe.validate_every:
        summary["validation"] = {kind: run.validate(kind) for kind in run.validation}
    if lesson.origin:
        summary["init"] = lesson.origin.summary()
    return summary


def optimize(run: Run, checkpoints: Checkpoints, note: Callable[[str], None], watch: Callable[[Run], None]) -> None:
    """Train by a plan, from the latest checkpoint if there is one; the model's weights change in place."""
    recipe, plan = run.recipe, run.plan
    found = checkpoints.restore(run.model, run.optimizer, note)
    if found is not None:
        plan.restore(found["plan"])
        run.losses = found["losses"]
        note(f"going on after step {plan.step} of {plan.steps}")
    run.start_trackers()
    with progress_bar("train") as progress:
        progress(plan.step, plan.steps)
        while plan.step < plan.steps:
            if recipe.reweight_every and plan.between_rounds and plan.step:
                plan.weights = reweighted(plan.weights, run.validate("domain", SEQUENCES), recipe.reweight_rate)
            run.step(plan.next_batch())
            progress(plan.step, plan.steps)
            if recipe.validate_every and plan.step % recipe.validate_every == 0 and recipe.trackers:
                run.log_validation()
            watch(run)
            if recipe.checkpoint_every and plan.step % recipe.checkpoint_every == 0 and plan.step < plan.steps:
                checkpoints.save(plan.state(), run.model, run.optimizer, run.losses)
