"""The whole of SILO in one run: licensed text in, a model of the permissive side, a store of the other, one rights
holder removed, and the proof that they are gone.

Every step is what the command of the same name does. Training runs as ``silo train`` in a process of its own, which
never sees the restricted side.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import yaml
from tokenizers import Tokenizer

from datastore.control import ControlPlane, describe, fit_control_plane, read_trained_on
from datastore.store import Selection, Store
from eval import domains
from eval.attribution import explain, most_gained, share_of
from eval.domains import Domain, Result
from eval.report import write_report
from silo.audit import audit
from silo.collect import collect
from silo.config import build
from silo.distributions import download
from silo.documents import Document, read_documents
from silo.errors import SiloError, UsageError
from silo.files import write_file, write_json
from silo.findings import OUTCOMES
from silo.language_model import LanguageModel
from silo.licensing import DEFAULT_POLICY
from silo.mixture import Mixture
from silo.progress import progress_bar
from silo.weights import METHODS

PLAN = Path(__file__).with_name("quickstart.yaml")
PERMISSIVE = "permissive text"
"""Name of the permissive side's row among the owners."""
CANDIDATES, EXPLAINED = 60, 5
"""Of so many tokens that gained most by the store, those are explained to which the removed owner gave most."""


@dataclass(frozen=True)
class Plan:
    """What a quickstart runs on; see ``quickstart.yaml``."""

    permissive: list
    restricted: list
    removed_owner: str
    validation_tokens: int
    test_tokens: int
    training: dict

    @classmethod
    def load(cls) -> Plan:
        """Read the plan that comes with SILO."""
        return build(cls, yaml.safe_load(PLAN.read_bytes()), where=PLAN.name)


@dataclass
class Run:
    """Directories and times of one quickstart."""

    out: Path
    downloads: Path
    seed: int
    plan: Plan
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def corpus(self) -> Path:
        """Where both sides of the text are."""
        return self.out / "corpus"

    @property
    def model(self) -> Path:
        """Where the model is."""
        return self.out / "model"

    @property
    def store(self) -> Path:
        """Where the store is."""
        return self.out / "store"

    @contextmanager
    def step(self, name: str, what: str) -> Iterator[None]:
        """Tell what begins, and remember how long it took."""
        click.echo(what, err=True)
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 1)


def quickstart(out: Path, downloads: Path | None, seed: int) -> dict[str, Any]:
    """Run everything and write ``report.json`` and ``report.html``.

    Returns:
        The report, with times and peak memory, which are not part of ``report.json``'s promise to repeat.

    Raises:
        UsageError: ``out`` holds something else than downloads.
        DataError: a wheel could not be fetched; the message says which file to put where.
    """
    run = Run(out, downloads or out / "downloads", seed, Plan.load())
    if out.exists() and any(path != run.downloads for path in out.iterdir()):
        raise UsageError(f"{out} holds an earlier run or other files; delete it, or choose another --out")
    run.downloads.mkdir(parents=True, exist_ok=True)
    with run.step("download", "1/7  downloading the restricted packages, as data"):
        for spec in run.plan.restricted:
            if spec.startswith("pypi:"):
                download(spec, run.downloads)
    with run.step("collect", "2/7  collecting text and reading its licences"):
        collect([*run.plan.permissive, *run.plan.restricted], run.corpus, pairs=True, downloads=run.downloads)
    with run.step("train", "3/7  training tokenizer and model on the permissive side"):
        training = train(run)
    model = LanguageModel.load(run.model)
    with run.step("index", "4/7  building the store of the restricted side"):
        plane = fit_control_plane(model, run.corpus / "permissive", DEFAULT_POLICY, read_trained_on(run.model))
        documents = list(read_documents(run.corpus / "restricted" / "train.jsonl"))
        store = build_store(run, model, run.store, documents, plane)
    report: dict[str, Any] = {
        "version": version("silo-lm"),
        "seed": seed,
        "audit": summarize_audit(run),
        "training": {**training, "model": run.model.name, "fingerprint": model.fingerprint},
        "store": {**describe(store.control), "hash": store.hash, "shards": store.summary()},
    }
    report.update(measure_removal(run, model, store))
    times = {**run.seconds, "total": round(sum(run.seconds.values()), 1)}
    write_json(out / "report.json", {**report, "times": times})
    complete = {**report, "times": times, "peak_memory_bytes": peak_memory_bytes()}
    write_report(complete, out / "report.html")
    if not report["removal"]["equal"]:
        raise SiloError(f"the answers differ from those of a store that never held the owner; see {out}/report.json")
    return complete


def train(run: Run) -> dict[str, Any]:
    """Write a recipe and train by it, as a user would: in a process that only ``silo train`` runs in."""
    recipe = {
        **run.plan.training,
        "corpus": str(run.corpus / "permissive"),
        "output": str(run.model),
        "seed": run.seed,
    }
    path = run.out / "recipe.yaml"
    write_file(path, yaml.safe_dump(recipe, sort_keys=True).encode())
    command = [sys.executable, "-m", "silo", "train", str(path), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        raise SiloError(f"`silo train {path}` failed with exit status {done.returncode}; its own message stands above")
    return json.loads(done.stdout)


def build_store(run: Run, model: LanguageModel, path: Path, documents: list[Document], plane: ControlPlane) -> Store:
    """Make a store with a control plane, and add documents."""
    store = Store.create(path, model, run.model / "tokenizer.json", plane)
    with progress_bar("index") as progress:
        store.add(documents, model, progress=progress)
    return store


def open_mixture(model: LanguageModel, store: Store) -> Mixture:
    """The model beside all that the store can answer with."""
    return store.mixture(model, METHODS)


def summarize_audit(run: Run) -> dict[str, Any]:
    """The corpus by licence, in documents and tokens, and what was refused."""
    found = audit(run.corpus, Tokenizer.from_file(str(run.model / "tokenizer.json")))
    sides: dict[str, Any] = {"permissive": [], "restricted": []}
    for row in found["licenses"]:
        del row["by_owner"]
        sides["restricted" if row["tier"] == "restricted" else "permissive"].append(row)
    outcomes = {outcome: found[outcome] for outcome in OUTCOMES}
    return {**sides, "found": outcomes}


def measure_removal(run: Run, model: LanguageModel, store: Store) -> dict[str, Any]:
    """Measure, remove one owner, measure again, and compare with a store that never held them."""
    owner = run.plan.removed_owner
    mixture = open_mixture(model, store)
    held_out = draw_domains(run, mixture)
    with run.step("measure", "5/7  measuring perplexity, with and without the store"), progress_bar("measure") as bar:
        before = domains.measure(mixture, held_out, progress=bar)
        gone = next(result for result in before if result.domain.name == owner)
        picks = most_gained(gone.domain.test, gains(gone), mixture, CANDIDATES)
        explained = explain(mixture, gone.domain.test, picks, gone.weights["all"])
        ranked = sorted(range(len(picks)), key=lambda index: -share_of(owner, explained[index]))
        chosen = sorted(ranked[:EXPLAINED])
        picks, explained = [picks[index] for index in chosen], [explained[index] for index in chosen]
    with run.step("remove", f"6/7  removing {owner}"):
        receipt = store.remove(Selection(owners=(owner,)), reason="quickstart: the rights holder asked")
        verified = store.verify()["verified"]
    mixture = open_mixture(model, store)
    with run.step("measure_again", "7/7  measuring again, beside a store that never held them"):
        with progress_bar("measure") as bar:
            after = domains.measure(mixture, held_out, progress=bar)
        gone_after = next(result for result in after if result.domain.name == owner)
        explained_after = explain(mixture, gone.domain.test, picks, gone_after.weights["all"])
        proof = prove(run, model, store, mixture, after)
    removed = receipt.content["documents"]
    return {
        "perplexity": {
            "restricted": domains.together([result for result in before if not result.domain.permissive]),
            "permissive": domains.together([result for result in before if result.domain.permissive]),
            "after_removal": domains.together([result for result in after if not result.domain.permissive]),
            "removed_owner": {"before": gone.perplexity, "after": gone_after.perplexity},
        },
        "owners": [
            domains.to_json(one, other, removed=one.domain.name == owner)
            for one, other in zip(before, after, strict=True)
        ],
        "attribution": [merge(one, other) for one, other in zip(explained, explained_after, strict=True)],
        "removal": {
            "owner": owner,
            "documents": len(removed),
            "tokens": sum(document["tokens"] for document in removed),
            "receipt": str(receipt.path.relative_to(run.out)),
            "store_before": receipt.content["store_before"],
            "verified": verified,
            **proof,
        },
    }


def prove(run: Run, model: LanguageModel, store: Store, mixture: Mixture, after: list[Result]) -> dict[str, Any]:
    """Build a store that never held the owner, and compare hashes and every bit of every distribution."""
    documents = read_documents(run.corpus / "restricted" / "train.jsonl")
    never = [document for document in documents if document.owner != run.plan.removed_owner]
    fresh = build_store(run, model, run.out / "store-that-never-held-them", never, store.control)
    ours, theirs = (domains.digest(one, after, "all") for one in (mixture, open_mixture(model, fresh)))
    return {
        "store_after": store.hash,
        "fresh_store": fresh.hash,
        "positions": sum(len(text.tokens) for result in after for text in result.domain.test),
        "distributions_after": ours,
        "distributions_fresh": theirs,
        "equal": ours == theirs and store.hash == fresh.hash,
    }


def draw_domains(run: Run, mixture: Mixture) -> list[Domain]:
    """One domain for each owner of the restricted side, and one for the permissive side."""
    budgets = (run.plan.validation_tokens, run.plan.test_tokens)
    by_owner: dict[str, tuple[list[Document], list[Document]]] = {}
    for index, split in enumerate(("val", "test")):
        for document in read_documents(run.corpus / "restricted" / f"{split}.jsonl"):
            by_owner.setdefault(document.owner, ([], []))[index].append(document)
    # A lone file that its own text restricts, out of a permissive package, makes no domain.
    measured = sorted(owner for owner, (validation, test) in by_owner.items() if validation and test)
    drawn = [Domain.draw(owner, by_owner[owner], mixture, budgets) for owner in measured]
    files = [
        [document for document in read_documents(run.corpus / "permissive" / f"{split}.jsonl") if not document.prompt]
        for split in ("val", "test")
    ]
    several = (budgets[0] * 2, budgets[1] * 2)
    permissive = Domain.draw(PERMISSIVE, (files[0], files[1]), mixture, several)
    return [*drawn, replace(permissive, permissive=True)]


def gains(result: Result) -> Any:
    """How much each token's log-probability gained by the store."""
    return result.scores.log_probabilities(result.weights["all"]) - result.scores.lm.log()


def merge(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """One explained token, before and after."""
    split = ("probability", "documents", "shares")
    place = {name: value for name, value in before.items() if name not in split}
    return {**place, "before": {name: before[name] for name in split}, "after": {name: after[name] for name in split}}


def peak_memory_bytes() -> int:
    """Peak resident memory of the largest process of this run."""
    return 1024 * max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def last_line(report: dict[str, Any], out: Path) -> dict[str, Any]:
    """What the last line of stdout holds."""
    return {
        "model": str(out / "model"),
        "store": str(out / "store"),
        "perplexity": report["perplexity"],
        "removed": {
            "owner": report["removal"]["owner"],
            "receipt": str(out / report["removal"]["receipt"]),
            "equal_to_never_added": report["removal"]["equal"],
        },
        "report": str(out / "report.html"),
        "seconds": report["times"],
        "peak_memory_bytes": report["peak_memory_bytes"],
    }
