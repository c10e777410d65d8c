"""Mixtures in lm-evaluation-harness: its own runs on local tasks, and its own class for the same model beside."""

import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from eval.continuations import Pair, score_pairs
from eval.perplexity import Text, score
from silo.causal_lm import MixtureForCausalLM
from silo.documents import Document
from silo.mixture import Mixture
from silo.weights import Weights
from silo.windows import windows

WEIGHTS = Weights({"lm": 0.5, "knn": 0.3, "ngram": 0.2}, 4.0)
ALONE = Weights({"lm": 1.0})


@pytest.fixture(scope="module")
def texts(documents) -> list[Document]:
    """Documents without the heads that they share."""
    return [replace(each, text=each.text[700:1300]) for each in documents if len(each.text) >= 1300]


@pytest.fixture(scope="module")
def store(texts, model, model_dir, control, tmp_path_factory):
    from datastore.store import Store

    made = Store.create(tmp_path_factory.mktemp("harness") / "store", model, model_dir / "tokenizer.json", control)
    made.add(texts, model)
    return made


@pytest.fixture(scope="module")
def mixture(store, model):
    return store.mixture(model, ["lm", "knn", "ngram"])


def ids(model, text: str) -> tuple[int, ...]:
    return tuple(model.tokenizer(text, add_special_tokens=False)["input_ids"])


def test_pairs_are_scored_as_the_documents_they_make(mixture, model, texts):
    """Continuations get what a document's scoring gives their tokens, by each weighing; greedy ones are told so."""
    tokens = model.tokenize(texts[0])[:150]
    expected = score(mixture, [Text(texts[0], tokens)])
    named = {"lm": ALONE, "all": WEIGHTS}
    cuts = [0, 1, 40, 149]
    pairs = [Pair(tuple(tokens[:cut].tolist()), tuple(tokens[cut:].tolist())) for cut in cuts]
    found = score_pairs(mixture, named, [*pairs, pairs[2], Pair(pairs[1].context, ())])
    for cut, each in zip(cuts, found, strict=False):
        for name, weighing in named.items():
            value = expected.log_probabilities(weighing)[cut:].sum().item()
            assert each[name].log_probability == pytest.approx(value, rel=1e-5)
    assert found[4] == found[2]
    assert found[5]["all"] == (0.0, True)
    lm = MixtureForCausalLM(mixture, WEIGHTS)
    start = torch.tensor([[model.start_token, *pairs[2].context]])
    written = lm.generate(
        start, attention_mask=torch.ones_like(start), max_new_tokens=5, do_sample=False, pad_token_id=0
    )
    best = tuple(written[0, start.shape[1] :].tolist())
    other = (*best[:-1], (best[-1] + 1) % model.vocab_size)
    one, two = score_pairs(mixture, named, [Pair(pairs[2].context, best), Pair(pairs[2].context, other)])
    assert one["all"].greedy
    assert not two["all"].greedy
    assert one["all"].log_probability > two["all"].log_probability


def test_without_the_harness_one_line_says_what_to_install():
    """``import eval`` and its commands need no harness; the class says in one line which extra brings it."""
    program = (
        "import sys\nsys.modules['lm_eval'] = None\n"
        "import eval.cli, eval.zero_shot\n"
        "from silo.errors import UsageError\n"
        "try:\n    import eval.harness\nexcept UsageError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    [line] = done.stdout.splitlines()
    assert "pip install 'silo-lm[harness]'" in line


TASKS = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{options}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{context}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "write": {
        "output_type": "generate_until",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{written}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False, "temperature": 0.0},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture
def run(tmp_path):
    """A function that runs the local tasks on rows with a model, by the harness itself."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    def ran(lm, rows: list[dict]) -> dict:
        data = tmp_path / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        for name, said in TASKS.items():
            local = {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")}
            whole = {"task": name, "dataset_path": "json", "dataset_kwargs": local, "test_split": "test", **said}
            (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(whole))
        tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
        return lm_eval.simple_evaluate(model=lm, tasks=list(TASKS), task_manager=tasks, bootstrap_iters=0)

    return ran


@pytest.fixture
def rows(texts) -> list[dict]:
    """Beginnings of documents, each to be gone on with by its own next words or by others'."""
    out = []
    for number, each in enumerate(texts):
        options = [each.text[200:230], texts[number - 1].text[200:230]]
        answer = number % 2
        out.append(
            {
                "context": each.text[:200].rstrip(),
                "options": options[:: (1, -1)[answer]],
                "answer": answer,
                "written": "?",
            }
        )
    return out


def test_local_tasks_run_through_the_harness(run, rows, mixture, model):
    """The harness's metrics of a mixture are those of our own scores: choices, rolling perplexity and writing."""
    pytest.importorskip("lm_eval")
    from eval.harness import MixtureLM

    lm = MixtureLM(MixtureForCausalLM(mixture, WEIGHTS))
    value = run(lm, rows)
    right, nats, size = 0, 0.0, 0
    for row in rows:
        pairs = [Pair(ids(model, row["context"]), ids(model, option)) for option in row["options"]]
        found = [each[""].log_probability for each in score_pairs(mixture, {"": WEIGHTS}, pairs)]
        right += int(np.argmax(found)) == row["answer"]
        whole = Pair((), ids(model, row["context"]))
        nats -= score_pairs(mixture, {"": WEIGHTS}, [whole])[0][""].log_probability
        size += len(row["context"].encode())
    results = value["results"]
    assert results["choice"]["acc,none"] == pytest.approx(right / len(rows))
    assert results["choice"]["acc,none"] > 0.5
    assert results["rolling"]["bits_per_byte,none"] == pytest.approx(nats / size / np.log(2), rel=1e-5)
    for sample in value["samples"]["write"]:
        [[said]] = sample["resps"]
        assert "\n" not in said
        answer = lm.lm.generate_with_sources(sample["doc"]["context"], max_new_tokens=8, temperature=0)
        assert said == answer.text.partition("\n")[0]
    answer = lm.lm.generate_with_sources("", max_new_tokens=5, temperature=0)
    assert lm.generate_until([SimpleNamespace(args=("", {"max_gen_toks": 5}))], disable_tqdm=True) == [answer.text]


def test_alone_it_scores_as_the_harness_s_own_class(model, texts):
    """Without a store, and in windows that advance as the harness's, log-likelihoods are those of its HFLM to 1e-5."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from eval.harness import MixtureLM

    context = 48
    theirs = HFLM(pretrained=model.model, tokenizer=model.tokenizer, max_length=context, batch_size=1, device="cpu")
    disjoint = model.reading_by(lambda length: windows(length, context=context, stride=context))
    ours = MixtureLM(MixtureForCausalLM(Mixture(disjoint), ALONE))
    asked = [Instance("loglikelihood_rolling", {}, (each.text,), 0) for each in texts[:4]]
    expected = theirs.loglikelihood_rolling(asked, disable_tqdm=True)
    assert ours.loglikelihood_rolling(asked, disable_tqdm=True) == pytest.approx(expected, rel=1e-5)
    assert ours.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("",), 0)]) == [0.0]
    start = [model.start_token]
    pairs = [(("", ""), start + list(ids(model, a)), list(ids(model, b))) for a, b in (("import ", "os"), ("", "def"))]
    of_pairs = theirs._loglikelihood_tokens(pairs, disable_tqdm=True)
    for one, two in zip(ours._loglikelihood_tokens(pairs, disable_tqdm=True), of_pairs, strict=True):
        assert one[0] == pytest.approx(two[0], rel=1e-5)
        assert one[1] == two[1]
