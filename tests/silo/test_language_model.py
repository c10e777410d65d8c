"""Documents in, keys and probabilities out: each document for itself, each token once, any causal model."""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from silo.documents import Document
from silo.errors import DataError, UsageError
from silo.files import sha256_file
from silo.language_model import KEY_LAYERS, LanguageModel, fingerprint


@pytest.fixture(scope="module")
def tokens(model, documents) -> list[np.ndarray]:
    """Three documents of different lengths, one of them longer than eight windows."""
    return [model.tokenize(document)[:length] for document, length in zip(documents, (700, 40, 1), strict=False)]


def other_model(config, model_class, model_dir: Path, directory: Path) -> LanguageModel:
    """A tiny random model of transformers', saved beside our tokenizer and loaded from there."""
    torch.manual_seed(0)
    model_class(config).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_dir / name, directory / name)
    return LanguageModel.load(directory)


def test_a_key_depends_on_its_document_alone(model, tokens):
    """Keys and probabilities have the same bits when a document is read alone, after others, or again (law 3)."""
    alone = [model.keys(document) for document in tokens]
    for document in reversed(tokens):
        list(model.score(document))
    for document, keys in zip(tokens, alone, strict=True):
        assert np.array_equal(model.keys(document), keys)
        scored = list(model.score(document))
        assert np.array_equal(np.concatenate([part for part, _ in scored]), keys)
        again = list(model.score(document))
        assert all(torch.equal(first, second) for (_, first), (_, second) in zip(scored, again, strict=True))


def test_every_token_is_scored_once(model, tokens):
    """For each token of a document there is one key and one distribution, in order, and each sums to 1."""
    for document in tokens:
        scored = list(model.score(document))
        keys, scores = np.concatenate([part for part, _ in scored]), torch.cat([part for _, part in scored])
        assert keys.shape == (len(document), model.key_spec.dimension)
        assert keys.dtype == np.float32
        assert scores.shape == (len(document), model.vocab_size)
        assert (scores.double().exp().sum(1) - 1).abs().max() < 1e-6


def test_scores_are_those_of_a_slow_reading(model, tokens):
    """Each position's key and distribution are what the model says of the window that it belongs to, read by itself."""
    document, spec = tokens[0], model.key_spec
    inputs = [model.start_token, *document[:-1].tolist()]
    keys = model.keys(document)
    scores = torch.cat([part for _, part in model.score(document)])
    for position in range(0, len(document), 37):
        # The first window ends at the context, each further one a stride later, the last at the document's end.
        steps = max(0, -(-(position + 1 - spec.context) // spec.stride))
        end = min(spec.context + steps * spec.stride, len(document))
        begin = max(0, end - spec.context)
        with torch.inference_mode():
            out = model.model(torch.tensor([inputs[begin : position + 1]]), output_keys=True)
        np.testing.assert_allclose(keys[position], out.retrieval_keys[0, -1].numpy(), atol=2e-5)
        torch.testing.assert_close(scores[position], out.logits[0, -1].log_softmax(-1), rtol=0, atol=1e-4)


def test_a_later_token_changes_nothing_before_it(model, tokens):
    """The score of a token depends on what stands before it alone."""
    document = tokens[0]
    changed = document.copy()
    changed[600] = (changed[600] + 1) % model.vocab_size
    before, after = (torch.cat([part for _, part in model.score(ids)]) for ids in (document, changed))
    torch.testing.assert_close(after[:601], before[:601], rtol=0, atol=1e-5)
    assert (after[601:] - before[601:]).abs().max() > 1e-3


def test_inputs_begin_with_the_start_token(model):
    """Input i predicts token i: the start token first, the last token never."""
    assert model.inputs(np.asarray([5, 6, 7], dtype=np.int32)).tolist() == [model.start_token, 5, 6]


def test_log_probabilities_of_a_batch(model, tokens):
    """Sequences in one batch are scored as each alone, at the last positions that were asked for."""
    batch = torch.stack([model.inputs(tokens[0])[at : at + 50] for at in (0, 10)])
    together = model.log_probabilities(batch, 7)
    assert together.shape == (2, 7, model.vocab_size)
    for row, sequence in zip(together, batch, strict=True):
        torch.testing.assert_close(row, model.log_probabilities(sequence.unsqueeze(0), 50)[0, -7:], rtol=0, atol=1e-5)


def test_prompt_and_text_are_tokenized_as_one(model):
    """A pair in the store is its prompt and its text, without special tokens."""
    pair = Document(id="a", prompt="def f(x):\n", text="    return x\n")
    ids = model.tokenize(pair)
    assert model.tokenizer.decode(ids.tolist()) == pair.full_text
    assert np.array_equal(ids, model.tokenize(replace(pair, prompt="", text=pair.full_text)))
    with pytest.raises(DataError, match="document 'b' has no tokens"):
        model.tokenize(Document(id="b", text=""))


ROTARY = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
GPT2 = {"n_embd": 24, "n_layer": 2, "n_head": 2, "n_positions": 32}


def normed_late(layer, x: torch.Tensor) -> torch.Tensor:
    return layer.post_attention_layernorm(x)


OTHERS = {
    "llama": (LlamaConfig, LlamaForCausalLM, ROTARY, normed_late),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, ROTARY | {"num_key_value_heads": 2}, normed_late),
    "gpt_neox": (
        GPTNeoXConfig, GPTNeoXForCausalLM, ROTARY | {"use_parallel_residual": False},
        normed_late,
    ),
    "pythia": (GPTNeoXConfig, GPTNeoXForCausalLM, ROTARY, None),
    "cohere": (CohereConfig, CohereForCausalLM, ROTARY, None),
    "phi": (PhiConfig, PhiForCausalLM, ROTARY, None),
    "gpt2": (GPT2Config, GPT2LMHeadModel, GPT2, lambda layer, x: layer.ln_2(x)),
}  # fmt: skip


def other(kind: str, model, model_dir: Path, directory: Path, **settings) -> LanguageModel:
    config, model_class, shape, _ = OTHERS[kind]
    if kind != "gpt2":
        shape = shape | {"max_position_embeddings": 32}
    made = config(vocab_size=model.vocab_size, bos_token_id=0, eos_token_id=0, **shape, **settings)
    return other_model(made, model_class, model_dir, directory)


@pytest.mark.parametrize("kind", OTHERS)
def test_any_causal_model_will_do(kind, model, model_dir, tokens, tmp_path):
    """Models of transformers' own give keys of their hidden size, in windows of their context, and proper scores."""
    theirs = other(kind, model, model_dir, tmp_path)
    assert (theirs.key_spec.layer, theirs.key_spec.dimension, theirs.key_spec.context) == ("last_ffn_input", 24, 32)
    if kind != "qwen2":  # for which transformers cuts text before the tokenizer's file is asked
        text = Document(id="a", text="x = 1")
        assert np.array_equal(theirs.tokenize(text), model.tokenize(text))
    document = tokens[0][:100]
    scored = list(theirs.score(document))
    assert np.array_equal(np.concatenate([keys for keys, _ in scored]), theirs.keys(document))
    with torch.inference_mode():
        out = theirs.model(theirs.inputs(document)[None, :32])
    torch.testing.assert_close(scored[0][1][:32], out.logits[0].log_softmax(-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in OTHERS if kind not in ("cohere", "phi")])
def test_their_keys_are_the_last_ffn_input(kind, model, model_dir, tokens, tmp_path):
    """A key is what the last layer's norm makes of the state between attention and feed-forward; that state is the
    layer's input plus what attention adds, which is the layer's output less what the feed-forward part adds."""
    theirs = other(kind, model, model_dir, tmp_path)
    inputs = theirs.inputs(tokens[0])[None, :32]
    layers = next(m for m in theirs.model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 2)
    states = []
    layers[-1].register_forward_hook(lambda _, given, out: states.extend((given[0], out)))
    keys = torch.from_numpy(theirs.keys(tokens[0])[:32])
    with torch.inference_mode():
        theirs.model(inputs)
        before, after = (state[0] if isinstance(state, tuple) else state for state in states[-2:])
        normed = OTHERS[kind][3]
        if normed is None:  # Both parts read the layer's input: there is no state in between.
            expected = layers[-1].post_attention_layernorm(before)
        else:
            expected = normed(layers[-1], after - layers[-1].mlp(keys))
    torch.testing.assert_close(keys, expected.view(-1, 24)[:32], rtol=0, atol=1e-4)
    assert not layers[-1].mlp._forward_pre_hooks


@pytest.mark.parametrize(
    ("kind", "settings", "plain"),
    [("llama", {}, True), ("cohere", {"logit_scale": 0.25}, False), ("phi", {}, False), ("gpt2", {}, True)],
)
def test_logits_are_the_models(kind, settings, plain, model, model_dir, tokens, tmp_path):
    """Logits that are made later are the model's own, also where it scales them or adds to them; where they are one
    matrix times the states, the states wait and not the logits."""
    theirs = other(kind, model, model_dir, tmp_path, **settings)
    with torch.no_grad():
        if (bias := getattr(theirs.model.get_output_embeddings(), "bias", None)) is not None:
            bias.normal_()
    document = tokens[0][:100]
    for layer in KEY_LAYERS:
        theirs = LanguageModel(theirs.model, theirs.tokenizer, "", layer)
        found = list(theirs.ahead(document))
        assert {unread.states.shape[1] for _, unread in found} == {24 if plain else model.vocab_size}
        with torch.inference_mode():
            out = theirs.model(theirs.inputs(document)[None, :32])
        torch.testing.assert_close(found[0][1].logits()[:32], out.logits[0], rtol=1e-5, atol=1e-5)
        assert np.array_equal(np.concatenate([keys for keys, _ in found]), theirs.keys(document))


def test_the_key_layer_can_be_chosen(model, model_dir, tokens, tmp_path):
    """last_hidden_state gives transformers' last hidden state; a layer that a model does not give is refused."""
    other("llama", model, model_dir, tmp_path)
    theirs = LanguageModel.load(tmp_path, key_layer="last_hidden_state")
    assert theirs.key_spec.layer == "last_hidden_state"
    with torch.inference_mode():
        out = theirs.model(theirs.inputs(tokens[0])[None, :32], output_hidden_states=True)
    np.testing.assert_allclose(theirs.keys(tokens[0])[:32], out.hidden_states[-1][0].numpy(), atol=1e-5)
    with pytest.raises(UsageError, match="'first'; expected one of last_ffn_input, last_hidden_state"):
        LanguageModel.load(tmp_path, key_layer="first")
    with pytest.raises(UsageError, match="expected last_ffn_input, which is what our models give"):
        LanguageModel.load(model_dir, key_layer="last_hidden_state")


def test_a_model_without_a_known_ffn_falls_back(model, model_dir, tmp_path):
    """OPT's layers have no feed-forward module: its keys are its last hidden state; to ask for others is refused."""
    shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 16}
    config = OPTConfig(vocab_size=model.vocab_size, max_position_embeddings=32, word_embed_proj_dim=24, **shape)
    assert other_model(config, OPTForCausalLM, model_dir, tmp_path).key_spec.layer == "last_hidden_state"
    with pytest.raises(UsageError, match="in a OPTForCausalLM the last feed-forward layer was not found"):
        LanguageModel.load(tmp_path, key_layer="last_ffn_input")


def test_a_model_may_read_one_token_at_once(model, model_dir, tokens, tmp_path):
    """Windows of a single input advance by one, and give a key for each token."""
    shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = LlamaConfig(vocab_size=model.vocab_size, max_position_embeddings=1, **shape)
    one = other_model(config, LlamaForCausalLM, model_dir, tmp_path)
    assert (one.key_spec.context, one.key_spec.stride) == (1, 1)
    assert one.keys(tokens[1]).shape == (len(tokens[1]), 24)


def copy_of(model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_dir, tmp_path / "copy"))


def cut_weights(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def edit_config(directory: Path, old: str, new: str) -> None:
    file = directory / "config.json"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


BREAKS = {
    "config.json is missing": lambda path: (path / "config.json").unlink(),
    "tokenizer.json is missing": lambda path: (path / "tokenizer.json").unlink(),
    "not a valid JSON file": lambda path: (path / "config.json").write_text("{"),
    "Should have a `model_type` key": lambda path: (path / "config.json").write_text("{}"),
    "model type `nonesuch`": lambda path: edit_config(path, '"silo"', '"nonesuch"'),
    "ffn is 'dense or so'": lambda path: edit_config(path, '"moe"', '"dense or so"'),
    "for 9 parameters of the model: model.layers.2.": lambda path: edit_config(
        path, '"num_hidden_layers": 2', '"num_hidden_layers": 3'
    ),
    "for 4 parameters of the model: model.layers.0.mlp.down_proj": lambda path: edit_config(
        path, '"intermediate_size": 64', '"intermediate_size": 32'
    ),
    "no file named model.safetensors": lambda path: (path / "model.safetensors").unlink(),
    "cannot be loaded as a causal language model": cut_weights,
    "line 1 column 2": lambda path: (path / "tokenizer.json").write_text("{"),
}


@pytest.mark.parametrize("said", BREAKS)
def test_a_directory_that_is_no_model_is_wrong_use(said: str, model_dir, tmp_path):
    """A model directory with a file missing, cut, or at odds with another is a UsageError; no weight is made up."""
    directory = copy_of(model_dir, tmp_path)
    BREAKS[said](directory)
    with pytest.raises(UsageError) as error:
        LanguageModel.load(directory)
    assert said in str(error.value)
    assert str(directory) in str(error.value) or "ffn" in said


def test_a_broken_model_is_one_line_on_the_terminal(model_dir, tmp_path):
    """Of weights that do not fit a user reads our line, and none of the report that transformers writes of them."""
    directory = copy_of(model_dir, tmp_path)
    edit_config(directory, '"num_hidden_layers": 2', '"num_hidden_layers": 3')
    data = tmp_path / "data.jsonl"
    data.write_text('{"id": "a", "text": "x"}')
    command = [sys.executable, "-m", "silo", "eval", "perplexity", "--model", str(directory), "--data", str(data)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "for 9 parameters of the model" in done.stderr


def test_a_token_that_the_model_does_not_know_is_named(model_dir, tmp_path):
    """A tokenizer with more tokens than the model is no error until a text has one; then the text is named."""
    directory = copy_of(model_dir, tmp_path)
    tokenizer = LanguageModel.load(directory).tokenizer
    tokenizer.add_tokens(["unheard of"])
    tokenizer.save_pretrained(directory)
    model = LanguageModel.load(directory)
    assert len(model.tokenize(Document(id="a", text="heard of"))) > 0
    with pytest.raises(DataError, match=r"document 'b' has token 512, and the model knows 512"):
        model.tokenize(Document(id="b", text="unheard of"))


def test_a_directory_that_is_not_there_is_wrong_use(tmp_path):
    """A path with nothing behind it says what was expected."""
    with pytest.raises(UsageError, match=r"none is not a model directory: config\.json is missing; train one with"):
        LanguageModel.load(tmp_path / "none")


def test_a_tokenizer_without_a_start_is_refused(model):
    """A tokenizer with neither a start nor an end token is a UsageError: the first token needs something before it."""

    class NoStart:
        bos_token_id = eos_token_id = None

    with pytest.raises(UsageError, match="neither a start nor an end token"):
        LanguageModel(model.model, NoStart(), "")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
def test_the_fingerprint_covers_what_makes_keys(name, model_dir, tmp_path):
    """A changed byte of weights, configuration or tokenizer makes another fingerprint; what training noted does not."""
    directory = copy_of(model_dir, tmp_path)
    assert fingerprint(directory) == fingerprint(model_dir)
    (directory / "training.json").write_text("{}")
    assert fingerprint(directory) == fingerprint(model_dir)
    with open(directory / name, "ab") as file:
        file.write(b" ")
    assert fingerprint(directory) != fingerprint(model_dir)


def test_the_fingerprint_covers_old_weight_files(model_dir, tmp_path):
    """Weights in PyTorch's own format count as well: two models that differ only there are two models."""
    directory = copy_of(model_dir, tmp_path)
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    before = fingerprint(directory)
    with open(directory / "pytorch_model.bin", "ab") as file:
        file.write(b" ")
    assert fingerprint(directory) != before


def test_loading_changes_no_file(model_dir):
    """A model directory is read, never written."""
    before = {path.name: sha256_file(path) for path in model_dir.iterdir()}
    LanguageModel.load(model_dir)
    assert {path.name: sha256_file(path) for path in model_dir.iterdir()} == before


def test_keys_alone_are_those_of_a_prediction(model, documents):
    """Keys made without the last feed-forward layer equal, bit for bit, those that come with predictions."""
    tokens = model.tokenize(documents[0])
    assert np.array_equal(model.keys(tokens), np.concatenate([keys for keys, _ in model.score(tokens)]))
