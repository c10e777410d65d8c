"""kNN: the neighbours that a search written out in numpy finds, however the documents came into the store."""

import random

import numpy as np
import pytest

from datastore import keys
from datastore.control import ControlPlane
from datastore.group_texts import id_hash
from datastore.keys import KeyGroup, write_keys
from datastore.knn import NeighbourIndex
from datastore.queries import prepare
from datastore.shard import Encoded, write_shard
from silo.documents import Document
from silo.errors import IntegrityError

DIMENSION = 16
TIED = "many/ties"


def cloud(rng, count):
    """Keys in clusters along few directions, as hidden states are."""
    centres = rng.normal(size=(12, 4)) @ np.random.default_rng(7).normal(size=(4, DIMENSION))
    return (centres[rng.integers(12, size=count)] + 0.2 * rng.normal(size=(count, DIMENSION))).astype(np.float32)


@pytest.fixture(scope="module", params=["sq8", "pq8", "unfitted"])
def plane(request):
    """A control plane of 32 lists with 8-bit or product codes, or one list with half precision."""
    return (
        ControlPlane.unfitted(DIMENSION)
        if request.param == "unfitted"
        else ControlPlane.fit(cloud(np.random.default_rng(1), 4096), [], codes=request.param)
    )


@pytest.fixture(scope="module")
def encoded(plane):
    """Forty documents; one has a run of equal keys, and another has them too."""
    rng = np.random.default_rng(2)
    same = np.repeat(cloud(rng, 1), 30, axis=0)
    documents = []
    for number, name in enumerate([*(f"doc/{n}" for n in range(38)), TIED, "a copy of " + TIED]):
        keys = cloud(rng, 20 + 3 * number)
        keys = np.concatenate([keys, same, keys[:2]]) if TIED in name else keys
        tokens = rng.integers(500, size=len(keys)).astype(np.uint16)
        described = Document(id=name, text=f"text {number}", license="GPL-3.0-only", owner=f"owner {number % 7}")
        documents.append(Encoded.make(described, tokens, *plane.encode(keys)))
    return documents


@pytest.fixture(scope="module")
def index_of(plane, tmp_path_factory):
    """A function that makes an index of some shards, each a group of its own or so many to a group."""

    def make(documents_of_shards, plane=plane, *, to_a_group=1, probes=16):
        root, groups, first_row = tmp_path_factory.mktemp("groups"), [], 0
        shards = []
        for number, documents in enumerate(documents_of_shards):
            (root / f"shard-{number}").mkdir()
            shards.append(write_shard(root / f"shard-{number}", documents, context={})[1])
        for at in range(0, len(shards), to_a_group):
            members = shards[at : at + to_a_group]
            (root / str(at)).mkdir()
            write_keys(root / str(at), members, lists=len(plane.centroids), first_row=first_row)
            rows = [row for shard in members for row in shard.rows]
            groups.append(KeyGroup(root / str(at), first_row=first_row, document=rows.__getitem__))
            first_row += 7 + sum(len(shard.tokens) for shard in members)
        return NeighbourIndex(groups, plane, probes=probes)

    return make


def shards_of(documents, *, by):
    """The documents of each shard, spread by a function of the document's number."""
    spread = {}
    for number, document in enumerate(documents):
        spread.setdefault(by(number), []).append(document)
    return list(spread.values())


def queries_of(encoded, plane, count=60):
    """Keys near to some of the store's, and one that is exactly the repeated one."""
    rng = np.random.default_rng(3)
    decoded = plane.quantizer().decode(np.concatenate([document.codes for document in encoded]))
    repeated = plane.quantizer().decode(next(d for d in encoded if d.document.id == TIED).codes[-3:-2])
    near = decoded[rng.integers(len(decoded), size=count)] + 0.1 * rng.normal(size=(count, DIMENSION))
    return np.concatenate([near.astype(np.float32), repeated])


def brute_force(encoded, plane, queries):
    """The squared distance to each (token, id, position) of each query, from where their grid has it."""
    queries = prepare(plane.codes, queries, "l2").keys.astype(np.float64)
    keys = np.concatenate([plane.quantizer().decode(document.codes) for document in encoded])
    rows = [(int(token), d.document.id, at) for d in encoded for at, token in enumerate(d.tokens)]
    return [dict(zip(rows, ((keys - query) ** 2).sum(axis=1), strict=True)) for query in queries]


def described(index, found):
    """What was found, with documents by their ids."""
    return [
        [
            (distance, int(value), index.document(document).id, int(position))
            for distance, value, document, position in zip(*columns, strict=True)
            if document >= 0
        ]
        for columns in zip(found.distances, found.values, found.documents, found.positions, strict=True)
    ]


def same_answers(a, b):
    """Whether two answers are equal in every bit, but for the numbers by which an index calls its documents."""
    fields = ("distances", "values", "positions")
    return all(getattr(a, name).tobytes() == getattr(b, name).tobytes() for name in fields)


@pytest.mark.parametrize("k", [1, 10, 64, 256])
def test_all_lists_probed_is_brute_force(index_of, encoded, plane, k):
    """With every list probed, neighbours, tokens, order and distances are those of numpy over the decoded codes."""
    index = index_of(shards_of(encoded, by=lambda n: n % 7), plane, probes=1024)
    queries = queries_of(encoded, plane)
    known = brute_force(encoded, plane, queries)
    for ours, all_there_are in zip(described(index, index.search(queries, k)), known, strict=True):
        found = np.array([all_there_are[row[1:]] for row in ours])
        np.testing.assert_allclose([row[0] for row in ours], found, rtol=1e-4, atol=1e-5)
        nearest = np.sort(list(all_there_are.values()))[:k]
        np.testing.assert_allclose(found, nearest, rtol=1e-5, atol=1e-5)  # of two that float32 has equal, either


@pytest.mark.parametrize("k", [5, 29, 31, 45, 60])
def test_ties_come_by_document_and_position(index_of, encoded, plane, k):
    """Of sixty equal keys in two documents, the first k by (hash of the id, position) are found, in that order."""
    index = index_of(shards_of(encoded, by=lambda n: n), plane)
    (found,) = described(index, index.search(queries_of(encoded, plane)[-1:], k))
    assert [row[2:] for row in found] == sorted((row[2:] for row in found), key=lambda row: (id_hash(row[0]), row[1]))
    assert len({row[0] for row in found}) == 1
    expected = [
        (document.document.id, at)
        for document in sorted(encoded[-2:], key=lambda document: id_hash(document.document.id))
        for at in range(len(document.tokens) - 32, len(document.tokens) - 2)
    ]
    assert [row[2:] for row in found] == expected[:k]


def test_shards_and_order_of_adding_leave_no_trace(index_of, encoded, plane):
    """One shard, seven or forty, filled in any order and listed in any order, give the same bits."""
    queries = queries_of(encoded, plane)
    expected = index_of([encoded]).search(queries, 40)
    shuffled = random.Random(0).sample(encoded, len(encoded))
    for by in (lambda n: 0, lambda n: n % 7, lambda n: n):
        for documents in (encoded, shuffled):
            shards = shards_of(documents, by=by)
            for to_a_group in (1, 3, 40):
                found = index_of(shards, to_a_group=to_a_group).search(queries, 40)
                assert same_answers(found, expected)
                assert same_answers(index_of(shards[::-1], to_a_group=to_a_group).search(queries, 40), expected)


@pytest.mark.parametrize("left", [-1, -1000, 7])
def test_lists_of_another_size_are_not_read(index_of, encoded, plane, left):
    """Where the file of lists was cut off or grew, nobody reads beyond it: one line says what to do."""
    group = index_of([encoded])._groups[0]
    data = group._path.read_bytes()
    group._path.unlink()  # the index has it mapped
    group._path.write_bytes(data[:left] if left < 0 else data + bytes(left))
    with pytest.raises(IntegrityError, match=rf"has {len(data) + left} bytes, not {len(data)}; restore it from a ba"):
        NeighbourIndex(
            [KeyGroup(group._path.parent, first_row=0, document=group.document)], index_of([encoded])._control
        )


def test_fewer_tokens_than_documents_have_are_not_read(index_of, encoded):
    """Where tokens were cut off, nobody reads beyond them: one line says what to do."""
    group = index_of([encoded])._groups[0]
    path, tokens = group._path.parent / "tokens.npy", np.array(group.tokens)
    path.unlink()  # the index has it mapped
    np.save(path, tokens[:-1])
    with pytest.raises(IntegrityError, match=rf"has {len(tokens) - 1} tokens, not {len(tokens)}; restore it from"):
        KeyGroup(path.parent, first_row=0, document=group.document)


@pytest.mark.parametrize("at_once", [1, 100, 5000])
def test_lists_written_in_pieces_are_the_same_bytes(encoded, plane, tmp_path, monkeypatch, at_once):
    """However few codes are in memory at a time, the files of a group are equal."""
    shards = []
    for number, documents in enumerate(shards_of(encoded, by=lambda n: n % 3)):
        (tmp_path / f"shard-{number}").mkdir()
        shards.append(write_shard(tmp_path / f"shard-{number}", documents, context={})[1])
    for name, held in (("whole", keys.GATHERED_BYTES), ("pieces", at_once)):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(keys, "GATHERED_BYTES", held)
        write_keys(tmp_path / name, shards, lists=len(plane.centroids), first_row=11)
    whole, pieces = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("whole", "pieces")
    )
    assert pieces == whole


def test_document_taken_out_is_never_found(index_of, encoded, plane):
    """Without a document, its neighbours are gone and those of the others are in every query what they were."""
    index = index_of(shards_of(encoded, by=lambda n: n % 3), plane, probes=1024)
    without = index_of(shards_of(encoded[:-2], by=lambda n: n % 3), plane, probes=1024)
    queries = queries_of(encoded, plane)
    k = index.num_keys
    everything, rest = described(index, index.search(queries, k)), described(without, without.search(queries, k))
    for before, after in zip(everything, rest, strict=True):
        assert any(TIED in row[2] for row in before)
        assert [row for row in before if TIED not in row[2]] == after


def test_value_is_the_token_at_its_position(index_of, encoded, plane):
    """Each value is the token that stands at the cited position of the cited document, and the licence is its own."""
    index = index_of(shards_of(encoded, by=lambda n: n % 7), plane)
    by_id = {document.document.id: document for document in encoded}
    found = index.search(queries_of(encoded, plane), 32)
    for row in described(index, found):
        assert all(by_id[name].tokens[position] == value for _, value, name, position in row)
    source = index.document(int(found.documents[0, 0]))
    row = by_id[source.id].document
    assert (source.owner, source.license, source.source, source.title) == (
        row.owner,
        row.license,
        row.source,
        row.title,
    )


def test_value_is_the_token_that_followed(make_store, model, documents):
    """The key of a position finds that position first, with the very token that the model was asked for there."""
    store = make_store("own", documents[:2])
    tokens = model.tokenize(documents[0])
    index = store.neighbours()
    found = index.search(store.control.quantizer().decode(store.shard("Ada").documents()[0].codes), 1)
    assert {index.document(at).id for at in found.documents[:, 0]} == {documents[0].id}
    assert (found.distances < 1e-5).all()
    own = found.positions[:, 0] == np.arange(len(tokens))
    assert own.mean() > 0.9
    np.testing.assert_array_equal(found.values[own, 0], tokens[own])


@pytest.mark.parametrize("present", [0, 1, 9])
def test_fewer_keys_than_asked_for(index_of, encoded, plane, present):
    """What is missing has infinite distance, document -1 and value 0, after what was found."""
    documents = [Encoded.make(Document(id="x", text="x", owner="o"), *(a[:present] for a in arrays(encoded[0])))]
    shards = [documents] if present else []
    index = index_of(shards, plane, probes=1024)
    found = index.search(queries_of(encoded, plane), 16)
    assert index.num_keys == present
    assert index
    assert found.distances.shape == found.values.shape == found.documents.shape == found.positions.shape == (61, 16)
    assert np.isfinite(found.distances[:, :present]).all()
    assert np.isinf(found.distances[:, present:]).all()
    assert (found.documents[:, present:] == -1).all()
    assert not found.values[:, present:].any()
    assert sorted(found.positions[0, :present].tolist()) == list(range(present))


def arrays(document):
    return document.tokens, document.lists, document.codes


def test_no_queries_no_answers(index_of, encoded, plane):
    """No query gives arrays without rows."""
    found = index_of(shards_of(encoded, by=lambda n: 0), plane).search(np.zeros((0, DIMENSION), np.float32), 5)
    assert found.values.shape == (0, 5)


def test_more_probes_lose_nothing(index_of):
    """The distance of the k-th neighbour never grows with the number of lists read, and with all it is exact."""
    plane = ControlPlane.fit(cloud(np.random.default_rng(1), 4096), [])
    rng = np.random.default_rng(2)
    documents = [
        Encoded.make(Document(id=str(n), text="x", owner="o"), np.zeros(99, np.uint16), *plane.encode(cloud(rng, 99)))
        for n in range(9)
    ]
    queries = cloud(rng, 50)
    last = np.full(50, np.inf)
    for probes in (1, 2, 4, 8, 16, 32):
        found = index_of([documents], plane, probes=probes).search(queries, 10).distances[:, -1]
        assert (found <= last).all()
        last = found
    expected = [np.sort(list(known.values()))[9] for known in brute_force(documents, plane, queries)]
    np.testing.assert_allclose(last, expected, rtol=1e-4)
