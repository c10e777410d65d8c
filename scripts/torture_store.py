"""What is left of a store whose change was cut off: by ``kill -9``, or by a disk that fails.

    python scripts/torture_store.py CORPUS/*.jsonl.zst --model quickstart/model > scripts/results/torture.json

An add, the removals of an owner and of a document, and another gate in place of the store's are made on copies of a
small store of several groups, and

- killed at random moments, from the first write on to the end;
- killed at each write in turn, half of its bytes written;
- let down by the disk at each write in turn (ENOSPC, EIO; that one write, or all from there on).

Each time the store must open, answer as before or as after the change, verify, and take the next change; and after
that hold the very files of a store to which nothing ever happened. And one bit is flipped in every file of the store
in turn, which ``verify`` must name. Writes are counted by ``failing_writes.c``, which sees Java's too; without a C
compiler there are only kills at random moments. What a power cut does to writes that were not synced cannot be seen
here: a kill leaves the kernel's cache as it is.

Prints one JSON document: machine, command, commit, seed, data hash, result. Exits with 1 if anything was wrong.
"""

from __future__ import annotations

import errno
import itertools
import json
import multiprocessing
import os
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import click
import failing_writes
import faiss
import torch
from failing_writes import Disk
from recording import command, commit, files_hash, machine

from datastore import groups, jvm
from datastore.control import ControlPlane
from datastore.store import SPOOL, Selection, Store
from silo.documents import Document
from silo.errors import IntegrityError, SiloError
from silo.files import canonical_json, sha256, sha256_file
from silo.gate import HIDDEN, Gate
from silo.language_model import LanguageModel
from silo.licensing import DEFAULT_POLICY
from silo.sources import open_source

SIZES: tuple[tuple[int, ...], ...] = ((1,), (1,), (HIDDEN, 1), (HIDDEN,), (3, HIDDEN), (3,))
CHANGES = ("add", "remove owner", "remove document", "keep gate")
GATES = [
    Gate(("lm", "knn"), ("lm_top",), tuple(torch.ones(each, dtype=torch.float64) for each in SIZES), temperature)
    for temperature in (1.0, 2.0)
]
"""Of one feature and two methods."""
COMMITTED = "is committed, but what it replaced may still be on disk"
FORKING = multiprocessing.get_context("fork")
WITH_TIMES = "log.jsonl"


class Patient:
    """A small store, and the changes that are made on copies of it."""

    def __init__(self, root: Path, model: Path, documents: list[Document], control_text: list[Document]) -> None:
        self.root, self.model_directory = root, model
        self.model = LanguageModel.load(model)
        self.work = root / "work"
        self.initial, (*self.new, self.later) = documents[:9], documents[9:12]
        self.control = ControlPlane.fit(self._keys(control_text), [])
        self.asked = self._keys(documents[::4])[::40].copy()
        self.queries = [document.text[100:300] for document in documents]
        self.disk = Disk.here()

    def _keys(self, documents: list[Document]) -> Any:
        import numpy as np

        return np.concatenate([self.model.keys(self.model.tokenize(document)) for document in documents])

    def create(self, path: Path) -> None:
        """Make the store as it is before any change."""
        store = Store.create(path, self.model, self.model_directory / "tokenizer.json", self.control)
        store.add(self.initial, self.model)
        self.keep_gate(store, GATES[0])

    @staticmethod
    def keep_gate(store: Store, gate: Gate) -> None:
        """Make a gate the store's own."""
        made_for = {"model": store.manifest.model["fingerprint"], "control": store.manifest.control, "teachers": []}
        store.keep_gate(gate, made_for)

    def change(self, name: str, path: Path) -> None:
        """Make a change; ``next`` is the one that follows what was cut off."""
        store = Store.open(path)
        if name == "add":
            store.add(self.new, self.model)
        elif name == "next":
            store.add([self.later], self.model)
        elif name == "remove owner":
            store.remove(Selection(owners=(self.initial[0].owner,)), reason="torture")
        elif name == "keep gate":
            self.keep_gate(store, GATES[1])
        else:
            store.remove(Selection(documents=(self.initial[1].id,)), reason="torture")

    def answers(self, store: Store) -> str:
        """One hash over what a store answers."""
        found = store.neighbours().search(self.asked, 16)
        arrays = [each.tobytes().hex() for each in (found.distances, found.values, found.positions)]
        hits = store.blocks().search(self.queries, 1)
        blocks = [[each.document.id, each.start, each.score] for each in itertools.chain.from_iterable(hits)]
        return sha256(canonical_json([*state_of(store), arrays, blocks]))

    def renew(self) -> None:
        """Undo everything: work on a fresh copy, on a disk that does not fail."""
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.root / "store", self.work)
        self.mend()

    def mend(self) -> None:
        """Let the disk not fail."""
        if self.disk is not None:
            self.disk.watch(self.work)


def picture(path: Path) -> dict[str, str]:
    """The hash of every file of a store, by its name there; an unfinished add's spool is no part of it."""
    files = (file for file in sorted(path.rglob("*")) if not file.is_dir() and file.parent != path / SPOOL)
    return {file.relative_to(path).as_posix(): sha256_file(file) for file in files}


def state_of(store: Store) -> tuple[str, str]:
    """What tells before from after: the store's hash, and its gate, which is no part of that."""
    return store.hash, store.manifest.gate


def reference(patient: Patient, changes: list[str]) -> dict[str, Any]:
    """What a store is to which some changes were made undisturbed: state, answers, files (None: not always equal)."""
    pictures = []
    for _ in range(2):
        patient.renew()
        for name in changes:
            patient.change(name, patient.work)
        pictures.append(picture(patient.work))
    files = {name: digest if pictures[1].get(name) == digest else None for name, digest in pictures[0].items()}
    files[WITH_TIMES] = None
    opened = Store.open(patient.work)
    return {"state": state_of(opened), "answers": patient.answers(opened), "files": files}


class Judge:
    """Says what is wrong with a store whose change was cut off."""

    def __init__(self, patient: Patient) -> None:
        self.patient = patient
        self.known: dict[tuple[str, ...], dict[str, Any]] = {}

    def expected(self, *changes: str) -> dict[str, Any]:
        """The store after some changes."""
        if changes not in self.known:
            kept = self.patient.root / "kept"
            if cut_off := self.patient.work.exists():
                self.patient.work.rename(kept)
            self.known[changes] = reference(self.patient, list(changes))
            shutil.rmtree(self.patient.work)
            if cut_off:
                kept.rename(self.patient.work)
        return self.known[changes]

    def differing(self, *changes: str) -> list[str]:
        """The files in which the store is not the one after some changes."""
        found, expected = picture(self.patient.work), self.expected(*changes)["files"]
        names = found.keys() | expected.keys()
        return sorted(
            name
            for name in names
            if name not in found or name not in expected or expected[name] not in (None, found[name])
        )

    def __call__(self, change: str, *, verify: bool) -> dict[str, Any]:
        """The state of the store, and what is wrong with it; the next change comes after ``verify`` or at once."""
        wrong: list[str] = []
        state = "none"
        try:
            store = Store.open(self.patient.work)
            made = {self.expected()["state"]: (), self.expected(change)["state"]: (change,)}[state_of(store)]
            state = "after" if made else "before"
            if self.patient.answers(store) != self.expected(*made)["answers"]:
                wrong.append("other answers")
            if verify:
                store.verify()
                wrong += [f"verified: {name}" for name in self.differing(*made)]
            self.patient.change("next", self.patient.work)
            wrong += [f"after the next change: {name}" for name in self.differing(*made, "next")]
            store = Store.open(self.patient.work)
            store.verify()
            if self.patient.answers(store) != self.expected(*made, "next")["answers"]:
                wrong.append("other answers after the next change")
        except Exception as error:  # whatever it is, the store did not survive
            wrong.append(f"{type(error).__name__}: {error}")
        return {"state": state, "wrong": wrong}


class Helper:
    """A process of its own, forked before a Java machine runs, that answers requests one by one."""

    def __init__(self, answer: Callable[..., Any]) -> None:
        self._connection, theirs = FORKING.Pipe()
        self._process = FORKING.Process(target=self._serve, args=(theirs, answer), daemon=True)
        self._process.start()

    @staticmethod
    def _serve(connection: Connection, answer: Callable[..., Any]) -> None:
        while (request := connection.recv()) is not None:
            connection.send(answer(**request))

    def __call__(self, **request: Any) -> Any:
        """Ask, and wait for the answer."""
        self._connection.send(request)
        return self._connection.recv()

    def close(self) -> None:
        """End the process."""
        self._connection.send(None)
        self._process.join()


def let_down(patient: Patient, judge: Judge, change: str, fail_at: int, error: int, stays: bool) -> dict[str, Any]:
    """Make a change on a disk that fails, and judge what is left."""
    disk, said = patient.disk, ""
    if disk is None:
        raise click.ClickException("the disk cannot be made to fail in this process")
    patient.renew()
    disk.watch(patient.work, fail_at=fail_at, error=error, stays=stays)
    try:
        patient.change(change, patient.work)
    except (SiloError, OSError) as caught:
        said = str(caught)
    finally:
        count, failed = disk.count, disk.failed
        before = picture(patient.root / "store")
        new = {path: path.stat().st_size for path in patient.work.rglob("*") if path.is_file()}
        fresh = {path: size for path, size in new.items() if path.relative_to(patient.work).as_posix() not in before}
        unseen = [path.name for path in disk.unseen(fresh)] if not fail_at else []
        patient.mend()
    judged = judge(change, verify=fail_at % 2 == 0)
    if bool(said) != (judged["state"] == "before" or COMMITTED in said):
        judged["wrong"].append(f"it is {judged['state']} the change, and was told {said!r}")
    return {**judged, "count": count, "failed": failed, "said": said, "unseen": unseen}


def victim(patient: Patient, change: str, ready: Connection, fail_at: int) -> None:
    """Start Java, say so, and make a change; in a process that will be killed."""
    sys.stderr = sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (dies with the process)
    jvm.start()
    if fail_at and patient.disk is not None:
        patient.disk.watch(patient.work, fail_at=fail_at)
    ready.send(True)
    patient.change(change, patient.work)
    os._exit(0)


def run_victim(patient: Patient, change: str, *, seconds: float | None = None, fail_at: int = 0) -> tuple[bool, float]:
    """Whether the victim was killed, some seconds after it began or at one of its writes, and how long it lived."""
    patient.renew()
    ours, theirs = FORKING.Pipe()
    process = FORKING.Process(target=victim, args=(patient, change, theirs, fail_at))
    process.start()
    ours.recv()
    begin = time.perf_counter()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
    lived = time.perf_counter() - begin
    patient.mend()
    return process.exitcode != 0, lived


def killed_at_random(patient: Patient, judge: Helper, kills: int, seed: int) -> dict[str, Any]:
    """Kill at moments drawn evenly over the time that each change takes."""
    rng = random.Random(seed)
    takes = {change: max(run_victim(patient, change)[1] for _ in range(3 if kills else 1)) for change in CHANGES}
    tally, done = Tally("killed"), 0
    while done < kills:
        change = CHANGES[done % len(CHANGES)]
        if run_victim(patient, change, seconds=rng.uniform(0, takes[change]))[0]:
            tally.add(change, judge(change=change, verify=rng.random() < 0.5), "at a random moment")
            done += 1
    return {**tally.result(), "seconds_of_a_change": takes}


def killed_at_writes(patient: Patient, judge: Helper, writes: list[tuple[str, int]]) -> dict[str, Any]:
    """Kill at some writes of every change, one after the other."""
    tally = Tally("killed at a write")
    for change, number in writes:
        if run_victim(patient, change, fail_at=number)[0]:
            tally.add(change, judge(change=change, verify=number % 2 == 0), f"at write {number}")
    return tally.result()


class Tally:
    """Counts outcomes, and keeps what was wrong."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._states: dict[str, Counter[str]] = {change: Counter() for change in CHANGES}
        self._wrong: list[str] = []

    def add(self, change: str, judged: dict[str, Any], where: str) -> None:
        """One more."""
        self._states[change][judged["state"]] += 1
        found = [f"{change}, {where}: {each}" for each in judged["wrong"]]
        self._wrong += found
        for line in found:
            say(line)
        total = sum(sum(each.values()) for each in self._states.values())
        if total % 50 == 0:
            say(f"{self._name}: {total}")

    def result(self) -> dict[str, Any]:
        """As JSON."""
        return {"states": {change: dict(each) for change, each in self._states.items()}, "wrong": self._wrong}


def failing(ask: Helper, writes: list[tuple[str, int]], stride: int) -> dict[str, Any]:
    """Let the disk fail at every write, in each of four ways; at one in ``stride`` of these occasions."""
    found: dict[str, Any] = {}
    ways = list(product((errno.ENOSPC, errno.EIO), (False, True)))
    occasions = [(way, write) for way in ways for write in writes][stride - 1 :: stride]
    for error, stays in ways:
        name = f"{errno.errorcode[error]}, {'that write and all after it' if stays else 'that write'}"
        tally, passed = Tally(name), Counter[str]()
        for change, number in [write for way, write in occasions if way == (error, stays)]:
            judged = ask(change=change, fail_at=number, error=error, stays=stays)
            if not judged["said"]:
                passed[judged["failed"].split()[0]] += 1
            tally.add(change, judged, f"{name} {number} ({judged['failed']})")
        found[name] = {**tally.result(), "succeeded_all_the_same": dict(passed)}
    return found


def flipped(patient: Patient, seed: int) -> dict[str, Any]:
    """Flip one random bit of every file of a store, one after the other: ``verify`` must name the file."""
    rng, wrong = random.Random(seed), []
    patient.renew()
    files = [path for path in sorted(patient.work.rglob("*")) if path.is_file() and path.stat().st_size]
    for path in files:
        good = path.read_bytes()
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        path.write_bytes(bad)
        said = ""
        try:
            Store.open(patient.work).verify()
        except IntegrityError as error:
            said = str(error)
        if str(path) not in said:
            wrong.append(f"a flipped bit in {path.relative_to(patient.work)}: {said or 'nothing was said'}")
        path.write_bytes(good)
    Store.open(patient.work).verify()
    return {"files": len(files), "names": sorted({path.name for path in files}), "wrong": wrong}


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def draw(files: tuple[Path, ...], seed: int) -> tuple[list[Document], list[Document]]:
    """Twelve short restricted documents of four owners, and some permissive ones."""
    documents = [document for file in files for document in open_source(str(file))]
    documents.sort(key=lambda document: sha256(f"{seed} {document.id}".encode()))
    restricted = [each for each in documents if not DEFAULT_POLICY.tier(each).permissive and len(each.text) > 2000]
    permissive = [each for each in documents if DEFAULT_POLICY.tier(each).permissive][:20]
    owners = ("one", "two", "three", "one", "two", "three", "one", "two", "three", "one", "four", "three")
    short = [
        replace(each, owner=owner, text=each.text[1000:1800]) for each, owner in zip(restricted, owners, strict=False)
    ]
    return short, [replace(each, text=each.text[:4000]) for each in permissive]


def torture(patient: Patient, kills: int, stride: int, seed: int) -> dict[str, Any]:
    """All of it."""
    maker = FORKING.Process(target=patient.create, args=(patient.root / "store",))
    maker.start()
    maker.join()
    judge = Judge(patient)
    helper = Helper(lambda **request: let_down(patient, judge, **request) if "error" in request else judge(**request))
    result: dict[str, Any] = {
        "flipped_bits": flipped(patient, seed),
        "killed_at_random_moments": killed_at_random(patient, helper, kills, seed),
    }
    if patient.disk is None:
        helper.close()
        return {**result, "skipped": "no C compiler: no failing writes, no kills at each write"}
    undisturbed = {change: helper(change=change, fail_at=0, error=0, stays=False) for change in CHANGES}
    counts = {change: each["count"] for change, each in undisturbed.items()}
    result["writes"] = counts
    result["files_with_bytes_that_no_write_was_seen_of"] = {
        change: each["unseen"] for change, each in undisturbed.items()
    }
    writes = [(change, number) for change, count in counts.items() for number in range(1, count + 1)]
    result["failing_writes"] = failing(helper, writes, stride)
    result["killed_at_writes"] = killed_at_writes(patient, helper, writes[stride - 1 :: stride])
    helper.close()
    return result


def all_wrong(value: Any) -> list[str]:
    """Everything that was found to be wrong, anywhere in the result."""
    if not isinstance(value, dict):
        return []
    unseen = value.get("files_with_bytes_that_no_write_was_seen_of", {})
    own = [*value.get("wrong", []), *(name for names in unseen.values() for name in names)]
    return own + [each for item in value.values() for each in all_wrong(item)]


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--model", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--kills", default=300, show_default=True, help="At random moments, over all changes.")
@click.option("--stride", default=1, show_default=True, help="One in so many writes fails.")
@click.option("--seed", default=0, show_default=True)
def main(files: tuple[Path, ...], model: Path, kills: int, stride: int, seed: int) -> None:
    """Torture, and print one JSON document."""
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    groups.GROUP_TOKENS = 1500  # several groups of a few documents
    with failing_writes.scratch() as scratch:
        root = Path(scratch)
        if Disk.here() is None and (library := failing_writes.build(root)):
            environment = Disk(root / "control", root / "log").environment(library)
            code = os.spawnve(os.P_WAIT, sys.executable, [sys.executable, *sys.argv], {**os.environ, **environment})
            sys.exit(code)
        begin = time.perf_counter()
        result = torture(Patient(root, model, *draw(files, seed)), kills, stride, seed)
        seconds = time.perf_counter() - begin
    report = {
        "machine": machine(),
        "command": command(),
        "commit": commit(),
        "seed": seed,
        "data": files_hash(files),
        "seconds": seconds,
        "result": result,
    }
    print(json.dumps(report, indent=1))
    sys.exit(1 if all_wrong(result) else 0)


if __name__ == "__main__":
    main()
