"""What the training experiments share: text whose splits are given, held-out samples, and runs that are watched.

Everything is written below one directory, so that an experiment that was stopped goes on where it stood:

    OUT/text/       the files' documents by split
    OUT/corpus/     what `silo corpus collect` makes of the training split, compared with the others
    OUT/runs/RUN/   model/ (of `silo train`), curve.json, and at last run.json
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from recording import commit, files_hash, require_same_run
from transformers import PreTrainedTokenizerFast

from silo.collect import collect
from silo.documents import parse_document
from silo.files import remove_tree, sha256, sha256_file, write_json
from silo.language_model import fingerprint
from silo.licensing import DEFAULT_POLICY
from silo.modeling import SiloForCausalLM
from silo.routing import Routing, load_of, unevenness
from training.loop import train
from training.measure import BATCH, experts_by_layer, validation_loss
from training.recipe import Recipe
from training.run import Run
from training.tokens import open_tokens

VOCABULARY = 8192
LENGTH = 256
PER_DOCUMENT = 4 * LENGTH
"""Tokens that one document gives a sample at most, so that no long one decides."""

SAMPLES = {"val": 100 * LENGTH, "test": 100 * LENGTH}
"""Tokens of each domain in a held-out sample."""
MIDDLE = 2
"""The layer whose feed-forward part is not dense."""
SHAPE = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 448,
    "peer_heads": 6,
    "peer_experts_per_head": 16,
    "pkm_heads": 6,
    "pkm_values_per_head": 32,
    "key_dim": 64,
}


def shape(kind: str) -> dict[str, Any]:
    """Fields of a model that has one kind of feed-forward layer in the middle, and dense ones else."""
    ffn = ["dense"] * SHAPE["num_hidden_layers"]
    ffn[MIDDLE] = kind
    return SHAPE | {"ffn": ffn}


def say(run: str) -> Callable[[str], None]:
    """Progress, on stderr."""
    return lambda line: print(f"{run}: {line}", file=sys.stderr, flush=True)


class HeldOut:
    """A fixed sample of held-out text, by domain: sequences as :func:`training.measure.validation_loss` takes them.

    Documents come in the order of their ids' hashes, each with its first tokens only, and are laid end to end.
    """

    def __init__(self, files: Sequence[Path], tokenizer: PreTrainedTokenizerFast, tokens: int) -> None:
        """Args: one JSON Lines file a domain; the tokenizer; and how many tokens of each to take."""
        self.domains = {file.stem: torch.from_numpy(_sequences(file, tokenizer, tokens)) for file in files}

    @property
    def tokens(self) -> int:
        """How many it has."""
        return sum(rows.numel() for rows in self.domains.values())

    def first(self, name: str, count: int) -> list[tuple[str, int]]:
        """The first sequences of a domain."""
        return [(name, number) for number in range(min(count, len(self.domains[name])))]

    def batch(self, sequences: Sequence[tuple[str, int]]) -> dict[str, torch.Tensor]:
        """Some of them, as a model takes them."""
        ids = torch.stack([self.domains[name][number] for name, number in sequences])
        return {"input_ids": ids, "labels": ids}

    def losses(self, model: Any) -> dict[str, float]:
        """Nats a token, by domain; and of ``all``, which count alike."""
        found = validation_loss(model, self, max(map(len, self.domains.values())))  # type: ignore[arg-type]
        return {**found, "all": statistics.fmean(found.values())}


def _sequences(file: Path, tokenizer: PreTrainedTokenizerFast, tokens: int) -> np.ndarray:
    with open(file, "rb") as lines:
        documents = [parse_document(line, where=str(file)) for line in lines]
    taken: list[int] = []
    for document in sorted(documents, key=lambda each: sha256(each.id.encode())):
        ids = tokenizer(document.full_text, add_special_tokens=False)["input_ids"]
        taken += [tokenizer.bos_token_id, *ids][:PER_DOCUMENT]
        if len(taken) >= tokens:
            return np.asarray(taken[:tokens], dtype=np.int64).reshape(-1, LENGTH)
    raise ValueError(f"{file} has {len(taken)} tokens; expected {tokens}")


def prepare(files: Sequence[Path], out: Path) -> tuple[Path, dict[str, list[Path]]]:
    """The permissive side of a corpus of the files' training documents, and the files of the other splits.

    Only training documents are taken in; passages and near-duplicates of the other splits are cut out of them.
    """
    text = out / "text"
    others = {split: [text / split / f"{_domain(file)}.jsonl" for file in files] for split in ("val", "test")}
    training = [text / "train" / f"{_domain(file)}.jsonl" for file in files]
    if not text.exists():
        partial = out / ".text.partial"
        out.mkdir(parents=True, exist_ok=True)
        remove_tree(partial)
        for split in ("train", "val", "test"):
            (partial / split).mkdir(parents=True)
        for file in files:
            with pa.OSFile(str(file)) as raw, pa.CompressedInputStream(raw, "zstd") as stream:
                lines = stream.read().splitlines(keepends=True)
            for split in ("train", "val", "test"):
                chosen = [line for line in lines if json.loads(line)["split"] == split]
                (partial / split / f"{_domain(file)}.jsonl").write_bytes(b"".join(chosen))
        partial.rename(text)
    require_same_run(text, {"files": files_hash(files)})
    if not (out / "corpus").exists():
        collect(
            list(map(str, training)), out / "corpus", against=[str(each) for all in others.values() for each in all]
        )
    return out / "corpus" / "permissive", others


def _domain(file: Path) -> str:
    return file.name.partition(".")[0]


def open_samples(
    corpus: Path, others: dict[str, list[Path]], sizes: dict[str, int] = SAMPLES
) -> tuple[dict[str, HeldOut], dict[str, Any]]:
    """A held-out sample of each split, cut by the corpus's own tokenizer; and what there is, for the record."""
    tokens = open_tokens(corpus, DEFAULT_POLICY, VOCABULARY)
    samples = {split: HeldOut(others[split], tokens.tokenizer, size) for split, size in sizes.items()}
    return samples, {
        "corpus": tokens.manifest["corpus"],
        "training_tokens": tokens.manifest["tokens"]["train"],
        "tokenizer": VOCABULARY,
        "sequence_length": LENGTH,
        **{f"{split}_tokens": sample.tokens for split, sample in samples.items()},
    }


class Watch:
    """What is seen of a run from outside: its loss on held-out text every so many steps, and what a step takes.

    The curve is on disk; a run that is resumed sees some steps again and finds the same numbers.
    """

    def __init__(self, path: Path, sample: HeldOut, every: int, say: Callable[[str], None]) -> None:
        self._path, self._sample, self._every, self._say = path, sample, every, say
        found = json.loads(path.read_bytes()) if path.exists() else {"curve": {}, "seconds": [], "taken": []}
        self.curve: dict[str, dict[str, float]] = found["curve"]
        """Step → nats a token, by domain and of all."""
        self._seconds: list[float] = found["seconds"]
        self._taken: list[int] = found["taken"]
        self._last: float | None = None

    def __call__(self, run: Run) -> None:
        """After a step."""
        step = run.plan.step
        if self._last is None:  # The first step of a process also warms up; it is seen, not timed.
            for layer in _choosing(run.model):
                layer.register_forward_hook(self._count)
        else:
            self._seconds.append(time.process_time() - self._last)
        measured = step % self._every == 0 or step == run.plan.steps
        if measured:
            self.curve[str(step)] = losses = self._sample.losses(run.model)
            recent = statistics.fmean(run.losses[-self._every :])
            self._say(f"step {step} of {run.plan.steps}: {losses['all']:.4f} (training {recent:.4f})")
        if measured or step % run.recipe.checkpoint_every == 0:  # type: ignore[operator]
            write_json(self._path, {"curve": self.curve, "seconds": self._seconds, "taken": self._taken})
        self._last = time.process_time()

    def _count(self, layer: torch.nn.Module, _: Any, out: tuple[torch.Tensor, Routing | None]) -> None:
        if layer.training and out[1] is not None:
            self._taken.append(len(out[1].expert.unique()))

    def summary(self) -> dict[str, Any]:
        """Processor seconds a step (median, without validation), and the mean number of different experts a step."""
        return {
            "seconds_a_step": statistics.median(self._seconds),
            "experts_a_step": statistics.fmean(self._taken) if self._taken else None,
        }


def _choosing(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The feed-forward layers, some of which have experts to choose."""
    for name, module in model.named_modules():
        if name.endswith(".mlp"):
            yield module


def run_once(
    directory: Path, settings: dict[str, Any], samples: dict[str, HeldOut], points: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Train by a recipe and measure, or read what an earlier call measured.

    Args:
        directory: of this run; the model goes to ``model`` in it.
        settings: the recipe, but for its output.
        samples: held-out text by split; ``val`` is measured on the way.
        points: how often.
        say: is told how it goes on.
    """
    record = directory / "run.json"
    tokens_a_step = settings["batch_size"] * settings["sequence_length"]
    steps = settings["token_budget"] // tokens_a_step
    directory.mkdir(parents=True, exist_ok=True)
    require_same_run(directory, of_what(settings))
    if record.exists():
        return dict(json.loads(record.read_bytes()))
    watch = Watch(directory / "curve.json", samples["val"], -(-steps // points), say)
    if not (directory / "model").exists():
        train(Recipe(output=directory / "model", **settings), say, watch)
    model = SiloForCausalLM.from_pretrained(directory / "model").eval()
    step = watch.summary()
    found = {
        "commit": commit(),
        "seed": settings["seed"],
        "learning_rate": settings["learning_rate"],
        "expert_learning_rate": settings["expert_learning_rate"],
        "steps": steps,
        "tokens": steps * tokens_a_step,
        "parameters": model.num_parameters(),
        "curve": {step: losses["all"] for step, losses in watch.curve.items()},
        "val": watch.curve[str(steps)],
        "test": samples["test"].losses(model),
        "tokens_per_processor_second": tokens_a_step / step["seconds_a_step"],
        "experts": experts_used(model, samples["val"], step["experts_a_step"], steps),
    }
    write_json(record, found)
    return found


def of_what(settings: dict[str, Any]) -> dict[str, Any]:
    """What decides a run, as JSON has it: of its files, what they hold."""
    files = {"corpus": sha256_file(settings["corpus"] / "manifest.json")}
    if "init" in settings:
        files["init"] = fingerprint(settings["init"])
    return dict(json.loads(json.dumps({**settings, **files})))


def experts_used(
    model: SiloForCausalLM, sample: HeldOut, experts_a_step: float | None, steps: int
) -> dict[str, float] | None:
    """How the layer with experts uses them: how many there are, in how many steps each was moved on average, and on
    held-out text the share that any token takes and the unevenness of the load, in nats. None if there is none."""
    counts = experts_by_layer(model.config)
    if not counts or experts_a_step is None:
        return None
    load = torch.zeros(counts[0], dtype=torch.float64)
    with torch.no_grad():
        for name, rows in sample.domains.items():
            for at in range(0, len(rows), BATCH):
                out = model(**sample.batch([(name, n) for n in range(at, min(at + BATCH, len(rows)))]), use_cache=False)
                load += load_of(out.routings[0], counts[0])
    return {
        "number": counts[0],
        "updates_of_each": experts_a_step * steps / counts[0],
        "used": float((load > 0).double().mean()),
        "unevenness": unevenness(load),
    }
