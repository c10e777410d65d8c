"""Licence tiers added one by one: what each class of licences adds to the store, and for whose text.

Steps go from the freest text to the strictest, by what the licences themselves permit (:mod:`silo.purposes`), so that
whoever must stop at a step sees what they have without the next. Each is a view of the one store. Weights are fitted on
validation text at each step anew.
"""

from __future__ import annotations

from typing import Any

from datastore.selection import Selection
from eval.perplexity import score
from eval.studies.figure import Panel, Series, draw
from eval.studies.subject import Progress, Subject, most, rows_of, take
from silo.licensing import tier_of
from silo.purposes import permits

STEPS = (
    "attribution and freer",
    "share-alike and copyleft",
    "non-commercial or unchanged only",
    "all rights reserved or unknown",
)


def step_of(license: str) -> int:
    """The first of :data:`STEPS` that takes an SPDX expression in; of "A OR B" that of the freer side.

    >>> [step_of(each) for each in ("CC-BY-4.0", "GPL-3.0-only", "CC-BY-NC-SA-4.0", "NOASSERTION")]
    [0, 1, 2, 3]
    """
    taken = (tier_of(license).permissive, permits(license, "commercial"), permits(license, "research"))
    return next((step for step, here in enumerate(taken) if here), len(taken))


def study(subject: Subject, progress: Progress | None = None) -> dict[str, Any]:
    """Measure the model alone, then beside the store with each class of licences added.

    Returns:
        ``steps``: of each the licences, documents and tokens that it adds, and by whose test text ("all", and each
        class of licences) the perplexity of each mixture, with its interval. Classes that the store lacks are passed
        over.
    """
    rows = rows_of(subject.store)
    left_out = subject.left_out
    hidden = set(left_out.documents) if left_out else set()
    present = [row for row in rows if row.id not in hidden]
    texts = subject.texts(subject.test)
    groups = {"all": list(range(len(texts)))}
    for step, name in enumerate(STEPS):
        groups[name] = [number for number, text in enumerate(texts) if step_of(text.document.license) == step]
    steps: list[dict[str, Any]] = []
    allowed: list[str] = []
    wanted = [step for step in range(len(STEPS)) if any(step_of(row.license) == step for row in present)]
    for done, step in enumerate(wanted, start=1):
        added = [row for row in present if step_of(row.license) == step]
        allowed += [row.id for row in added]
        mixture = subject.mixture(allow=Selection(documents=tuple(allowed)))
        weighings = subject.weighings(mixture)
        scores = score(mixture, texts)
        steps.append(
            {
                "adds": STEPS[step],
                "licenses": sorted({row.license for row in added}),
                "documents": len(added),
                "tokens": sum(row.end - row.begin for row in added),
                "perplexity": {
                    name: subject.perplexities(take(scores, numbers), [texts[each] for each in numbers], weighings)
                    for name, numbers in groups.items()
                    if numbers
                },
                "weights": {name: each.to_json() for name, each in weighings.items() if not subject.given},
            }
        )
        if progress:
            progress(done, len(wanted))
    return {"test_tokens": {name: sum(len(texts[each].tokens) for each in of) for name, of in groups.items() if of},
            "steps": steps}  # fmt: skip


def figure(result: dict[str, Any]) -> str:
    """Perplexity of each class's test text from the model alone to the whole store, by the mixture of most methods."""
    steps = result["steps"]
    best = most(list(steps[0]["perplexity"]["all"]))
    names = [
        "model alone",
        *(f"+ {step['adds']}".replace(" and ", "\nand ").replace(" or ", "\nor ") for step in steps),
    ]
    series = [
        Series(
            f"text: {group}",
            list(range(len(names))),
            [steps[0]["perplexity"][group]["lm"][0], *(step["perplexity"][group][best][0] for step in steps)],
        )
        for group in steps[0]["perplexity"]
    ]
    return draw(
        "Classes of licences, added one by one", [Panel("", "perplexity", series, y_scale="log", x_names=names)]
    )
