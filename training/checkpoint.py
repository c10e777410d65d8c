"""Checkpoints: all that a killed run needs to end with the very weights that it would have ended with.

    .model.run/                  beside the output ``model``, and gone when that stands
        step-000000500/
            state.json           what run this is, where it stands, and every file's checksum; sealed
            tensors.pt           weights, the optimizer's state, and the loss of each step
            random-0.pt          random state of each process

A checkpoint takes its name by one rename when all of it is on disk, and is read only if every checksum agrees. The two
latest are kept: should the last one be damaged, the one before it serves.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.distributed.checkpoint import state_dict as sharded

from silo.errors import IntegrityError, SiloError, UsageError
from silo.files import (
    check_digest,
    exclusive_lock,
    read_sealed,
    remove_tree,
    sealed,
    sha256_file,
    sync_directory,
    write_json,
)

FORMAT = 1
KEPT = 2
"""Checkpoints that are kept."""


def run_directory(output: Path) -> Path:
    """Where the checkpoints of an unfinished run stand."""
    return output.with_name(f".{output.name}.run")


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, output: Path, identity: Mapping[str, Any], accelerator: Accelerator) -> None:
        """Args: the run's output; what decides its weights, as JSON; and the processes that take part."""
        self._directory = run_directory(output)
        self._identity = dict(identity)
        self._accelerator = accelerator

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep other runs away, and leave no empty directory behind. When all went well, leave none at all.

        Raises:
            StoreError: another process trains towards the same output.
        """
        if not self._accelerator.is_main_process:
            yield
            return
        self._directory.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(self._directory / "lock"):
            try:
                yield
            except BaseException:
                if not any(self._directory.glob("step-*")):
                    remove_tree(self._directory)
                raise
            remove_tree(self._directory)

    def save(self, plan: Mapping[str, Any], model: Any, optimizer: Any, losses: list[float]) -> None:
        """Write a checkpoint, whole or not at all, and remove those that are too old."""
        accelerator = self._accelerator
        path = self._directory / f"step-{plan['step']:09}"
        partial = path.with_name(f".{path.name}.partial")
        if accelerator.is_main_process:
            remove_tree(partial)  # what a killed run left
            partial.mkdir()
        accelerator.wait_for_everyone()
        _write_tensors(partial / f"random-{accelerator.process_index}.pt", _random_state())
        weights, state = _gathered(accelerator, model, optimizer)
        if accelerator.is_main_process:
            tensors = {"model": weights, "optimizer": state, "losses": torch.tensor(losses, dtype=torch.float64)}
            _write_tensors(partial / "tensors.pt", tensors)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            files = {file.name: sha256_file(file) for file in sorted(partial.iterdir())}
            manifest = {"format": FORMAT, "identity": self._identity, "plan": plan, "files": files}
            write_json(partial / "state.json", sealed(manifest))
            remove_tree(path)  # a damaged one that was left aside
            partial.rename(path)
            sync_directory(self._directory)
            for old in sorted(self._directory.glob("step-*"))[:-KEPT]:
                remove_tree(old)
        accelerator.wait_for_everyone()

    def restore(self, model: Any, optimizer: Any, note: Callable[[str], None]) -> dict[str, Any] | None:
        """Bring model, optimizer and random state to the latest whole checkpoint.

        Args:
            model, optimizer: as accelerate prepared them.
            note: is told of checkpoints that are damaged and left aside.

        Returns:
            Where the run stands: ``plan`` and ``losses``; None if there is no checkpoint.

        Raises:
            UsageError: the checkpoint is that of another run; what differs is named.
            IntegrityError: there are checkpoints, and none is whole.
        """
        found = sorted(self._directory.glob("step-*"), reverse=True)
        for path in found:
            try:
                state = _read_whole(path)
            except (SiloError, OSError) as error:
                note(f"a checkpoint is left aside: {error}")
                continue
            self._require_same(state["identity"])
            tensors = _read_tensors(path / "tensors.pt")
            _scatter(self._accelerator, model, optimizer, tensors)
            _set_random_state(_read_tensors(path / f"random-{self._accelerator.process_index}.pt"))
            return {"plan": state["plan"], "losses": tensors["losses"].tolist()}
        if found:
            raise IntegrityError(f"no checkpoint in {self._directory} is whole; remove it, so that the run begins anew")
        return None

    def _require_same(self, identity: dict[str, Any]) -> None:
        was, now = _flat(identity), _flat(self._identity)
        differs = [
            f"{name} was {was.get(name, 'not set')!r} and is {now.get(name, 'not set')!r}"
            for name in sorted(was.keys() | now.keys())
            if was.get(name) != now.get(name)
        ]
        if differs:
            raise UsageError(
                f"{self._directory} holds an unfinished run that is another one: {', '.join(differs)}; "
                "go back to what it was, choose another output, or remove that directory"
            )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found


def _read_whole(path: Path) -> dict[str, Any]:
    """The state of a checkpoint of which every file is as it was written."""
    state = read_sealed(path / "state.json", FORMAT)
    for name, digest in state["files"].items():
        check_digest(path / name, sha256_file(path / name), digest)
    return state


def _write_tensors(path: Path, value: Any) -> None:
    with open(path, "wb") as file:
        torch.save(value, file)
        file.flush()
        os.fsync(file.fileno())


def _read_tensors(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def _gathered(accelerator: Accelerator, model: Any, optimizer: Any) -> tuple[dict[str, Any], Any]:
    """Whole weights and optimizer state, wherever their parts lie. Every process has to call it."""
    if accelerator.distributed_type != DistributedType.FSDP:
        return accelerator.unwrap_model(model).state_dict(), optimizer.state_dict()
    whole = sharded.StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = sharded.get_model_state_dict(model, options=whole)
    return weights, sharded.get_optimizer_state_dict(model, optimizer.optimizer, options=whole)


def _scatter(accelerator: Accelerator, model: Any, optimizer: Any, tensors: dict[str, Any]) -> None:
    """Give weights and optimizer back what :func:`_gathered` took from them."""
    if accelerator.distributed_type != DistributedType.FSDP:
        accelerator.unwrap_model(model).load_state_dict(tensors["model"])
        optimizer.load_state_dict(tensors["optimizer"])
        return
    whole = sharded.StateDictOptions(full_state_dict=True)
    sharded.set_model_state_dict(model, tensors["model"], options=whole)
    sharded.set_optimizer_state_dict(model, optimizer.optimizer, tensors["optimizer"], options=whole)
