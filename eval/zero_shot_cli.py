"""``silo eval zero-shot``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from datastore.generate_cli import policy_options
from eval.options import file_of_weights
from silo.cli import reports

if TYPE_CHECKING:
    from datastore.policy import QueryPolicy

PATH = click.Path(path_type=Path)
HEADINGS = {
    "plain": "log p(option | context)",
    "normalised": "the same a byte",
    "pmi": "minus log p(option | domain prompt)",
}


def render(value: dict[str, Any]) -> None:
    """Show accuracies side by side."""
    from eval import suite_report as report

    found = {(row["mixture"], row["scoring"]): row["accuracy"] for row in value["rows"]}
    names = list(dict.fromkeys(name for name, _ in found))
    lines = [[name, *(report.spread([100 * each for each in found[name, s]], 1) for s in HEADINGS)] for name in names]
    title = f"accuracy in %, {value['questions']:,} questions, chance {100 * value['chance']:.1f}"
    Console().print(report.table(title, ["", *HEADINGS.values()], lines))
    orders = value["orders"]
    said = " and ".join(
        f"{count} order{'s' * (count != '1')} of the options ({n:,} questions)" for count, n in orders.items()
    )
    Console().print(f"In brackets: 95 % bootstrap intervals over questions. Scores are means over {said}.")


@click.command("zero-shot")
@click.argument("model", type=PATH)
@click.argument("task", type=PATH)
@click.option("--store", type=PATH, help="The store; the model alone is measured in any case.")
@click.option("--use", metavar="METHODS", help="Such as lm,knn,ngram. Default: what is weighed.")
@click.option(
    "--weights",
    metavar="FILE",
    help='JSON: a gate, weights that --save-weights wrote, or such as {"knn": 0.3}. Default: the store\'s gate.',
)
@click.option("--domain-prompt", metavar="TEXT", help="Of questions that name none, such as 'Answer:'.")
@reports(render)
@policy_options
def zero_shot(
    model: Path,
    task: Path,
    store: Path | None,
    use: str | None,
    weights: str | None,
    domain_prompt: str | None,
    policy: QueryPolicy,
) -> dict[str, Any]:
    """Choose among the options of each question of TASK by probability alone, and count what is right.

    A line of TASK has context, options, answer (an option or its number) and domain_prompt. Where {options} stands in
    the context the options are listed, in several orders, and scores are means over these.

    Example: silo eval zero-shot MODEL --store STORE --domain-prompt 'Answer:' TASK.jsonl
    """
    from datastore.loading import load_by
    from eval.suite_report import origin
    from eval.zero_shot import read_task, score_task, summary
    from silo.files import sha256_file
    from silo.progress import progress_bar
    from silo.weights import Weights

    questions = read_task(task, domain_prompt)
    chosen = file_of_weights(Path(weights), store) if weights else None
    lm = load_by(policy, model, store=store, use=use, weights=chosen)
    weighings: dict[str, Any] = {"lm": Weights({"lm": 1.0})}
    if len(lm.weighing.methods) > 1:
        weighings["+".join(lm.weighing.methods)] = lm.weighing
    with progress_bar("zero-shot") as progress:
        scores = score_task(lm.mixture, weighings, questions, progress=progress)
    return {
        **summary(questions, scores),
        "task": sha256_file(task),
        "model": lm.mixture.model.fingerprint,
        "store": store_hash(store) if len(weighings) > 1 else None,
        "weights": sha256_file(chosen) if chosen and len(weighings) > 1 else None,
        "policy": policy.to_json(),
        "made": origin(),
    }


def store_hash(store: Path | None) -> str | None:
    """The canonical hash of a store."""
    from datastore.store import Store

    return Store.open(store).hash if store is not None else None
