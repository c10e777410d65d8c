"""Search structures that are cut out of larger ones, beside such as are built."""

import shutil
from dataclasses import replace

import numpy as np
import pytest

from datastore import bm25, groups, regrouping, shard
from datastore.bm25 import Block, build_index, cut_index, index_content
from datastore.selection import Selection
from datastore.verification import verify_derived
from silo.errors import StoreError

REMOVALS = {
    "a document": ("Ada/1",),
    "a document of each": ("Ada/0", "Grace/3", "Mary/2"),
    "an owner": ("Grace/0", "Grace/1", "Grace/2", "Grace/3"),
    "all but one document": tuple(f"{owner}/{at}" for owner in ("Ada", "Grace", "Mary") for at in range(4))[1:],
}


@pytest.fixture
def built(monkeypatch):
    """The kinds of which groups were built anew; both kinds are built side by side."""
    kinds = []

    def spied(real, kind):
        def build(*given, **named):
            kinds.append(kind)
            real(*given, **named)

        return build

    monkeypatch.setattr(regrouping, "build_group", spied(regrouping.build_group, groups.SEARCH))
    monkeypatch.setattr(regrouping, "build_ngrams", spied(regrouping.build_ngrams, groups.NGRAMS))
    return kinds


def content(store):
    """What the store's search structures hold, one of each kind."""
    group, ngrams = (next((store.path / kind).iterdir()) for kind in groups.KINDS)
    parts = [group / "keys", group / "sketches", ngrams / "texts", ngrams / "suffixes"]
    arrays = {f"{part.name}/{path.name}": path.read_bytes() for part in parts for path in part.iterdir()}
    return arrays | index_content(group / "blocks")


def part_of(store, name):
    """Where a part of its search structures is, which are one of each kind."""
    (part,) = store.path.glob(f"*/*/{name}")
    return part


@pytest.mark.parametrize("ids", REMOVALS.values(), ids=REMOVALS)
def test_what_is_cut_is_what_would_be_built(make_store, documents, model, ids, built):
    """Without some documents all files are those of a store that never had them, and none of Lucene's old ones stay."""
    store = make_store("store", documents)
    built.clear()
    store.remove(Selection(documents=ids))
    assert not built
    assert content(store) == content(make_store("fresh", [each for each in documents if each.id not in ids]))
    (group,) = (store.path / "search").iterdir()
    assert {path.name.split(".")[0].split("_Lucene")[0] for path in (group / "blocks").iterdir()} == {
        "_1",
        "segments_2",
    }
    store.verify()
    assert verify_derived(store) == 2


def test_documents_without_words_or_keys_are_cut(make_store, documents, model):
    """So are documents without words, that are alike, or have no keys; beside such that stay."""
    odd = [replace(documents[at], id=f"{at}", text=text) for at, text in enumerate(("!", "!", "a", "b " * 500))]
    for number, keyed in enumerate((True, False)):
        store = make_store(f"store{number}", documents[:3])
        store.add(odd, model, keyed=keyed)
        store.remove(Selection(documents=("0", "2", documents[1].id)))
        fresh = make_store(f"fresh{number}", [documents[0], documents[2]])
        fresh.add([odd[1], odd[3]], model, keyed=keyed)
        assert content(store) == content(fresh)
        assert verify_derived(store) == 2


def test_rows_are_numbered_anew(make_store, documents, monkeypatch, built):
    """A group that is cut may lie elsewhere among the store's rows than the group that it is cut out of."""
    monkeypatch.setattr(groups, "GROUP_TOKENS", 1)
    store = make_store("store", documents)
    first_rows = {group.shards[0]: group.first_row for group in store.manifest.groups}
    built.clear()
    store.remove(Selection(owners=("Ada",)))
    store.remove(Selection(documents=("Grace/1", "Mary/2")))
    assert not built
    assert all(group.first_row < first_rows[group.shards[0]] for group in store.manifest.groups)
    assert verify_derived(store) == 4


def test_no_other_owners_shard_is_read(make_store, documents, monkeypatch):
    """Of the shards a removal reads the one that loses a part of its documents, and none that goes as a whole."""
    store, read = make_store("store", documents), []

    def spied(real):
        def spy(directory, *rest):
            read.append(directory.name.partition("-")[0])
            return real(directory, *rest)

        return spy

    for of, name in ((shard.Shard, "read"), (shard.Texts, "read"), (shard, "read_rows")):
        monkeypatch.setattr(of, name, spied(getattr(of, name)))
    store.remove(Selection(documents=("Ada/1",)))
    assert set(read) == {"ada"}
    read.clear()
    store.remove(Selection(owners=("Grace",)))
    assert set(read) == {"grace"}


@pytest.mark.parametrize("part", ["blocks", "keys", "sketches", "texts", "suffixes"])
@pytest.mark.parametrize("how", ["changed", "missing", "of other shards"])
def test_nothing_is_cut_out_of_what_is_damaged(make_store, documents, built, part, how):
    """A search structure that is not what was built is built anew, as if the removal had found none."""
    store = make_store("store", documents)
    place = part_of(store, part)
    file = max(place.iterdir(), key=lambda path: path.stat().st_size)
    if how == "of other shards":
        other = part_of(make_store("other", documents[:5]), part)
        shutil.rmtree(place.parent)
        shutil.copytree(other.parent, place.parent)
    elif how == "missing":
        file.unlink()
    else:
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    built.clear()
    store.remove(Selection(documents=("Ada/0",)))
    assert built == [place.parent.parent.name]
    assert content(store) == content(make_store("fresh", [each for each in documents if each.id != "Ada/0"]))
    store.verify()


def test_an_add_is_built(make_store, documents, model, built):
    """What a change brings in is nowhere to be cut out of, also if it has the id of what was there."""
    store = make_store("store", documents[:6])
    built.clear()
    store.add(documents[6:7], model)
    assert sorted(built) == ["ngrams", "search"]
    store.remove(Selection(documents=(documents[6].id,)))
    store.add([replace(documents[6], text=documents[7].text)], model)
    assert sorted(built) == sorted(["ngrams", "search"] * 2)
    assert verify_derived(store) == 2


def test_a_group_that_grows_as_it_loses_a_shard_is_built(make_store, documents, model, monkeypatch, built):
    """Where one of two shards outgrows the group that they share, and the other grows in it, nothing can be cut."""
    named = {document.id: document for document in documents}
    store = make_store("store", [named["Ada/0"], named["Grace/0"]])
    [shared] = {tuple(group.shards) for kind in groups.KINDS for group in store.groups_of(kind)}
    assert shared == ("Ada", "Grace")
    monkeypatch.setattr(groups, "GROUP_TOKENS", sum(entry.tokens for entry in store.manifest.shards.values()) * 3 // 2)
    monkeypatch.setitem(groups.TIMES, groups.NGRAMS, 1)
    built.clear()
    store.add([named["Ada/1"], named["Grace/1"]], model)
    assert sorted(built) == sorted(groups.KINDS * 2)
    assert verify_derived(store) == 4


def test_indexes_of_several_parts_are_cut_to_the_same(monkeypatch, tmp_path):
    """However many parts Lucene wrote an index in, blocks stay in their order, with those that go and without."""
    real = bm25._writer_config

    def small_parts(mode):
        config = real(mode)
        config.setMaxBufferedDocs(int(rng.integers(2, 60)))
        return config

    rng = np.random.default_rng(0)
    blocks = [Block(f"{at // 7}\0{at:09d}", " ".join(map(str, rng.integers(0, 300, 40)))) for at in range(500)]
    gone = {block.key for block in blocks if rng.random() < 0.3}
    (tmp_path / "at once").mkdir()
    build_index(tmp_path / "at once", [block for block in blocks if block.key not in gone])
    expected = index_content(tmp_path / "at once")
    monkeypatch.setattr(bm25, "_writer_config", small_parts)
    for number in range(4):
        for name in ("whole", "cut", "built"):
            (tmp_path / f"{name}{number}").mkdir()
        build_index(tmp_path / f"whole{number}", blocks)
        cut_index(tmp_path / f"cut{number}", tmp_path / f"whole{number}", gone)
        build_index(tmp_path / f"built{number}", [block for block in blocks if block.key not in gone])
        assert index_content(tmp_path / f"cut{number}") == expected
        assert index_content(tmp_path / f"built{number}") == expected


@pytest.mark.parametrize("left", [["\n ;;\n"], ["", "..."], ["a word", ";;"]])
def test_blocks_without_words_are_cut_as_they_are_built(tmp_path, left):
    """Where no word is left, or few, the index is that to which the other blocks were never given."""
    rest = [Block(f"b{number}", text) for number, text in enumerate(left)]
    for name in ("whole", "cut", "built"):
        (tmp_path / name).mkdir()
    build_index(tmp_path / "whole", [Block("a", "hello world"), *rest, Block("c", "good bye")])
    cut_index(tmp_path / "cut", tmp_path / "whole", ["a", "c"])
    build_index(tmp_path / "built", rest)
    assert index_content(tmp_path / "cut") == index_content(tmp_path / "built")


def test_what_lucene_leaves_behind_is_found(monkeypatch, tmp_path):
    """If files of the index that was cut stayed beside the new ones, cutting would fail, and so would verifying."""
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    build_index(tmp_path / "whole", [Block("a", "one"), Block("b", "two")])
    real = bm25._write

    def write_and_leave(files, change, *, mode="CREATE"):
        real(files, change, mode=mode)
        shutil.copyfile(tmp_path / "whole" / "_0.nvd", tmp_path / "cut" / "_0.nvd")

    monkeypatch.setattr(bm25, "_write", write_and_leave)
    for act in (
        lambda: cut_index(tmp_path / "cut", tmp_path / "whole", ["a"]),
        lambda: index_content(tmp_path / "cut"),
    ):
        with pytest.raises(StoreError, match="cut holds segments 0, 1 of Lucene, expected one"):
            act()
