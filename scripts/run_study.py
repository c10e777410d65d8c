"""A study of `silo eval study` on one store of all restricted domains of a corpus.

    python scripts/run_study.py CORPUS/*.jsonl.zst --model MODEL --name NAME --study opt-out > study_opt_out.json

The store holds text of the training split of all restricted files, the same amount of each. Test and validation text
are of the other splits, some documents of each domain, so that no domain decides.

Opt-out is of all methods, reliance of blocks, the others of neighbours and ∞-grams; routing is on text of every file,
permissive ones too.

Prints one JSON document: machine, command, commit, seed, data hash, result.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from compare_at_equal_text import Splits, build, say, split
from recording import made

from eval.perplexity import data_hash
from eval.studies import copying, licenses, membership, neighbours, opt_out, reliance, routing, store_size
from eval.studies.subject import Subject, sampled
from silo.documents import Document
from silo.language_model import LanguageModel
from silo.weights import METHODS


def told(done: int, total: int) -> None:
    """Progress."""
    say(f"{done} of {total}")


def of_neighbours(subject: Subject) -> dict[str, Any]:
    """k, λ and τ, without the whole grid, of which the rows say the best."""
    result = neighbours.study(subject, 1024, told)
    del result["validation"]
    return result


STUDIES: dict[str, Callable[[Subject], dict[str, Any]]] = {
    "store-size": lambda subject: store_size.study(subject, 8, told),
    "neighbours": of_neighbours,
    "licenses": lambda subject: licenses.study(subject, told),
    "membership": lambda subject: membership.study(subject, "document", 32, told),
    "copying": lambda subject: copying.study(
        subject, prompts=32, prompt=32, written=128, temperature=0, longest_copy=12, progress=told
    ),
    "reliance": lambda subject: reliance.study(subject, told),
}
"""Those that ask a subject, with the sizes that the commands have by default."""


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--model", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--name", required=True, help="What the model is called in RESULTS.md.")
@click.option("--study", required=True, type=click.Choice(["opt-out", "routing", *STUDIES]))
@click.option("--store-tokens", default=300_000, show_default=True, help="Of all restricted domains together.")
@click.option(
    "--tokens",
    default=16_000,
    show_default=True,
    help="Of test text, for opt-out of each owner's, and as many to fit on.",
)
@click.option("--documents", default=16, show_default=True, help="Of each domain, from which these are taken.")
@click.option("--owners", default=10, show_default=True, help="That opt out.")
@click.option("--control-tokens", default=60_000, show_default=True)
def main(
    files: tuple[Path, ...], model: Path, name: str, study: str, store_tokens: int, tokens: int, documents: int,
    owners: int, control_tokens: int,
) -> None:  # fmt: skip
    """Run a study, and print one JSON document."""
    lm = LanguageModel.load(model)
    permissive, restricted = split(files)
    with tempfile.TemporaryDirectory(prefix="silo-studies-") as directory:
        share = store_tokens // len(restricted)
        store = build(Path(directory) / "store", lm, model, permissive, restricted, (share, 0), control_tokens)
        test, validation = (chosen(restricted, side, documents) for side in ("test", "val"))
        subject = Subject(lm, store, ["lm", "knn", "ngram"], test, validation, {}, tokens)
        if study == "opt-out":
            every = [document for domain in restricted.values() for document in domain["test"]]
            subject = replace(subject, methods=list(METHODS), test=every)
            result = opt_out.study(subject, opt_out.owners_of(subject, (), owners), told)
        elif study == "routing":
            domains = {each: of["test"][:documents] for each, of in {**permissive, **restricted}.items()}
            result = routing.study(lm, domains, tokens // len(domains))
            read = {each: data_hash(sampled(lm, of, tokens // len(domains))) for each, of in domains.items()}
        else:
            subject = replace(subject, methods=["lm"]) if study == "reliance" else subject
            result = STUDIES[study](subject)
        described = subject.described() | ({"test": read} if study == "routing" else {})
    report = {
        **made(files),
        "model": {"name": name, "fingerprint": lm.fingerprint},
        "result": {**described, "studies": {study: result}},
    }
    print(json.dumps(report, indent=1))


def chosen(domains: Splits, side: str, documents: int) -> list[Document]:
    """Some documents of each domain."""
    return [document for domain in domains.values() for document in domain[side][:documents]]


if __name__ == "__main__":
    main()
