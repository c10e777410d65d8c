"""The recorded proofs, on small stores: each holds, and each fails where it should."""

import importlib
import itertools
import json
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from datastore import groups, knn, sketches
from datastore.store import Selection
from silo.files import sha256
from silo.sources import open_source

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
LICENSES = ("GPL-3.0-only", "CC-BY-NC-4.0", "CC-BY-SA-4.0")


@pytest.fixture(scope="module")
def prove():
    """``scripts/prove_removal.py``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        module = importlib.import_module("prove_removal")
        patch.setattr(module, "COPIED", 4)
        yield module


@pytest.fixture(scope="module")
def texts():
    """Fourteen short documents of four owners and two sources, and copies of four of them."""
    files = sorted(open_source("python:accelerate"), key=lambda file: file.id)
    long = [file for file in files if len(file.text) > 5000][:14]
    return [
        replace(
            file,
            id=f"document {number}",
            text=f"{file.text[3000:4000]}\n the {own_word(number)} of it",
            title=f"The title of number {number}",
            owner=f"owner {number % 4}",
            source=("a list", "a page")[number % 2],
            license=LICENSES[number % 3],
        )
        for number, file in enumerate(long)
    ]


def own_word(number):
    """A long word that only one document has."""
    return "".join(chr(ord("a") + int(digit, 16)) for digit in sha256(str(number).encode())[:14])


@pytest.fixture
def proof(prove, texts, model, model_dir, control, tmp_path):
    """Stores of these documents."""
    return prove.Proof(tmp_path, prove.Remembering(model), model_dir, control, prove.copied(texts))


def test_after_random_changes_a_store_is_a_fresh_one_and_nothing_is_left(prove, proof):
    """Whatever was added and removed, hash, neighbours, blocks and distributions are equal, and no byte tells of it."""
    found = prove.history(proof, random.Random(1), 9)
    assert prove.exact(found["steps"]), found
    assert prove.physical(found["steps"]), found
    made = {step["change"] for step in found["steps"]}
    assert made >= {"add", *(f"remove by {kind}" for kind in prove.KINDS)}
    assert max(step["groups"] for step in found["steps"]) > 1


def test_a_control_plane_of_restricted_text_is_found_out(prove, proof):
    """With centroids and ranges of the store's own text, hash, neighbours and distributions differ after a removal."""
    equal = prove.without_law_2(proof, random.Random(1))["equal"]
    assert equal == {"hash": False, "neighbours": False, "blocks": True, "ngrams": True, "distributions": False}
    assert prove.found_out(equal)
    assert not prove.found_out({**equal, "neighbours": True})


def test_neighbours_tied_in_another_order_are_found_out(prove, proof, monkeypatch):
    """If equal distances came in the order of rows, which groups decide, the comparison would fail."""
    real = knn.Documents.of

    def by_row(groups):
        known = real(groups)
        return known._replace(hashes=np.arange(len(known.hashes), dtype=np.uint64))

    monkeypatch.setattr(knn.Documents, "of", by_row)
    steps = prove.history(proof, random.Random(1), 4)["steps"]
    assert not all(step["equal"]["neighbours"] for step in steps)
    assert not prove.exact(steps)


def test_what_is_left_in_the_sketches_is_found_out(prove, proof, monkeypatch):
    """If a removed document's shingles stayed in the search structure, the search would name them."""
    real, texts = sketches.write_sketches, []

    def write_all_ever(directory, new):
        new = list(new)
        texts.extend(new)
        real(directory, ["\n".join(texts), *new[1:]])

    monkeypatch.setattr(groups, "write_sketches", write_all_ever)
    steps = prove.history(proof, random.Random(1), 4)["steps"]
    assert any("shingles" in step.get("found_after", {}) for step in steps)
    assert not prove.physical(steps)


@pytest.mark.skipif(shutil.which("cc") is None or sys.platform != "linux", reason="needs a C compiler, on Linux")
def test_torture(model_dir, tmp_path):
    """Killed at some writes, or let down by the disk at them, Lucene's included, a store is that before or after."""
    files = [file for file in open_source("python:accelerate") if len(file.text) > 2000]
    rows = [replace(file, id=f"r{at}", license="GPL-3.0-only") for at, file in enumerate(files[:12])] + files[12:14]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps(row.to_json()) + "\n" for row in rows))
    command = [sys.executable, SCRIPTS / "torture_store.py", corpus, "--model", model_dir]
    done = subprocess.run(
        [*map(str, command), "--kills", "0", "--stride", "137"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)["result"]
    assert not any(result["files_with_bytes_that_no_write_was_seen_of"].values())
    assert min(count for change, count in result["writes"].items() if change != "keep gate") > 30
    assert result["writes"]["keep gate"] > 5  # it writes no shard and no group
    states = [each for way in result["failing_writes"].values() for each in way["states"].values()]
    assert {name for each in states for name in each} == {"before", "after"}


@settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],  # the stores' names are unique
)
@given(data=st.data())
def test_any_history_gives_the_store_of_what_remains(make_store, mixed, model, answers, fresh_answers, data):
    """Adding and removing in any order, with groups of any size, ends at the store that was built of what remains."""
    store = make_store(f"store-{next(STORES)}")
    bound = data.draw(st.sampled_from([1, 2500, 4_000_000]), label="group tokens")
    times = data.draw(st.sampled_from([1, 8]), label="times as many for ∞-grams")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(groups.TIMES, groups.NGRAMS, times)
        patch.setattr(groups, "GROUP_TOKENS", bound)
        for _ in range(data.draw(st.integers(2, 5), label="changes")):
            absent = [document for document in mixed if document.id not in ids_of(store)]
            if absent and data.draw(st.booleans() if ids_of(store) else st.just(True), label="add"):
                store.add(data.draw(st.lists(st.sampled_from(absent), min_size=1, unique=True), label="added"), model)
            else:
                shard, row = data.draw(
                    st.sampled_from([(name, row) for name in store.rows() for row in store.rows()[name]])
                )
                named = {
                    "documents": row.id,
                    "sources": row.source,
                    "owners": row.owner,
                    "licenses": "GPL-*",
                    "shards": shard,
                }
                kind = data.draw(st.sampled_from(sorted(named)), label="named by")
                alike = data.draw(st.sampled_from(["ignore", "report", "remove"]), label="near-duplicates")
                store.remove(Selection(**{kind: (named[kind],)}), duplicates=alike)
        assert answers(store) == fresh_answers(ids_of(store))
        for kind, times in groups.TIMES.items():
            assert all(len(one.shards) == 1 or tokens_of(store, one) <= times * bound for one in store.groups_of(kind))
        store.verify()


STORES = itertools.count()


def tokens_of(store, group):
    return sum(store.manifest.shards[name].tokens for name in group.shards)


def ids_of(store):
    return {row.id for rows in store.rows().values() for row in rows}
