"""Two processes make what one makes: DDP and FSDP, started by accelerate's launcher for tests, on gloo.

accelerate offers FSDP on accelerators only: told to use it on a CPU, it quietly takes DDP. So the FSDP half of this
file turns its state to FSDP by hand once the processes have met; from there on accelerate and torch do what they do on
GPUs.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from silo.collect import collect
from silo.config import load_config
from silo.corpus import TRAINED_ON
from training.loop import train
from training.recipe import Recipe

ROOT = Path(__file__).parents[2]
RECIPE = {
    "token_budget": 8 * 12 * 24,
    "vocab_size": 300,
    "sequence_length": 24,
    "batch_size": 12,
    "micro_batch_size": 3,
    "learning_rate": 0.01,
    "checkpoint_every": 2,
    "domains": "source",
    "reweight_every": 3,
    "model": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 16,
        "num_experts": 4,
        "ffn": "dense",
    },
}
TOLERANCE = 2e-4
"""Greatest difference of any weight, of which the largest are about 1: sums are taken in another order."""

PROGRAM = """
import sys
from pathlib import Path
import torch
from accelerate import debug_launcher
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
import training.loop, training.run
from silo.config import load_config
from training.loop import train
from training.recipe import Recipe

class Killed(BaseException):
    pass

make, factor = training.loop.make_accelerator, training.run.learning_rate_factor

def sharded(recipe):
    accelerator = make(recipe)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    AcceleratorState._shared_state.update(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)
    PartialState._shared_state.update(distributed_type=DistributedType.FSDP)
    return accelerator

def killing(step, *arguments, **settings):
    if step == 5:
        raise Killed
    return factor(step, *arguments, **settings)

def work(kind):
    torch.set_num_threads(1)
    training.loop.make_accelerator = sharded if kind == "fsdp" else make
    def run(name, *overrides):
        return train(load_config(Recipe, Path(sys.argv[1]), [f"output={root / name}", *overrides]))
    run(kind)
    training.run.learning_rate_factor = killing
    try:
        run(f"{kind}-resumed")
    except Killed:
        assert (root / f".{kind}-resumed.run" / "step-000000004").is_dir()
    training.run.learning_rate_factor = factor
    run(f"{kind}-resumed")
    if kind == "ddp":
        run("moe", "model.ffn=moe")

root = Path(sys.argv[2])
if __name__ == "__main__":
    for kind in ("ddp", "fsdp"):
        debug_launcher(work, (kind,))
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models that two processes trained, on files and on pairs whose prompts are not learnt."""
    root = tmp_path_factory.mktemp("distributed")
    collect(["python:click", "python:fsspec"], root / "corpus", pairs=True)
    settings = {"corpus": str(root / "corpus" / "permissive"), "output": str(root / "one"), **RECIPE}
    (root / "recipe.yaml").write_text(json.dumps(settings))
    command = [sys.executable, "-c", PROGRAM, str(root / "recipe.yaml"), str(root)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return root


@pytest.fixture(scope="module")
def one(root: Path) -> dict[str, torch.Tensor]:
    """The weights that one process makes, all sequences of a step at once."""
    return alone(root, "one", "micro_batch_size=12")


def alone(root: Path, name: str, *overrides: str) -> dict[str, torch.Tensor]:
    train(load_config(Recipe, root / "recipe.yaml", [f"output={root / name}", *overrides]))
    return load_file(root / name / "model.safetensors")


def difference(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> float:
    """The greatest between two sets of weights."""
    assert some.keys() == others.keys()
    return max(float((some[name] - others[name]).abs().max()) for name in some)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_equal_one(root, one, kind):
    """Two processes, each with two passes a step, end within the tolerance of one that takes the step at once, though
    prompts leave them unequal numbers of learnt tokens; and the same documents are listed."""
    assert difference(load_file(root / kind / "model.safetensors"), one) < TOLERANCE
    assert (root / kind / TRAINED_ON).read_bytes() == (root / "one" / TRAINED_ON).read_bytes()


def test_accumulation_equals_the_whole_step(root, one):
    """One process that takes a step in four passes ends within the tolerance of one that takes it at once."""
    assert difference(alone(root, "passes"), one) < TOLERANCE


def test_experts_are_balanced_pass_by_pass(root):
    """With experts, one process and two make the same of the same passes: the balancing loss is that of each pass."""
    found = load_file(root / "moe" / "model.safetensors")
    assert difference(found, alone(root, "moe-one", "model.ffn=moe")) < TOLERANCE


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_resume(root, kind):
    """Killed in the sixth step and started again, two processes make the bytes of two that went through."""
    for name in ("model.safetensors", TRAINED_ON):
        assert (root / f"{kind}-resumed" / name).read_bytes() == (root / kind / name).read_bytes()
    assert [path.name for path in root.iterdir() if path.name.startswith(".")] == []
