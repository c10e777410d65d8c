"""A run that was killed ends with the very weights that it would have ended with, or says why it cannot go on."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from torch.nn import functional as F

import training.checkpoint
import training.loop
import training.run
from silo.collect import collect
from silo.config import load_config
from silo.corpus import TRAINED_ON
from silo.errors import IntegrityError, StoreError, UsageError
from silo.files import exclusive_lock
from training.checkpoint import run_directory
from training.loop import train
from training.recipe import Recipe

ROOT = Path(__file__).parents[2]
RECIPE = {
    "token_budget": 12 * 16 * 8,
    "vocab_size": 300,
    "sequence_length": 16,
    "batch_size": 8,
    "micro_batch_size": 4,
    "learning_rate": 0.01,
    "domains": "source",
    "reweight_every": 5,
    "checkpoint_every": 2,
    "model": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 16,
        "num_experts": 4,
    },
}
STEPS = 12


@pytest.fixture(scope="module")
def side(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small permissive corpus of two sources."""
    out = tmp_path_factory.mktemp("corpus") / "out"
    collect(["python:click", "python:fsspec"], out)
    return out / "permissive"


@pytest.fixture
def recipe_file(side: Path, tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps({"corpus": str(side), "output": str(tmp_path / "model"), **RECIPE}))
    return file


@pytest.fixture(autouse=True)
def noisy_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose training takes random numbers, so that their state matters."""
    make = training.run.make_optimizer

    def noisy(model, *arguments):
        drop = lambda module, _, out: F.dropout(out, 0.1, module.training)  # noqa: E731
        model.get_input_embeddings().register_forward_hook(drop)
        return make(model, *arguments)

    monkeypatch.setattr(training.run, "make_optimizer", noisy)


class Killed(BaseException):
    """Stands for the kill: nothing of ours catches it."""


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """End the next run in the middle of a step."""
    factor = training.run.learning_rate_factor

    def killing(at: int, *arguments: object, **settings: object) -> float:
        if at == step:
            raise Killed
        return factor(at, *arguments, **settings)

    monkeypatch.setattr(training.run, "learning_rate_factor", killing)


def run(recipe_file: Path, *overrides: str, notes: list[str] | None = None) -> tuple[dict, list[float], Path]:
    """Train; give the summary, the loss of each step, and the model's directory."""
    recipe = load_config(Recipe, recipe_file, overrides)
    with pytest.MonkeyPatch.context() as patch:
        losses, summarize = [], training.loop.summarize
        patch.setattr(training.loop, "summarize", lambda run, *rest: losses.extend(run.losses) or summarize(run, *rest))
        summary = train(recipe, note=(notes if notes is not None else []).append)
    return summary, losses, recipe.output


def interrupted(recipe_file: Path, step: int, *overrides: str) -> Path:
    """Train until a step, and die there; give the directory with the checkpoints."""
    recipe = load_config(Recipe, recipe_file, overrides)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, step)
        with pytest.raises(Killed):
            train(recipe)
    return run_directory(recipe.output)


@pytest.fixture
def whole(recipe_file: Path, tmp_path: Path) -> tuple[dict, list[float], Path]:
    """The same run, never interrupted."""
    return run(recipe_file, f"output={tmp_path / 'whole'}")


def assert_same(found: tuple[dict, list[float], Path], whole: tuple[dict, list[float], Path]) -> None:
    """Same losses step by step, same bytes of the model, nothing left beside it."""
    assert found[1] == whole[1]
    assert len(found[1]) == STEPS
    assert {**found[0], "model": ""} == {**whole[0], "model": ""}
    for name in ("model.safetensors", "tokenizer.json", TRAINED_ON):
        assert (found[2] / name).read_bytes() == (whole[2] / name).read_bytes(), name
    assert not run_directory(found[2]).exists()


@pytest.mark.parametrize("step", sorted(random.Random(5).sample(range(1, STEPS), 4)))
def test_a_resumed_run_is_bit_identical(recipe_file, whole, step):
    """Ended in the middle of a step and started again, a run has the losses and the bytes of one that went through:
    weights, AdamW's moments, random numbers, the round under way and the domains' weights all came back."""
    interrupted(recipe_file, step)
    notes: list[str] = []
    found = run(recipe_file, notes=notes)
    assert_same(found, whole)
    done = (step - step % 2) if step >= 2 else 0
    assert notes == ([f"going on after step {done} of {STEPS}"] if done else [])


def test_a_run_killed_again_and_again_is_bit_identical(recipe_file, whole):
    """However often a run ends, at steps that fall into its first and its second round, the end is the same."""
    for step in (3, 4, 7, 11):
        interrupted(recipe_file, step)
    assert_same(run(recipe_file), whole)


KILLER = """
import json, os, random, signal, sys, time, traceback
from pathlib import Path
import torch
torch.set_num_threads(1)
from silo.config import load_config
from training.loop import train
from training.recipe import Recipe
settings = ["checkpoint_every=1", "token_budget=5120"]
load = lambda output: load_config(Recipe, Path(sys.argv[1]), [f"output={output}", *settings])
def forked(output):
    child = os.fork()
    if not child:
        try:
            train(load(output))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return child
def reached(output):
    steps = output.with_name(f".{output.name}.run").glob("step-*")
    return max((int(path.name.removeprefix("step-")) for path in steps), default=0)
root, generator, kills = Path(sys.argv[2]), random.Random(int(sys.argv[3])), 0
assert os.waitpid(forked(root / "whole"), 0)[1] == 0
for step in sorted(generator.sample(range(1, 32), 5)):
    child = forked(root / "killed")
    while not (ended := os.waitpid(child, os.WNOHANG)[0]) and reached(root / "killed") < step:
        time.sleep(0.001)
    if ended:
        break
    time.sleep(generator.uniform(0, 0.02))
    os.kill(child, signal.SIGKILL)
    kills += os.WIFSIGNALED(os.waitpid(child, 0)[1])
if not (root / "killed").exists():
    assert os.waitpid(forked(root / "killed"), 0)[1] == 0
print(json.dumps({"kills": kills, "left": sorted(path.name for path in root.iterdir())}))
"""


def test_kill_9_at_any_time(recipe_file, tmp_path):
    """Killed with signal 9 at random moments behind random steps, several times in a row, in a checkpoint or not,
    a run still ends with the bytes of one that went through, and leaves nothing beside its model."""
    root = tmp_path / "runs"
    root.mkdir()
    command = [sys.executable, "-c", KILLER, str(recipe_file), str(root), "11"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["kills"] >= 2
    assert found["left"] == ["killed", "whole"]
    for name in ("model.safetensors", TRAINED_ON):
        assert (root / "killed" / name).read_bytes() == (root / "whole" / name).read_bytes()


def test_two_checkpoints_are_kept(recipe_file):
    """Of the checkpoints of steps 2 to 8 the last two stand, and nothing half-written beside them."""
    directory = interrupted(recipe_file, 9)
    assert sorted(path.name for path in directory.iterdir()) == ["lock", "step-000000006", "step-000000008"]


@pytest.mark.parametrize("name", ["state.json", "tensors.pt", "random-0.pt"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_a_torn_checkpoint_is_never_loaded(recipe_file, whole, name, damage):
    """A checkpoint with a flipped bit, a file cut short or one missing is left aside and told; the run goes on from the
    one before it, to the same end."""
    latest = interrupted(recipe_file, 9) / "step-000000008"
    data = bytearray((latest / name).read_bytes())
    data[len(data) // 2] ^= 1
    (latest / name).write_bytes(data if damage == "flipped" else data[:-1])
    if damage == "gone":
        (latest / name).unlink()
    notes: list[str] = []
    found = run(recipe_file, notes=notes)
    assert [note.startswith("a checkpoint is left aside") for note in notes] == [True, False]
    assert "step-000000008" in notes[0]
    assert notes[1] == f"going on after step 6 of {STEPS}"
    assert_same(found, whole)


def test_without_a_whole_checkpoint_nothing_is_begun(recipe_file):
    """When every checkpoint is damaged, that is an error which says what to remove; no run begins anew unasked."""
    directory = interrupted(recipe_file, 9)
    for path in directory.glob("step-*/tensors.pt"):
        path.write_bytes(b"")
    with pytest.raises(IntegrityError, match=r"no checkpoint in \S+\.model\.run is whole; remove it"):
        run(recipe_file)
    assert len(list(directory.glob("step-*"))) == 2


@pytest.mark.parametrize("at", ["_write_tensors", "write_json", "sync_directory"])
def test_a_failing_checkpoint_leaves_the_one_before(recipe_file, whole, at, monkeypatch):
    """When the disk is full in the middle of the second checkpoint, the first still serves."""
    write, calls = getattr(training.checkpoint, at), []

    def full(path: Path, *rest: object) -> None:
        calls.append(path)
        if any("step-000000004" in part for part in path.parts) or (at == "sync_directory" and len(calls) == 2):
            raise OSError(28, "No space left on device")
        write(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(training.checkpoint, at, full)
        with pytest.raises(OSError, match="No space left"):
            run(recipe_file)
    assert_same(run(recipe_file), whole)


CHANGES = [
    ("learning_rate=0.02", r"learning_rate was 0\.01 and is 0\.02"),
    ("model.num_experts=2", r"model\.num_experts was 4 and is 2"),
    ("seed=3", "seed was 0 and is 3"),
    ("token_budget=4096", "token_budget was 1536 and is 4096"),
]


@pytest.mark.parametrize(("override", "said"), CHANGES)
def test_another_recipe_does_not_go_on(recipe_file, override, said):
    """A run under other settings is refused, with each difference and the ways out, and the checkpoints stay."""
    directory = interrupted(recipe_file, 9)
    with pytest.raises(UsageError, match=rf"another one: {said}; go back"):
        run(recipe_file, override)
    assert len(list(directory.glob("step-*"))) == 2


def test_another_corpus_or_policy_does_not_go_on(recipe_file, side, tmp_path):
    """Another corpus under the same settings, and another policy, are other runs; the same corpus elsewhere is not."""
    interrupted(recipe_file, 9)
    collect(["python:click", "python:rich"], tmp_path / "other")
    with pytest.raises(UsageError, match=r"another one: corpus was '[0-9a-f]{64}' and is '[0-9a-f]{64}'; go back"):
        run(recipe_file, f"corpus={tmp_path / 'other' / 'permissive'}")
    (tmp_path / "policy.yaml").write_text("licenses: {GPL-3.0-only: restricted}")
    with pytest.raises(UsageError, match="another one: policy was"):
        run(recipe_file, f"policy={tmp_path / 'policy.yaml'}")
    (tmp_path / "moved").symlink_to(side)
    run(recipe_file, f"corpus={tmp_path / 'moved'}")


def test_what_is_watched_may_change(recipe_file, whole):
    """How often a run is saved and measured may be changed on the way, and changes no bit."""
    interrupted(recipe_file, 9)
    found = run(recipe_file, "checkpoint_every=1", "validate_every=2", "log_every=1")
    assert found[0].pop("validation")
    assert_same(found, whole)


def test_one_run_at_a_time(recipe_file):
    """While a run is under way, another towards the same output is refused."""
    directory = interrupted(recipe_file, 9)
    with exclusive_lock(directory / "lock"), pytest.raises(StoreError, match="is being written by another process"):
        run(recipe_file)
