"""Perplexity: against a loop that reads one token at a time, fitted on validation text and nothing else."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from datastore.control import read_trained_on
from datastore.store import Selection, Store
from eval import perplexity as measure
from silo.cli import main
from silo.corpus import Corpus
from silo.documents import Document
from silo.errors import DataError, UsageError
from silo.files import canonical_json
from silo.mixture import Mixture
from silo.nearest import Nearest
from silo.weights import METHODS, Weights


@pytest.fixture(scope="module")
def store(model, model_dir, control, documents, tmp_path_factory) -> Store:
    made = Store.create(tmp_path_factory.mktemp("perplexity") / "store", model, model_dir / "tokenizer.json", control)
    made.add([replace(document, text=document.text[:600]) for document in documents[:6]], model)
    return made


@pytest.fixture(scope="module")
def mixture(model, store) -> Mixture:
    return store.mixture(model, METHODS)


@pytest.fixture(scope="module")
def val(documents) -> list[Document]:
    """Text that shares something with the store."""
    return [replace(document, id=f"val/{document.id}", text=document.text[300:900]) for document in documents[:4]]


@pytest.fixture(scope="module")
def test(documents) -> list[Document]:
    return [replace(document, id=f"test/{document.id}", text=document.text[200:700]) for document in documents[4:8]]


@pytest.fixture(scope="module")
def val_scores(mixture, val) -> measure.Scores:
    return measure.score(mixture, measure.sample(val, mixture, None))


def write(path: Path, documents: list[Document]) -> Path:
    path.write_bytes(b"".join(canonical_json(document.to_json()) for document in documents))
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["eval", "perplexity", *map(str, arguments)])


def run_json(*arguments: object) -> dict:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def assert_error(result: Result, exit_code: int, said: str) -> None:
    assert isinstance(result.exception, SystemExit), result.exception
    assert (result.exit_code, result.stdout) == (exit_code, "")
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert said in result.stderr


def test_perplexity_is_that_of_a_slow_loop(model, model_dir, documents, tmp_path):
    """For documents within the context it is exp of the mean NLL of tokens read one at a time, the first included."""
    texts, length = [], model.key_spec.context
    for document in documents[:2]:
        text = model.tokenizer.decode(model.tokenize(document)[: length - 4].tolist())
        texts.append(replace(document, text=text))
    nll = []
    for document in texts:
        tokens = model.tokenizer(document.text, add_special_tokens=False)["input_ids"]
        assert len(tokens) <= length
        for position, token in enumerate(tokens):
            read = torch.tensor([[model.start_token, *tokens[:position]]])
            with torch.inference_mode():
                nll.append(-model.model(read).logits[0, -1].double().log_softmax(-1)[token].item())
    expected = math.exp(math.fsum(nll) / len(nll))
    report = run_json("--model", model_dir, "--data", write(tmp_path / "x.jsonl", texts))
    assert report["tokens"] == len(nll)
    assert report["documents"] == 2
    assert report["perplexity"] == {"lm": pytest.approx(expected, rel=1e-5)}


def test_every_method_scores_every_token_once(mixture, val, val_scores):
    """Each method has one probability for each token of the texts, between 0 and 1, at each temperature."""
    tokens = sum(len(mixture.model.tokenize(document)) for document in val)
    of_neighbours = [val_scores.knn(temperature) for temperature in measure.TEMPERATURES]
    for scores in (*(val_scores.given[method] for method in ("lm", "ric", "ngram")), *of_neighbours):
        assert scores.shape == (tokens,)
        assert scores.dtype == torch.float64
        assert scores.min() >= 0
        assert scores.max() <= 1 + 1e-6
    assert {each.shape for each in val_scores.evidence.values()} == {(tokens,)}
    assert sum(val_scores.lengths) == tokens


def test_scores_do_not_depend_on_company(mixture, val):
    """A text has the same bits of probability and evidence alone and among others, whatever their order."""
    texts = measure.sample(val, mixture, None)
    together = measure.score(mixture, texts)
    alone = [measure.score(mixture, [text]) for text in texts]
    for method in ("lm", "ric", "ngram"):
        assert torch.equal(torch.cat([scores.given[method] for scores in alone]), together.given[method])
    for name, value in together.evidence.items():
        assert torch.equal(torch.cat([scores.evidence[name] for scores in alone]), value)
    temperature = measure.TEMPERATURES[3]
    assert torch.equal(torch.cat([scores.knn(temperature) for scores in alone]), together.knn(temperature))


def test_weights_by_suffix_are_no_worse_than_one_for_all(val_scores):
    """λ fitted for each class of suffix apart gives the text that it is fitted on at least as high a probability."""
    fitted = measure.fit(val_scores, ["lm", "ngram"])
    assert len(fitted.by_suffix) > 1
    value = val_scores.log_probabilities(fitted).mean()
    assert value > val_scores.log_probabilities(replace(fitted, by_suffix=None)).mean()
    for number, weights in fitted.by_suffix.items():
        own = val_scores.evidence["ngram_class"] == number
        assert own.sum() >= measure.CLASS_TOKENS
        parts = [val_scores.given[method][own] for method in ("lm", "ngram")]
        for share in np.linspace(0, 1, 21):
            grid = ((1 - share) * parts[0] + share * parts[1]).log().mean()
            assert (weights["lm"] * parts[0] + weights["ngram"] * parts[1]).log().mean() >= grid - 1e-9


def test_fitted_weights_beat_a_grid(val_scores):
    """On the text that they are fitted on, no grid point of weights and temperature has a lower perplexity."""
    for members in measure.combinations(["lm", "knn", "ric"]).values():
        fitted = measure.fit(val_scores, members)
        assert list(fitted.by_method) == members
        assert sum(fitted.by_method.values()) == pytest.approx(1, abs=1e-9)
        best = val_scores.log_probabilities(fitted).sum().item()
        for temperature in measure.TEMPERATURES:
            for knn in np.linspace(0, 1, 11):
                for ric in np.linspace(0, 1 - knn, 5):
                    by_method = {"lm": 1 - knn - ric, "knn": knn, "ric": ric}
                    if set(members) < set(by_method) and any(by_method[name] for name in set(by_method) - set(members)):
                        continue
                    point = Weights({name: by_method[name] for name in members}, temperature)
                    assert val_scores.log_probabilities(point).sum().item() <= best + 1e-9


@pytest.mark.parametrize("power", [-16, 12, 20])
def test_distances_may_be_of_any_size(val_scores, power):
    """Distances that are so many times as large, as another model's are, make τ larger by as much, and change nothing
    else."""
    usual = measure.fit(val_scores, ["lm", "knn"])
    large = measure.fit(replace(val_scores, distances=val_scores.distances * 2.0**power), ["lm", "knn"])
    assert (large.temperature, large.by_method) == (usual.temperature * 2.0**power, usual.by_method)


def test_more_methods_are_never_worse_where_they_were_fitted(val_scores):
    """On validation text, all methods together are at least as good as any fewer, and those as the model alone."""
    found = measure.perplexities(val_scores, measure.fit_combinations(val_scores, METHODS))
    assert list(found) == ["lm", "lm+knn", "lm+ric", "lm+ngram", "all"]
    assert found["all"] <= min(found["lm+knn"], found["lm+ric"]) * (1 + 1e-9)
    assert max(found["lm+knn"], found["lm+ric"]) <= found["lm"] * (1 + 1e-9)
    assert found["lm+knn"] < found["lm"]


def test_weights_hang_on_validation_text_alone(model_dir, store, val, test, documents, tmp_path):
    """Whatever text is reported on, the fitted weights are the same; with other validation text they are others."""
    common = ["--model", model_dir, "--store", store.path, "--use", "lm,knn"]
    fit = write(tmp_path / "val.jsonl", val)
    first = run_json(*common, "--data", write(tmp_path / "test.jsonl", test), "--fit", fit)
    second = run_json(*common, "--data", write(tmp_path / "other.jsonl", documents[8:10]), "--fit", fit)
    assert first["mixtures"] == second["mixtures"]
    assert first["fitted_on"] == second["fitted_on"]
    assert first["data"] != second["data"]
    assert first["store"] == store.hash
    third = run_json(*common, "--data", tmp_path / "test.jsonl", "--fit", tmp_path / "other.jsonl")
    assert third["mixtures"] != first["mixtures"]


@pytest.mark.parametrize("id", ["test/Ada/0", "another"])
def test_a_document_on_both_sides_is_refused(model_dir, store, val, id, tmp_path):
    """A text to be reported on that is also fitted on stops the run with 1, under whatever name it comes."""
    data = write(tmp_path / "test.jsonl", [replace(val[2], id=id)])
    fit = write(tmp_path / "val.jsonl", val)
    result = run("--model", model_dir, "--store", store.path, "--use", "lm,knn", "--data", data, "--fit", fit)
    assert_error(result, 1, f"document {id!r} is also in the file that weights are fitted on (as {val[2].id!r})")


def test_disjoint_texts_pass(val, test):
    """Texts that share no document are fitted and reported without complaint, in either direction."""
    measure.require_disjoint(test, val)
    measure.require_disjoint(val, [])
    with pytest.raises(DataError):
        measure.require_disjoint(val, [*test, val[0]])


def test_weights_come_back_from_their_file(model_dir, store, val, test, tmp_path):
    """Weights saved by one run and read by another give the same perplexities to the last bit."""
    common = ["--model", model_dir, "--store", store.path, "--use", "lm,knn,ric"]
    common += ["--data", write(tmp_path / "test.jsonl", test)]
    saved = tmp_path / "weights.json"
    fitted = run_json(*common, "--fit", write(tmp_path / "val.jsonl", val), "--save-weights", saved)
    read = run_json(*common, "--weights", saved)
    assert read == fitted
    noted = json.loads(saved.read_bytes())
    assert noted.pop("texts") == sorted(each.content_hash for each in val)
    assert {name: fitted[name] for name in noted} == noted
    fewer = run_json("--model", model_dir, "--data", tmp_path / "test.jsonl", "--weights", saved)
    assert fewer["perplexity"] == {"lm": fitted["perplexity"]["lm"]}


def test_chosen_weights_are_the_mixture_of_their_methods(model_dir, store, test, tmp_path):
    """λ by method, as `silo generate` takes it, is measured beside the model alone; it must be of what --use names."""
    common = ["--model", model_dir, "--store", store.path, "--data", write(tmp_path / "test.jsonl", test)]
    chosen, whole = tmp_path / "chosen.json", tmp_path / "whole.json"
    chosen.write_text('{"knn": 0.3, "ngram": 0.3}')
    alone, mixed = {"weights": {"lm": 1.0}, "temperature": 1.0}, {"lm": 0.4, "knn": 0.3, "ngram": 0.3}
    by_name = {"lm": alone, "all": {"weights": mixed, "temperature": 1.0}}
    by_name |= {f"lm+{each}": {"weights": {"lm": 0.5, each: 0.5}, "temperature": 1.0} for each in ("knn", "ngram")}
    whole.write_text(json.dumps({"mixtures": by_name}))
    found = run_json(*common, "--use", "lm,knn,ngram", "--weights", chosen)
    expected = run_json(*common, "--use", "lm,knn,ngram", "--weights", whole)["perplexity"]
    assert found["perplexity"] == {name: pytest.approx(expected[name]) for name in ("lm", "all")}
    assert_error(run(*common, "--use", "lm,knn", "--weights", chosen), 2, "give --use lm,knn,ngram")
    chosen.write_text('{"knn": 2}')
    assert_error(run(*common, "--use", "lm,knn", "--weights", chosen), 2, "chosen.json has weights")


def test_neighbours_are_looked_up_as_asked_and_as_their_weights_say(model_dir, model, store, val, test, tmp_path):
    """Weights of three neighbours are fitted and used with three; others are refused, in the command and below it."""
    common = ["--model", model_dir, "--store", store.path, "--use", "lm,knn"]
    common += ["--data", write(tmp_path / "test.jsonl", test)]
    fit, saved = ["--fit", write(tmp_path / "val.jsonl", val)], tmp_path / "weights.json"
    few = run_json(*common, *fit, "--neighbours", 3, "--probes", 2, "--save-weights", saved)
    usual = run_json(*common, *fit)
    assert (few["nearest"], usual["nearest"]) == (Nearest(k=3, probes=2).to_json(), Nearest().to_json())
    assert few["perplexity"]["lm"] == usual["perplexity"]["lm"]
    assert few["perplexity"]["lm+knn"] != usual["perplexity"]["lm+knn"]
    assert run_json(*common, "--weights", saved) == few
    assert_error(run(*common, "--weights", saved, "--neighbours", 4), 2, "weights.json were made with Nearest(k=3,")
    weights = measure.weights_from_json(json.loads(saved.read_bytes()), ["lm", "knn"], where="w")["lm+knn"]
    by_three, by_all = (
        measure.score(store.mixture(model, ["lm", "knn"], nearest=each), measure.sample(test, Mixture(model), 99))
        for each in (Nearest(k=3, probes=2), Nearest())
    )
    assert len(by_three.log_probabilities(weights)) == 99
    with pytest.raises(UsageError, match="the weights were made with"):
        by_all.log_probabilities(weights)


def test_the_help_says_how_neighbours_are_looked_up():
    """The defaults that the options state are those of the code."""
    told = " ".join(run("--help").output.split())
    assert f"Of each token. [default: {Nearest().k};" in told
    assert f"Inverted lists read for each. [default: {Nearest().probes};" in told


def test_a_stored_document_does_not_find_itself(model_dir, make_store, documents, test, val, tmp_path):
    """A document that is scored and in the store is left out of it: the same perplexity as if it were not there."""
    files = ["--fit", write(tmp_path / "val.jsonl", val), "--data", write(tmp_path / "x.jsonl", documents[4:5])]
    found = [
        run_json("--model", model_dir, "--store", make_store(name, held).path, "--use", "lm,knn,ngram", *files)
        for name, held in (("with", documents[:5]), ("without", documents[:4]))
    ]
    assert [each["left_out_of_store"] for each in found] == [[documents[4].id], []]
    assert found[0]["perplexity"] == found[1]["perplexity"]


def test_a_policy_chooses_from_the_store(model_dir, make_store, documents, test, val, tmp_path):
    """Under a policy the perplexity is that of a store of the allowed owners alone."""
    files = ["--fit", write(tmp_path / "val.jsonl", val), "--data", write(tmp_path / "x.jsonl", test)]
    use = ["--use", "lm,knn,ngram", *files]
    both = make_store("both", documents[:6])
    denied = run_json("--model", model_dir, "--store", both.path, *use, "--deny-owner", "Ada")
    assert denied["policy"]["deny"]["owners"] == ["Ada"]
    alone = make_store("alone", [document for document in documents[:6] if document.owner != "Ada"])
    assert denied["perplexity"] == run_json("--model", model_dir, "--store", alone.path, *use)["perplexity"]


def test_a_removal_names_weights_that_restricted_text_taught(model_dir, make_store, val, test, documents, tmp_path):
    """Weights fitted on restricted text say whose it was, and a later removal names their file; a gate is not named."""
    store = make_store("store", documents[:4])
    saved = tmp_path / "w.json"
    files = ["--data", write(tmp_path / "test.jsonl", test), "--fit", write(tmp_path / "val.jsonl", val)]
    run_json("--model", model_dir, "--store", store.path, "--use", "lm,knn", *files)
    assert "weights_to_fit_again" not in store.remove(Selection(documents=(documents[0].id,))).content
    run_json("--model", model_dir, "--store", store.path, "--use", "lm,knn", *files, "--save-weights", saved)
    assert json.loads(saved.read_bytes())["restricted_text_of"] == sorted({each.owner for each in val})
    receipt = store.remove(Selection(documents=(documents[1].id,)))
    assert receipt.content["weights_to_fit_again"] == ["w.json"]
    store.verify()


def test_weights_are_not_reported_on_what_taught_them(model_dir, store, val, test, tmp_path):
    """Weights that --save-weights wrote refuse any document that they were fitted on, in whatever sample."""
    saved, fitted = tmp_path / "w.json", write(tmp_path / "val.jsonl", val)
    asked = ["--model", model_dir, "--store", store.path, "--use", "lm,knn"]
    files = ["--fit", fitted, "--data", write(tmp_path / "test.jsonl", test)]
    assert "texts" not in run_json(*asked, *files, "--save-weights", saved)
    for data in (fitted, write(tmp_path / "mixed.jsonl", [*test, val[0]])):
        for sampled in ([], ["--max-tokens", 50]):
            told = run(*asked, "--weights", saved, "--data", data, *sampled)
            assert_error(told, 2, "w.json was fitted on text of --data; fit on validation text")
    assert run_json(*asked, "--weights", saved, "--data", tmp_path / "test.jsonl")["tokens"]


def test_a_gate_is_not_reported_on_its_lessons(mixture, val, test):
    """A gate's teachers, and the hash of what older weights were fitted on, are known as what taught them."""
    texts = measure.sample(test, mixture, None)
    taught = {"provenance": {"teachers": [{"content_hash": test[1].content_hash}]}}
    for value in (taught, {"fitted_on": measure.data_hash(texts)}):
        with pytest.raises(UsageError, match=r"^g was fitted on the test text of x; fit on"):
            measure.require_unfitted(value, test, texts, where="g", whose="the test text of x")
    for value in (taught, {}, [], None):
        measure.require_unfitted(value, val, measure.sample(val, mixture, None), where="g")


def test_weights_as_json_and_back():
    """What a file of weights holds makes the same weights again."""
    weights = {
        "lm": Weights({"lm": 1.0}, 1.0),
        "lm+knn": Weights({"lm": 1 / 3, "knn": 2 / 3}, 0.5),
    }
    written = json.loads(canonical_json({"mixtures": {name: each.to_json() for name, each in weights.items()}}))
    assert measure.weights_from_json(written, ["lm", "knn"], where="x") == weights


@pytest.mark.parametrize(
    "value",
    [
        {},
        [],
        None,
        {"mixtures": []},
        {"mixtures": {"lm": {"weights": {"lm": 1.0}, "temperature": 1.0}}},
        {"mixtures": {"lm": {"weights": {"lm": 1.0}}, "lm+knn": {"weights": {"lm": 0.5, "knn": 0.5}}}},
        {
            "mixtures": {
                "lm": {"weights": {"lm": 1.0}, "temperature": 1.0},
                "lm+knn": {"weights": {"lm": 1.0}, "temperature": 1},
            }
        },
        {
            "mixtures": {
                "lm": {"weights": {"lm": 1.0}, "temperature": 1.0},
                "lm+knn": {"weights": {"lm": "half", "knn": 0.5}, "temperature": 1},
            }
        },
    ],
)
def test_a_file_without_the_weights_is_wrong_use(value):
    """Weights that lack a mixture, a method, a temperature or sense are a UsageError that says how to make them."""
    with pytest.raises(
        UsageError,
        match=r"w\.json(: mixture .*)? (holds no weights.*; make it with --fit and|weighs lm; expected lm, knn)",
    ):
        measure.weights_from_json(value, ["lm", "knn"], where="w.json")


@pytest.mark.parametrize("budget", [1, 50, 384, 700, 10**9])
def test_a_sample_has_as_many_tokens_as_asked(mixture, documents, budget):
    """A sample fills its budget from passages in a row, one a document, or takes what there is; order plays no part."""
    model = mixture.model
    whole = {document.id: model.tokenize(document) for document in documents[:4]}
    texts = measure.sample(documents[:4], mixture, budget)
    assert sum(len(text.tokens) for text in texts) == min(budget, sum(min(384, len(t)) for t in whole.values()))
    assert len({text.document.id for text in texts}) == len(texts)
    for text in texts:
        of_document = whole[text.document.id][text.begin : text.begin + len(text.tokens)]
        assert np.array_equal(text.tokens, of_document)
    mixed = random.Random(0).sample(documents[:4], 4)
    again = measure.sample(mixed, mixture, budget)
    assert [(text.document.id, text.begin) for text in again] == [(text.document.id, text.begin) for text in texts]
    assert measure.data_hash(again) == measure.data_hash(texts)


def test_without_a_budget_every_token_is_scored(mixture, documents):
    """No budget means whole documents, each from its first token."""
    texts = measure.sample(documents[:3], mixture, None)
    assert sorted((text.document.id, text.begin, len(text.tokens)) for text in texts) == sorted(
        (document.id, 0, len(mixture.model.tokenize(document))) for document in documents[:3]
    )


def test_the_budget_of_the_command(model_dir, test, tmp_path):
    """--max-tokens scores that many tokens, and the report says so."""
    data = write(tmp_path / "test.jsonl", test)
    report = run_json("--model", model_dir, "--data", data, "--max-tokens", 77)
    assert report["tokens"] == 77


def test_a_digest_sees_one_bit(mixture, test):
    """Equal mixtures have equal digests of all their distributions; another weight has another."""
    texts = measure.sample(test, mixture, 60)
    weights = Weights({"lm": 0.5, "knn": 0.5}, 1.0)
    digest = measure.distribution_digest(mixture, texts, weights)
    assert measure.distribution_digest(mixture, texts, weights) == digest
    other = Weights({"lm": math.nextafter(0.5, 1), "knn": math.nextafter(0.5, 0)}, 1.0)
    assert measure.distribution_digest(mixture, texts, other) != digest


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--use knn", "'knn'; expected lm, or lm and some of knn, ric and ngram"),
        ("--use lm,lm", "'lm,lm'; expected lm"),
        ("--use lm,ngrams", "'lm,ngrams'; expected lm"),
        ("--use lm,knn", "--use lm,knn needs --store"),
        ("--use lm,knn --fit {val}", "--use lm,knn needs --store"),
        (
            "--use lm,knn --store {store}",
            "a mixture needs weights: give --fit FILE with validation text, or --weights FILE",
        ),
        ("--use lm,knn --store {store} --fit {val} --weights {val}", "--fit and --weights were both given; choose one"),
        ("--use lm,knn --store {store} --weights {none}", "none does not exist"),
        ("--use lm,knn --store {none} --fit {val}", "none is not a store"),
        ("--use lm,knn --store {store} --fit {none}", "none does not exist"),
        ("--save-weights {none}", "--save-weights writes what was fitted, and nothing is; give --fit FILE"),
        ("--policy {none}", "--policy judges the text of --fit, and there is none"),
        ("--purpose research", "--purpose, --neighbours and --probes choose from a store; give --store"),
        ("--deny-owner Ada", "choose from a store; give --store"),
        ("--probes 2", "choose from a store; give --store"),
        ("--max-tokens 0", "0 is not in the range x>=1"),
        ("--max-tokens many", "'many' is not a valid integer"),
    ],
)
def test_options_that_do_not_fit_are_wrong_use(model_dir, store, val, test, tmp_path, options, said):
    """A mixture without a store, without weights or with two kinds, and words that are none: one line and 2."""
    paths = {"store": store.path, "val": write(tmp_path / "val.jsonl", val), "none": tmp_path / "none"}
    data = write(tmp_path / "test.jsonl", test)
    arguments = [option.format(**paths) for option in options.split()]
    assert_error(run("--model", model_dir, "--data", data, *arguments), 2, said)


def test_text_that_taught_the_model_is_told(model_dir, corpus, test, tmp_path):
    """Scoring what the model trained on warns in one line, with count and first id; other text does not."""
    seen = read_trained_on(model_dir)
    taught = [each for each in Corpus.open(corpus).documents("train") if each.content_hash in seen][:2]
    data = write(tmp_path / "x.jsonl", [*test[:1], *(replace(each, id=f"again/{each.id}") for each in taught)])
    told = run("--model", model_dir, "--data", data, "--max-tokens", 100)
    assert told.exit_code == 0
    said = f"warning: the model trained on 2 of 3 documents of --data, the first {'again/' + taught[0].id!r}; "
    assert told.stderr.startswith(said)
    assert told.stderr.count("\n") == 1
    assert run("--model", model_dir, "--data", write(data, test), "--max-tokens", 100).stderr == ""


def test_a_store_of_another_model_is_refused(model, model_dir, control, test, val, tmp_path):
    """Keys of one model mean nothing to another: the run stops with 1 before anything is scored."""
    store = Store.create(tmp_path / "store", model, model_dir / "tokenizer.json", control)
    other = tmp_path / "other"
    other.mkdir()
    for file in Path(model_dir).iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    config = json.loads((other / "config.json").read_bytes())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-4}))
    files = ["--data", write(tmp_path / "test.jsonl", test), "--fit", write(tmp_path / "val.jsonl", val)]
    result = run("--model", other, "--store", store.path, "--use", "lm,knn", *files)
    assert_error(result, 1, "holds keys of the model")


@pytest.mark.parametrize(
    ("lm", "knn", "temperature"), [(0.5, 0.6, 1), (1.5, -0.5, 1), (float("nan"), 1, 1), (0.5, 0.5, 0)]
)
def test_weights_that_are_none_are_refused(lm, knn, temperature):
    """A file whose weights are negative, nan or do not sum to 1, or whose temperature is 0, is a UsageError."""
    value = {"mixtures": {name: {"weights": {"lm": lm, "knn": knn}, "temperature": temperature} for name in ["lm+knn"]}}
    value["mixtures"]["lm"] = {"weights": {"lm": 1.0}, "temperature": 1.0}
    with pytest.raises(UsageError, match=r"w\.json: mixture 'lm\+knn'"):
        measure.weights_from_json(value, ["lm", "knn"], where="w.json")
