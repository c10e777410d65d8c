"""silo.load and silo generate: what a caller may use, which weights count, and what an answer says of its sources."""

import copy
import json
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import silo
from datastore.generate_cli import generate, render
from datastore.policy import QueryPolicy
from datastore.selection import Selection
from silo.errors import StoreError, UsageError
from silo.explanation import pieces
from silo.gate import HIDDEN, Gate
from silo.nearest import Nearest
from silo.weights import METHODS, Weights, read_weighing

WEIGHTS = {"knn": 0.3, "ric": 0.2, "ngram": 0.1, "temperature": 4.0}
PROMPT = "import os\n\ndef main("


@pytest.fixture(scope="module")
def various(documents):
    """Documents of several owners, licences and sources, mixed within shards."""
    licences = ("GPL-3.0-only", "CC-BY-NC-4.0", "CC-BY-4.0 AND GPL-2.0-only", "CC0-1.0", "LicenseRef-reserved")
    return [
        replace(each, text=each.text[:500], license=licences[number % 5], source=("books", "web")[number // 2 % 2])
        for number, each in enumerate(documents)
    ]


@pytest.fixture(scope="module")
def store(various, model, model_dir, control, tmp_path_factory):
    from datastore.store import Store

    made = Store.create(tmp_path_factory.mktemp("loading") / "store", model, model_dir / "tokenizer.json", control)
    made.add(various, model)
    return made


POLICIES = {
    "a licence": ({"allow": "GPL-*"}, lambda d: d.license == "GPL-3.0-only"),
    "an owner without a licence": (
        {"allow": {"owners": ["Ada"]}, "deny": ["*-NC-*"]},
        lambda d: d.owner == "Ada" and d.license != "CC-BY-NC-4.0",
    ),
    "a source": ({"deny": {"sources": "web"}}, lambda d: d.source == "books"),
    "for sale": ({"purpose": "commercial"}, lambda d: d.license not in ("CC-BY-NC-4.0", "LicenseRef-reserved")),
    "research without an owner": (
        {"purpose": "research", "deny": Selection(owners=("Grace",))},
        lambda d: d.license != "LicenseRef-reserved" and d.owner != "Grace",
    ),
    "nothing": ({"allow": "Apache-*"}, lambda d: False),
}


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_is_a_store_of_what_it_allows(store, various, model, make_store, name):
    """The mixture under a policy is, bit for bit, that over a store of the allowed documents alone."""
    asked, allowed = POLICIES[name]
    chosen = [each for each in various if allowed(each)]
    assert len(chosen) < len(various)
    alone = make_store("alone", chosen)
    ids = model.inputs(np.append(model.tokenize(various[0])[:70], 0)).unsqueeze(0)
    logits = [
        silo.load(model, store=store.path, weights=WEIGHTS, **asked)(ids).logits,
        silo.load(model, store=alone, weights=WEIGHTS)(ids).logits,
    ]
    assert torch.equal(*logits)
    assert torch.equal(logits[0], silo.load(model, store=store, weights=WEIGHTS)(ids).logits) == (chosen == various)


def test_policies_say_what_is_wrong():
    """An unknown purpose and a kind of names that there is not are refused in one line."""
    with pytest.raises(UsageError, match="commercial or research"):
        QueryPolicy.of(purpose="fun")
    with pytest.raises(UsageError, match="named by colour"):
        QueryPolicy.of(allow={"colour": ["red"]})


@pytest.mark.parametrize("way", ["allow", "deny"])
def test_a_misspelt_name_in_a_policy_is_refused(store, model, model_dir, tmp_path, way):
    """An owner, a source or a shard that the store does not have is wrong use, and names like it are told."""
    for kind, name, like in (("owners", "grace", "Grace"), ("sources", "Book", "books"), ("shards", "Marry", "Mary")):
        with pytest.raises(UsageError, match=f"no {kind[:-1]} '{name}' is in the store; .* did you mean '{like}'"):
            silo.load(model, store=store, weights=WEIGHTS, **{way: {kind: [like, name]}})
    weights = tmp_path / "weights.json"
    weights.write_text(json.dumps({"knn": 0.3}))
    options = ["--model", str(model_dir), "--store", str(store.path), "--weights", str(weights)]
    done = run(PROMPT, *options, f"--{way}-owner", "Adda")
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert "did you mean 'Ada'?" in done.stderr


def test_a_licence_that_no_document_has_is_told(store, model):
    """A policy may name a licence that the store does not have, with a warning; of one that it has there is none."""
    with pytest.warns(UserWarning, match=r"deny 'GPL-3.0-onyl' is of no licence .* did you mean 'GPL-3.0-only'"):
        silo.load(model, store=store, weights=WEIGHTS, deny=["GPL-3.0-onyl", "*-NC-*"])
    with warnings.catch_warnings(action="error"):
        silo.load(model, store=store, weights=WEIGHTS, deny=["*-NC-*", "gpl-2*"], allow="CC0-*")


def test_which_weights_count(store, model, tmp_path):
    """Weights come from a mapping, a file, or a gate; the methods that are used are those that are weighed."""
    assert silo.load(model).weighing.methods == ("lm",)
    assert silo.load(model, store=store, weights={"knn": 0.25}).weighing == Weights({"lm": 0.75, "knn": 0.25})
    fitted = {"lm": Weights({"lm": 1.0}), "lm+knn": Weights({"lm": 0.5, "knn": 0.5}, 3.0), "all": Weights(
        {"lm": 0.4, "knn": 0.3, "ngram": 0.3}, 2.0)}  # fmt: skip
    file = tmp_path / "weights.json"
    file.write_text(json.dumps({"mixtures": {name: each.to_json() for name, each in fitted.items()}}))
    assert silo.load(model, store=store, weights=file).weighing == fitted["all"]
    assert silo.load(model, store=store, weights=str(file), use=["lm", "knn"]).weighing == fitted["lm+knn"]
    gate = Gate(
        ("lm", "knn"),
        ("lm_entropy",),
        tuple(
            torch.zeros(shape, dtype=torch.float64) for shape in ((1,), (1,), (HIDDEN, 1), (HIDDEN,), (3, HIDDEN), (3,))
        ),
        2.0,
    )
    value = {**gate.to_json(), "provenance": {"model": model.fingerprint}}
    loaded = silo.load(model, store=store, weights=value)
    assert loaded.weighing.methods == ("lm", "knn")
    assert loaded.mixture.ngrams is None
    with pytest.raises(UsageError, match="made for the model other"):
        silo.load(model, store=store, weights={**value, "provenance": {"model": "other"}})


def test_neighbours_are_looked_up_as_the_gate_learnt(model, store):
    """A gate says how, and who wants it another way is told; chosen weights say nothing."""
    sizes = ((1,), (1,), (HIDDEN, 1), (HIDDEN,), (3, HIDDEN), (3,))
    few, many = Nearest(k=5), Nearest(k=50)
    gate = Gate(("lm", "knn"), ("lm_entropy",), tuple(map(torch.zeros, sizes)), 2.0, few)
    with warnings.catch_warnings(action="error"):
        for given in (None, few):
            assert silo.load(model, store=store, weights=gate, nearest=given).mixture.nearest == few
        assert silo.load(model, store=store, weights=WEIGHTS, nearest=many).mixture.nearest == many
        assert silo.load(model, store=store, weights=WEIGHTS).mixture.nearest == Nearest()
    with pytest.warns(UserWarning, match=r"made with Nearest\(k=5,.* looked up with Nearest\(k=50,"):
        assert silo.load(model, store=store, weights=gate, nearest=many).mixture.nearest == many


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ({"weights": {"knn": 0.3}}, "without a store"),
        ({"use": ["knn"]}, "expected lm"),
        ({"use": ["lm", "magic"]}, "expected lm"),
        ({"weights": {"knn": "much"}}, "expected numbers"),
        ({"weights": {"knn": 1.3}}, "sum to 1"),
        ({"weights": {"mixtures": {}}}, "no mixture"),
        (
            {
                "weights": {
                    "weights": {"lm": 0.7, "knn": 0.3},
                    "temperature": 1,
                    "by_suffix": {"1": {"lm": 1, "knn": 0}},
                }
            },
            "by_suffix with ngram alone",
        ),
        ({"weights": "nowhere.json"}, "does not exist"),
    ],
)
def test_weights_that_do_not_fit_are_refused(model, options, wrong):
    """What does not fit together is an error of ours."""
    with pytest.raises(UsageError, match=wrong):
        silo.load(model, **options)


def test_a_store_asks_for_weights(store, model):
    """A mixture is not weighed by a guess."""
    with pytest.raises(UsageError, match="a store without weights"):
        silo.load(model, store=store)
    assert read_weighing({"knn": 0.3}).methods == ("lm", "knn")
    assert read_weighing({"knn": 0.33, "ric": 0.56, "ngram": 0.11}).methods == METHODS  # sum to a little more than 1


def test_a_store_of_another_model_is_refused(store, model):
    """Also where the model is used alone, since a limit on copies looks for its tokens in the store; and for other keys
    of the same model."""
    other, unlike = copy.copy(model), copy.copy(model)
    other.fingerprint = "0" * 64
    unlike.key_spec = replace(model.key_spec, layer="last_hidden_state")
    for wrong, said in ((other, "holds keys of the model"), (unlike, "layer 'last_hidden_state' instead of")):
        for asked in ({"use": ["lm"]}, {"weights": WEIGHTS}):
            with pytest.raises(StoreError, match=said):
                silo.load(wrong, store=store, **asked)


def test_explain_splits_every_token(store, various, model):
    """The shares of a token sum to its probability under the mixture, and its pieces to the text."""
    lm = silo.load(model, store=store, weights=WEIGHTS)
    text = various[0].text[100:300] + " é 漢字"
    explained = lm.explain(text)
    ids = model.inputs(np.append(model.tokenize(replace(various[0], text=text)), 0)).unsqueeze(0)
    own = lm(ids[:, :-1]).logits[0].double().gather(1, ids[0, 1:].unsqueeze(1)).squeeze(1).exp()
    found = [each.probability for each in explained.tokens]
    np.testing.assert_allclose(found, own.numpy(), rtol=1e-5)
    for each in explained.tokens:
        assert math.isclose(each.probability, each.lm + sum(share.probability for share in each.shares), rel_tol=1e-12)
    assert "".join(each.text for each in explained.tokens) == text
    by_document = [given for _, given in explained.documents()]
    assert len(by_document) > 1
    for sums in (by_document, explained.owners()):
        assert math.isclose(sum(given.tokens for given in sums) + explained.lm.tokens, len(found), rel_tol=1e-9)
        assert math.isclose(sum(each.probability for each in sums) + explained.lm.probability, sum(found), rel_tol=1e-9)
    assert {given.name for given in explained.owners()} <= {"Ada", "Grace", "Mary"}


def test_the_notice_names_what_must_be_named(store, various, model):
    """Documents that an answer owes something to are named with owner, licence and source; those in the public domain
    need not be, and small shares are not."""
    lm = silo.load(model, store=store, weights=WEIGHTS)
    explained = lm.explain(various[0].text[:200])
    notice = explained.notice(least=0.0)
    assert explained.notice(least=1e9) == ""
    for document, given in explained.documents():
        named = f"{document.title or document.id} by {document.owner} ({document.license}), {document.source}" in notice
        assert named == (document.license != "CC0-1.0" and given.tokens > 0)


def test_pieces_join_to_the_text(model):
    """Characters of several tokens come with their last token, and nothing is lost."""
    text = "a 漢字 é\N{PILE OF POO}b"
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    found = pieces(model.tokenizer.decode, ids)
    assert "".join(found) == text
    assert len(found) == len(ids)
    assert "" in found


def run(*arguments: str, **options):
    return CliRunner().invoke(generate, arguments, **options)


def test_generate_writes_and_names_its_sources(store, model_dir, tmp_path):
    """The command writes the same text for the same seed, with sources that respect its policy, from stdin too."""
    weights = tmp_path / "weights.json"
    weights.write_text(json.dumps(WEIGHTS))
    common = ["--model", str(model_dir), "--store", str(store.path), "--weights", str(weights), "--max-new-tokens", "6"]
    common += ["--seed", "3"]
    first, again = (run(PROMPT, *common, "--deny-owner", "Ada", "--json") for _ in range(2))
    assert first.exit_code == 0, first.output
    assert first.stdout == again.stdout
    value = json.loads(first.stdout)
    assert 1 <= len(value["tokens"]) <= 6
    assert {row["owner"] for row in value["documents"]} == {"Grace", "Mary"}
    assert "".join(each["text"] for each in value["tokens"]) == value["text"]
    piped = run("-", *common, "--deny-owner", "Ada", "--json", input=PROMPT)
    assert json.loads(piped.stdout) == value
    assert value["longest_copy"] is None
    limited = json.loads(run(PROMPT, *common, "--longest-copy", "1", "--json").stdout)
    assert limited["longest_copy"] == 1
    assert limited["text"] != value["text"]
    shown = run(PROMPT, *common, "--temperature", "0", "--purpose", "research")
    assert shown.exit_code == 0
    assert "come from the model itself" in shown.stdout


def test_names_are_shown_as_they_are(capsys):
    """Brackets in what stands behind a text are no markup of its table."""
    names = {"document": "[/x]", "owner": "dependabot[bot]", "license": "[b]MIT", "source": "[red]web", "title": ""}
    render({"text": "", "tokens": [], "lm": {"tokens": 0.0}, "documents": [{**names, "tokens": 1.0}], "notice": ""})
    shown = capsys.readouterr().out
    assert all(f" {name} " in shown for name in names.values())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--model", "MODEL", "--purpose", "research"], "give --store"),
        (["--model", "nowhere"], "is not a model directory"),
        (["--model", "MODEL", "--longest-copy", "4"], "a limit on copies without a store"),
        (["--model", "MODEL", "--store", "STORE"], "a store without weights"),
    ],
)
def test_generate_fails_in_one_line(store, model_dir, options, says):
    """What is wrong is said in one line, without a traceback."""
    named = {"MODEL": str(model_dir), "STORE": str(store.path)}
    done = run(PROMPT, *(named.get(each, each) for each in options))
    assert done.exit_code == 2
    assert says in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_prompt_that_is_no_text_is_one_line(model_dir):
    """Bytes that are not UTF-8 are bad data on standard input, and wrong use as an argument."""
    piped = run("-", "--model", str(model_dir), input=b"def \xff")
    given = run("def \udcff", "--model", str(model_dir))
    assert (piped.exit_code, given.exit_code) == (1, 2)
    assert piped.stderr.startswith("error: standard input is not UTF-8")
    assert given.stderr.startswith("error: PROMPT is not UTF-8")
    assert (piped.stderr.count("\n"), given.stderr.count("\n")) == (1, 1)
