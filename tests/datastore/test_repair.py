"""Search structures that were damaged, built anew from the shards."""

import json
import shutil

import pytest
from click.testing import CliRunner

from datastore import groups, snapshot
from datastore.store import Store
from silo.cli import main
from silo.errors import IntegrityError


def run(*arguments):
    """What a command of ``silo datastore`` gave."""
    return CliRunner().invoke(main, ["datastore", *map(str, arguments)])


def change(group):
    """Flip a bit of its largest file."""
    file = max(group.rglob("*.*"), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGE = {
    "changed": change,
    "a file missing": lambda group: next(group.rglob("*.npy")).unlink(),
    "all missing": shutil.rmtree,
    "a file too many": lambda group: (next(group.rglob("*.npy")).parent / "more").write_bytes(b"text"),
    "another's": lambda group: (group / groups.INDEX).write_bytes(b"{}"),
}


@pytest.fixture
def store(make_store, documents, monkeypatch):
    """One of three groups."""
    monkeypatch.setattr(groups, "GROUP_TOKENS", 1)
    return make_store("store", documents[:6])


def named(store, kind):
    """The groups of a kind, as a repair names them."""
    return [f"{kind}/{group.directory}" for group in store.groups_of(kind)]


@pytest.mark.parametrize("kind", groups.KINDS)
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_what_is_damaged_is_built_anew(store, damage, kind, answers):
    """Only that; the store has the hash and the answers that it had, and the log says what was done."""
    before, expected = {each: named(store, each) for each in groups.KINDS}, answers(store)
    damage(store.path / before[kind][1])
    found = run("verify", store.path)
    assert found.exit_code == 1
    assert found.stderr.rstrip().endswith("`silo datastore verify --repair` rebuilds it")
    done = run("verify", store.path, "--repair", "--deep", "--json")
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["repaired"], result["rebuilt_and_equal"]) == ([before[kind][1]], 6)
    opened = Store.open(store.path)
    for each, names in before.items():
        assert [name in named(opened, each) for name in names] == [True, each != kind, True]
    assert answers(opened) == expected
    assert [line["operation"] for line in opened.log()] == ["add", "repair"]
    assert run("verify", store.path, "--repair").exit_code == 0


def test_what_is_sound_stays(store, bytes_of):
    """Nothing is written, and nothing logged."""
    before = bytes_of(store.path)
    assert json.loads(run("verify", store.path, "--repair", "--json").stdout)["repaired"] == []
    assert bytes_of(store.path) == before


@pytest.mark.parametrize("kind", groups.KINDS)
def test_nothing_is_built_of_a_damaged_shard(store, kind, bytes_of):
    """Its file is named, and the store stays as it was."""
    group = store.groups_of(kind)[0]
    shutil.rmtree(store.path / kind / group.directory)
    tokens = store.path / "shards" / store.manifest.shards[group.shards[0]].directory / "tokens.npy"
    tokens.write_bytes(tokens.read_bytes()[:-1] + b"!")
    before = bytes_of(store.path)
    found = run("verify", store.path, "--repair")
    assert found.exit_code == 1
    assert f"{tokens} is damaged" in found.stderr
    assert bytes_of(store.path) == before


@pytest.mark.parametrize("left", [0, 50, -8])
def test_a_file_that_was_cut_is_named_where_nothing_is_checked(store, monkeypatch, left):
    """In a store that is too large to be checked when it is opened, each array and the lists, cut or empty, are an
    error of one kind that names the file and the way to build it anew."""
    monkeypatch.setattr(snapshot, "CHECKED_BYTES", 0)
    directories = [store.path / kind / store.groups_of(kind)[0].directory for kind in groups.KINDS]
    files = [path for directory in directories for path in directory.rglob("*.npy") if path.parent.name != "sketches"]
    for path in [*files, directories[0] / "keys" / "lists.bin"]:
        whole = path.read_bytes()
        path.write_bytes(whole[:left])
        opened = Store.open(store.path)
        use = opened.ngrams if directories[1] in path.parents else opened.neighbours
        with pytest.raises(IntegrityError, match=r"verify --repair") as caught:
            use()
        assert str(path) in str(caught.value)
        path.write_bytes(whole)
