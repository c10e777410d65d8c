"""``silo datastore``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from silo.cli import reports
from silo.errors import IntegrityError, UsageError

if TYPE_CHECKING:
    from datastore.store import Selection, Store
    from silo.documents import Document

PATH = click.Path(path_type=Path)
STORE = click.argument("store", type=PATH)
KEY = click.option("--key", type=PATH, help="Sign the receipt with this Ed25519 private key (PEM).")


@click.group()
def datastore() -> None:
    """Build, change and verify a store of restricted text."""


def render_pairs(value: dict[str, Any]) -> None:
    """Show a flat value, one name a line."""
    width = max(map(len, value))
    for name, item in value.items():
        click.echo(f"{name:<{width}}  {item}")


@datastore.command()
@STORE
@click.option("--model", required=True, type=PATH, help="Directory of the model that makes the keys.")
@click.option(
    "--control",
    type=PATH,
    help="Permissive side of a corpus; its control split teaches centroids and codes. "
    "Without it nothing is learnt: search is exhaustive, keys are half-precision.",
)
@click.option("--policy", type=PATH, help="Licence policy file that judges the control corpus.")
@click.option("--codes", metavar="NAME", help="sq8 (default), fp16, or pqM for M bytes a key; needs --control.")
@click.option("--lists", type=click.IntRange(1), help="Inverted lists, at most (default 1024); needs --control.")
@reports(render_pairs)
def create(
    store: Path, model: Path, control: Path | None, policy: Path | None, codes: str | None, lists: int | None
) -> dict[str, Any]:
    """Make an empty store for the keys of one model.

    Example: silo datastore create STORE --model MODEL --control CORPUS/permissive
    """
    if control is None and (codes or lists):
        raise UsageError("--codes and --lists are fitted on text; give --control CORPUS with them")
    from datastore.control import CODES, MAX_LISTS, describe, fit_control_plane, read_trained_on
    from datastore.store import Store
    from silo.language_model import LanguageModel
    from silo.licensing import DEFAULT_POLICY, load_policy

    lm = LanguageModel.load(model)
    rules = load_policy(policy) if policy else DEFAULT_POLICY
    plane = None
    if control is not None:
        seen = read_trained_on(model)
        plane = fit_control_plane(lm, control, rules, seen, codes=codes or CODES, lists=lists or MAX_LISTS)
    made = Store.create(store, lm, model / "tokenizer.json", plane)
    return {"store": str(store), "hash": made.hash, **describe(made.control)}


@datastore.command()
@STORE
@click.argument("files", nargs=-1, required=True, type=PATH, metavar="FILE...")
@click.option("--model", required=True, type=PATH, help="Directory of the model that the store was made for.")
@click.option("--skip-present", is_flag=True, help="Pass over documents that the store has, with the same text.")
@click.option("--no-keys", is_flag=True, help="For blocks and ∞-grams alone, without a call of the model.")
@KEY
@reports(render_pairs)
def add(
    store: Path, files: tuple[Path, ...], model: Path, skip_present: bool, no_keys: bool, key: Path | None
) -> dict[str, Any]:
    """Add the documents of JSON Lines FILEs (plain, .gz or .zst), each to its owner's shard; all of them, or none.

    With --no-keys no neighbours are found in them. To give them keys later, remove them and add them again.

    Example: silo datastore add STORE CORPUS/restricted/train.jsonl --model MODEL
    """
    from datastore.signing import load_key
    from datastore.store import Store
    from silo.documents import DocumentFiles
    from silo.progress import progress_bar

    opened = Store.open(store)
    documents = DocumentFiles(files, owned=True)
    signing = load_key(key) if key else None
    if skip_present:
        documents = DocumentFiles(files, passed_over=opened.present(documents), owned=True)
        if not any(True for _ in documents):
            nothing = {"documents": 0, "tokens": 0, "shards": [], "hash": opened.hash, "receipt": None}
            return {"store": str(store), **nothing}
    opened.require_addable(documents)
    from silo.language_model import LanguageModel  # takes seconds; bad input is refused before

    with progress_bar("add") as progress:
        lm = LanguageModel.load(model)
        receipt = opened.add(documents, lm, keyed=not no_keys, progress=progress, key=signing)
    return change(opened.path, receipt.path, receipt.content)


def change(store: Path, path: Path, receipt: dict[str, Any]) -> dict[str, Any]:
    """What a change says of itself."""
    documents = receipt["documents"]
    return {
        "store": str(store),
        "documents": len(documents),
        "tokens": sum(document["tokens"] for document in documents),
        "shards": sorted({document["shard"] for document in documents}),
        "hash": receipt["store_after"],
        "receipt": str(path),
    }


@datastore.command()
@STORE
@click.option("--document", "documents", multiple=True, metavar="ID", help="Remove one document.")
@click.option("--owner", "owners", multiple=True, metavar="NAME", help="Remove all documents of an owner.")
@click.option("--source", "sources", multiple=True, metavar="S", help="Remove all documents of a source.")
@click.option(
    "--license", "licenses", multiple=True, metavar="SPDX", help="Remove a licence, or a pattern: CC-BY-NC-*."
)
@click.option("--shard", "shards", multiple=True, metavar="NAME", help="Remove a shard.")
@click.option("--with-duplicates", is_flag=True, help="Remove near-duplicates elsewhere in the store too.")
@click.option("--no-duplicates", is_flag=True, help="Do not look for near-duplicates; they are reported otherwise.")
@KEY
@click.option("--reason", default="", help="Why; kept in the receipt and the log.")
@click.option("--dry-run", is_flag=True, help="Say what would go, and change nothing.")
@reports(render_pairs)
def remove(
    store: Path,
    reason: str,
    dry_run: bool,
    with_duplicates: bool,
    no_duplicates: bool,
    key: Path | None,
    **names: tuple[str, ...],
) -> dict[str, Any]:
    """Remove documents physically, and write a receipt.

    Documents elsewhere in the store that hold much of the same text are named, and stay unless --with-duplicates is
    given.

    Weights that were fitted with the removed text lie outside the store: those that the store knows of are named, to be
    fitted again. A gate, which is learnt from permissive text, stays as it is.

    Example: silo datastore remove STORE --owner 'Jeff Forcier' --reason 'request of 2026-11-22'
    """
    from datastore.signing import load_key
    from datastore.store import Selection, Store

    if with_duplicates and no_duplicates:
        raise UsageError("--with-duplicates and --no-duplicates exclude each other; give one")
    signing = load_key(key) if key else None
    opened = Store.open(store)
    selection: Selection = Selection(**names)
    if dry_run:
        going, lost = opened.affected(selection), opened.unreadable(selection)
        damaged = set(lost)
        alike = [] if no_duplicates else opened.near_duplicates(going, damaged)
        told = {"not_compared": sorted(damaged)} if damaged and not no_duplicates else {}
        return {
            "store": str(store),
            "would_remove": [row.id for _, row in going],
            "documents": len(going),
            "tokens": sum(row.end - row.begin for _, row in going),
            "near_duplicates": [row["id"] for row in alike],
            **told,
            **({"unreadable_shards": lost} if lost else {}),
        }
    wanted: Any = "ignore" if no_duplicates else "remove" if with_duplicates else "report"
    receipt = opened.remove(selection, reason=reason, duplicates=wanted, key=signing)
    alike = receipt.content.get("near_duplicates", [])
    left = [] if with_duplicates else [row["id"] for row in alike]
    outside: dict[str, Any] = {
        name: receipt.content[name]
        for name in ("exports", "weights_to_fit_again", "not_compared", "unreadable_shards")
        if name in receipt.content
    }
    return {**change(opened.path, receipt.path, receipt.content), "near_duplicates_left": left, **outside}


@datastore.command()
@STORE
@click.option("--shard", required=True, metavar="NAME", help="The shard to write; `silo datastore list` names them.")
@click.option("--out", "file", required=True, type=PATH, metavar="FILE", help="Must not be there yet.")
@click.option("--reason", default="", help="Why; kept in the receipt and the log.")
@KEY
@reports(render_pairs)
def export(store: Path, shard: str, file: Path, reason: str, key: Path | None) -> dict[str, Any]:
    """Write a shard as one file for another store of the same model and control plane.

    The log keeps that it was, and a later removal of its documents names the export: a copy that it cannot reach.

    Example: silo datastore export STORE --shard 'Jeff Forcier' --out forcier.shard
    """
    from datastore.signing import load_key
    from datastore.store import Store
    from silo.files import require_place

    require_place(file, "--out")
    signing = load_key(key) if key else None
    receipt = Store.open(store).export(shard, file, reason=reason, key=signing)
    return {**change(store, receipt.path, receipt.content), "file": str(file)}


@datastore.command("import")
@STORE
@click.argument("file", type=PATH)
@KEY
@reports(render_pairs)
def take_in(store: Path, file: Path, key: Path | None) -> dict[str, Any]:
    """Add the documents of an exported shard; no model is needed.

    Example: silo datastore import STORE forcier.shard
    """
    from datastore.signing import load_key
    from datastore.store import Store

    signing = load_key(key) if key else None
    receipt = Store.open(store).take_in(file, key=signing)
    return change(store, receipt.path, receipt.content)


def render_shards(value: dict[str, Any]) -> None:
    """Show what the store is, as far as that is told, and one row a shard."""
    facts = {name: item for name, item in value.items() if name != "shards"}
    if len(facts) > 2:
        render_pairs(facts)
    table = Table()
    for column in ("shard", "licences", "documents", "tokens", "bytes"):
        table.add_column(column, justify="left" if column in ("shard", "licences") else "right", overflow="fold")
    for row in value["shards"]:
        numbers = (f"{row[name]:,}" for name in ("documents", "tokens", "bytes"))
        table.add_row(escape(row["shard"]), escape(", ".join(row["licenses"])), *numbers)
    Console().print(table)


@datastore.command("list")
@STORE
@reports(render_shards)
def list_shards(store: Path) -> dict[str, Any]:
    """List the live shards: owners, licences, documents, tokens, bytes."""
    from datastore.store import Store

    opened = Store.open(store)
    return {"store": str(store), "hash": opened.hash, "shards": opened.summary()}


@datastore.command()
@STORE
@click.option("--deep", is_flag=True, help="Build all search structures anew from the shards, and compare.")
@click.option("--repair", is_flag=True, help="First build damaged search structures anew from the shards.")
@click.option(
    "--absent", type=PATH, metavar="FILE", help="Prove that the documents of this JSON Lines file are nowhere."
)
@click.option("--model", type=PATH, help="With --absent: look for the codes of their keys too.")
@reports(render_pairs)
def verify(store: Path, deep: bool, repair: bool, absent: Path | None, model: Path | None) -> dict[str, Any]:
    """Check every checksum, the log's chain, every receipt and signature; exit 1 and name the file if one is wrong.

    With --absent it exits 1 too where a run of a document's bytes, tokens, shingles or codes is found, also in what an
    unfinished add has encoded.
    """
    from datastore.store import Store
    from silo.documents import read_documents

    if model is not None and absent is None:
        raise UsageError("--model goes with --absent FILE")
    documents = list(read_documents(absent)) if absent is not None else []
    opened = Store.open(store)
    repaired = {"repaired": opened.repair()} if repair else {}
    result = opened.verify() | repaired
    if deep:
        from datastore.verification import verify_derived

        result["rebuilt_and_equal"] = verify_derived(opened)
    if documents:
        result["absent"] = require_absent(opened, documents, model)
    return result


def require_absent(store: Store, documents: list[Document], model: Path | None) -> int:
    """How many documents are nowhere in a store. Raises :class:`IntegrityError` if there is a trace of one."""
    from datastore.store import SPOOL
    from datastore.verification import find_traces

    lm = None
    if model is not None:
        from silo.language_model import LanguageModel

        store.require_model(lm := LanguageModel.load(model))
    for trace in find_traces(store, documents, lm):
        held = f"{trace.file} holds {trace.kind} of document {trace.document!r}; it is not gone"
        if trace.file.parent == store.path / SPOOL:
            held += ": an unfinished add has encoded it, which `silo datastore remove` deletes"
        raise IntegrityError(held)
    return len(documents)


@datastore.command()
@STORE
@reports(render_shards)
def show(store: Path) -> dict[str, Any]:
    """Show what a store holds, for people: model, control plane, and each shard with licences, tokens and bytes."""
    from datastore.store import Store

    opened = Store.open(store)
    return {"store": str(store), **opened.describe(), "shards": opened.summary()}


@datastore.command("hash")
@STORE
@reports(lambda value: click.echo(value["hash"]))
def show_hash(store: Path) -> dict[str, Any]:
    """Print the canonical hash: equal for stores that hold the same documents, whatever their history."""
    from datastore.store import Store

    return {"store": str(store), "hash": Store.open(store).hash}


def render_log(value: dict[str, Any]) -> None:
    """Show one line a change."""
    for line in value["log"]:
        signed = "signed" if line["signed"] else "unsigned"
        said = "  ".join(shown(line[name]) for name in ("what", "reason") if line[name])
        place = f"{line['sequence']:>6}  {line['time']}  {line['operation']:<7} {line['receipt']}"
        click.echo(f"{place}  {signed:<8}  {said}".rstrip())


def shown(text: str) -> str:
    """A text in one line: what no line can show, such as its end, is escaped."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


@datastore.command()
@STORE
@reports(render_log)
def log(store: Path) -> dict[str, Any]:
    """Show what was added and removed, of whom, when, why, and with which receipt, signed or not."""
    from datastore import history
    from datastore.store import Store

    path = Store.open(store).path
    return {"store": str(store), "log": history.told(path / "log.jsonl", path / "receipts")}
