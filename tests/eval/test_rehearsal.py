"""The rehearsal of a store with permissive text: who may play, and that a gate comes out which only they taught."""

import json
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

import silo
import silo.gate
from datastore.selection import Selection
from datastore.store import Store
from eval.perplexity import Text, looked_up_by, weighings_from_json
from eval.rehearsal import ENOUGH, Cast, _split, rehearse
from silo.cli import main
from silo.documents import Document
from silo.errors import IntegrityError, LicenseError, StoreError, UsageError
from silo.files import canonical_json
from silo.gate import Gate
from silo.licensing import DEFAULT_POLICY
from silo.nearest import Nearest
from silo.sources import open_source

METHODS = ["lm", "knn", "ngram"]


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch):
    monkeypatch.setattr(silo.gate, "STEPS", 200)


@pytest.fixture(scope="module")
def permissive() -> list[Document]:
    """The heads of real files, others than the store has, under their real licence, dealt out to six owners."""
    files = sorted(open_source("python:accelerate", downloads=None), key=lambda document: document.id)[12:]
    return [replace(file, text=file.text[:900], owner=f"owner {at % 6}") for at, file in enumerate(files)]


@pytest.fixture(scope="module")
def store(model, model_dir, control, documents, tmp_path_factory) -> Store:
    made = Store.create(tmp_path_factory.mktemp("rehearsal") / "store", model, model_dir / "tokenizer.json", control)
    made.add(documents[:2], model)
    return made


def rehearsed(model, store, documents, *, trained_on=frozenset(), store_tokens=4000, **options):
    return rehearse(
        model,
        store,
        documents,
        METHODS,
        policy=DEFAULT_POLICY,
        trained_on=set(trained_on),
        store_tokens=store_tokens,
        asked_tokens=3000,
        **options,
    )


def test_a_gate_is_learnt_and_helps(model, store, permissive):
    """It reads the evidence of all methods, and text that it did not learn from gains by it."""
    gate, source = rehearsed(model, store, permissive)
    assert gate.methods == tuple(METHODS)
    assert {name.split("_")[0] for name in gate.features} == set(METHODS)
    assert source["nats_gained"]["held_out"] > 0
    assert source["control"] == store.manifest.control
    named = {row["id"] for row in source["teachers"]}
    assert named <= {document.id for document in permissive}
    assert {row["license"] for row in source["teachers"]} == {permissive[0].license}


def test_a_gate_learns_with_the_neighbours_that_are_asked_for(model, store, permissive):
    """It says how they were looked up, and who looks them up in another way cannot weigh by it."""
    few = Nearest(k=3)
    gate, source = rehearsed(model, store, permissive, nearest=few)
    usual, _ = rehearsed(model, store, permissive)
    assert (gate.nearest, usual.nearest) == (few, Nearest())
    assert gate.layers[0].tolist() != usual.layers[0].tolist()
    read = weighings_from_json({**gate.to_json(), "provenance": source}, METHODS, model, where="g")
    assert looked_up_by(read.values(), None, where="g") == looked_up_by(read.values(), few, where="g") == few
    with pytest.raises(UsageError, match=r"g were made with Nearest\(k=3, "):
        looked_up_by(read.values(), Nearest(), where="g")


def test_every_document_plays_one_part(permissive):
    """Strangers' owners have nothing in the store, and nobody is asked about a text that is stored."""
    cast = Cast.of(permissive)
    owners = [{document.owner for document in each} for each in (cast.stored, cast.asked, cast.strangers)]
    assert not owners[2] & (owners[0] | owners[1])
    assert owners[1] <= owners[0]
    ids = [document.id for each in (cast.stored, cast.asked, cast.strangers) for document in each]
    assert sorted(ids) == sorted(document.id for document in permissive)
    assert Cast.of(permissive[::-1]) == cast


@pytest.mark.parametrize("license", ["GPL-3.0-only", "", "CC-BY-NC-4.0"])
def test_restricted_text_cannot_teach_a_gate(model, store, permissive, license):
    """One document under another licence stops the rehearsal before anything is read (law 2)."""
    documents = [*permissive, replace(permissive[3], id="theirs", license=license)]
    with pytest.raises(
        LicenseError, match=r"'theirs' under .* is restricted; a gate is fitted on permissive text only"
    ):
        rehearsed(model, store, documents)


def test_text_that_taught_the_weights_cannot_teach_a_gate(model, store, permissive):
    """What the model has seen would teach the gate to trust the model too much."""
    with pytest.raises(LicenseError, match=f"the model trained on '{permissive[5].id}'"):
        rehearsed(model, store, permissive, trained_on={permissive[5].content_hash})


def test_too_little_text_is_wrong_use(model, store, permissive):
    """Documents of one owner cannot play both sides."""
    with pytest.raises(UsageError, match="too few for a rehearsal; give more permissive text") as caught:
        rehearsed(model, store, [document for document in permissive if document.owner == "owner 0"])
    assert ENOUGH in str(caught.value)


def test_what_is_called_enough_is_enough(permissive):
    """Of a hundred sets of as many documents and owners as the message names, at most a few have a part without any."""
    assert ENOUGH.startswith("some 50 documents of a dozen owners")
    few = 0
    for name in range(100):
        try:
            cast = Cast.of(
                replace(permissive[0], id=f"{name}/{n}", owner=f"owner {name}/{n % 12}", text="x") for n in range(50)
            )
            _split([Text(each, np.zeros(1)) for each in (*cast.asked, *cast.strangers)])
        except UsageError:
            few += 1
    assert few <= 3


def test_text_without_keys_is_rehearsed_with(model, store, permissive, monkeypatch):
    """Some more text can be in the rehearsal's store without keys, which only the ∞-gram then knows."""
    added = []
    real = Store.add

    def add(self, documents, model, *, keyed=True, **options):
        added.append((keyed, sum(len(model.tokenize(document)) for document in documents)))
        return real(self, documents, model, keyed=keyed, **options)

    monkeypatch.setattr(Store, "add", add)
    _, source = rehearsed(model, store, permissive, store_tokens=1500, bare_tokens=1500)
    assert [keyed for keyed, _ in added] == [True, False]
    assert all(tokens >= 1500 for _, tokens in added)
    assert source["store_tokens"] == sum(tokens for _, tokens in added)
    _, without = rehearsed(model, store, permissive, store_tokens=1500)
    assert without["store_tokens"] == added[0][1] == added[2][1]
    assert {row["id"] for row in without["teachers"]} < {row["id"] for row in source["teachers"]}


def test_the_store_is_not_read(model, store, make_store, permissive):
    """The gate of a store with restricted text is, to the bit, that of one with none (law 2)."""
    of_full, _ = rehearsed(model, store, permissive)
    of_empty, _ = rehearsed(model, make_store("empty"), permissive)
    assert of_full.to_json() == of_empty.to_json()


def test_a_store_keeps_its_gate(model, make_store, permissive, documents):
    """The store's readers weigh by it, its hash and its removals do not change, and a newer one takes its place."""
    store = make_store("keeps")
    store.add(documents[:2], model)
    gate, source = rehearsed(model, store, permissive)
    before = store.hash
    assert store.keep_gate(gate, source).content["gate"] == store.manifest.gate
    assert store.hash == before
    by_default, named = (silo.load(model, store=store.path, weights=each).weighing for each in (None, "gate"))
    assert by_default.to_json() == named.to_json() == gate.to_json()
    old = store.gate_path()
    store.keep_gate(replace(gate, base_temperature=gate.base_temperature * 2), source)
    assert not old.exists()
    store.remove(Selection(documents=(documents[0].id,)))
    assert Store.open(store.path).gate_path() == store.gate_path()
    assert store.verify()["verified"]
    (store.path / "gate-0000.json").write_bytes(b"{}")
    assert store.verify()["collected"] == ["gate-0000.json"]
    store.gate_path().write_bytes(store.gate_path().read_bytes()[:-2] + b" \n")
    with pytest.raises(IntegrityError, match=store.manifest.gate_file):
        store.verify()


def test_a_gate_for_another_store_is_not_kept(model, make_store, permissive):
    """It must have been learnt for this model, beside this control plane, from permissive text (law 2); and a store may
    have none, and then no file that could be one."""
    store = make_store("other")
    gate, source = rehearsed(model, store, permissive)
    with pytest.raises(StoreError, match="another model or control plane"):
        store.keep_gate(gate, {**source, "control": "0" * 64})
    theirs = {**source["teachers"][0], "license": "GPL-3.0-only"}
    with pytest.raises(LicenseError, match="taught the gate, and is restricted"):
        store.keep_gate(gate, {**source, "teachers": [*source["teachers"], theirs]})
    with pytest.raises(UsageError, match="has no gate of its own"):
        Store.open(store.path).gate_path()
    assert not list(store.path.glob("gate-*"))
    (store.path / "None").touch()
    with pytest.raises(IntegrityError, match="does not belong to the store"):
        store.verify()


def test_the_commands(model_dir, store, permissive, documents, tmp_path):
    """`silo eval gate` writes a gate with which `silo eval perplexity` measures one mixture for all owners."""
    taught, asked = tmp_path / "permissive.jsonl", tmp_path / "test.jsonl"
    taught.write_bytes(b"".join(canonical_json(document.to_json()) for document in permissive))
    asked.write_bytes(canonical_json(replace(documents[3], text=documents[3].text[:400]).to_json()))
    common = ["--model", str(model_dir), "--store", str(store.path), "--use", ",".join(METHODS), "--json"]
    sizes = ["--store-tokens", "4000", "--asked-tokens", "3000"]
    made = CliRunner().invoke(main, ["eval", "gate", str(taught), "--out", str(tmp_path / "g.json"), *sizes, *common])
    assert made.exit_code == 0, made.stderr
    assert json.loads(made.stdout)["nats_gained"]["held_out"] > 0
    written = json.loads((tmp_path / "g.json").read_bytes())
    assert Gate.from_json(written, where="g.json").methods == tuple(METHODS)
    assert written["provenance"]["model"] == store.manifest.model["fingerprint"]
    options = ["--data", str(asked), "--weights", str(tmp_path / "g.json"), *common]
    done = CliRunner().invoke(main, ["eval", "perplexity", *options])
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert list(found["perplexity"]) == ["lm", "gate"]
    kept = CliRunner().invoke(main, ["eval", "gate", str(taught), *sizes, *common])
    assert kept.exit_code == 0, kept.stderr
    options[options.index("--weights") + 1] = "gate"
    again = CliRunner().invoke(main, ["eval", "perplexity", *options])
    assert json.loads(again.stdout)["perplexity"] == found["perplexity"], again.stderr
    options[options.index("--weights") + 1] = str(tmp_path / "g.json")
    other = {**written, "provenance": {**written["provenance"], "model": "another"}}
    (tmp_path / "g.json").write_bytes(canonical_json(other))
    refused = CliRunner().invoke(main, ["eval", "perplexity", *options])
    assert refused.exit_code == 2
    assert "was made for the model another" in refused.stderr


def test_a_policy_says_who_may_teach(model_dir, make_store, permissive, tmp_path):
    """What a policy file permits, by licence or owner, teaches a gate that the store keeps; what it restricts does not;
    and text that it permits needs no new weights after a removal."""
    text, policy = tmp_path / "text.jsonl", tmp_path / "policy.yaml"
    store = make_store("store")
    common = ["--model", str(model_dir), "--store", str(store.path), "--use", "lm,ngram"]
    sizes = ["--store-tokens", "4000", "--asked-tokens", "3000"]

    def taught(license: str, rules: str):
        text.write_bytes(b"".join(canonical_json(replace(each, license=license).to_json()) for each in permissive))
        policy.write_text(rules)
        return CliRunner().invoke(main, ["eval", "gate", str(text), *common, *sizes, "--policy", str(policy)])

    owners = ", ".join(f"'{each}': BY" for each in sorted({each.owner for each in permissive}))
    for rules in ("licenses: {CC-BY-SA-4.0: BY}", f"owners: {{{owners}}}"):
        made = taught("CC-BY-SA-4.0", rules)
        assert made.exit_code == 0, made.stderr
    refused = taught("MIT", "licenses: {MIT: restricted}")
    assert refused.exit_code == 1
    assert "under MIT is restricted; a gate is fitted on permissive text only" in refused.stderr

    (tmp_path / "data.jsonl").write_bytes(canonical_json({"id": "d", "text": "import this and that"}))
    fit = ["--data", str(tmp_path / "data.jsonl"), "--fit", str(text), "--max-tokens", "300", "--json"]
    for rules, whose in (([], 0), (["--policy", str(policy)], len({each.owner for each in permissive}))):
        found = CliRunner().invoke(main, ["eval", "perplexity", *common, *fit, *rules])
        assert found.exit_code == 0, found.stderr
        assert len(json.loads(found.stdout)["restricted_text_of"]) == whose
