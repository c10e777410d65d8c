"""What a forward pass costs in floating-point operations, counted as it runs and not estimated from a shape."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

aten = torch.ops.aten


def flops_per_token(model: PreTrainedModel, length: int, *, batch: int = 4) -> float:
    """Floating-point operations of a forward pass in evaluation, a token: two for each multiplication and addition of
    every product.

    torch's own counter counts matrix products. The operations that it does not know are counted in this module: dot
    products with rows of a matrix, weighted sums of rows, grouped products, and attention on a CPU (like torch's
    formula for GPUs, without the half that a causal mask leaves out). Norms, activations, softmax and top-k are not
    counted, by either.

    Args:
        model: a causal language model; its ``config`` has a ``vocab_size``.
        length: tokens a sequence.
        batch: sequences. More of them even out what depends on the tokens.
    """
    tokens = torch.randint(model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))
    training = model.training
    model.eval()
    # oneDNN fills up the runs of experts to a few lengths, which is work but no part of the function.
    counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    with torch.backends.mkldnn.flags(enabled=False), torch.no_grad(), counter:
        model(input_ids=tokens, use_cache=False)
    model.train(training)
    return counter.get_total_flops() / tokens.numel()


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Scores and weighted sums; shapes are (batch, heads, time, width), and several query heads may share a key's."""
    batch, heads, time, width = query
    return 2 * batch * heads * time * key[2] * (width + value[3])


def _sums_of_rows(matrix: Any, index: Any, *_: Any, **__: Any) -> int:
    return 2 * index[0] * matrix[1]


def _dots_with_rows(wanted: torch.Tensor, x: torch.Tensor, *_: Any, **__: Any) -> int:
    return 2 * wanted.values().numel() * x.shape[1]


_dots_with_rows._get_raw = True  # type: ignore[attr-defined]  # torch's mark: how many are wanted is in no shape


def _grouped(rows: Any, weight: Any, *_: Any, **__: Any) -> int:
    if len(weight) == 2:  # what the weights' gradient is: (width, rows) of each group by its (rows, width)
        return 2 * rows[0] * rows[1] * weight[1]
    return 2 * rows[0] * weight[1] * weight[2]


FORMULAS: dict[Any, Any] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._embedding_bag: _sums_of_rows,
    aten._embedding_bag_forward_only: _sums_of_rows,
    aten.sparse_sampled_addmm: _dots_with_rows,
    aten._grouped_mm: _grouped,
}
"""Operation → its count, given the shapes of its arguments."""
