"""``silo eval``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from datastore.generate_cli import policy_options
from eval.options import (
    RULES,
    file_of_weights,
    licence_policy,
    nearest_options,
    parse_methods,
    require_options,
    require_used,
)
from eval.study_cli import study
from eval.suite_cli import compare, suite
from eval.zero_shot_cli import zero_shot
from silo.cli import reports

if TYPE_CHECKING:
    from datastore.policy import QueryPolicy
    from silo.documents import Document
    from silo.gate import Gate
    from silo.language_model import LanguageModel
    from silo.licensing import Policy
    from silo.mixture import Mixture
    from silo.nearest import Nearest
    from silo.weights import Weights

MODEL_ALONE = {"mixtures": {"lm": {"weights": {"lm": 1.0}, "temperature": 1.0}}}


@click.group("eval")
def evaluate() -> None:
    """Measure perplexity with and without the store."""


def render(value: dict[str, Any]) -> None:
    """Show a table of mixtures."""
    table = Table(title=f"{value['documents']} documents, {value['tokens']:,} tokens")
    for column in ("mixture", "perplexity", "weights", "temperature"):
        table.add_column(column, justify="right" if column == "perplexity" else "left")
    for name, perplexity in value["perplexity"].items():
        mixture = value["mixtures"][name]
        weights = ", ".join(f"{method} {weight:.3f}" for method, weight in mixture["weights"].items())
        table.add_row(name, f"{perplexity:.2f}", weights, f"{mixture['temperature']:g}" if "knn" in weights else "")
    Console().print(table)


@evaluate.command()
@click.option("--model", required=True, type=click.Path(path_type=Path), help="Directory of the model.")
@click.option("--store", type=click.Path(path_type=Path), help="The store, for knn, ric and ngram.")
@click.option("--use", "methods", default="lm", callback=parse_methods, help="Such as lm,knn,ngram. Default lm.")
@click.option("--data", required=True, type=click.Path(path_type=Path), help="JSON Lines to report on.")
@click.option("--fit", "fit_on", type=click.Path(path_type=Path), help="JSON Lines to fit weights on; other documents.")
@click.option(
    "--weights",
    type=click.Path(path_type=Path),
    help='Weights that --save-weights wrote, or such as {"knn": 0.3}, a gate, or gate: the store\'s own.',
)
@click.option("--save-weights", type=click.Path(path_type=Path), help="Write the fitted weights to this file.")
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    help="Score a sample of so many tokens, one passage a document.",
)
@RULES
@nearest_options
@reports(render)
@policy_options
def perplexity(
    model: Path,
    store: Path | None,
    methods: list[str],
    data: Path,
    fit_on: Path | None,
    weights: Path | None,
    save_weights: Path | None,
    max_tokens: int | None,
    rules: Path | None,
    nearest: Nearest | None,
    policy: QueryPolicy,
) -> dict[str, Any]:
    """Perplexity of the model alone, with each method, and with all.

    Weights and temperature are fitted on the documents of --fit, which must be others than those of --data. --allow,
    --deny and --purpose choose from the store; documents that are scored or fitted on are left out of it.

    Example: silo eval perplexity --model MODEL --store STORE --use lm,knn,ngram --data test.jsonl --fit val.jsonl
    """
    from datastore.store import Store
    from eval import perplexity as measure
    from silo.documents import read_documents
    from silo.files import require_place, write_json
    from silo.language_model import LanguageModel
    from silo.progress import progress_bar

    require_options(methods, store, fit_on, weights)
    require_used(store, fit_on, save_weights, rules, of_store=bool(nearest or policy.to_json()))
    if save_weights:
        require_place(save_weights, "--save-weights")
    documents = list(read_documents(data))
    fitted_documents = list(read_documents(fit_on)) if fit_on else []
    measure.require_disjoint(documents, fitted_documents)
    judge, lm = licence_policy(rules), LanguageModel.load(model)
    warn_of_taught(documents, model)
    given = None if fit_on else read_weights(weights, store, methods, lm)
    nearest = measure.looked_up_by(given[0].values(), nearest, where=str(weights)) if given else nearest
    mixture, opened = open_mixture(lm, store, methods, [*documents, *fitted_documents], policy, nearest)
    fitted, source = given or fit_weights(mixture, fitted_documents, methods, max_tokens, judge)
    texts = measure.sample(documents, mixture, max_tokens)
    measure.require_unfitted(source, documents, texts, where=str(weights))
    taught = source.pop("texts")
    with progress_bar("score") as progress:
        scores = measure.score(mixture, texts, progress=progress)
    mixtures = {name: measure.described(each, scores.evidence) for name, each in fitted.items()}
    described = {"mixtures": mixtures, **source, "model": lm.fingerprint, **opened}
    if save_weights:
        write_json(save_weights, {**described, "texts": taught})
        if store and source["restricted_text_of"]:
            Store.open(store).note_weights(save_weights, source["restricted_text_of"])
    return {
        "perplexity": measure.perplexities(scores, fitted),
        "tokens": len(scores.lm),
        "documents": len(texts),
        "data": measure.data_hash(texts),
        **described,
    }


def warn_of_taught(documents: Sequence[Document], model: Path) -> None:
    """Say on stderr how many documents of --data the model has seen: a low perplexity of theirs is no merit."""
    from datastore.control import read_trained_on

    seen = read_trained_on(model)
    known = [each.id for each in documents if each.content_hash in seen]
    if known:
        said = f"{len(known)} of {len(documents)} documents of --data, the first {known[0]!r}"
        click.echo(f"warning: the model trained on {said}; their perplexity says little of other text", err=True)


def fit_weights(
    mixture: Mixture, documents: Sequence[Document], methods: list[str], max_tokens: int | None, policy: Policy
) -> tuple[Mapping[str, Weights | Gate], dict[str, Any]]:
    """Weights of each mixture, fitted on validation text; and whose restricted text they learnt from."""
    from eval import perplexity as measure
    from silo.progress import progress_bar

    with progress_bar("fit") as progress:
        texts = measure.sample(documents, mixture, max_tokens)
        fitted = measure.fit_combinations(measure.score(mixture, texts, progress=progress), methods)
    whose = {each.owner or each.source for each in documents if not policy.tier(each).permissive}
    return fitted, {
        "fitted_on": measure.data_hash(texts),
        "restricted_text_of": sorted(whose),
        "texts": sorted({each.document.content_hash for each in texts}),
    }


def read_weights(
    weights: Path | None, store: Path | None, methods: list[str], lm: LanguageModel
) -> tuple[Mapping[str, Weights | Gate], dict[str, Any]]:
    """The same from a file; without one, of the model alone."""
    from eval import perplexity as measure
    from silo.weights import read_weights_file

    file = file_of_weights(weights, store) if weights else None
    value: dict[str, Any] = read_weights_file(file) if file else MODEL_ALONE
    return measure.weighings_from_json(value, methods, lm, where=str(file)), {
        "fitted_on": value.get("fitted_on") or value.get("provenance", {}).get("fitted_on"),
        "restricted_text_of": value.get("restricted_text_of", []),
        "texts": measure.taught_by(value),
    }


def open_mixture(
    lm: LanguageModel,
    store: Path | None,
    methods: list[str],
    asked: Sequence[Document],
    policy: QueryPolicy,
    nearest: Nearest | None,
) -> tuple[Mixture, dict[str, Any]]:
    """The mixture of some methods over a store, and what of the store it uses.

    Documents that are asked about are left out, if the store has them, so that no position finds itself.
    """
    from datastore.store import Store
    from silo.mixture import Mixture

    if store is None or methods == ["lm"]:
        return Mixture(lm), {"store": None}
    opened = Store.open(store)
    hashes = {document.content_hash for document in asked}
    present = sorted(row.id for rows in opened.rows().values() for row in rows if row.content_hash in hashes)
    used = policy.without(present)
    chosen = used.selections(opened)
    mixture = opened.mixture(lm, methods, allow=chosen["allow"], deny=chosen["deny"], nearest=nearest)
    described = {"store": opened.hash, "policy": policy.to_json(), "left_out_of_store": present}
    return mixture, {**described, "nearest": mixture.nearest.to_json()}


def render_gate(value: dict[str, Any]) -> None:
    """Say what was learnt, and where it is."""
    gained = value["nats_gained"]
    click.echo(
        f"{value['gate']}: learnt from {value['asked_tokens']:,} tokens beside a store of {value['store_tokens']:,}; "
        f"better than the model alone by {gained['held_out']:.3f} nats a token of held-out text"
    )


def tokens_option(name: str, usual: int, least: int, said: str) -> Any:
    """An option that takes a number of tokens."""
    return click.option(name, default=usual, show_default=True, type=click.IntRange(min=least), help=said)


@evaluate.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--model", required=True, type=click.Path(path_type=Path), help="Directory of the model.")
@click.option("--store", required=True, type=click.Path(path_type=Path), help="The store that the gate is for.")
@click.option("--use", "methods", default="lm,knn,ngram", callback=parse_methods, show_default=True, help="Methods.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the gate to this file.  [default: to the store]")
@tokens_option("--store-tokens", 400_000, 1, "Tokens of the rehearsal's store.")
@tokens_option("--bare-tokens", 0, 0, "The same, without keys, beside them.")
@tokens_option("--asked-tokens", 60_000, 2, "Tokens to learn from, and to judge by.")
@RULES
@nearest_options
@reports(render_gate)
def gate(
    files: tuple[Path, ...],
    model: Path,
    store: Path,
    methods: list[str],
    out: Path | None,
    store_tokens: int,
    bare_tokens: int,
    asked_tokens: int,
    rules: Path | None,
    nearest: Nearest | None,
) -> dict[str, Any]:
    """Learn, from permissive FILES, how far to trust a store at each token.

    The text must be under permissive licences, of several owners, and not have taught the model: it plays the part of
    a store's text. The gate weighs the methods of --use by what they found, for all owners alike. Without --out the
    store keeps it: `silo generate` and silo.load then weigh by it, and so does --weights gate.

    Example: silo eval gate permissive/control.jsonl --model MODEL --store STORE
    """
    from datastore.control import read_trained_on
    from datastore.store import Store
    from eval.rehearsal import rehearse
    from silo.documents import read_documents
    from silo.files import require_place, write_json
    from silo.language_model import LanguageModel
    from silo.progress import progress_bar

    if out is not None:
        require_place(out, "--out")
    judge = licence_policy(rules)
    documents = [document for file in files for document in read_documents(file)]
    lm, opened = LanguageModel.load(model), Store.open(store)
    with progress_bar("rehearse") as progress:
        learnt, source = rehearse(
            lm,
            opened,
            documents,
            methods,
            policy=judge,
            trained_on=read_trained_on(model),
            store_tokens=store_tokens,
            asked_tokens=asked_tokens,
            bare_tokens=bare_tokens,
            nearest=nearest,
            progress=progress,
        )
    if out is None:
        opened.keep_gate(learnt, source, judge)
        out = opened.gate_path()
    else:
        write_json(out, {**learnt.to_json(), "provenance": source})
    return {"gate": str(out), **{name: value for name, value in source.items() if name != "teachers"}}


evaluate.add_command(suite)
evaluate.add_command(compare)
evaluate.add_command(study)
evaluate.add_command(zero_shot)
