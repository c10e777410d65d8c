"""How fast the model's layers train: forward, backward and optimizer, each in turns with its peer.

    python scripts/bench model > scripts/results/model.json

- ``dense`` and ``moe``: whole decoders of one shape, ours and transformers' Llama and Mixtral (experts by
  ``grouped_mm``), with torch's fused AdamW for all.
- ``peer``: one layer, 256 wide, 8 heads of 16 experts, 512 tokens a step; ours with 65,536 and 1,048,576 experts and
  its row-wise AdamW, PEER-pytorch's with torch's AdamW, fused or as it is by default (``--not-fused``), for which 16
  GB of memory are needed (``--no-peer-pytorch`` if it is not installed).
- ``peer_decoder``: our decoder of four layers, one of which is PEER, at both sizes.

Beside each contestant stand the operations of its matrix products and the share of the machine's rate that it reached;
what an optimizer moves is not in them; and where the time of some steps goes (see profiling.py). Tokens are random.
With THP_MEM_ALLOC_ENABLE=1 in the environment torch asks Linux for huge pages, which spares a million experts most of
their page faults; all contestants gain. Prints one JSON document: machine, command, commit, seed, medians, and ratios
round by round.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import combinations as pairs
from typing import Any

import click
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from bench import ceiling
from bench.harness import Measured, compete, say, subject
from bench.profiling import operations
from silo.modeling import SiloConfig, SiloForCausalLM
from silo.product_keys import PeerFFN
from training.optimizer import RowAdamW

SHAPE: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 512,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "tie_word_embeddings": True,
}
BATCH, TIME = 4, 256
WIDTH, HEADS, EXPERTS_PER_HEAD, TOKENS = 256, 8, 16, 512
SIZES = {"65k": 256**2, "1m": 1024**2}
FUSED: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1, "fused": True}
PROFILED = 3
"""Steps that are profiled."""
PARTS = ("dense", "moe", "peer", "peer_decoder")
Step = Callable[[], None]


@click.command()
@click.option("--rounds", default=7, show_default=True, help="Counted rounds, after one that warms up.")
@click.option("--threads", default=None, type=int, help="Threads of torch.  [default: all cores]")
@click.option("--seed", default=0, show_default=True, help="Of what is random.")
@click.option(
    "--part",
    "parts",
    multiple=True,
    type=click.Choice(PARTS),
    help="Only these.  [default: all]",
)
@click.option(
    "--peer-pytorch/--no-peer-pytorch",
    default=True,
    show_default=True,
    help="Whether the peer of the PEER layer is there.",
)
@click.option("--fused/--not-fused", default=True, show_default=True, help="AdamW of PEER-pytorch: its kernel.")
@subject
def main(
    rounds: int, threads: int | None, seed: int, parts: tuple[str, ...], peer_pytorch: bool, fused: bool
) -> dict[str, Any]:
    """Training steps of layers beside other implementations."""
    if threads is not None:
        torch.set_num_threads(threads)
    roof = ceiling.measure()
    torch.manual_seed(seed)
    contests: dict[str, Callable[[], dict[str, Step]]] = {
        "dense": lambda: decoders("dense"),
        "moe": lambda: decoders("moe"),
        "peer": lambda: peers(peer_pytorch, fused),
        "peer_decoder": peer_decoders,
    }
    result = {}
    for part in parts or contests:
        steps = contests[part]()
        result[part] = compare(steps, rounds)
        result[part]["ceiling"] = {
            name: roof.share(ceiling.products_of(step), result[part]["wall"]["milliseconds"][name] / 1000)
            for name, step in steps.items()
        }
        result[part]["profile"] = {name: operations(step, PROFILED) for name, step in steps.items()}
        say(f"{part}: {result[part]['wall']['milliseconds']}")
    return {
        "threads": torch.get_num_threads(),
        "huge_pages": os.environ.get("THP_MEM_ALLOC_ENABLE") == "1",
        "seed": seed,
        "shape": SHAPE | {"batch": BATCH, "time": TIME},
        "rounds": rounds,
        "ceiling": roof.told(),
        "result": result,
    }


def decoders(kind: str) -> dict[str, Step]:
    """Training steps of our decoder and of transformers'."""
    ours = SiloForCausalLM(SiloConfig(**SHAPE, ffn=kind, num_experts=8, num_experts_per_tok=2))
    theirs: nn.Module
    if kind == "dense":
        theirs = LlamaForCausalLM(LlamaConfig(**SHAPE))
    else:
        config = MixtralConfig(
            **SHAPE, num_local_experts=8, num_experts_per_tok=2, output_router_logits=True, sliding_window=None
        )
        config._experts_implementation = "grouped_mm"
        theirs = MixtralForCausalLM(config)
    return {
        "silo": language_step(ours, torch.optim.AdamW(ours.parameters(), **FUSED)),
        "transformers": language_step(theirs, torch.optim.AdamW(theirs.parameters(), **FUSED)),
    }


def peer_decoders() -> dict[str, Step]:
    """Training steps of our decoder with PEER in its third of four layers, as the paper has it in the middle."""
    steps = {}
    for name, experts in SIZES.items():
        kinds = ["dense", "dense", "peer", "dense"]
        model = SiloForCausalLM(SiloConfig(**SHAPE, ffn=kinds, peer_num_experts=experts))
        steps[f"silo_{name}"] = language_step(model, RowAdamW(model.parameters()))
    return steps


def language_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    """One training step of a language model on new random tokens."""
    model.train()

    def step() -> None:
        tokens = torch.randint(SHAPE["vocab_size"], (BATCH, TIME))
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peers(with_peer_pytorch: bool, fused: bool = True) -> dict[str, Step]:
    """Training steps of one PEER layer: ours and PEER-pytorch's, at both sizes."""
    steps = {}
    for name, experts in SIZES.items():
        shape: dict[str, Any] = {"hidden_size": WIDTH, "num_attention_heads": 8, "num_key_value_heads": 8}
        config = SiloConfig(
            **shape, ffn="peer", peer_num_experts=experts, peer_heads=HEADS,
            peer_experts_per_head=EXPERTS_PER_HEAD, key_dim=WIDTH, query_batch_norm=False, shared_keys=False,
        )  # fmt: skip
        layer = PeerFFN(config)
        nn.init.normal_(layer.down.weight, std=WIDTH**-0.5)
        nn.init.normal_(layer.up.weight, std=WIDTH**-0.5)
        nn.init.normal_(layer.retrieval.keys, std=0.02)
        steps[f"silo_{name}"] = layer_step(layer, RowAdamW(layer.parameters()))
    if with_peer_pytorch:
        from PEER_pytorch import PEER

        for name, experts in SIZES.items():
            # Its default would cut each head's experts to one; its keys are 2 · dim // 2 wide, as ours here.
            theirs = PEER(
                WIDTH, heads=HEADS, num_experts=experts, num_experts_per_head=EXPERTS_PER_HEAD,
                non_competing_scores=False,
            )  # fmt: skip
            optimizer = torch.optim.AdamW(theirs.parameters(), **(FUSED | {"fused": fused or None}))
            steps[f"peer_pytorch_{name}"] = layer_step(theirs, optimizer)
    return steps


def layer_step(layer: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    """One training step of a layer on new random inputs."""

    def step() -> None:
        x = torch.randn(1, TOKENS, WIDTH, requires_grad=True)
        out = layer(x)
        (out[0] if isinstance(out, tuple) else out).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def compare(steps: dict[str, Step], rounds: int) -> dict[str, Any]:
    """Run contestants in turns. Medians of their times, and of the ratio of each two, round by round: by the clock, and
    by the processor time of all threads, which other work on the machine disturbs less."""
    contest = compete(steps, rounds)
    return {
        clock: {
            "milliseconds": {name: round(1000 * contest.taken(name, clock).value, 2) for name in steps},
            **told({f"{other}_over_{name}": contest.times(other, name, clock) for name, other in pairs(steps, 2)}),
        }
        for clock in contest.seconds
    }


def told(ratios: dict[str, Measured]) -> dict[str, Any]:
    """For the record: medians and spreads apart."""
    return {
        "ratio": {name: round(each.value, 3) for name, each in ratios.items()},
        "spread": {name: [round(each.low, 3), round(each.high, 3)] for name, each in ratios.items()},
    }
