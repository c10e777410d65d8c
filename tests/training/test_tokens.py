"""The gate in front of a tokenised corpus: planted bypasses are refused, and the document is named."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import training.tokens
from silo.cli import main
from silo.collect import collect
from silo.corpus import Corpus
from silo.errors import DataError, IntegrityError, LicenseError
from silo.files import canonical_json, sealed, sha256_file
from silo.licensing import DEFAULT_POLICY, Policy, Tier
from training.tokens import Tokens, open_tokens


def write_corpus(root: Path, name: str, owner: str = "Ada", count: int = 40) -> Path:
    rows = [
        {"id": f"{name}{n}", "text": f"{name} number {n} " * 9, "license": "MIT", "owner": owner, "source": name}
        for n in range(count)
    ]
    source = root / f"{name}.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    collect([str(source)], root / name)
    return root / name / "permissive"


@pytest.fixture
def side(tmp_path: Path) -> Path:
    side = write_corpus(tmp_path, "x")
    open_tokens(side, DEFAULT_POLICY, 300)
    return side


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def forge(tokens: Path, change) -> str:
    """Change one row of a tokenised corpus, with every checksum made good, and give the document's id."""
    rows = rows_of(tokens / "documents.jsonl")
    change(rows[3])
    (tokens / "documents.jsonl").write_bytes(b"".join(map(canonical_json, rows)))
    reseal(tokens)
    return rows[3]["id"]


def reseal(tokens: Path, **changes: object) -> None:
    manifest = json.loads((tokens / "manifest.json").read_bytes())
    manifest["files"] = {name: sha256_file(tokens / name) for name in manifest["files"]}
    del manifest["digest"]
    (tokens / "manifest.json").write_bytes(canonical_json(sealed({**manifest, **changes})))


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """No token may be read while this is in force."""

    def never(*_: object) -> None:
        raise AssertionError("tokens were read")

    monkeypatch.setattr(Tokens, "array", never)
    monkeypatch.setattr(training.tokens, "tokenize", never)


def test_a_restricted_document_in_a_forged_manifest_is_named(side: Path, unread):
    """A row whose licence is restricted stops the opening, whatever tier and checksums say."""
    victim = forge(side / "tokens" / "bpe-300", lambda row: row.update(license="GPL-3.0-only", tier="SW"))
    with pytest.raises(LicenseError, match=f"document '{victim}' is under 'GPL-3.0-only'"):
        open_tokens(side, DEFAULT_POLICY, 300)


@pytest.mark.parametrize("field", ["id", "license", "owner", "source", "content", "split"])
def test_a_row_that_the_corpus_does_not_know_is_named(side: Path, unread, field):
    """A document that was put in another's place has to agree with the corpus's index in everything, or is named."""
    victim = forge(side / "tokens" / "bpe-300", lambda row: row.update({field: "ISC"}))
    with pytest.raises(IntegrityError, match=f"document '{victim}' is not what the corpus says of it"):
        open_tokens(side, DEFAULT_POLICY, 300)


def test_a_smuggled_row_is_named(side: Path, unread):
    """A document more than the corpus has, permissive by its label, is named."""
    tokens = side / "tokens" / "bpe-300"
    rows = rows_of(tokens / "documents.jsonl")
    (tokens / "documents.jsonl").write_bytes(b"".join(map(canonical_json, [*rows, {**rows[-1], "id": "smuggled"}])))
    reseal(tokens)
    with pytest.raises(IntegrityError, match="document 'smuggled' is not what the corpus says of it"):
        open_tokens(side, DEFAULT_POLICY, 300)


def test_tokens_of_another_corpus_are_refused(side: Path, tmp_path: Path, unread, monkeypatch):
    """The tokens, or the manifest alone, of another corpus are refused, and a document is named."""
    monkeypatch.undo()
    other = write_corpus(tmp_path, "y")
    open_tokens(other, DEFAULT_POLICY, 300)
    mine, theirs = (each / "tokens" / "bpe-300" for each in (side, other))
    shutil.copy(theirs / "manifest.json", mine / "manifest.json")
    with pytest.raises(IntegrityError, match="another corpus than the one with document 'x0'"):
        open_tokens(side, DEFAULT_POLICY, 300)
    shutil.rmtree(mine)
    shutil.copytree(theirs, mine)
    with pytest.raises(IntegrityError, match=r"document 'y\d+' is not what the corpus says of it"):
        open_tokens(side, DEFAULT_POLICY, 300)


def test_a_manifest_of_another_corpus_is_refused(side: Path, tmp_path: Path):
    """A corpus under another corpus's manifest does not open, and a document is named."""
    other = write_corpus(tmp_path, "y")
    shutil.copy(other / "manifest.json", side / "manifest.json")
    with pytest.raises(IntegrityError, match=r"another corpus's.*document"):
        Corpus.open(side)
    shutil.copy(other / "index.jsonl", side / "index.jsonl")
    with pytest.raises(IntegrityError, match=r"'y\d+'"):
        Corpus.open(side)


def test_a_policy_that_became_stricter_is_obeyed(side: Path, unread):
    """Tokens made under one policy are judged by the policy of today, and the document is named."""
    strict = Policy(owners=(("Ada", Tier.RESTRICTED),))
    with pytest.raises(LicenseError, match="document 'x0' is under 'MIT', which is restricted"):
        open_tokens(side, strict, 300)


def test_a_policy_written_into_the_manifest_does_not_help(side: Path, unread):
    """What the manifest states of the policy is for people: the trainer's own policy judges."""
    free = Policy(licenses=(("GPL-3.0-only", Tier.SW),))
    tokens = side / "tokens" / "bpe-300"
    victim = forge(tokens, lambda row: row.update(license="GPL-3.0-only"))
    reseal(tokens, policy=free.to_json(), policy_fingerprint=free.fingerprint)
    with pytest.raises(LicenseError, match=f"document '{victim}'"):
        open_tokens(side, DEFAULT_POLICY, 300)


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "tokenizer.json", "documents.jsonl", "manifest.json"])
def test_a_flipped_byte_is_named(side: Path, name):
    """A changed byte of any file of the tokens is an error that names the file."""
    path = side / "tokens" / "bpe-300" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises((IntegrityError, LicenseError), match=name):
        open_tokens(side, DEFAULT_POLICY, 300)


def test_a_killed_tokenisation_leaves_nothing(side: Path, monkeypatch: pytest.MonkeyPatch):
    """What fails half-way leaves no tokens, and the next run makes them whole."""
    shutil.rmtree(side / "tokens")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(training.tokens, "write_json", full)
        with pytest.raises(OSError, match="No space"):
            open_tokens(side, DEFAULT_POLICY, 300)
    assert [path.name for path in (side / "tokens").iterdir()] == [".bpe-300.lock"]
    assert len(open_tokens(side, DEFAULT_POLICY, 300).array("train"))


def test_a_corpus_without_training_text_is_said(tmp_path: Path):
    """A corpus whose documents are all held out is an error that says what is missing."""
    from silo.corpus import split_of

    id = next(str(n) for n in range(99) if split_of(str(n)) == "test")
    (tmp_path / "x.jsonl").write_text(json.dumps({"id": id, "text": "some text", "license": "MIT"}))
    collect([str(tmp_path / "x.jsonl")], tmp_path / "out")
    with pytest.raises(DataError, match="has no training documents"):
        open_tokens(tmp_path / "out" / "permissive", DEFAULT_POLICY, 300)


def test_large_vocabularies_have_wide_tokens(side: Path, monkeypatch: pytest.MonkeyPatch):
    """With more than 65,536 entries ids take four bytes, and come back the same."""
    narrow = open_tokens(side, DEFAULT_POLICY, 300).array("train")
    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.__len__", lambda self: 70_000)
    wide = open_tokens(side, DEFAULT_POLICY, 301)
    assert (narrow.dtype, wide.array("train").dtype) == (np.uint16, np.uint32)
    assert wide.tokenizer.decode(wide.array("train")[1:20]).startswith("x number")


def test_the_audit_of_a_model_lists_who_taught_it(side: Path, tmp_path: Path):
    """``silo corpus audit MODEL`` counts the documents by licence, and a changed list is found out."""
    model = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    sizes = {"token_budget": 512, "vocab_size": 300, "sequence_length": 16, "batch_size": 4}
    recipe = {"corpus": str(side), "output": str(tmp_path / "model"), **sizes, "domains": "source", "upsample": True}
    (tmp_path / "recipe.yaml").write_text(
        json.dumps({**recipe, "reweight_every": 2, "model": {**model, "intermediate_size": 8, "num_experts": 2}})
    )
    assert CliRunner().invoke(main, ["train", str(tmp_path / "recipe.yaml")]).exit_code == 0
    result = CliRunner().invoke(main, ["corpus", "audit", str(tmp_path / "model"), "--json"])
    (row,) = json.loads(result.stdout)["licenses"]
    in_train = sum(each["split"] == "train" for each in rows_of(side / "index.jsonl"))
    assert (row["tier"], row["license"], row["documents"], row["owners"]) == ("SW", "MIT", in_train, ["Ada"])
    assert 0 < row["weights"] <= row["tokenizer"] == in_train
    card = (tmp_path / "model" / "README.md").read_text()
    assert f"| SW | MIT | {row['weights']} |" in card
    assert json.loads(result.stdout)["collected"] == Corpus.open(side).fingerprint
    listed = tmp_path / "model" / "trained_on.jsonl"
    listed.write_bytes(listed.read_bytes().replace(b"MIT", b"ISC", 1))
    result = CliRunner().invoke(main, ["corpus", "audit", str(tmp_path / "model")])
    assert result.exit_code == 1
    assert "trained_on.jsonl is damaged" in result.stderr
