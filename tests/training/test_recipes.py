"""The recipes that come with SILO, and what `--dry-run` says of one."""

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

import training.loop
from silo.cli import main
from silo.collect import collect
from silo.config import load_config
from silo.corpus import Corpus
from silo.errors import UsageError
from training.recipe import RECIPES, Recipe, find_recipe
from training.shape import model_config, parameter_count

NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
TINY = ["vocab_size=300", "sequence_length=32", "token_budget=16384", "model.hidden_size=16", "model.ffn=dense"]
TINY += ["model.intermediate_size=16"]


def named(name: str, *overrides: str) -> Recipe:
    return load_config(Recipe, find_recipe(Path(name)), ["corpus=corpus", "output=no-such-model", *overrides])


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_states_its_size(name):
    """Each recipe is one, its first line has the number of parameters of its model, and two numbers of GPUs share its
    batch evenly."""
    recipe = named(name)
    first = (RECIPES / f"{name}.yaml").read_text().partition("\n")[0]
    stated = int(re.match(r"# ([\d,]+) parameters", first)[1].replace(",", ""))
    assert parameter_count(model_config(recipe)) == stated
    for processes in (1, 8):
        size, passes = recipe.micro_batches(1 if name == "nano" else processes)
        assert size * passes * (1 if name == "nano" else processes) == recipe.batch_size


@pytest.mark.parametrize(("tiers", "budget"), [("pd", 60), ("pdsw", 250), ("pdswby", 350)])
def test_silo_is_as_in_the_paper(tiers, budget):
    """SILO's recipes have the paper's budget in billions of tokens, its steps of 2.6 M tokens and 2,000 of warm-up, on
    128 processes in one pass."""
    recipe = named(f"silo-1.3b-{tiers}")
    assert recipe.token_budget == budget * 10**9
    assert recipe.batch_size * recipe.sequence_length == pytest.approx(2.6e6, rel=0.01)
    assert round(recipe.steps * recipe.warmup_fraction) == 2000
    assert recipe.micro_batches(128) == (10, 1)


def test_a_batch_that_cannot_be_dealt_out_is_said():
    """A batch that processes and passes do not divide is an error with all three numbers."""
    with pytest.raises(UsageError, match="batch_size 1280 is no multiple of micro_batch_size 10 x 3 processes"):
        named("silo-1.3b-pd").micro_batches(3)
    with pytest.raises(UsageError, match="batch_size 16 is no multiple of micro_batch_size 1 x 32 processes"):
        named("nano").micro_batches(32)


def test_a_file_goes_before_a_name(tmp_path, monkeypatch):
    """A file of that name is taken before the recipe that comes with SILO, and an unknown name is a missing file."""
    monkeypatch.chdir(tmp_path)
    assert find_recipe(Path("nano")) == RECIPES / "nano.yaml"
    (tmp_path / "nano").write_text("seed: 1")
    assert find_recipe(Path("nano")) == Path("nano")
    with pytest.raises(UsageError, match="none does not exist"):
        named("none")


@pytest.fixture(scope="module")
def side(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("corpus") / "out"
    collect(["python:click", "python:fsspec"], out)
    return out / "permissive"


def test_a_dry_run_trains_nothing(side, tmp_path, monkeypatch):
    """`--dry-run` of a recipe by its name tells parameters, steps, documents by licence, each domain's sequences, and
    makes no model; trained after that, the model has those parameters and steps."""

    def never(*_: object) -> None:
        raise AssertionError("something was trained")

    arguments = ["train", "nano", f"corpus={side}", f"output={tmp_path / 'model'}", *TINY, "--json"]
    with monkeypatch.context() as patch:
        patch.setattr(training.loop, "optimize", never)
        result = CliRunner().invoke(main, [*arguments, "--dry-run"])
        shown = CliRunner().invoke(main, [*arguments[:-1], "--dry-run"]).stdout
    assert result.exit_code == 0, result.stderr
    assert list(tmp_path.iterdir()) == []
    told = json.loads(result.stdout)
    documents = list(Corpus.open(side).documents("train"))
    assert told["documents"] == len(documents) == sum(told["documents_by_license"].values())
    assert set(told["documents_by_license"]) == {document.license for document in documents}
    assert set(told["domains"]) == {document.source for document in documents}
    for domain in told["domains"].values():
        assert domain["sequences"] == domain["tokens"] // 32
        assert domain["passes"] == pytest.approx(domain["weight"] * 512 / domain["sequences"], abs=2e-3)
    assert (told["steps"], told["tokens"], told["tokens_a_step"]) == (32, 16384, 512)
    assert f"{told['parameters']:,} parameters" in shown
    assert "nothing was trained" in shown
    done = json.loads(CliRunner().invoke(main, arguments).stdout)
    assert {name: done[name] for name in ("parameters", "steps", "tokens", "corpus")} == {
        name: told[name] for name in ("parameters", "steps", "tokens", "corpus")
    }
    assert set(done["validation"]) == {"tier", "domain"}
