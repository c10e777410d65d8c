"""Continued pre-training: weights keep their teachers, and the tokenizer stays."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import training.loop
import training.tokens
from silo.cli import main
from silo.collect import collect
from silo.config import load_config
from silo.corpus import MODEL_CARD, TRAINED_ON, Corpus
from silo.errors import IntegrityError, LicenseError, UsageError
from silo.files import canonical_json, sealed, sha256_file
from silo.modeling import SiloConfig, SiloForCausalLM
from training.continued import Origin
from training.loop import train
from training.recipe import Recipe

MODEL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
SIZES = {"token_budget": 512, "vocab_size": 300, "sequence_length": 16, "batch_size": 4}


def write_corpus(root: Path, name: str, license: str, shared: int) -> Path:
    """Documents of one licence, and so many under MIT that all corpora share."""
    rows = [
        {"id": f"{name}{n}", "text": f"{name} number {n} " * 9, "license": license, "owner": name} for n in range(30)
    ] + [{"id": f"shared{n}", "text": f"shared {n} " * 20, "license": "MIT", "owner": "all"} for n in range(shared)]
    (root / f"{name}.jsonl").write_text("".join(json.dumps({**row, "source": "s"}) + "\n" for row in rows))
    collect([str(root / f"{name}.jsonl")], root / name)
    return root / name / "permissive"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two corpora, a model of the first, and one of both."""
    root = tmp_path_factory.mktemp("continued")
    first, second = write_corpus(root, "ada", "ISC", 20), write_corpus(root, "bea", "BSD-3-Clause", 20)
    settings = {**SIZES, "model": {**MODEL, "intermediate_size": 8, "num_experts": 2}}
    (root / "first.yaml").write_text(json.dumps({"corpus": str(first), "output": str(root / "first"), **settings}))
    (root / "second.yaml").write_text(
        json.dumps({"corpus": str(second), "output": str(root / "second"), "init": str(root / "first"), **SIZES})
    )
    train(load_config(Recipe, root / "first.yaml"))
    train(load_config(Recipe, root / "second.yaml"))
    return root


def rows_of(directory: Path) -> dict[str, dict]:
    return {row["id"]: row for row in map(json.loads, (directory / TRAINED_ON).read_bytes().splitlines())}


def again(root: Path, init: Path, *overrides: str) -> Recipe:
    return load_config(Recipe, root / "second.yaml", [f"init={init}", f"output={init.parent / 'more'}", *overrides])


def test_all_teachers_are_listed(root):
    """Whoever taught the first model is listed beside the second with all that it taught, and so is whoever was new."""
    before, after = rows_of(root / "first"), rows_of(root / "second")
    assert before.keys() < after.keys()
    for id, row in before.items():
        assert set(row["taught"]) <= set(after[id]["taught"])
        assert {**row, "taught": 0} == {**after[id], "taught": 0}
    new = [row for id, row in after.items() if id not in before]
    assert new
    assert all(row["taught"] == ["weights"] and row["id"].startswith("bea") for row in new)
    again = [id for id in before if "weights" in after[id]["taught"] and "weights" not in before[id]["taught"]]
    assert all(id.startswith("shared") for id in again)
    assert list(after) == sorted(after)


def test_the_summary_and_the_card_tell_both(root):
    """Documents by licence are those of both runs; the card names the first model by its hash, and the audit counts."""
    card = json.loads((root / "second" / MODEL_CARD).read_bytes())
    first = json.loads((root / "first" / MODEL_CARD).read_bytes())
    in_weights = [row for row in rows_of(root / "second").values() if "weights" in row["taught"]]
    assert card["documents"] == len(in_weights) == sum(card["documents_by_license"].values())
    assert set(card["documents_by_license"]) >= {"ISC", "BSD-3-Clause"}
    assert card["init"]["fingerprint"] == first["fingerprint"]
    assert card["init"]["documents_by_license"] == first["documents_by_license"]
    assert f"Continued from: sha256 `{first['fingerprint']}`" in (root / "second" / "README.md").read_text()
    result = CliRunner().invoke(main, ["corpus", "audit", str(root / "second"), "--json"])
    counted = {row["license"]: row["weights"] for row in json.loads(result.stdout)["licenses"]}
    assert {name: count for name, count in counted.items() if count} == card["documents_by_license"]


def test_the_tokenizer_is_kept(root, monkeypatch):
    """The second corpus is cut by the first model's tokenizer, byte for byte the same file, and none is trained."""
    files = [root / name / "tokenizer.json" for name in ("first", "second")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert not (root / "bea" / "permissive" / "tokens" / "bpe-300").exists()


def test_it_begins_with_the_weights(root, tmp_path):
    """Continued at a learning rate of zero the weights are those of the first model; at the usual one they are not."""
    train(again(root, root / "first", f"output={tmp_path / 'still'}", "learning_rate=0"))
    first, still, second = (
        load_file(path / "model.safetensors") for path in (root / "first", tmp_path / "still", root / "second")
    )
    assert all((first[name] == still[name]).all() for name in first)
    assert any((first[name] != second[name]).any() for name in first)


def test_a_third_run_keeps_the_first_teachers(root, tmp_path):
    """Continued twice, a model still lists the teachers of the first run, and names both models before it."""
    train(again(root, root / "second", f"output={tmp_path / 'third'}"))
    assert rows_of(root / "first").keys() < rows_of(tmp_path / "third").keys()
    assert (tmp_path / "third" / "README.md").read_text().count("Continued from: sha256") == 2


@pytest.fixture
def copy(root, tmp_path) -> Path:
    return shutil.copytree(root / "first", tmp_path / "copy")


@pytest.fixture
def untaught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be tokenised or trained while this is in force."""

    def never(*_: object, **__: object) -> None:
        raise AssertionError("something was trained")

    monkeypatch.setattr(training.tokens, "tokenize", never)
    monkeypatch.setattr(training.loop, "optimize", never)


def reseal(directory: Path, rows: list[dict]) -> None:
    """Change a model's list of teachers, with every checksum of it made good."""
    (directory / TRAINED_ON).write_bytes(b"".join(map(canonical_json, rows)))
    card = json.loads((directory / MODEL_CARD).read_bytes())
    del card["digest"]
    card["trained_on_sha256"] = sha256_file(directory / TRAINED_ON)
    (directory / MODEL_CARD).write_bytes(canonical_json(sealed(card)))


def test_a_restricted_teacher_is_refused(root, copy, untaught):
    """A model that a document taught which is restricted, by its label or by today's policy, is not continued."""
    rows = list(rows_of(copy).values())
    rows[3]["license"] = "GPL-3.0-only"
    reseal(copy, rows)
    with pytest.raises(LicenseError, match=f"document {rows[3]['id']!r} is under 'GPL-3.0-only'"):
        train(again(root, copy))
    (copy.parent / "policy.yaml").write_text("licenses: {ISC: restricted}")
    with pytest.raises(LicenseError, match="document 'ada"):
        train(again(root, root / "first", f"policy={copy.parent / 'policy.yaml'}", f"output={copy.parent / 'more'}"))


@pytest.mark.parametrize("name", [MODEL_CARD, TRAINED_ON])
def test_a_model_of_unknown_teachers_is_refused(root, copy, untaught, name):
    """A model directory without its card or its list is not continued, for nobody knows who taught it."""
    (copy / name).unlink()
    with pytest.raises(UsageError, match=f"has no {name}, so it is not known who taught it"):
        train(again(root, copy))


def test_other_weights_under_the_list_are_refused(root, copy, untaught):
    """Weights that were put beside another model's list, and a list with a line less, are not continued."""
    weights = load_file(copy / "model.safetensors")
    save_file({name: value + 1e-3 for name, value in weights.items()}, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(IntegrityError, match="weights and tokenizer are not those that"):
        train(again(root, copy))
    (copy / TRAINED_ON).write_bytes(b"".join((copy / TRAINED_ON).read_bytes().splitlines(keepends=True)[1:]))
    with pytest.raises(IntegrityError, match=r"trained_on\.jsonl is damaged"):
        train(again(root, copy))


def test_shapes_are_the_models(root):
    """A recipe with both init and model, or with longer sequences than the model reads, is wrong use."""
    with pytest.raises(UsageError, match=r"init and model\.hidden_size are both set"):
        again(root, root / "first", "model.hidden_size=8", "model.peer_num_experts=64")
    with pytest.raises(UsageError, match=r"sequence_length is 32, and .* reads 16 tokens at most"):
        train(again(root, root / "first", "sequence_length=32"))


def test_a_recipe_grows_the_experts_of_its_first_model(root, tmp_path):
    """With init and more experts a PEER layer grows: without learning it computes what it did but for rounding, with
    it siblings part ways, and the audit still lists its teachers."""
    peer = ["model.ffn=peer", "model.peer_num_experts=16", "model.peer_experts_per_head=4", "model.key_dim=4"]
    peer += ["model.query_batch_norm=false"]  # whose averages move without learning
    train(load_config(Recipe, root / "first.yaml", [*peer, f"output={tmp_path / 'small'}"]))
    more = "model.peer_num_experts=64"
    train(again(root, tmp_path / "small", more, "learning_rate=0", f"output={tmp_path / 'still'}"))
    small, still = (SiloForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("small", "still"))
    tokens = torch.randint(still.config.vocab_size, (4, 16), generator=torch.Generator().manual_seed(0))
    assert still.config.peer_num_experts == 64
    torch.testing.assert_close(small(tokens).logits, still(tokens).logits, rtol=0, atol=1e-6)
    train(again(root, tmp_path / "small", more, f"output={tmp_path / 'grown'}"))
    keys = SiloForCausalLM.from_pretrained(tmp_path / "grown").model.layers[0].mlp.retrieval.keys
    assert (keys[:, :, ::2] != keys[:, :, 1::2]).any()
    assert rows_of(tmp_path / "small").keys() < rows_of(tmp_path / "grown").keys()


@pytest.mark.parametrize("number", [4, 16, 32, 80, 100])
def test_experts_that_are_no_square_times_as_many_are_refused(number):
    """Fewer experts, as many, or a number that is not 4, 9, 16 … times theirs is wrong use."""
    model = SiloForCausalLM(SiloConfig(**MODEL, ffn="peer", peer_num_experts=16, peer_experts_per_head=4, key_dim=4))
    with pytest.raises(UsageError, match=f"peer_num_experts is {number}, and the model of init has 16; expected 4, 9"):
        Origin("", {}, [], model, None).grown(number)


def test_the_corpus_is_still_judged(root, copy, untaught, tmp_path):
    """With a model to begin with, the new corpus goes through the same gate."""
    (tmp_path / "policy.yaml").write_text("owners: {bea: restricted}")
    with pytest.raises(LicenseError, match="document 'bea"):
        train(again(root, copy, f"policy={tmp_path / 'policy.yaml'}"))


def test_tokens_of_another_tokenizer_are_refused(root, tmp_path):
    """Tokens that stand under this tokenizer's name and were cut by another are an error, not text of noise."""
    side = write_corpus(tmp_path, "eve", "MIT", 0)
    train(load_config(Recipe, root / "first.yaml", [f"corpus={side}", f"output={tmp_path / 'eve-model'}"]))
    recipe = again(root, root / "first", f"corpus={side}", f"output={tmp_path / 'more'}")
    train(recipe)
    (made,) = set((side / "tokens").glob("bpe-*")) - {side / "tokens" / "bpe-300"}
    shutil.rmtree(made)
    shutil.copytree(side / "tokens" / "bpe-300", made)
    with pytest.raises(IntegrityError, match="was made by another tokenizer; delete it"):
        train(again(root, root / "first", f"corpus={side}", f"output={tmp_path / 'yet'}"))
    assert len(list(Corpus.open(side).rows)) == 30
