"""The parametric model: a decoder whose feed-forward layers may be mixtures of experts.

Attention is grouped-query with rotary positions, norms are RMSNorm before each block, feed-forward layers are SwiGLU.
Both classes are registered with transformers' Auto classes, so that ``AutoModelForCausalLM.from_pretrained(DIR)`` gives
the same model after ``import silo.modeling``.

One thing is not in other decoders: ``forward(..., output_keys=True)`` also returns the input of the last feed-forward
layer after its norm, the representation that kNN-LM found to retrieve best (Khandelwal 2020, section 5), so that the
datastore needs no hooks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput

from silo.errors import UsageError

FFN_KINDS = ("dense", "moe")
SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "num_experts",
    "max_position_embeddings",
)


class SiloConfig(PreTrainedConfig):
    """Shape of a model; field names follow transformers.

    ``ffn`` is one kind for all layers or one a layer, of ``dense`` and ``moe``. ``router_aux_loss_coef`` weighs the
    load-balancing loss of Switch Transformer (Fedus 2021, equation 4). Raises :class:`UsageError` for shapes that do
    not fit together.
    """

    model_type = "silo"
    keys_to_ignore_at_inference = ("past_key_values",)

    vocab_size: int = 8192
    hidden_size: int = 192
    num_hidden_layers: int = 4
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    intermediate_size: int = 512
    ffn: str | list[str] = "moe"
    num_experts: int = 8
    num_experts_per_tok: int = 2
    router_aux_loss_coef: float = 0.01
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
        super().__post_init__(**kwargs)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    def ffn_of(self, layer: int) -> str:
        """The feed-forward kind of one layer."""
        return self.ffn[layer] if isinstance(self.ffn, list) else self.ffn


@dataclass
class SiloOutput(ModelOutput):
    """What a forward pass gives; ``retrieval_keys`` has shape (batch, time, hidden) and ``router_logits`` one entry a
    moe layer, each (batch · time, experts)."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    retrieval_keys: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn pairs of features by their position's angles (RoPE, Su 2021, equation 34). ``x`` is (batch, heads, time,
    head_dim), ``cos`` and ``sin`` (batch, 1, time, head_dim)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    """Causal grouped-query attention (Ainslie 2023) through transformers' attention interface."""

    def __init__(self, config: SiloConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer
        self.is_causal = True
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        key_value_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_value_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_value_width, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        x: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
    ) -> torch.Tensor:
        """Attend within each sequence; ``x`` is (batch, time, hidden)."""
        batch, time, _ = x.shape
        shape = (batch, time, -1, self.config.head_dim)
        query = rotate(self.q_proj(x).view(shape).transpose(1, 2), *rotation)
        key = rotate(self.k_proj(x).view(shape).transpose(1, 2), *rotation)
        value = self.v_proj(x).view(shape).transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        # The interface has no entry for "eager"; torch's own attention computes the same with the mask made for it.
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, sdpa_attention_forward)
        out, _ = attend(self, query, key, value, attention_mask, scaling=self.config.head_dim**-0.5, dropout=0.0)
        return self.o_proj(out.reshape(batch, time, -1))


class DenseFFN(nn.Module):
    """SwiGLU (Shazeer 2020): ``down(silu(gate(x)) · up(x))``."""

    def __init__(self, config: SiloConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Map (batch, time, hidden) to the same shape. There is no router, so no router logits."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up), None


class MoeFFN(nn.Module):
    """Top-k of n SwiGLU experts, weighted by a softmax over the chosen (Mixtral, Jiang 2024, section 2.1).

    Dropless: every token reaches its k experts, however uneven the load. Tokens are sorted by expert, so that each
    expert is two matrix products over a contiguous run of rows.
    """

    def __init__(self, config: SiloConfig) -> None:
        super().__init__()
        self.experts_per_token = config.num_experts_per_tok
        self.router = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        shape = (config.num_experts, config.hidden_size, config.intermediate_size)
        self.gate_proj = nn.Parameter(torch.empty(shape))
        self.up_proj = nn.Parameter(torch.empty(shape))
        self.down_proj = nn.Parameter(torch.empty(shape).transpose(1, 2).contiguous())

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map (batch, time, hidden) to the same shape, and give the router's logits (batch · time, experts)."""
        rows = x.reshape(-1, x.shape[-1])
        logits = self.router(rows)
        best, expert = logits.float().topk(self.experts_per_token, dim=-1)
        weight = best.softmax(dim=-1).to(x.dtype)
        by_expert = expert.flatten().argsort(stable=True)
        load = torch.bincount(expert.flatten(), minlength=len(self.gate_proj)).tolist()
        chunks = rows[by_expert // self.experts_per_token].split(load)
        out = torch.cat([self.apply_expert(i, chunk) for i, chunk in enumerate(chunks)])
        # Undoing the sort by a gather, not by index_add, keeps the order of summation fixed.
        back = torch.empty_like(by_expert)
        back[by_expert] = torch.arange(len(by_expert), device=x.device)
        out = out[back].view(len(rows), self.experts_per_token, -1)
        return (out * weight.unsqueeze(-1)).sum(dim=1).view_as(x), logits

    def apply_expert(self, index: int, rows: torch.Tensor) -> torch.Tensor:
        """One expert on the rows that chose it, which may be none."""
        return (F.silu(rows @ self.gate_proj[index]) * (rows @ self.up_proj[index])) @ self.down_proj[index]


FFN_CLASSES: dict[str, type[nn.Module]] = {"dense": DenseFFN, "moe": MoeFFN}


class DecoderLayer(GradientCheckpointingLayer):
    """Attention, then feed-forward, each after a norm and beside a residual."""

    def __init__(self, config: SiloConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = FFN_CLASSES[config.ffn_of(layer)](config)

    def forward(
        self,
        x: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        key_only: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Give the layer's output, its feed-forward input (the datastore's key) and its router's logits if any.

        With ``key_only`` the feed-forward part is left out, and the output is of no use.
        """
        x = x + self.self_attn(self.input_layernorm(x), rotation, attention_mask, past_key_values)
        key = self.post_attention_layernorm(x)
        if key_only:
            return x, key, None
        out, router_logits = self.mlp(key)
        return x + out, key, router_logits


class SiloPreTrainedModel(PreTrainedModel):
    """What transformers wants to know to save, load and initialise the model."""

    config_class = SiloConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = {"DecoderLayer"}  # noqa: RUF012 (transformers declares it so)
    _supports_sdpa = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MoeFFN):
            for parameter in (module.gate_proj, module.up_proj, module.down_proj):
                nn.init.normal_(parameter, std=self.config.initializer_range)


class SiloModel(SiloPreTrainedModel):
    """Embeddings and decoder layers, without the head."""

    def __init__(self, config: SiloConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        keys_only: bool = False,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...], Cache | None]:
        """Give (hidden states, keys of the last layer, router logits, cache); states and keys are (batch, time,
        hidden). With ``keys_only`` the last feed-forward layer is left out, and only the keys are of use."""
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(seen, seen + x.shape[1], device=x.device).unsqueeze(0)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        rotation = self.rotation(position_ids, x.dtype)
        key, router_logits = x, []
        for number, layer in enumerate(self.layers, start=1):
            x, key, logits = layer(x, rotation, mask, past_key_values, keys_only and number == len(self.layers))
            if logits is not None:
                router_logits.append(logits)
        return self.norm(x), key, tuple(router_logits), past_key_values

    def rotation(self, position_ids: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine of each position's angles, (batch, 1, time, head_dim), computed in float32."""
        exponent = torch.arange(0, self.config.head_dim, 2, device=position_ids.device).float() / self.config.head_dim
        angles = position_ids.float().unsqueeze(-1) * self.config.rope_theta**-exponent
        angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)
        return angles.cos().to(dtype), angles.sin().to(dtype)


class SiloForCausalLM(SiloPreTrainedModel, GenerationMixin):
    """The decoder with its language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (transformers reads it so)

    def __init__(self, config: SiloConfig) -> None:
        super().__init__(config)
        self.model = SiloModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        output_keys: bool = False,
        **kwargs: Any,
    ) -> SiloOutput:
        """Score sequences.

        Args:
            input_ids: (batch, time).
            labels: (batch, time), shifted inside; -100 is left out of the loss.
            logits_to_keep: compute logits for this many last positions only; 0 for all.
            output_keys: also return the datastore's keys as ``retrieval_keys``, (batch, time, hidden).
            attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, kwargs: as in transformers.

        Returns:
            Logits (batch, time, vocabulary); with labels the loss in nats a token, the load-balancing loss included.
        """
        hidden, keys, router_logits, cache = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
        )
        logits = self.lm_head(hidden[:, -logits_to_keep:])
        loss = aux_loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)
            if router_logits:
                aux_loss = load_balancing_loss(router_logits, self.config.num_experts_per_tok)
                loss = loss + self.config.router_aux_loss_coef * aux_loss
        return SiloOutput(
            loss=loss,
            logits=logits,
            past_key_values=cache,
            retrieval_keys=keys if output_keys else None,
            aux_loss=aux_loss,
            router_logits=router_logits or None,
        )

    def retrieval_keys(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The datastore's keys (batch, time, hidden), bit for bit those of :meth:`forward`, without the last
        feed-forward layer and the head, which only predictions need."""
        return self.model(input_ids, keys_only=True)[1]


def load_balancing_loss(router_logits: tuple[torch.Tensor, ...], experts_per_token: int) -> torch.Tensor:
    """Experts · Σ_e (share of choices) · (mean probability), averaged over layers: 1·k when the load is even.

    Fedus 2021 (Switch Transformer), equation 4, with k choices a token. Each entry of ``router_logits`` is (tokens,
    experts).
    """
    losses = []
    for logits in router_logits:
        probability = logits.float().softmax(dim=-1)
        chosen = probability.topk(experts_per_token, dim=-1).indices
        share = torch.zeros_like(probability).scatter_(1, chosen, 1.0).mean(dim=0)
        losses.append(logits.shape[-1] * (share * probability.mean(dim=0)).sum())
    return torch.stack(losses).mean()


AutoConfig.register(SiloConfig.model_type, SiloConfig, exist_ok=True)
AutoModel.register(SiloConfig, SiloModel, exist_ok=True)
AutoModelForCausalLM.register(SiloConfig, SiloForCausalLM, exist_ok=True)
