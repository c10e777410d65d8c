"""Membership after removal: whether text that was taken out can still be told from text that never was there.

MUSE's two questions (Shi 2024, https://arxiv.org/abs/2407.06460), after 1, 2, 4 and more removals in a row: whether
scores of removed text are higher than those of text that was never held (privacy leakage), and whether the removed text
is written on word for word (verbatim memorisation). Each is asked of the whole store, of the store after the removals,
and of one that never held what was removed, which stands for MUSE's model trained again; the last two must be equal.
Text that other documents hold too stays known after the removals, as it is to the store that never held them.

A passage's score is the mean log-probability of its tokens (``loss``), or that of the least probable fifth of them
(``min_k``, Min-K% Prob, Shi 2024, https://arxiv.org/abs/2310.16789).
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from datastore.selection import Selection
from datastore.shard import DocumentRow
from datastore.store import Store
from eval.perplexity import Text, score
from eval.studies.continuation import continued, longest_run, longest_subsequence
from eval.studies.figure import Panel, Series, draw
from eval.studies.opt_out import MOMENTS, never
from eval.studies.subject import Progress, Subject, Weighings, by_text, most, rows_of
from silo.documents import Document
from silo.errors import UsageError
from silo.files import sha256

PROMPT, WRITTEN = 32, 64
"""Tokens of a passage that are read as a prompt, and those after it that should not be written. MUSE takes 200 words
each for models that read more."""
LEAST_PROBABLE = 0.2
"""k of Min-K% Prob."""
Unit = Literal["document", "owner"]


@dataclass(frozen=True)
class Leaving:
    """What one removal takes out, and a passage of it."""

    name: str
    selection: Selection
    ids: frozenset[str]
    passage: Text


@dataclass(frozen=True)
class Asked:
    """What one store says of removed passages and of others."""

    removed: np.ndarray
    """(removals, tokens) float64 log-probabilities."""
    others: np.ndarray
    """(others, tokens) float64."""
    written: np.ndarray
    """(removals, tokens) what it writes after the removed passages' prompts."""

    def first(self, count: int) -> Asked:
        """The same of the first removals alone."""
        return Asked(self.removed[:count], self.others, self.written[:count])

    def equals(self, other: Asked) -> bool:
        """Whether another store says the same in every bit."""
        pairs = ((self.removed, other.removed), (self.others, other.others), (self.written, other.written))
        return all(one.tobytes() == also.tobytes() for one, also in pairs)


def leaving(subject: Subject, unit: Unit, count: int) -> list[Leaving]:
    """The first ``count`` documents, or owners, in the order of their hashed names that have a passage long enough.

    Raises:
        UsageError: there are too few, so that nothing would be left in the store.
    """
    hidden = subject.left_out.documents if subject.left_out else ()
    by_name: dict[str, list[DocumentRow]] = {}
    for row in rows_of(subject.store):
        if row.id not in hidden:
            by_name.setdefault(row.id if unit == "document" else row.owner, []).append(row)
    found: list[Leaving] = []
    for name in sorted(filter(None, by_name), key=lambda name: sha256(name.encode())):
        rows = by_name[name]
        passage = _passage(subject, rows)
        if passage is not None and len(found) < count:
            named = Selection(documents=(name,)) if unit == "document" else Selection(owners=(name,))
            found.append(Leaving(name, named, frozenset(row.id for row in rows), passage))
    if len(found) < count or len(by_name) == count:
        raise UsageError(
            f"{count} removals of a store with {len(by_name)} {unit}s, of which {len(found)} or more have a passage of "
            f"{PROMPT + WRITTEN} tokens; give --removals a smaller number"
        )
    return found


def _passage(subject: Subject, rows: Sequence[DocumentRow]) -> Text | None:
    """A passage of the longest of some documents, as the store holds it."""
    row = max(rows, key=lambda row: (row.end - row.begin, row.id))
    shard = subject.store.shard(row.owner or row.source)
    tokens = np.asarray(shard.tokens[row.begin : row.end]).astype(np.int32)
    document = Document(id=row.id, text=row.id, license=row.license, owner=row.owner, source=row.source)
    return cut(document, tokens)


def cut(document: Document, tokens: np.ndarray) -> Text | None:
    """A passage of a document, at a place that hangs on its id; None if it is too short."""
    length = PROMPT + WRITTEN
    if len(tokens) < length:
        return None
    begin = int(sha256(document.id.encode())[:8], 16) % (len(tokens) - length + 1)
    return Text(document, tokens[begin : begin + length], begin)


def study(subject: Subject, unit: Unit, removals: int, progress: Progress | None = None) -> dict[str, Any]:
    """Take out one after the other, and ask at 1, 2, 4 and so on.

    Returns:
        ``steps``: of each, at each moment, the AUC of both scores, the mean share of the true continuation that is
        written (``rouge_l``; on texts of equal length its recall, precision and F1 are one), and the longest run of
        it (``longest_run``); MUSE's ``priv_leak``, (AUC after - AUC never) / AUC never; whether all is ``equal``.
    """
    going = leaving(subject, unit, removals)
    others = [text for text in (cut(each, subject.model.tokenize(each)) for each in subject.test) if text is not None]
    if not others:
        raise UsageError(f"no document of --data has {PROMPT + WRITTEN} tokens; give longer ones")
    weighings = subject.weighings(subject.mixture())
    before = ask(subject, subject.store, going, others, weighings)
    counts = [2**power for power in range(removals.bit_length()) if 2**power <= removals]
    steps = []
    with tempfile.TemporaryDirectory(prefix="silo-membership-") as directory:
        copy = Path(directory) / "after"
        shutil.copytree(subject.store.path, copy, ignore=shutil.ignore_patterns(".lock", "spool"))
        done = 0
        for number, count in enumerate(counts, start=1):
            for each in going[done:count]:
                Store.open(copy).remove(each.selection, reason="study of membership")
            done = count
            kept = {row.id for row in rows_of(subject.store)} - frozenset().union(*(each.ids for each in going[:count]))
            afresh = never(subject, kept, Path(directory) / str(count), seed=count)
            stores = {"after": Store.open(copy), "never": afresh}
            said = {name: ask(subject, store, going[:count], others, weighings) for name, store in stores.items()}
            steps.append(_step(going[:count], {"before": before.first(count), **said}, stores))
            if progress:
                progress(number, len(counts))
    return {
        "unit": unit,
        "others": len(others),
        "prompt_tokens": PROMPT,
        "written_tokens": WRITTEN,
        "mixture": most(list(weighings)),
        "steps": steps,
        "equal": all(step["equal"] for step in steps),
    }


def ask(
    subject: Subject, store: Store, going: Sequence[Leaving], others: Sequence[Text], weighings: Weighings
) -> Asked:
    """Score passages with a store, and write on after those that leave."""
    mixture, weighing = subject.mixture(store), weighings[most(list(weighings))]
    passages = [each.passage for each in going]
    logs = []
    for texts in (passages, others):
        scores = score(mixture, texts)
        logs.append(np.stack(by_text(scores.log_probabilities(weighing).numpy(), scores)))
    prompts = np.stack([text.tokens[:PROMPT] for text in passages])
    return Asked(logs[0], logs[1], continued(mixture, weighing, prompts, WRITTEN))


def _step(going: Sequence[Leaving], said: dict[str, Asked], stores: dict[str, Store]) -> dict[str, Any]:
    row: dict[str, Any] = {"removals": len(going), "documents": sum(len(each.ids) for each in going)}
    row["auc"] = {
        name: {moment: auc(of(said[moment].removed), of(said[moment].others)) for moment in MOMENTS}
        for name, of in SCORES.items()
    }
    row["priv_leak"] = {
        name: (of["after"] - of["never"]) / of["never"] for name, of in row["auc"].items() if of["never"]
    }
    truth = [each.passage.tokens[PROMPT:].tolist() for each in going]
    for name, of in (("rouge_l", longest_subsequence), ("longest_run", longest_run)):
        row[name] = {}
        for moment in MOMENTS:
            written = said[moment].written.tolist()
            found = [of(one, other) for one, other in zip(written, truth, strict=True)]
            row[name][moment] = float(np.mean(found)) / WRITTEN if name == "rouge_l" else max(found)
    equal = said["after"].equals(said["never"]) and stores["after"].hash == stores["never"].hash
    return {**row, "equal": equal}


def mean_log(logs: np.ndarray) -> np.ndarray:
    """Mean log-probability of each passage, of (passages, tokens)."""
    return logs.mean(axis=1)


def min_k(logs: np.ndarray) -> np.ndarray:
    """The same of each passage's least probable tokens."""
    count = max(1, round(LEAST_PROBABLE * logs.shape[1]))
    return np.sort(logs, axis=1)[:, :count].mean(axis=1)


SCORES = {"loss": mean_log, "min_k": min_k}


def auc(members: np.ndarray, others: np.ndarray) -> float:
    """How often a member's score is above another's, ties half: 0.5 tells nothing, 1 tells all."""
    above = members[:, None] - others[None, :]
    return float((above > 0).mean() + 0.5 * (above == 0).mean())


def figure(result: dict[str, Any]) -> str:
    """AUC of Min-K% Prob and the share that is written, against the removals."""
    steps = result["steps"]
    x = [step["removals"] for step in steps]
    names = {"before": "whole store", "after": "after the removals", "never": "store that never held them"}
    panels = [
        Panel(label, y_label, [Series(names[moment], x, [of(step)[moment] for step in steps]) for moment in MOMENTS],
              x_scale="log")
        for label, y_label, of in (
            ("removals in a row", "AUC of Min-K% Prob", lambda step: step["auc"]["min_k"]),
            ("removals in a row", "written of the true text, ROUGE-L", lambda step: step["rouge_l"]),
        )
    ]  # fmt: skip
    return draw("Membership after removal", panels)
