"""Verbatim copying: how much of what a mixture writes stands in the store word for word.

Prompts are the beginnings of held-out documents, so that whatever is copied was found, not asked for. A run counts if a
document of the store has the whole of it, with a token after it. What the held-out documents' own continuations have in
the store word for word is the measure beside it: so much any honest writer of such text would share. The mixture of
most methods writes a second time with a limit on its copies (:class:`silo.copying.CopyLimit`).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from eval.leakage import leakage
from eval.studies.continuation import continued
from eval.studies.figure import Panel, Series, draw
from eval.studies.subject import Progress, Subject, most
from eval.terms import mixture_title
from silo.copying import CopyLimit
from silo.errors import UsageError
from silo.files import sha256

TRUE_TEXT, LIMITED = "true text", "limited"


def study(
    subject: Subject,
    *,
    prompts: int,
    prompt: int,
    written: int,
    temperature: float,
    longest_copy: int,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write on after prompts by each mixture, and look the result up.

    Args:
        subject: its test text gives the prompts.
        prompts: how many.
        prompt: tokens of each.
        written: tokens after each.
        temperature: of drawing, 0 for the likeliest token.
        longest_copy: tokens in a row that may be copied where copies are limited.
        progress: is told of each mixture.

    Returns:
        By mixture, for the true text and with the limit: ``longest`` run in tokens, its ``mean`` over prompts, and in
        ``shares`` the share of tokens inside runs of some lengths.

    Raises:
        UsageError: too few documents are long enough.
    """
    ordered = sorted(subject.test, key=lambda document: sha256(document.id.encode()))
    tokens = [subject.model.tokenize(document) for document in ordered]
    chosen = [each for each in tokens if len(each) >= prompt + written][:prompts]
    if len(chosen) < prompts:
        raise UsageError(
            f"{len(chosen)} documents of --data have {prompt + written} tokens, {prompts} prompts were asked for; give "
            "--prompts a smaller number"
        )
    begin = np.stack([each[:prompt] for each in chosen])
    mixture = subject.mixture()
    ngrams = subject.store.select(deny=subject.left_out).ngrams()

    def copied(texts: np.ndarray) -> dict[str, Any]:
        rows = [row.astype(np.int32) for row in texts]
        longest = [leakage(ngrams, [row])["longest"] for row in rows]
        return {"mean": float(np.mean(longest)), **leakage(ngrams, rows)}

    found = {TRUE_TEXT: copied(np.stack([each[prompt : prompt + written] for each in chosen]))}
    weighings = subject.weighings(mixture)
    limits = dict.fromkeys(weighings) | {LIMITED: partial(CopyLimit, ngrams, longest_copy)}
    weighings = {**weighings, LIMITED: weighings[most(list(weighings))]}
    for number, (name, weighing) in enumerate(weighings.items(), start=1):
        texts = continued(mixture, weighing, begin, written, temperature=temperature, limit=limits[name])
        found[name] = copied(texts)
        if progress:
            progress(number, len(weighings))
    return {"prompts": prompts, "prompt_tokens": prompt, "written_tokens": written, "temperature": temperature,
            "longest_copy": longest_copy, "mixtures": found}  # fmt: skip


def figure(result: dict[str, Any]) -> str:
    """Longest runs by mixture."""
    found = result["mixtures"]
    limited = f"at most {result['longest_copy']} in a row"
    names = [{TRUE_TEXT: TRUE_TEXT, LIMITED: limited}.get(name) or mixture_title(name) for name in found]
    places = list(range(len(found)))
    series = [
        Series("longest of all prompts", [each["longest"] for each in found.values()], places, marks_only=True),
        Series("mean over prompts", [each["mean"] for each in found.values()], places, marks_only=True),
    ]
    panel = Panel("tokens in a row that stand in the store", "", series, y_names=names)
    return draw("Verbatim copying", [panel])
