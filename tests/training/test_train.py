"""Training as a whole: the same bytes from the same recipe, a list of what taught, and a model or nothing at all."""

import json
import math
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from click.testing import CliRunner
from safetensors.torch import load_file

import training.model_directory
import training.tokens
from silo.cli import main
from silo.collect import collect
from silo.config import load_config
from silo.corpus import TRAINED_ON, Corpus
from silo.documents import Document
from silo.errors import SiloError, UsageError
from silo.language_model import LanguageModel
from silo.modeling import SiloForCausalLM
from training.loop import train
from training.optimizer import parameter_groups
from training.recipe import Recipe
from training.shape import model_config

ROOT = Path(__file__).parents[2]
RECIPE = {
    "token_budget": 8192,
    "vocab_size": 300,
    "sequence_length": 32,
    "batch_size": 16,
    "learning_rate": 0.01,
    "model": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 16,
        "num_experts": 4,
    },
}


@pytest.fixture(scope="module")
def side(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small permissive corpus."""
    out = tmp_path_factory.mktemp("corpus") / "out"
    collect(["python:click"], out)
    return out / "permissive"


@pytest.fixture
def recipe_file(side: Path, tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps({"corpus": str(side), "output": str(tmp_path / "model"), **RECIPE}))
    return file


def run(recipe_file: Path, *overrides: str) -> tuple[dict, Path]:
    """Train by a recipe with overrides; give the summary and the model's directory."""
    recipe = load_config(Recipe, recipe_file, overrides)
    return train(recipe), recipe.output


def hidden(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir() if path.name.startswith(".")]


def test_same_recipe_same_bytes(recipe_file, tmp_path):
    """One recipe and seed give bit-identical weights, tokenizer and provenance; another seed gives other weights."""
    first, first_output = run(recipe_file)
    second, second_output = run(recipe_file, f"output={tmp_path / 'again'}")
    files = {path.name for path in first_output.iterdir()}
    assert files >= {"config.json", "model.safetensors", "tokenizer.json", "trained.json", TRAINED_ON}
    assert {path.name for path in second_output.iterdir()} == files
    for name in files - {"trained.json"}:  # which holds the output's name
        assert (first_output / name).read_bytes() == (second_output / name).read_bytes(), name
    assert {**first, "model": ""} == {**second, "model": ""}
    _, other = run(recipe_file, f"output={tmp_path / 'other'}", "seed=1")
    assert (other / "model.safetensors").read_bytes() != (first_output / "model.safetensors").read_bytes()


def nats_a_token(directory: Path, document: Document) -> float:
    """Mean negative log-probability of the first tokens of a document under a saved model."""
    model = LanguageModel.load(directory)
    tokens = model.tokenize(document)[:1000]
    scores = torch.cat([scores for _, scores in model.score(tokens)])
    return -scores.gather(1, torch.from_numpy(tokens).long().unsqueeze(1)).mean().item()


def test_the_loss_falls(recipe_file, tmp_path, side):
    """Training brings the loss below that of the same untrained model, and what was saved is what was trained."""
    untrained, untrained_output = run(recipe_file, f"output={tmp_path / 'untrained'}", "learning_rate=0")
    trained, output = run(recipe_file)
    assert untrained["loss"] == pytest.approx(math.log(300), abs=0.2)
    assert trained["loss"] < untrained["loss"] - 0.5
    held_out = next(Corpus.open(side).documents("test"))
    assert nats_a_token(output, held_out) < nats_a_token(untrained_output, held_out) - 0.5


def test_what_balances_experts_is_no_loss_of_the_text(recipe_file, tmp_path):
    """The loss that is told does not hang on how much routers count, if nothing is learnt."""
    plain, _ = run(recipe_file, f"output={tmp_path / 'plain'}", "learning_rate=0", "model.router_aux_loss_coef=0")
    heavy, _ = run(recipe_file, f"output={tmp_path / 'heavy'}", "learning_rate=0", "model.router_aux_loss_coef=1")
    assert heavy["loss"] == plain["loss"]


def test_a_model_is_on_the_disk_before_it_has_its_name(recipe_file, tmp_path, monkeypatch):
    """Every file is synced while the directory is still a partial one: the checkpoints go once it has its name."""
    synced = []
    sync = training.model_directory.sync_file
    monkeypatch.setattr(training.model_directory, "sync_file", lambda path: synced.append(path) or sync(path))
    _, output = run(recipe_file)
    assert {path.name for path in synced} == {path.name for path in output.iterdir()}
    assert {path.parent.name for path in synced} == {f".{output.name}.partial"}


def test_what_taught_is_listed(recipe_file, side):
    """Beside the weights stands one row for each training document, with its licence and hash and without its text."""
    summary, output = run(recipe_file)
    rows = [json.loads(line) for line in (output / TRAINED_ON).read_bytes().splitlines()]
    documents = {document.id: document for document in Corpus.open(side).documents("train")}
    assert {row["id"] for row in rows} == set(documents)
    assert len(rows) == len(documents)
    for row in rows:
        document = documents[row["id"]]
        assert set(row) == {"id", "license", "owner", "source", "content_hash", "taught"}
        assert (row["license"], row["owner"], row["source"]) == (document.license, document.owner, document.source)
        assert row["content_hash"] == document.content_hash
        assert row["taught"] in (["tokenizer"], ["tokenizer", "weights"])
    in_weights = [row for row in rows if "weights" in row["taught"]]
    assert 0 < len(in_weights) < len(rows)
    assert len(in_weights) == summary["documents"]
    assert Counter(row["license"] for row in in_weights) == summary["documents_by_license"]
    noted = json.loads((output / "trained.json").read_bytes())
    assert noted["corpus"] == Corpus.open(side).fingerprint
    assert noted["recipe"]["corpus"] == str(side)


def test_the_summary_counts(recipe_file):
    """Steps, tokens and parameters are those of the run."""
    summary, output = run(recipe_file)
    assert summary["steps"] == 8192 // (16 * 32)
    assert summary["tokens"] == 8192
    model = SiloForCausalLM.from_pretrained(output)
    assert summary["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert model.config.max_position_embeddings == 32
    assert model.config.bos_token_id == model.config.eos_token_id == 0


@pytest.mark.parametrize(("rate", "equal"), [(0.0, False), (0.75, True)])
def test_averaged_experts_share_after_each_step(recipe_file, rate, equal):
    """Of four experts that each step moves by three quarters towards the others' mean, all are the same in the end; of
    four that it does not move, none are."""
    _, model = run(recipe_file, "model.ffn=averaged", f"model.share_rate={rate}")
    experts = SiloForCausalLM.from_pretrained(model).model.layers[0].mlp.gate_up_proj
    assert torch.allclose(experts, experts[:1], atol=1e-6) == equal


def test_half_precision_trains(recipe_file):
    """With bf16 the forward pass is rounded, and weights are still float32 and finite."""
    AcceleratorState._reset_state(reset_partial_state=True)  # a process has one precision
    try:
        summary, output = run(recipe_file, "mixed_precision=bf16")
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert summary["loss"] < 5.6
    weights = load_file(output / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert all(tensor.isfinite().all() for tensor in weights.values())


WRONG = [
    ("model.num_expert=4", "unknown setting 'model.num_expert'; known are ffn, hidden_size"),
    ("model.vocab_size=300", "unknown setting 'model.vocab_size'"),
    ("model.bos_token_id=1", "unknown setting 'model.bos_token_id'"),
    ("model.architectures=[x]", "unknown setting 'model.architectures'"),
    ("model.hidden_size=big", "model.hidden_size is 'big'; expected int"),
    ("model.rms_norm_eps=small", "model.rms_norm_eps is 'small'; expected float"),
    ("model.initializer_range=-1", "initializer_range is -1.0; expected a number above 0"),
    ("model.ffn=peeer", "ffn is 'peeer'"),
    ("model.num_attention_heads=3", "num_attention_heads 3"),
    ("model=[]", "model is []; expected dict"),
    ("sead=1", "unknown setting 'sead'"),
    ("seed=-1", "seed is -1; expected 0 to 4294967295"),
    ("batch_size=0", "batch_size is 0; expected at least 1"),
    ("sequence_length=1", "sequence_length is 1; expected at least 2"),
    ("vocab_size=256", "vocab_size is 256; expected at least 257"),
    ("learning_rate=.nan", "learning_rate is nan; expected at least 0"),
    ("warmup_fraction=1.5", "warmup_fraction is 1.5; expected 0 to 1"),
    ("token_budget=511", "token_budget is 511; expected at least one step of 32 x 16 tokens"),
    ("mixed_precision=fp8", "mixed_precision is 'fp8'; expected one of no, bf16"),
    ("policy=none.yaml", "none.yaml does not exist"),
    ("corpus=none", "none does not exist"),
]


@pytest.mark.parametrize(("override", "said"), WRONG, ids=[override for override, _ in WRONG])
def test_a_wrong_recipe_is_wrong_use(recipe_file, tmp_path, override, said, monkeypatch):
    """An unknown key, a field that is the tokenizer's, or a value that cannot be is one line and 2, before any work."""

    def never(*_: object) -> None:
        raise AssertionError("work was begun")

    monkeypatch.setattr(training.tokens, "train_tokenizer", never)
    result = CliRunner().invoke(main, ["train", str(recipe_file), override])
    assert isinstance(result.exception, SystemExit), result.exception
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    assert said in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_numbers_as_yaml_spells_them(recipe_file):
    """1e-6 without a dot, which YAML reads as text, is a number in a model's fields as it is in the recipe's."""
    recipe = load_config(Recipe, recipe_file, ["model.rms_norm_eps=1e-6", "learning_rate=1e-3"])
    assert model_config(recipe).rms_norm_eps == 1e-6
    assert recipe.learning_rate == 1e-3


def test_an_output_that_exists_is_kept(recipe_file, tmp_path):
    """A directory that is there is not written to: wrong use, with the way out."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine").write_text("x")
    result = CliRunner().invoke(main, ["train", str(recipe_file)])
    assert result.exit_code == 2
    assert "model exists already; choose another output or remove it" in result.stderr
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["mine"]


def test_too_little_text_is_said(recipe_file, tmp_path):
    """A corpus that does not fill one step is a UsageError with both numbers."""
    with pytest.raises(
        UsageError, match=r"training sequences of 32 tokens, and a step takes 100000; collect more text"
    ):
        run(recipe_file, "batch_size=100000", "token_budget=3200000")
    assert not (tmp_path / "model").exists()


def test_a_loss_that_explodes_leaves_nothing(recipe_file, tmp_path):
    """A run whose loss is not finite ends with 1 and a line that says at which step, and no model is written."""
    with pytest.raises(
        SiloError, match=r"the (loss|gradient) is \S+( finite)? at step \d+; lower learning_rate.*: 'python:click/"
    ):
        run(recipe_file, "learning_rate=1e30", "max_grad_norm=1e30")
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize("step", ["write_file", "write_json"])
def test_a_failing_write_leaves_nothing(recipe_file, tmp_path, monkeypatch, step):
    """When the disk is full at the end, the error is told, and neither a model nor a part of one is left."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(training.model_directory, step, full)
    result = CliRunner().invoke(main, ["train", str(recipe_file)])
    assert (result.exit_code, result.stderr) == (1, "error: input/output: No space left on device\n")
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_a_kill_leaves_no_model(recipe_file, tmp_path):
    """Killed with all but the last file written, a run leaves no model, and the next one sweeps up and makes it."""
    program = (
        "import os, signal, sys\nimport training.model_directory\nfrom silo.cli import main\n"
        "training.model_directory.write_json = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "main(['train', *sys.argv[1:]])\n"
    )
    command = [sys.executable, "-c", program, str(recipe_file)]
    killed = subprocess.run(command, capture_output=True, cwd=ROOT, timeout=300, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "model").exists()
    assert sorted(hidden(tmp_path)) == [".model.partial", ".model.run"]
    (tmp_path / ".model.partial" / "leftover").write_text("of the killed run")
    _, output = run(recipe_file)
    assert not (output / "leftover").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "recipe.yaml"]


def test_accelerate_launch_gives_the_same(recipe_file, tmp_path):
    """Under ``accelerate launch`` one process makes the very bytes that ``silo train`` makes, tokenizer included."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--num_cpu_threads_per_process", str(torch.get_num_threads())]
    command = [*launch, "-m", "silo", "train", str(recipe_file), f"output={tmp_path / 'launched'}", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True, timeout=300)
    summary, output = run(recipe_file)
    assert {**json.loads(done.stdout), "model": ""} == {**summary, "model": ""}
    for name in ("model.safetensors", "tokenizer.json", TRAINED_ON):
        assert (tmp_path / "launched" / name).read_bytes() == (output / name).read_bytes(), name


SPY = """
import json, os, sys
import training.run
from silo.cli import main
factors, factor = [], training.run.learning_rate_factor
training.run.learning_rate_factor = lambda *a, **k: factors.append(factor(*a, **k)) or factors[-1]
try:
    main(["train", *sys.argv[2:], "--json"])
finally:
    seen = {"factors": factors, "modules": sorted({name.partition(".")[0] for name in sys.modules})}
    with open(os.path.join(sys.argv[1], "rank" + os.environ["RANK"] + ".json"), "w") as file:
        json.dump(seen, file)
"""


def test_two_processes_make_one_model(recipe_file, tmp_path):
    """Two processes share the sequences of each step and train one model; one of them writes it and speaks.

    The learning rate falls once to its end, and neither process ever loads the store's code."""
    spy = tmp_path / "spy.py"
    spy.write_text(SPY)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    launch += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    done = subprocess.run(
        [*launch, str(spy), str(tmp_path), str(recipe_file)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("\n") == 1
    summary = json.loads(done.stdout)
    assert (summary["steps"], summary["tokens"]) == (16, 8192)
    assert hidden(tmp_path) == []
    assert LanguageModel.load(tmp_path / "model").vocab_size <= 300
    alone, _ = run(recipe_file, f"output={tmp_path / 'alone'}")
    assert summary["loss"] == pytest.approx(alone["loss"], abs=0.01)
    for rank in ("rank0.json", "rank1.json"):
        seen = json.loads((tmp_path / rank).read_bytes())
        assert seen["factors"][-1] == pytest.approx(0.1, abs=0.01)
        assert max(seen["factors"]) == 1.0
        after = seen["factors"][seen["factors"].index(1.0) :]
        assert after == sorted(after, reverse=True)
        assert not {"datastore", "eval", "faiss", "jnius"} & set(seen["modules"])


def test_matrices_decay_and_gains_do_not(recipe_file):
    """Weight decay is on every parameter of two or more dimensions and on no other, and no parameter is left out."""
    model = SiloForCausalLM(model_config(load_config(Recipe, recipe_file)))
    decayed, kept = parameter_groups(model.parameters(), 0.1)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(parameter)] for parameter in kept["params"]} == {name for name in names.values() if "norm" in name}
    assert len(decayed["params"]) + len(kept["params"]) == len(names)
