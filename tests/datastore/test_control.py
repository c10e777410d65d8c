"""The control plane: it learns from permissive text that the weights did not see, says from which, or from nothing."""

import json

import numpy as np
import pytest

from datastore import control as control_module
from datastore.codes import Codes
from datastore.control import KEYS_AT_ONCE, ControlPlane, fit_control_plane
from silo.collect import collect
from silo.corpus import Corpus
from silo.errors import IntegrityError, LicenseError, UsageError
from silo.files import sha256
from silo.licensing import DEFAULT_POLICY, load_policy


def keys_like(shape, *, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def control_documents(corpus):
    """The control split in the order in which it is used."""
    return sorted(Corpus.open(corpus).documents("control"), key=lambda document: sha256(document.id.encode()))


def test_restricted_side_of_a_corpus_is_refused_by_name(model, documents, tmp_path):
    """Asked to fit on restricted text, it names a document and its licence instead."""
    (tmp_path / "gpl.jsonl").write_text("".join(json.dumps(document.to_json()) + "\n" for document in documents))
    collect([str(tmp_path / "gpl.jsonl")], tmp_path / "out")
    with pytest.raises(LicenseError, match=r"document '(Ada|Grace|Mary)/\d' is under 'GPL-3.0-only'"):
        fit_control_plane(model, tmp_path / "out" / "restricted", DEFAULT_POLICY, set())


def test_policy_of_the_day_judges_a_corpus_collected_before(model, corpus, tmp_path):
    """A corpus that was permissive when it was collected is refused under a policy that has become stricter."""
    restricted = next(Corpus.open(corpus).rows)
    (tmp_path / "policy.yaml").write_text(f"licenses: {{{restricted.license}: restricted}}\n")
    with pytest.raises(LicenseError, match=f"is under '{restricted.license}', which is restricted"):
        fit_control_plane(model, corpus, load_policy(tmp_path / "policy.yaml"), set())


def test_document_that_taught_the_weights_is_refused_by_name(model, corpus):
    """A control document whose text the model trained on is refused, also under another id."""
    seen = control_documents(corpus)[-1]
    with pytest.raises(LicenseError, match=f"the model trained on '{seen.id}'"):
        fit_control_plane(model, corpus, DEFAULT_POLICY, {seen.content_hash})


def test_model_of_the_corpus_did_not_train_on_its_control_split(model_dir, corpus, control):
    """What our trainer lists as its teachers and what the control plane lists as its own have no text in common."""
    rows = [json.loads(line) for line in (model_dir / "trained_on.jsonl").read_bytes().splitlines()]
    assert rows
    assert not {row["content_hash"] for row in rows} & {row["content_hash"] for row in control.provenance}


def test_empty_split_is_wrong_use(model, tmp_path):
    """A corpus without control documents is named, with the two ways out."""
    one = {"id": "a", "text": "public text", "license": "CC0-1.0", "owner": "o"}
    (tmp_path / "one.jsonl").write_text(json.dumps(one))
    collect([str(tmp_path / "one.jsonl")], tmp_path / "out")
    with pytest.raises(
        UsageError, match="no documents in its control split; collect more text, or leave --control out"
    ):
        fit_control_plane(model, tmp_path / "out" / "permissive", DEFAULT_POLICY, set())


def test_provenance_lists_the_teachers_and_nobody_else(model, corpus, monkeypatch):
    """Documents are read in a fixed order until there are keys enough; those read are listed, and those alone teach."""
    first, second, *_ = control_documents(corpus)
    monkeypatch.setattr(control_module, "KEYS_PER_LIST", len(model.tokenize(first)) + 1)
    plane = fit_control_plane(model, corpus, DEFAULT_POLICY, set(), lists=1)
    assert [(row["id"], row["license"], row["source"], row["content_hash"]) for row in plane.provenance] == [
        (document.id, document.license, document.source, document.content_hash) for document in (first, second)
    ]
    keys = np.concatenate([model.keys(model.tokenize(document)) for document in (first, second)])
    np.testing.assert_array_equal(plane.centroids, ControlPlane.fit(keys, [], lists=1).centroids)
    np.testing.assert_array_equal(plane.codes.fitted, ControlPlane.fit(keys, []).codes.fitted)


def test_teachers_are_permissive_control_documents(corpus, control):
    """What a control plane lists is the head of the control split, every licence of it permissive."""
    assert control.provenance
    listed = [row["id"] for row in control.provenance]
    assert listed == [document.id for document in control_documents(corpus)][: len(listed)]
    assert {row["license"] for row in control.provenance} <= {"BSD-3-Clause", "MIT"}


@pytest.mark.parametrize(("keys", "lists"), [(1, 1), (255, 1), (256, 2), (1000, 4), (5000, 32)])
def test_each_list_has_enough_keys_to_be_fitted(keys, lists):
    """The number of lists is the largest power of two that leaves 128 fitting keys to each."""
    assert len(ControlPlane.fit(keys_like((keys, 4)), []).centroids) == lists


@pytest.mark.parametrize(
    ("codes", "keys", "message"),
    [
        ("sq9", 300, "there are no codes 'sq9'; use sq8, fp16 or pqM"),
        ("pq0", 300, "there are no codes 'pq0'"),
        ("pq3", 300, "pq3 cuts a key into 3 equal runs, and 8 coordinates are no multiple of that"),
        ("pq4", 255, "pq4 needs at least 256 keys to be fitted on, and there are 255"),
    ],
)
def test_codes_that_cannot_be_are_wrong_use(codes, keys, message):
    """Unknown codes, runs that do not fit the keys, and too few keys to fit on are told in one line."""
    with pytest.raises(UsageError, match=message):
        ControlPlane.fit(keys_like((keys, 8)), [], codes=codes)


@pytest.mark.parametrize(("codes", "size"), [("sq8", 8), ("fp16", 16), ("pq4", 4)])
def test_codes_come_back_from_disk(codes, size, tmp_path):
    """Each kind of code has its size, and a plane read from disk codes keys to the same bytes."""
    plane = ControlPlane.fit(keys_like((3000, 8)), [], codes=codes)
    loaded = ControlPlane.load(tmp_path, plane.save(tmp_path))
    keys = keys_like((100, 8), seed=1)
    assert plane.encode(keys)[1].shape == (100, size)
    assert loaded.encode(keys)[1].tobytes() == plane.encode(keys)[1].tobytes()
    error = ((loaded.quantizer().decode(loaded.encode(keys)[1]) - keys) ** 2).mean()
    assert error < 0.15


def test_same_keys_give_the_same_bytes(tmp_path, bytes_of):
    """Two control planes fitted on equal keys are equal files with equal hashes; other keys give another hash."""
    hashes = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        hashes[name] = ControlPlane.fit(keys_like((3000, 8), seed=seed), [{"id": "x"}]).save(tmp_path / name)
    assert hashes["a"] == hashes["b"] != hashes["c"]
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")


def test_teachers_are_part_of_the_hash(tmp_path):
    """Equal centroids with other teachers are another control plane."""
    hashes = set()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        hashes.add(ControlPlane.fit(keys_like((300, 8)), [{"id": name}]).save(tmp_path / name))
    assert len(hashes) == 2


def test_code_is_a_function_of_the_key_alone(control, model, documents):
    """List and code of a key are the same bytes alone, in any batch and in any order (law 3)."""
    keys = model.keys(model.tokenize(documents[0]))[:150]
    lists, codes = control.encode(keys)
    assert len(set(lists.tolist())) > 10
    for at in range(len(keys)):
        one_list, one_code = control.encode(keys[at : at + 1])
        assert (one_list[0], one_code.tobytes()) == (lists[at], codes[at].tobytes())
    reversed_lists, reversed_codes = control.encode(np.ascontiguousarray(keys[::-1]))
    np.testing.assert_array_equal(reversed_lists[::-1], lists)
    np.testing.assert_array_equal(reversed_codes[::-1], codes)


def test_keys_on_a_border_fall_on_the_same_side():
    """A key that lies within rounding of the border between two lists is in the same list alone as in a batch."""
    # Many and wide enough that FAISS, given all at once, would multiply matrices.
    plane = ControlPlane(10 + keys_like((1024, 192)), Codes.fit("fp16", keys_like((1, 192))), [])
    centroids = plane.centroids.astype(np.float64)
    distances = ((centroids[:, None] - centroids) ** 2).sum(axis=2)
    np.fill_diagonal(distances, np.inf)
    keys = ((centroids + centroids[distances.argmin(axis=1)]) / 2).astype(np.float32)
    lists, _ = plane.encode(keys)
    assert [int(plane.encode(key[None])[0][0]) for key in keys[::3]] == lists[::3].tolist()


def test_nearest_centroid_is_the_list(control, model, documents):
    """A key goes to the list whose centroid a search written out in numpy finds nearest."""
    keys = model.keys(model.tokenize(documents[1]))[:100]
    distances = ((keys[:, None].astype(np.float64) - control.centroids) ** 2).sum(axis=2)
    np.testing.assert_array_equal(control.encode(keys)[0], distances.argmin(axis=1))


@pytest.mark.parametrize("metric", ["l2", "inner_product"])
@pytest.mark.parametrize("count", [1, 4, 31])
def test_lists_whose_centroids_are_nearest(metric, count):
    """However many keys are asked for at once, the lists are those that numpy finds; and keys that are no numbers, or
    equally near to all centroids, have some lists."""
    plane = ControlPlane(keys_like((32, 24)) + 1, Codes.fit("fp16", keys_like((1, 24))), [])
    keys = keys_like((KEYS_AT_ONCE + 5, 24))
    products = keys.astype(np.float64) @ plane.centroids.T
    distances = (plane.centroids.astype(np.float64) ** 2).sum(axis=1) * (metric == "l2") - 2 * products
    expected = np.sort(np.argsort(distances, axis=1)[:, :count], axis=1)
    np.testing.assert_array_equal(np.sort(plane.nearest(keys, count, metric), axis=1), expected)
    for odd in (np.full((3, 24), np.nan, np.float32), np.zeros((3, 24), np.float32)):
        lists = plane.nearest(odd, count, metric)
        assert all(len(set(row)) == count and 0 <= min(row) <= max(row) < 32 for row in lists.tolist())


def test_codes_are_near_the_keys(control, model, documents):
    """An 8-bit code decodes to within half a step of each coordinate that lies in the fitted range."""
    keys = model.keys(model.tokenize(documents[2]))
    low, width = control.codes.fitted[: control.dimension], control.codes.fitted[control.dimension :]
    inside = (keys >= low) & (keys <= low + width)
    assert inside.mean() > 0.95
    error = np.abs(control.quantizer().decode(control.encode(keys)[1]) - keys)
    assert (error <= width / 255)[inside].all()


def test_unfitted_plane_has_learnt_nothing(tmp_path):
    """Without a corpus there is one list, no teacher, and codes that are the keys in half precision."""
    plane = ControlPlane.unfitted(8)
    keys = keys_like((50, 8))
    lists, codes = plane.encode(keys)
    assert plane.codes.name == "fp16"
    assert list(plane.provenance) == []
    assert not plane.centroids.any()
    assert lists.tolist() == [0] * 50
    np.testing.assert_array_equal(codes.view(np.float16), keys.astype(np.float16))


def test_saved_plane_comes_back(tmp_path, control, documents, model):
    """A control plane read from its files codes keys as the one that was saved."""
    loaded = ControlPlane.load(tmp_path, control.save(tmp_path))
    keys = model.keys(model.tokenize(documents[3]))
    assert loaded.provenance == control.provenance
    for ours, theirs in zip(loaded.encode(keys), control.encode(keys), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", ["control.json", "centroids.npy", "codes.npy", "provenance.jsonl"])
def test_any_flipped_byte_is_named(tmp_path, name):
    """A byte changed anywhere in any file of the control plane is an error that names the file."""
    expected = ControlPlane.fit(keys_like((300, 4)), [{"id": "x"}]).save(tmp_path)
    good = (tmp_path / name).read_bytes()
    for at in range(0, len(good), 7):
        (tmp_path / name).write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        with pytest.raises(IntegrityError, match=f"{name} is damaged"):
            ControlPlane.load(tmp_path, expected)
    (tmp_path / name).write_bytes(good)
    ControlPlane.load(tmp_path, expected)
