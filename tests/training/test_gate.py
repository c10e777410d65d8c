"""Law 1: weights never see restricted text, and the licence is read before the text is."""

import json
import os
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import training.loop
import training.tokens
from silo.cli import main
from silo.collect import collect
from silo.config import load_config
from silo.errors import LicenseError, SiloError
from silo.files import canonical_json, sha256
from training.loop import train
from training.recipe import Recipe

TEXTS = ("train.jsonl", "val.jsonl", "test.jsonl", "control.jsonl")
RESTRICTED = [
    "GPL-3.0-only",
    "LGPL-2.1-or-later",
    "CC-BY-NC-4.0",
    "MIT AND GPL-2.0-only",
    "LicenseRef-Nobody-Knows",
    "Mine, all mine ((",
    "NOASSERTION",
    "",
]
WATCHERS: list[set[str]] = []
sys.addaudithook(
    lambda event, arguments: (
        WATCHERS[-1].add(os.path.basename(str(arguments[0]))) if event == "open" and WATCHERS else None
    )
)


@pytest.fixture
def side(tmp_path: Path) -> Path:
    """The permissive side of a corpus of sixty documents that are what they say."""
    source = tmp_path / "source.jsonl"
    rows = [
        {"id": f"d{n}", "text": f"def f{n}(x):\n    return x + {n}\n" * 9, "license": "MIT", "owner": "Ada"}
        for n in range(60)
    ]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    collect([str(source)], tmp_path / "corpus")
    return tmp_path / "corpus" / "permissive"


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def forge(side: Path, split: str, **changes: object) -> str:
    """Change what a corpus says of one document of a split, in its text and its index, with every checksum made good.

    Returns:
        The document's id.
    """
    index = read(side / "index.jsonl")
    victim = next(row["id"] for row in index if row["split"] == split)
    for name in TEXTS:
        lines, offset = [], 0
        for record in read(side / name):
            row = next(row for row in index if row["id"] == record["id"])
            if record["id"] == victim:
                record |= {key: value for key, value in changes.items() if key in record}
                row |= changes
            line = canonical_json(record)
            row |= {"offset": offset, "bytes": len(line), "sha256": sha256(line)}
            lines.append(line)
            offset += len(line)
        (side / name).write_bytes(b"".join(lines))
    (side / "index.jsonl").write_bytes(b"".join(map(canonical_json, index)))
    reseal(side)
    return victim


def reseal(side: Path) -> None:
    """Make a manifest that agrees with the files as they are now, as a forger would."""
    manifest = json.loads((side / "manifest.json").read_bytes())
    del manifest["digest"]
    for name, file in manifest["files"].items():
        data = (side / name).read_bytes()
        file |= {"bytes": len(data), "sha256": sha256(data)}
    manifest["digest"] = sha256(canonical_json(manifest))
    (side / "manifest.json").write_bytes(canonical_json(manifest))


def recipe_for(side: Path, **settings: object) -> Path:
    """A recipe file for a tiny model on a corpus."""
    recipe = side.parents[1] / "recipe.yaml"
    model = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    model |= {"intermediate_size": 8, "num_experts": 2}
    output = side.parents[1] / "model"
    sizes = {"token_budget": 64, "vocab_size": 300, "sequence_length": 16, "batch_size": 4}
    recipe.write_text(json.dumps({"corpus": str(side), "output": str(output), **sizes, "model": model, **settings}))
    return recipe


@pytest.fixture
def untaught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither tokenizer nor weights may be made while this is in force."""

    def never(*_: object, **__: object) -> None:
        raise AssertionError("something was trained")

    monkeypatch.setattr(training.tokens, "train_tokenizer", never)
    monkeypatch.setattr(training.tokens, "tokenize", never)
    monkeypatch.setattr(training.loop, "optimize", never)


def assert_refused(side: Path, victim: str) -> None:
    """The trainer names the document, opens no file of text, and writes nothing."""
    recipe = load_config(Recipe, recipe_for(side))
    before = sorted(path.relative_to(side.parents[1]) for path in side.parents[1].rglob("*"))
    WATCHERS.append(set())
    with pytest.raises(LicenseError) as error:
        train(recipe)
    opened = WATCHERS.pop()
    assert f"document {victim!r}" in str(error.value)
    assert "restricted" in str(error.value)
    assert "index.jsonl" in opened
    assert not opened & set(TEXTS)
    assert sorted(path.relative_to(side.parents[1]) for path in side.parents[1].rglob("*")) == before


def test_the_corpus_trains_when_nobody_touched_it(side):
    """What follows is refused for its licence and nothing else: as collected, the same corpus trains; resealed, too."""
    victim = forge(side, "train", title="another")
    summary = train(load_config(Recipe, recipe_for(side)))
    assert summary["documents_by_license"] == {"MIT": summary["documents"]}
    assert victim in {row["id"] for row in read(side.parents[1] / "model" / "trained_on.jsonl")}


@pytest.mark.parametrize("license", RESTRICTED)
def test_a_restricted_document_is_refused_before_any_text_is_read(side, untaught, license):
    """One restricted, unknown, missing or unreadable licence stops the run, though every checksum agrees."""
    assert_refused(side, forge(side, "train", license=license))


@pytest.mark.parametrize("license", ["GPL-3.0-only", "NOASSERTION"])
def test_licences_are_judged_before_text(side, untaught, license):
    """With the text scrambled the error is still that of the licence: nothing else was looked at before it."""
    victim = forge(side, "train", license=license)
    for name in TEXTS:
        (side / name).write_bytes(os.urandom((side / name).stat().st_size))
    assert_refused(side, victim)


@pytest.mark.parametrize("tier", ["SW", "PD", "restricted"])
def test_a_forged_tier_does_not_help(side, untaught, tier):
    """The tier that the index states is for people; the gate works it out anew."""
    assert_refused(side, forge(side, "train", license="AGPL-3.0-only", tier=tier))


@pytest.mark.parametrize("split", ["val", "test", "control"])
def test_no_split_hides_a_restricted_document(side, untaught, split):
    """A corpus with a restricted document anywhere is no permissive corpus."""
    assert_refused(side, forge(side, split, license="GPL-2.0-only"))


@pytest.mark.parametrize("change", [{"license": None}, {"license": ["MIT"]}, {"license": 3}, {"owner": None}])
def test_a_licence_that_is_no_text_is_refused(side, untaught, change):
    """A licence or owner of another type is an error of ours, never a pass and never a crash."""
    forge(side, "train", **change)
    result = CliRunner().invoke(main, ["train", str(recipe_for(side))])
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert not (side.parents[1] / "model").exists()


def test_a_row_without_a_licence_is_refused(side, untaught):
    """An index that says nothing of a licence is damaged, whatever its checksums say."""
    rows = read(side / "index.jsonl")
    del rows[7]["license"]
    (side / "index.jsonl").write_bytes(b"".join(map(canonical_json, rows)))
    reseal(side)
    with pytest.raises(SiloError, match=r"index\.jsonl:8 is no row of an index"):
        train(load_config(Recipe, recipe_for(side)))
    assert not (side.parents[1] / "model").exists()


def test_an_index_that_lies_about_the_text_is_refused(side):
    """A document that says GPL in its own line cannot pass under an index that says MIT."""
    victim = forge(side, "train", license="GPL-3.0-only")
    rows = read(side / "index.jsonl")
    for row in rows:
        row["license"] = "MIT"
    (side / "index.jsonl").write_bytes(b"".join(map(canonical_json, rows)))
    reseal(side)
    with pytest.raises(SiloError, match=f"document '{victim}' has license 'GPL-3.0-only', the index says 'MIT'"):
        train(load_config(Recipe, recipe_for(side)))
    assert not (side.parents[1] / "model").exists()


def test_the_command_says_it_in_one_line(side, untaught):
    """``silo train`` names document and licence in one line, leaves with 1, and makes no model."""
    victim = forge(side, "train", license="GPL-3.0-only")
    result = CliRunner().invoke(main, ["train", str(recipe_for(side)), "--json"])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.count("\n") == 1
    assert f"document {victim!r} is under 'GPL-3.0-only', which is restricted" in result.stderr
    assert not (side.parents[1] / "model").exists()


def test_the_policy_of_the_recipe_decides(side):
    """The operator's policy file can admit what the tables hold back, and hold back what they admit."""
    victim = forge(side, "train", license="GPL-3.0-only", owner="Grace")
    policy = side.parents[1] / "policy.yaml"
    policy.write_text("owners: {Grace: SW}")
    with pytest.raises(LicenseError):
        train(load_config(Recipe, recipe_for(side)))
    train(load_config(Recipe, recipe_for(side, policy=str(policy))))
    taught = {row["id"]: row["license"] for row in read(side.parents[1] / "model" / "trained_on.jsonl")}
    assert taught[victim] == "GPL-3.0-only"
    policy.write_text("licenses: {MIT: restricted}\nowners: {Grace: SW}")
    recipe = load_config(Recipe, recipe_for(side, policy=str(policy)), [f"output={side.parents[1] / 'other'}"])
    with pytest.raises(LicenseError, match="is under 'MIT', which is restricted"):
        train(recipe)
