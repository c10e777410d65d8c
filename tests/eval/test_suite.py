"""Suites: each cell measured once, with weights that never saw its test text, and compared document by document."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import CliRunner, Result

from datastore.store import Store
from eval import suite_run
from eval.perplexity import fit_combinations, perplexities, sample, score
from eval.suite import Data, load_suite, read_domains
from eval.suite_report import compare, markdown, read_result
from silo.cli import main
from silo.errors import DataError, IntegrityError, UsageError
from silo.files import canonical_json
from silo.mixture import Mixture

USE = ["lm", "knn", "ngram"]


@pytest.fixture(scope="module")
def base(model, model_dir, control, documents, tmp_path_factory) -> Path:
    """A directory with a model, a store of some owners' text, and their other text."""
    root = tmp_path_factory.mktemp("suite")
    (root / "model").symlink_to(model_dir)
    store = Store.create(root / "store", model, model_dir / "tokenizer.json", control)
    store.add([replace(each, text=each.text[:600]) for each in documents[:6]], model)
    for name, begin in (("test", 200), ("val", 500)):
        cut = [replace(each, id=f"{name}/{each.id}", text=each.text[begin : begin + 300]) for each in documents[:6]]
        (root / f"{name}.jsonl").write_bytes(b"".join(canonical_json(each.to_json()) for each in cut))
    return root


@pytest.fixture
def plan() -> dict:
    return {
        "name": "small",
        "version": 3,
        "reference": "alone",
        "models": {"mixed": {"path": "model", "store": "store", "use": USE}, "alone": {"path": "model"}},
        "domains": {"own": {"test": {"source": "test.jsonl"}, "validation": {"source": "val.jsonl"}}},
    }


@pytest.fixture
def write(tmp_path):
    def written(plan: dict) -> Path:
        path = tmp_path / "suite.yaml"
        path.write_text(yaml.safe_dump(plan, sort_keys=False))
        return path

    return written


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["eval", *map(str, arguments)])


def invoke_json(*arguments: object) -> dict:
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_numbers_are_those_of_eval_perplexity(base, plan, write, tmp_path, model):
    """A cell has the perplexities of weights fitted on validation text, as `silo eval perplexity` fits and reports."""
    plan |= {"tokens": 400, "fit_tokens": 300}
    value = invoke_json("suite", write(plan), "--base", base, "--out", tmp_path / "out")
    mixture = Store.open(base / "store").mixture(model, USE)
    domain = read_domains(load_suite(write(plan)), base)[0]
    fitted = fit_combinations(score(mixture, sample(domain.validation, mixture, 300)), USE)
    expected = perplexities(score(mixture, sample(domain.test, mixture, 400)), fitted)
    found = {row["mixture"]: row["perplexity"] for row in value["rows"] if row["model"] == "mixed"}
    assert {name: each[0] for name, each in found.items()} == pytest.approx(expected, rel=1e-9)
    assert list(found) == ["lm", "lm+knn", "lm+ngram", "all"]
    assert all(low < middle < high for middle, low, high in found.values())
    assert sum(value["cells"][0]["tokens"]) == 400
    assert value["rows"][0]["leakage"]["longest"] > 0
    assert value["cells"][1]["leakage"] is None
    assert read_result(tmp_path / "out") == value


def test_no_text_finds_itself(base, plan, write, tmp_path, model, model_dir, control, documents):
    """Test and validation text that the store holds is left out, as `silo eval perplexity` does: numbers, weights and
    leakage are those of a store without it."""
    domain = read_domains(load_suite(write(plan)), base)[0]
    held = [domain.test[0], domain.validation[-1]]
    store = Store.create(tmp_path / "store", model, model_dir / "tokenizer.json", control)
    store.add([*(replace(each, text=each.text[:600]) for each in documents[:6]), *held], model)
    plan["models"] = {"holds": {"path": "model", "store": str(tmp_path / "store"), "use": USE}, **plan["models"]}
    value = invoke_json("suite", write(plan), "--base", base, "--out", tmp_path / "out")
    holds, mixed = ([row for row in value["rows"] if row["model"] == name] for name in ("holds", "mixed"))
    assert [{**row, "model": "mixed"} for row in holds] == mixed
    assert [cell["left_out_of_store"] for cell in value["cells"]] == [sorted(each.id for each in held), [], []]


def test_neighbours_are_looked_up_as_the_suite_says(base, plan, write, tmp_path):
    """Numbers are those of `silo eval perplexity --neighbours`, in cells of their own; a file of weights says how it
    wants them, and a suite that wants others is refused."""
    plan["domains"]["own"]["tokens"] = plan["domains"]["own"]["fit_tokens"] = 300
    usual = invoke_json("suite", write(plan), "--base", base, "--out", tmp_path / "out")
    plan["models"]["mixed"]["nearest"] = {"k": 2}
    few = invoke_json("suite", write(plan), "--base", base, "--out", tmp_path / "out")
    files = ["--data", base / "test.jsonl", "--fit", base / "val.jsonl", "--save-weights", tmp_path / "w.json"]
    common = ["--model", base / "model", "--store", base / "store", "--use", ",".join(USE), "--max-tokens", 300]
    alone = invoke_json("perplexity", *common, *files, "--neighbours", 2)["perplexity"]
    cells = [
        {row["mixture"]: row["perplexity"][0] for row in value["rows"] if row["model"] == "mixed"}
        for value in (usual, few)
    ]
    assert cells[1] == pytest.approx(alone, rel=1e-9)
    assert cells[0]["lm+ngram"] == cells[1]["lm+ngram"]
    assert cells[0]["lm+knn"] != cells[1]["lm+knn"]
    plan["models"]["mixed"] |= {"weights": str(tmp_path / "w.json"), "nearest": None}
    read = invoke_json("suite", write(plan), "--base", base, "--out", tmp_path / "out")
    assert read["cells"][0]["nearest"] == {"k": 2, "probes": 4, "metric": "l2", "spare": None}
    assert [row["perplexity"] for row in read["rows"]] == [row["perplexity"] for row in few["rows"]]
    plan["models"]["mixed"]["nearest"] = {"k": 3}
    refused = invoke("suite", write(plan), "--base", base, "--out", tmp_path / "out")
    assert refused.exit_code == 2
    assert "w.json were made with Nearest(k=2," in refused.stderr


def test_a_whole_documents_bytes_are_those_of_its_text(base, plan, write, tmp_path):
    """Without a budget the bytes of a cell are the UTF-8 bytes of all its documents."""
    value = invoke_json("suite", write(plan), "models={alone: {path: model}}", "--base", base, "--out", tmp_path / "o")
    texts = read_domains(load_suite(write(plan)), base)[0].test
    assert sorted(value["cells"][0]["bytes"]) == sorted(len(each.full_text.encode()) for each in texts)


def test_what_is_there_is_not_measured_again(base, plan, write, tmp_path, monkeypatch):
    """A second run, and one with another domain beside, score only what is new, and give the same result."""
    out, scored = tmp_path / "out", []
    real = suite_run.score_cell
    monkeypatch.setattr(suite_run, "score_cell", lambda *given: scored.append(given[0].name) or real(*given))
    first = invoke_json("suite", write(plan), "--base", base, "--out", out)
    assert scored == ["mixed", "alone"]
    again = invoke_json("suite", write(plan), "--base", base, "--out", out)
    assert scored == ["mixed", "alone"]
    assert again["rows"] == first["rows"]
    plan["domains"]["half"] = {**plan["domains"]["own"], "test": {"source": "test.jsonl", "limit": 3}}
    more = invoke_json("suite", write(plan), "--base", base, "--out", out)
    assert scored == ["mixed", "alone", "mixed", "alone"]
    assert [row for row in more["rows"] if row["domain"] == "own"] == first["rows"]


def test_a_cell_that_was_changed_is_refused(base, plan, write, tmp_path):
    """A finished cell with one number changed by hand is an error that names the file."""
    plan["models"] = {"alone": {"path": "model"}}
    invoke_json("suite", write(plan), "--base", base, "--out", tmp_path / "out")
    [cell] = (tmp_path / "out" / "cells").iterdir()
    cell.write_text(cell.read_text().replace('"tokens":[', '"tokens":[1', 1))
    result = invoke("suite", write(plan), "--base", base, "--out", tmp_path / "out")
    assert result.exit_code == IntegrityError.exit_code
    assert cell.name in result.stderr


def test_fitting_on_test_text_is_refused(base, plan, write, tmp_path):
    """Validation text that is test text is refused, and so is a file of weights that was fitted on it."""
    out = tmp_path / "out"
    plan["domains"]["own"]["validation"] = {"source": "test.jsonl"}
    result = invoke("suite", write(plan), "--base", base, "--out", out)
    assert result.exit_code == DataError.exit_code
    assert "fit on validation text" in result.stderr
    plan["domains"]["own"] = {"test": {"source": "val.jsonl"}, "validation": {"source": "test.jsonl"}}
    invoke_json("suite", write(plan), "--base", base, "--out", out)
    [weights] = (out / "weights").iterdir()
    plan["domains"]["own"] = {"test": {"source": "test.jsonl"}}
    plan["models"]["mixed"]["weights"] = str(weights)
    result = invoke("suite", write(plan), "--base", base, "--out", out)
    assert result.exit_code == UsageError.exit_code
    assert f"{weights} was fitted on the test text" in result.stderr


def test_weights_and_what_they_are_fitted_on_are_needed(base, plan, write, tmp_path):
    """A mixture without weights or validation text is an error of use, before anything is measured."""
    del plan["domains"]["own"]["validation"]
    result = invoke("suite", write(plan), "--base", base, "--out", tmp_path / "out")
    assert result.exit_code == UsageError.exit_code
    assert "validation text" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_stream_is_read_as_silo_reads(base, plan, write, tmp_path, model):
    """With SILO's protocol a model and its mixture read the same windows, across documents."""
    plan["protocol"] = {"kind": "stream", "context": 64, "stride": 32}
    value = invoke_json("suite", write(plan), "--base", base, "--out", tmp_path / "out")
    mixed, alone = value["cells"]
    assert mixed["windows"] == plan["protocol"]
    assert mixed["log_probability"]["lm"] == alone["log_probability"]["lm"]
    protocol = load_suite(write(plan)).protocol
    texts = sample(read_domains(load_suite(write(plan)), base)[0].test, Mixture(model), None)
    stream = np.concatenate([text.tokens for text in texts])
    expected = score(Mixture(model.reading_by(protocol.cut)), [replace(texts[0], tokens=stream)])
    assert sum(alone["log_probability"]["lm"]) == pytest.approx(expected.lm.log().sum().item(), rel=1e-9)
    own = score(Mixture(model), texts)
    assert abs(own.lm.log().sum().item() - sum(alone["log_probability"]["lm"])) > 1


def test_one_domain_for_each_owner(base, plan, write):
    """``by_owner`` makes a domain of each owner, whose texts are all theirs."""
    plan["domains"]["own"]["by_owner"] = True
    domains = read_domains(load_suite(write(plan)), base)
    assert [domain.name for domain in domains] == ["own: Ada", "own: Grace", "own: Mary"]
    for domain in domains:
        assert {f"own: {each.owner}" for side in (domain.test, domain.validation) for each in side} == {domain.name}


def test_pinned_text_is_checked(base):
    """Text with another hash than the suite states is refused."""
    data = Data(source="test.jsonl", sha256="0" * 64)
    with pytest.raises(DataError, match="the suite was written for 000000000000"):
        data.read(base)


def test_comparison_pairs_documents(base, plan, write, tmp_path):
    """A result compared with itself differs by nothing; a worse mixture's ratio is that of the perplexities."""
    value = invoke_json("suite", write(plan), "--base", base, "--out", tmp_path / "a")
    same = compare(value, value)["rows"]
    assert [row["perplexity_ratio"] for row in same] == [[1.0, 1.0, 1.0]] * len(same)
    [weights] = (tmp_path / "a" / "weights").iterdir()
    worse = json.loads(weights.read_bytes())
    worse["mixtures"]["all"] = {"weights": {"lm": 0.9, "knn": 0.05, "ngram": 0.05}, "temperature": 1.0}
    (tmp_path / "worse.json").write_bytes(canonical_json(worse))
    plan["models"]["mixed"]["weights"] = str(tmp_path / "worse.json")
    invoke_json("suite", write(plan), "--base", base, "--out", tmp_path / "b")
    rows = invoke_json("compare", tmp_path / "a", tmp_path / "b")["rows"]
    [row] = [row for row in rows if row["mixture"] == "all"]
    of = [
        next(each for each in read_result(tmp_path / name)["rows"] if each["mixture"] == "all")["perplexity"][0]
        for name in "ab"
    ]
    assert row["perplexity_ratio"][0] == pytest.approx(of[0] / of[1])
    assert row["perplexity_ratio"][2] < 1
    text = markdown(read_result(tmp_path / "b"))
    assert "95 % bootstrap" in text
    assert read_result(tmp_path / "b")["suite"]["digest"] in text


@pytest.mark.parametrize("name", ["quickstart", "pypi", "silo14"])
def test_ready_suites_load(name):
    """Every suite that comes with SILO can be read, and each of its packages is pinned by its hash."""
    suite = load_suite(Path(name))
    assert suite.name == name
    sources = [data.source for domain in suite.domains.values() for data in (domain.test, domain.validation) if data]
    assert all("==" in source and "#sha256=" in source for source in sources if source.startswith("pypi:"))


def rows_of_hub(source: str, of: str | None, number: int) -> dict:
    """A row in the fields of the data set that silo14 names."""
    text = f"{of or source}, text {number}"
    if "pile" in source:
        return {"text": text, "meta": {"pile_set_name": of}}
    return {"content": text, "title": "t", "label": 1} if "amazon" in source else {"text": text, "title": "t"}


def test_silo14_has_fourteen_domains_with_the_hubs_fields(tmp_path):
    """From local folders with the hub's fields each of the fourteen domains gets its own text, test and validation."""
    suite = load_suite(Path("silo14"))
    rows: dict[str, list[dict]] = {}
    for domain in suite.domains.values():
        source = domain.test.source.removeprefix("hf:")
        rows.setdefault(source, []).extend(rows_of_hub(source, domain.test.of, number) for number in range(60))
    settings = []
    for source, own in rows.items():
        (tmp_path / source).mkdir(parents=True)
        (tmp_path / source / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    for name, domain in suite.domains.items():
        local = domain.test.source.replace("hf:", "hf:./").replace("silo14/", "hf:./silo14/")
        settings += [f"domains.{name}.{side}.source={local}" for side in ("test", "validation")]
    plan = load_suite(Path("silo14"), tuple(settings))
    domains = read_domains(plan, tmp_path)
    assert len(domains) == 14
    assert sum(domain.permissive for domain in domains) == 3
    for domain, described in zip(domains, suite.domains.values(), strict=True):
        of = described.test.of or described.test.source.removeprefix("hf:")
        for side in (domain.test, domain.validation):
            assert side
            assert all(each.text.startswith(f"{of}, text") for each in side)
        assert not {each.id for each in domain.test} & {each.id for each in domain.validation}
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for source in {Path(source).parts[0] for source in rows}:
        (tmp_path / source).rename(moved / source)
    assert read_domains(plan, moved) == domains


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"reference": "third"}, "expected one of mixed, alone"),
        ({"models": {}}, "0 models"),
        ({"domains": {"own": {"tests": {}}}}, "expected test, validation"),
        ({"models": {"mixed": {"path": "model", "use": ["knn"]}}}, "use is"),
        ({"models": {"mixed": {"path": "model", "use": USE}}}, "need one"),
        ({"protocol": {"kind": "other"}}, "expected one of alone, stream"),
        ({"models": {"mixed": {"path": "model", "nearest": {"k": 0}}}}, "nearest is {'k': 0}; expected some of k,"),
        ({"models": {"mixed": {"path": "model", "nearest": {"k": 2.5}}}}, "nearest is {'k': 2.5}; expected some of k,"),
        ({"models": {"mixed": {"path": "model", "nearest": {"K": 3}}}}, "nearest is {'K': 3}; expected some of k,"),
    ],
)
def test_impossible_suites_are_refused(plan, write, change, said):
    """What no suite can say is an error of use that says what it could."""
    with pytest.raises(UsageError, match=said):
        load_suite(write(plan | change))
