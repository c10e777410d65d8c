"""``silo eval study``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from eval.options import parse_methods, require_options
from silo.cli import Finite, reports

if TYPE_CHECKING:
    from eval.studies.subject import Subject

OUT = click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="The record, NAME.json; the figure is NAME.svg."
)
MODEL = click.option("--model", required=True, type=click.Path(path_type=Path), help="Directory of the model.")
DATA = click.option(
    "--data", required=True, multiple=True, type=click.Path(path_type=Path), help="JSON Lines to report on."
)
MAX_TOKENS = click.option(
    "--max-tokens", type=click.IntRange(min=1), help="Read a sample of so many tokens, one passage a document."
)
STORE = click.option("--store", required=True, type=click.Path(path_type=Path), help="The store; it is not changed.")


def subject_options(use: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The options that choose a :class:`Subject`, with the methods that are used if none are named."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        options = [
            MODEL,
            STORE,
            click.option("--use", "methods", default=use, callback=parse_methods, show_default=True, help="Methods."),
            DATA,
            click.option(
                "--fit", "fit_on", multiple=True, type=click.Path(path_type=Path), help="Other text, to fit on."
            ),
            click.option("--weights", type=click.Path(path_type=Path), help="A gate or weights, without --fit."),
            MAX_TOKENS,
            OUT,
        ]
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def open_subject(
    model: Path,
    store: Path,
    methods: list[str],
    data: tuple[Path, ...],
    fit_on: tuple[Path, ...],
    weights: Path | None,
    max_tokens: int | None,
    out: Path,
) -> Subject:
    """Check the options and open what they name."""
    from eval.studies.record import require_record_name
    from eval.studies.subject import Subject

    require_record_name(out)
    require_options(methods, store, fit_on[0] if fit_on else None, weights)
    return Subject.open(model, store, methods, data, fit_on=fit_on, weights=weights, budget=max_tokens)


def show(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A table on the terminal, the first column to the left and numbers to the right."""
    table = Table(title=title)
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


@click.group()
def study() -> None:
    """Ask one question of a model beside its store: a record and a figure each."""


def render_opt_out(value: dict[str, Any]) -> None:
    """Show each owner's perplexities and whether the last two are equal."""
    from eval.studies.opt_out import most

    rows = []
    for row in value["result"]["owners"]:
        of, best = row["perplexity"], most(list(row["perplexity"]["before"]))
        numbers = [of["before"]["lm"], *(of[moment][best] for moment in ("before", "after", "never"))]
        rows.append([row["owner"], f"{row['store_tokens']:,}", *(f"{each[0]:.2f}" for each in numbers)])
        rows[-1].append("equal" if row["equal"] else "DIFFER")
    columns = ["owner", "tokens in store", "model alone", "before", "after", "never held", "last two, bit for bit"]
    show("perplexity of held-out text", columns, rows)


@study.command("opt-out")
@subject_options("lm,knn,ngram")
@click.option("--owners", "count", default=10, show_default=True, type=click.IntRange(min=1), help="So many of them.")
@click.option("--owner", "names", multiple=True, help="This one in place of the largest; may be given again.")
@reports(render_opt_out)
def opt_out(out: Path, count: int, names: tuple[str, ...], **options: Any) -> dict[str, Any]:
    """Take owners out, one at a time: perplexity before, after, and with a store that never held them.

    The owners are the largest of the store that have held-out text in --data. Removals are of a copy. The last two must
    be equal in every bit; if they are not, the record is written and the command fails.

    Example: silo eval study opt-out --model MODEL --store STORE --data test.jsonl --fit val.jsonl --out opt-out.json
    """
    from eval.studies import opt_out as study
    from eval.studies.record import write_study
    from silo.errors import StoreError
    from silo.progress import progress_bar

    subject = open_subject(out=out, **options)
    with progress_bar("owners") as progress:
        result = study.study(subject, study.owners_of(subject, names, count), progress)
    record = write_study(out, "opt-out", subject.described(), result, study.figure(result))
    if not result["equal"]:
        unequal = [row["owner"] for row in result["owners"] if not row["equal"]]
        raise StoreError(
            f"after the removal of {', '.join(unequal)} the store does not answer as one that never held them; "
            f"{out} says where"
        )
    return record


def render_store_size(value: dict[str, Any]) -> None:
    """Show perplexity by size, and the fits."""
    result = value["result"]
    names = list(result["sizes"][0]["perplexity"])
    rows = [
        [f"{each['tokens']:,}", *(f"{each['perplexity'][name][0]:.2f}" for name in names)] for each in result["sizes"]
    ]
    fits = [result["fits"].get(name) for name in names]
    rows.append(["nats a doubling", *(f"{fit['nats_a_doubling']:+.4f}" if fit else "" for fit in fits)])
    rows.append(["r²", *(f"{fit['r2']:.4f}" if fit else "" for fit in fits)])
    show("perplexity by tokens in the store", ["tokens", *names], rows)


@study.command("store-size")
@subject_options("lm,knn,ngram")
@click.option("--sizes", default=8, show_default=True, type=click.IntRange(min=2), help="The last is the whole store.")
@reports(render_store_size)
def store_size(out: Path, sizes: int, **options: Any) -> dict[str, Any]:
    """Perplexity while the store grows by doubling, with a log-linear fit and its r².

    Each size is a view of the store; nothing is built. Weights are fitted on --fit at each size.

    Example: silo eval study store-size --model MODEL --store STORE --data test.jsonl --fit val.jsonl --out size.json
    """
    from eval.studies import store_size as study
    from eval.studies.record import write_study
    from silo.progress import progress_bar

    subject = open_subject(out=out, **options)
    with progress_bar("sizes") as progress:
        result = study.study(subject, sizes, progress)
    return write_study(out, "store-size", subject.described(), result, study.figure(result))


def render_neighbours(value: dict[str, Any]) -> None:
    """Show the best setting at each k."""
    result = value["result"]
    rows = [
        [
            f"{row['k']}",
            f"{row['temperature']:g}",
            f"{row['lambda']:.3f}",
            f"{row['validation']:.2f}",
            f"{row['test']:.2f}",
        ]
        for row in [*result["by_k"], result["chosen"]]
    ]
    lm = result["lm"]
    rows.append(["model alone", "", "", f"{lm['validation']:.2f}", f"{lm['test']:.2f}"])
    rows[-2][0] += ", exact λ"
    show("chosen on validation text", ["k", "τ", "λ", "validation", "test"], rows)


@study.command("neighbours")
@MODEL
@STORE
@DATA
@click.option(
    "--fit", "fit_on", required=True, multiple=True, type=click.Path(path_type=Path), help="Other text, which chooses."
)
@MAX_TOKENS
@click.option("--largest", default=1024, show_default=True, type=click.IntRange(min=1), help="The largest k.")
@OUT
@reports(render_neighbours)
def neighbours(out: Path, largest: int, **options: Any) -> dict[str, Any]:
    """Perplexity by k, λ and τ of the neighbours: a grid on validation text, its choices reported on test text.

    One search at the largest k answers for all.

    Example: silo eval study neighbours --model MODEL --store STORE --data test.jsonl --fit val.jsonl --out k.json
    """
    from eval.studies import neighbours as study
    from eval.studies.record import write_study
    from silo.progress import progress_bar

    subject = open_subject(out=out, methods=["lm", "knn"], weights=None, **options)
    with progress_bar("k") as progress:
        result = study.study(subject, largest, progress)
    return write_study(out, "neighbours", subject.described(), result, study.figure(result))


def render_licenses(value: dict[str, Any]) -> None:
    """Show what each step adds."""
    from eval.studies.subject import most

    steps = value["result"]["steps"]
    best = most(list(steps[0]["perplexity"]["all"]))
    groups = list(steps[0]["perplexity"])
    rows = [["model alone", "", *(f"{steps[0]['perplexity'][group]['lm'][0]:.2f}" for group in groups)]]
    rows += [
        [f"+ {step['adds']}", f"{step['tokens']:,}", *(f"{step['perplexity'][group][best][0]:.2f}" for group in groups)]
        for step in steps
    ]
    show("perplexity by whose text", ["store", "tokens added", *groups], rows)


@study.command("licenses")
@subject_options("lm,knn,ngram")
@reports(render_licenses)
def licenses(out: Path, **options: Any) -> dict[str, Any]:
    """Classes of licences added to the store one by one, from the freest to the strictest.

    Attribution and freer; share-alike and copyleft; non-commercial or unchanged only; all rights reserved or unknown.

    Example: silo eval study licenses --model MODEL --store STORE --data test.jsonl --fit val.jsonl --out licences.json
    """
    from eval.studies import licenses as study
    from eval.studies.record import write_study
    from silo.progress import progress_bar

    subject = open_subject(out=out, **options)
    with progress_bar("steps") as progress:
        result = study.study(subject, progress)
    return write_study(out, "licenses", subject.described(), result, study.figure(result))


def render_routing(value: dict[str, Any]) -> None:
    """Show each layer."""
    rows = []
    for row in value["result"]["layers"]:
        alike, told = row["alike"], row["information"]
        mean = "" if alike["mean"] is None else f"{alike['mean']:+.3f}"
        nats = [f"{row['unevenness']:.3f}", f"{told['domain']:.3f}", f"{told['license']:.3f}"]
        rows.append([f"{row['layer']} {row['kind']}", f"{row['experts']:,}", f"{row['dead']:,}", *nats, mean])
    columns = ["layer", "experts", "dead", "unevenness", "nats on domain", "on licence", "mean cosine"]
    show("experts", columns, rows)


@study.command("routing")
@MODEL
@DATA
@MAX_TOKENS
@OUT
@reports(render_routing)
def routing(model: Path, data: tuple[Path, ...], max_tokens: int | None, out: Path) -> dict[str, Any]:
    """Which experts serve whose text, how many are dead, and how alike they are.

    Each file of --data is a domain. --max-tokens is of each.

    Example: silo eval study routing --model MODEL --data books.jsonl --data code.jsonl --out routing.json
    """
    from eval.perplexity import data_hash
    from eval.studies import routing as study
    from eval.studies.record import require_record_name, write_study
    from eval.studies.subject import sampled
    from silo.documents import read_documents
    from silo.errors import UsageError
    from silo.language_model import LanguageModel

    require_record_name(out)
    domains = {file.stem: list(read_documents(file)) for file in data}
    if len(domains) < len(data):
        raise UsageError("two files of --data have one name, which is their domain's; rename one")
    lm = LanguageModel.load(model)
    result = study.study(lm, domains, max_tokens)
    read = [text for documents in domains.values() for text in sampled(lm, documents, max_tokens)]
    described = {"model": lm.fingerprint, "test": data_hash(read)}
    return write_study(out, "routing", described, result, study.figure(result))


def render_membership(value: dict[str, Any]) -> None:
    """Show each step."""
    rows = []
    for step in value["result"]["steps"]:
        numbers = [step["auc"]["min_k"], step["auc"]["loss"], step["rouge_l"]]
        cells = [" / ".join(f"{of[moment]:.3f}" for moment in ("before", "after", "never")) for of in numbers]
        rows.append([f"{step['removals']}", *cells, "equal" if step["equal"] else "DIFFER"])
    columns = ["removals", "AUC Min-K%", "AUC loss", "ROUGE-L", "after and never"]
    show("before / after / never held", columns, rows)


@study.command("membership")
@subject_options("lm,knn,ngram")
@click.option(
    "--by", "unit", default="document", type=click.Choice(["document", "owner"]), help="What one removal is of."
)
@click.option("--removals", default=32, show_default=True, type=click.IntRange(min=1), help="So many in a row.")
@reports(render_membership)
def membership(out: Path, unit: Any, removals: int, **options: Any) -> dict[str, Any]:
    """Whether removed text can be told from text that never was there, and is written word for word.

    MUSE's privacy leakage and verbatim memorisation, at 1, 2, 4 and more removals from a copy of the store. The text
    that never was there is that of --data. After the removals, all must be as with a store that never held them; if it
    is not, the record is written and the command fails.

    Example: silo eval study membership --model MODEL --store STORE --data test.jsonl --fit val.jsonl --out left.json
    """
    from eval.studies import membership as study
    from eval.studies.record import write_study
    from silo.errors import StoreError
    from silo.progress import progress_bar

    subject = open_subject(out=out, **options)
    with progress_bar("steps") as progress:
        result = study.study(subject, unit, removals, progress)
    record = write_study(out, "membership", subject.described(), result, study.figure(result))
    if not result["equal"]:
        raise StoreError(
            f"after the removals the store does not answer as one that never held the text; {out} says where"
        )
    return record


def render_copying(value: dict[str, Any]) -> None:
    """Show each mixture's runs."""
    found = value["result"]["mixtures"]
    rows = [
        [name, f"{of['longest']}", f"{of['mean']:.1f}", *(f"{share:.1%}" for share in of["shares"].values())]
        for name, of in found.items()
    ]
    lengths = [f"in runs of {least}" for least in next(iter(found.values()))["shares"]]
    show("tokens in a row that stand in the store", ["written by", "longest", "mean", *lengths], rows)


@study.command("copying")
@subject_options("lm,knn,ngram")
@click.option(
    "--prompts", default=50, show_default=True, type=click.IntRange(min=1), help="Documents to write on after."
)
@click.option(
    "--prompt-tokens", default=32, show_default=True, type=click.IntRange(min=1), help="Of each, to begin with."
)
@click.option("--new-tokens", default=128, show_default=True, type=click.IntRange(min=1), help="Written after each.")
@click.option("--temperature", default=0.0, show_default=True, type=Finite(min=0), help="0: likeliest token.")
@click.option(
    "--longest-copy",
    default=12,
    show_default=True,
    type=click.IntRange(min=1),
    help="Tokens, where copies are limited.",
)
@reports(render_copying)
def copying(
    out: Path, prompts: int, prompt_tokens: int, new_tokens: int, temperature: float, longest_copy: int, **options: Any
) -> dict[str, Any]:
    """The longest run of what each mixture writes that stands in the store word for word.

    Example: silo eval study copying --model MODEL --store STORE --data test.jsonl --fit val.jsonl --out copying.json
    """
    from eval.studies import copying as study
    from eval.studies.record import write_study
    from silo.progress import progress_bar

    subject = open_subject(out=out, **options)
    with progress_bar("mixtures") as progress:
        result = study.study(
            subject,
            prompts=prompts,
            prompt=prompt_tokens,
            written=new_tokens,
            temperature=temperature,
            longest_copy=longest_copy,
            progress=progress,
        )
    return write_study(out, "copying", subject.described(), result, study.figure(result))


def render_reliance(value: dict[str, Any]) -> None:
    """Show what each cut costs."""
    rows = []
    for name, of in value["result"]["groups"].items():
        logs = [f"{of['log_probability'][each]:.3f}" for each in ("alone", "all")]
        rows.append([name, f"{of['positions']:,}", *logs, *(f"{lost[0]:+.3f}" for lost in of["lost"].values())])
    cuts = ["lost: last to block", "text to block", "last to text"]
    show("nats a token", ["tokens", "positions", "alone", "with block", *cuts], rows)


@study.command("reliance")
@MODEL
@STORE
@DATA
@MAX_TOKENS
@OUT
@reports(render_reliance)
def reliance(out: Path, **options: Any) -> dict[str, Any]:
    """Whether the model takes its answer from retrieved text or from its weights, by attention knocked out.

    Example: silo eval study reliance --model MODEL --store STORE --data test.jsonl --out reliance.json
    """
    from eval.studies import reliance as study
    from eval.studies.record import write_study
    from silo.progress import progress_bar

    subject = open_subject(out=out, methods=["lm"], fit_on=(), weights=None, **options)
    with progress_bar("texts") as progress:
        result = study.study(subject, progress)
    return write_study(out, "reliance", subject.described(), result, study.figure(result))
