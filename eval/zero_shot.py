"""Zero-shot choices, scored in the ways of which published numbers are made, side by side.

A task is JSON Lines, one question a line:

    {"context": "Is this review good or bad?\\n{options}\\nI liked it.\\nAnswer:", "options": ["good", "bad"],
     "answer": 0, "domain_prompt": "Answer:"}

``answer`` is an option or its number, from 0. Where ``{options}`` stands in the context the options are listed, one a
line. Three scores of an option y after a context x are compared:

- ``plain``: log p(y | x).
- ``normalised``: log p(y | x) for each UTF-8 byte of y, so that short options have no advantage.
- ``pmi``: log p(y | x) − log p(y | domain prompt), what the context says for y beyond what the domain does: the
  domain-conditional PMI of Holtzman 2021, which SILO's zero-shot tasks are scored by (Min 2023, table 5).

A model likes what is listed at one place more than at another. So a listed question is asked in several orders, and an
option's score is the mean over them: all orders of up to three options, and of more one order for each of them, in
which every option has every place once. They are made from the sorted options; the file's order changes nothing.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np

from eval.continuations import Pair, Progress, score_pairs
from eval.metrics import bootstrap
from silo.errors import DataError, UsageError
from silo.mixture import Mixture
from silo.weights import Weighing

LISTED = "{options}"
SCORINGS = ("plain", "normalised", "pmi")
ALL_ORDERS = 3
"""Of so many options every order is asked."""
MOST_OPTIONS = 64


@dataclass(frozen=True)
class Question:
    """One question of a task."""

    context: str
    options: tuple[str, ...]
    answer: int
    """Which option is right, from 0."""
    domain_prompt: str
    """What stands before the answer of every question of this kind."""

    def contexts(self) -> list[str]:
        """The context once for each order in which its options are listed; once as it is if they are not."""
        if LISTED not in self.context:
            return [self.context]
        return [self.context.replace(LISTED, "\n".join(order)) for order in orders(self.options)]


def orders(options: Sequence[str]) -> list[tuple[str, ...]]:
    """In which orders options are listed, whatever their order here.

    >>> orders(["b", "a"]), orders(["a", "b", "c", "d"])[1]
    ([('a', 'b'), ('b', 'a')], ('b', 'c', 'd', 'a'))
    """
    ordered = sorted(options)
    if len(ordered) <= ALL_ORDERS:
        return list(permutations(ordered))
    return [(*ordered[first:], *ordered[:first]) for first in range(len(ordered))]


def read_task(path: Path, domain_prompt: str | None = None) -> list[Question]:
    """Read a task; ``domain_prompt`` is that of the questions that name none.

    Raises:
        UsageError: there is no such file.
        DataError: a line is no question, or has no domain prompt.
    """
    if not path.is_file():
        raise UsageError(f"{path} does not exist or is not a file; expected JSON Lines, one question a line")
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if line.strip():
            found.append(_question(line, domain_prompt, f"{path}:{number}"))
    if len(found) < 2:
        raise DataError(f"{path} has {len(found)} questions; expected at least 2, one JSON object a line")
    return found


def _question(line: bytes, domain_prompt: str | None, where: str) -> Question:
    try:
        record = json.loads(line)
        context, options, answer = record["context"], record["options"], record["answer"]
        prompt = record.get("domain_prompt", domain_prompt)
    except (ValueError, TypeError, KeyError, AttributeError):
        raise DataError(f"{where} is no question; expected a JSON object with context, options and answer") from None
    if not isinstance(context, str) or not isinstance(options, list) or not all(isinstance(o, str) for o in options):
        raise DataError(f"{where}: context and options are to be text, and options a list of it")
    if not (2 <= len(set(options)) == len(options) <= MOST_OPTIONS) or not all(each.strip() for each in options):
        raise DataError(f"{where} has the options {options}; expected 2 to {MOST_OPTIONS}, none empty or named twice")
    if answer in options:
        answer = options.index(answer)
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(options):
        raise DataError(f"{where} has the answer {answer!r}; expected one of its options, or its number from 0")
    if not isinstance(prompt, str):
        raise DataError(f"{where} has no domain_prompt; give it there, such as 'Answer:', or as --domain-prompt")
    return Question(context, tuple(options), answer, prompt)


def score_task(
    mixture: Mixture,
    weighings: Mapping[str, Weighing],
    questions: Sequence[Question],
    *,
    progress: Progress | None = None,
) -> dict[str, dict[str, list[np.ndarray]]]:
    """Score every option of every question: by the name of a weighing and of a scoring, (options,) a question.

    An option is the same tokens after every context: it is tokenised by itself, after a blank where the context does
    not end in one.
    """
    pairs: list[Pair] = []
    places = []
    for question in questions:
        before = [*question.contexts(), question.domain_prompt]
        places.append((len(pairs), len(before)))
        pairs += [_pair(mixture, context, option) for context in before for option in question.options]
    scored = score_pairs(mixture, weighings, pairs, progress=progress)
    found: dict[str, dict[str, list[np.ndarray]]] = {name: {each: [] for each in SCORINGS} for name in weighings}
    for question, (first, contexts) in zip(questions, places, strict=True):
        size = np.asarray([len(option.encode()) for option in question.options])
        for name, out in found.items():
            own = scored[first : first + contexts * len(size)]
            given = np.reshape([each[name].log_probability for each in own], (contexts, len(size)))
            plain = given[:-1].mean(axis=0)
            for scoring, value in zip(SCORINGS, (plain, plain / size, plain - given[-1]), strict=True):
                out[scoring].append(value)
    return found


def _pair(mixture: Mixture, context: str, option: str) -> Pair:
    blank = "" if not context or context[-1].isspace() else " "
    ids = (mixture.model.tokenizer(text, add_special_tokens=False, verbose=False) for text in (context, blank + option))
    before, after = (tuple(each["input_ids"]) for each in ids)
    return Pair(before, after)


def right(scores: np.ndarray, answer: int) -> float:
    """1 if the answer has the highest score (options,), 0 if not, and its share where several have the highest.

    >>> right(np.array([2.0, 1.0, 2.0]), 0)
    0.5
    """
    best = scores == scores.max()
    return float(best[answer] / best.sum())


def summary(questions: Sequence[Question], scores: Mapping[str, Mapping[str, Sequence[np.ndarray]]]) -> dict[str, Any]:
    """Accuracy of each weighing and scoring with its interval over questions, and what chance and how many orders are.

    Where every answer is right, or none, the interval has no width: what was never drawn cannot be drawn again.
    """
    rows = []
    for name, of in scores.items():
        for scoring in SCORINGS:
            hits = [right(own, question.answer) for own, question in zip(of[scoring], questions, strict=True)]
            columns = np.stack([hits, np.ones(len(hits))], axis=1)
            found = bootstrap([columns], lambda drawn: drawn[0][..., 0] / drawn[0][..., 1])
            rows.append({"mixture": name, "scoring": scoring, "accuracy": list(found)})
    asked = Counter(len(question.contexts()) for question in questions)
    return {
        "questions": len(questions),
        "chance": float(np.mean([1 / len(question.options) for question in questions])),
        "orders": {str(count): asked[count] for count in sorted(asked)},
        "rows": rows,
    }
