"""How well the methods have foretold a text: by its definition, whatever pieces the text is read in."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import silo.past
from datastore.store import Store
from silo.mixture import Parts
from silo.past import FLOOR, KNOWN, Past
from silo.readings import ModelReading, NeighbourReading

VOCABULARY, K = 11, 4


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    """A window that texts here are longer than."""
    monkeypatch.setattr(silo.past, "WINDOW", 6)


class Found:
    """Made-up neighbours; the last of each position is not there."""

    def __init__(self, generator, n):
        self.values = generator.integers(0, VOCABULARY, (n, K))
        self.distances = np.sort(generator.random((n, K)).astype(np.float32), axis=1)
        self.distances[:, -1] = np.inf


def make(begin: int, logits: torch.Tensor, found: Found) -> Parts:
    end = begin + len(logits)
    return Parts(begin, end, ModelReading.of(logits), NeighbourReading(found, None))  # type: ignore[arg-type]


def cut_of(found: Found, begin: int, end: int) -> Found:
    part = Found(np.random.default_rng(0), 1)
    part.values, part.distances = found.values[begin:end], found.distances[begin:end]
    return part


def by_definition(logits, found, tokens) -> dict[str, list[float]]:
    """The means, one position after the other."""
    lm = [max(FLOOR, float(torch.softmax(row.double(), 0)[token])) for row, token in zip(logits, tokens, strict=True)]
    near = [max(FLOOR, float((row[:-1] == token).mean())) for row, token in zip(found.values, tokens, strict=True)]
    out = {KNOWN: [], "lm_past": [], "knn_past": []}
    for position in range(len(tokens)):
        before = slice(max(0, position - 6), position)
        out[KNOWN].append(math.log1p(position - before.start))
        for name, given in (("lm", lm), ("knn", near)):
            logs = [math.log(each) for each in given[before]]
            out[f"{name}_past"].append(sum(logs) / max(1, len(logs)))
    return out


@pytest.mark.parametrize("known_later", [False, True])
@pytest.mark.parametrize("cuts", [[0, 20], [0, 1, 2, 3, 20], [0, 5, 13, 20], list(range(21))])
def test_it_is_what_was_said_of_the_last_tokens(cuts, known_later):
    """Whatever pieces the text comes in, and also where a piece's last token is not there until the next is read."""
    generator = np.random.default_rng(3)
    tokens, found = generator.integers(0, VOCABULARY, 20), Found(generator, 20)
    logits = torch.randn(20, VOCABULARY, generator=torch.Generator().manual_seed(3)) * 6
    past, joined = Past(), []
    for begin, end in itertools.pairwise(cuts):
        parts = make(begin, logits[begin:end], cut_of(found, begin, end))
        joined.append(past.join(parts, tokens[: end - 1] if known_later else tokens).past)
    expected = by_definition(logits, found, tokens)
    assert all(set(each) == set(expected) for each in joined)
    for name, values in expected.items():
        given = torch.cat([each[name] for each in joined])
        torch.testing.assert_close(given, torch.tensor(values, dtype=torch.float64), rtol=1e-6, atol=1e-6)


def test_a_copy_goes_its_own_way():
    """Two texts that begin alike, as beams do, each have their own past."""
    generator = np.random.default_rng(5)
    tokens, found = generator.integers(0, VOCABULARY, 12), Found(generator, 12)
    other = np.append(tokens[:7], (tokens[7:] + 1) % VOCABULARY)
    logits = torch.randn(12, VOCABULARY, generator=torch.Generator().manual_seed(5)) * 6
    past = Past()
    past.join(make(0, logits[:8], cut_of(found, 0, 8)), tokens[:7])
    for way, text in ((past.copy(), other), (past, tokens)):
        for at in range(8, 12):
            joined = way.join(make(at, logits[at : at + 1], cut_of(found, at, at + 1)), text[:at]).past
        expected = by_definition(logits, found, text)
        assert {name: float(of[0]) for name, of in joined.items()} == pytest.approx(
            {name: of[-1] for name, of in expected.items()}
        )


def test_a_gap_begins_anew():
    """Parts that do not go on where the last ended know nothing of what was before."""
    generator = np.random.default_rng(4)
    tokens, found = generator.integers(0, VOCABULARY, 20), Found(generator, 20)
    logits = torch.randn(20, VOCABULARY)
    past = Past()
    past.join(make(0, logits[:5], cut_of(found, 0, 5)), tokens)
    assert past.join(make(8, logits[8:12], cut_of(found, 8, 12)), tokens).past[KNOWN][0] == 0


def test_mixtures_give_it_of_every_method(model, model_dir, control, documents, tmp_path):
    """Reading a document gives the evidence of lm, knn, ric and ngram, and a later token changes none before it."""
    store = Store.create(tmp_path / "store", model, model_dir / "tokenizer.json", control)
    store.add([replace(each, text=each.text[:500]) for each in documents[:6]], model)
    mixture = store.mixture(model, ("lm", "knn", "ric", "ngram"))
    tokens = model.tokenize(documents[0])[:150]
    changed = tokens.copy()
    changed[100:] = changed[100:][::-1]
    found = []
    for each in (tokens, changed):
        parts = [read.evidence() for read in mixture.parts(each)]
        found.append({name: torch.cat([of[name] for of in parts]) for name in parts[0]})
    for method in ("lm", "knn", "ric", "ngram"):
        of = [each[f"{method}_past"] for each in found]
        torch.testing.assert_close(of[0][:101], of[1][:101], rtol=1e-5, atol=1e-5)
        assert (of[0][101:] - of[1][101:]).abs().max() > 0.1
    given = torch.cat(
        [
            each.lm.log_probability(torch.from_numpy(tokens[each.begin : each.end].astype(np.int64)))
            for each in mixture.parts(tokens)
        ]
    ).clamp_min(math.log(FLOOR))
    assert math.isclose(found[0]["lm_past"][50], given[44:50].mean(), rel_tol=1e-6)
