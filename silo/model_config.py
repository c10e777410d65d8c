"""The shape of a model: what stands in its ``config.json``."""

from __future__ import annotations

import math
from math import isqrt
from typing import Any

from transformers import PreTrainedConfig

from silo.errors import UsageError

FFN_KINDS = ("dense", "moe", "peer", "pkm", "averaged")
ROUTERS = ("topk", "noisy_topk", "expert_choice")
SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "num_experts",
    "max_position_embeddings",
    "peer_num_experts",
    "peer_heads",
    "peer_experts_per_head",
    "peer_siblings",
    "pkm_num_values",
    "pkm_heads",
    "pkm_values_per_head",
    "key_dim",
)


class SiloConfig(PreTrainedConfig):
    """Shape of a model; field names follow transformers.

    ``ffn`` is one kind for all layers or one a layer: ``dense``, ``moe`` (``num_experts``, of which ``router`` takes
    ``num_experts_per_tok``, each ``moe_intermediate_size`` wide, or as wide as a dense layer if that is None), ``peer``
    (``peer_num_experts`` neurons, of which each of ``peer_heads`` takes ``peer_experts_per_head``), ``pkm`` (the same
    of values without a neuron) or ``averaged`` (``num_experts`` experts in training, which each step moves by
    ``share_rate`` towards the mean of the others; their mean afterwards).

    ``key_dim`` is the width of a product key, ``query_batch_norm`` norms its queries, ``shared_keys`` lets heads share
    it, ``peer_siblings`` is what growing leaves behind; of ``sparse_gradients`` see :mod:`silo.rows`. The
    coefficients weigh losses of :mod:`silo.routing`. Raises :class:`UsageError` for shapes that do not fit together.
    """

    model_type = "silo"
    keys_to_ignore_at_inference = ("past_key_values",)

    vocab_size: int = 8192
    hidden_size: int = 192
    num_hidden_layers: int = 4
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    intermediate_size: int = 512
    moe_intermediate_size: int | None = None
    ffn: str | list[str] = "moe"
    num_experts: int = 8
    num_experts_per_tok: int = 2
    router: str = "topk"
    router_aux_loss_coef: float = 0.01
    router_z_loss_coef: float = 0.0
    router_importance_loss_coef: float = 0.1
    router_load_loss_coef: float = 0.1
    share_rate: float = 0.1
    peer_num_experts: int = 1024**2
    peer_heads: int = 8
    peer_experts_per_head: int = 16
    peer_siblings: int = 1
    pkm_num_values: int = 512**2
    pkm_heads: int = 4
    pkm_values_per_head: int = 32
    key_dim: int = 256
    query_batch_norm: bool = True
    shared_keys: bool = True
    sparse_gradients: bool = True
    max_position_embeddings: int = 512
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = True
    bos_token_id: int | None = 0
    eos_token_id: int | None = 0
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for name in SIZES:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise UsageError(f"{name} is {value!r}; expected a whole number, at least 1")
        for name in ("initializer_range", "rms_norm_eps", "rope_theta"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise UsageError(f"{name} is {value!r}; expected a number above 0")
        if self.moe_intermediate_size is not None and self.moe_intermediate_size < 1:
            raise UsageError(f"moe_intermediate_size is {self.moe_intermediate_size}; expected at least 1, or none")
        kinds = self.ffn if isinstance(self.ffn, list) else [self.ffn] * self.num_hidden_layers
        if len(kinds) != self.num_hidden_layers or not set(kinds) <= set(FFN_KINDS):
            raise UsageError(
                f"ffn is {self.ffn!r}; expected one of {', '.join(FFN_KINDS)}, or a list of them with "
                f"{self.num_hidden_layers} entries, one a layer"
            )
        if self.hidden_size % self.num_attention_heads or self.num_attention_heads % self.num_key_value_heads:
            raise UsageError(
                f"hidden_size {self.hidden_size} must be a multiple of num_attention_heads {self.num_attention_heads}, "
                f"and that a multiple of num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise UsageError(
                f"hidden_size {self.hidden_size} over num_attention_heads {self.num_attention_heads} makes heads of "
                f"width {self.head_dim}; expected an even width, since rotary positions turn pairs of features"
            )
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise UsageError(
                f"num_experts_per_tok is {self.num_experts_per_tok}; expected 1 to num_experts ({self.num_experts})"
            )
        if self.router not in ROUTERS:
            raise UsageError(f"router is {self.router!r}; expected one of {', '.join(ROUTERS)}")
        if "peer" in kinds:
            self._check_keys("peer_num_experts", "peer_experts_per_head", self.peer_siblings)
        if "pkm" in kinds:
            self._check_keys("pkm_num_values", "pkm_values_per_head", 1)
        super().__post_init__(**kwargs)

    def _check_keys(self, total: str, per_head: str, siblings: int) -> None:
        """Whether product keys of a kind fit together."""
        n, k = getattr(self, total), getattr(self, per_head)
        side = isqrt(n)
        if side * side != n:
            raise UsageError(f"{total} is {n}; expected a square, since keys are pairs: {side**2} or {(side + 1) ** 2}")
        if side % siblings:
            raise UsageError(f"peer_siblings is {siblings}; expected a divisor of {side}, the root of {total}")
        if k > side // siblings:
            raise UsageError(f"{per_head} is {k}; expected at most {side // siblings}, as each half key offers no more")
        if self.key_dim % 2:
            raise UsageError(f"key_dim is {self.key_dim}; expected an even number, since keys have two halves")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    def ffn_of(self, layer: int) -> str:
        """The feed-forward kind of one layer."""
        return self.ffn[layer] if isinstance(self.ffn, list) else self.ffn
