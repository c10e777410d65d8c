"""The parametric model: a decoder whose feed-forward layers are chosen one by one, from a dense network to a million
experts (:mod:`silo.experts`, :mod:`silo.product_keys`).

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
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput

from silo.experts import AveragedFFN, DenseFFN, Experts, MoeFFN
from silo.model_config import SiloConfig
from silo.product_keys import PeerFFN, PkmFFN, ProductKeys
from silo.products import Linear
from silo.routing import Routing


@dataclass
class SiloOutput(ModelOutput):
    """What a forward pass gives; ``retrieval_keys`` has shape (batch, time, hidden), ``router_logits`` one entry a moe
    layer, each (batch · time, experts), and ``routings`` one a layer that chose experts."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    retrieval_keys: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None
    routings: tuple[Routing, ...] | None = None


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
        self.q_proj = Linear(config.hidden_size, config.hidden_size)
        self.k_proj = Linear(config.hidden_size, key_value_width)
        self.v_proj = Linear(config.hidden_size, key_value_width)
        self.o_proj = Linear(config.hidden_size, config.hidden_size)

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


FFN_CLASSES: dict[str, type[nn.Module]] = {
    "dense": DenseFFN,
    "moe": MoeFFN,
    "peer": PeerFFN,
    "pkm": PkmFFN,
    "averaged": AveragedFFN,
}


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
    ) -> tuple[torch.Tensor, torch.Tensor, Routing | None]:
        """Give the layer's output, its feed-forward input (the datastore's key) and which experts it took, if any.

        With ``key_only`` the feed-forward part is left out, and the output is of no use.
        """
        x = x + self.self_attn(self.input_layernorm(x), rotation, attention_mask, past_key_values)
        key = self.post_attention_layernorm(x)
        if key_only:
            return x, key, None
        out, routing = self.mlp(key)
        return x + out, key, routing


class SiloPreTrainedModel(PreTrainedModel):
    """What transformers wants to know to save, load and initialise the model."""

    config: SiloConfig
    config_class = SiloConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = {"DecoderLayer"}  # noqa: RUF012 (transformers declares it so)
    _supports_sdpa = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Experts):
            for parameter in (module.gate_up_proj, module.down_proj):
                init.normal_(parameter, std=self.config.initializer_range)
        if isinstance(module, AveragedFFN):  # Experts are tied: they begin as one.
            for parameter in (module.gate_up_proj, module.down_proj):
                init.copy_(parameter, parameter[:1].clone().expand_as(parameter))
        if isinstance(module, MoeFFN) and self.config.router == "noisy_topk":
            init.zeros_(module.router.weight)
            init.zeros_(module.router_noise.weight)
        # A neuron's weights have length 1 and its input the length √hidden, as PKM's published code has its values.
        if isinstance(module, PeerFFN):
            init.normal_(module.down.weight, std=self.config.hidden_size**-0.5)
            init.normal_(module.up.weight, std=self.config.hidden_size**-0.5)
        if isinstance(module, PkmFFN):
            init.normal_(module.values.weight, std=self.config.hidden_size**-0.5)
        if isinstance(module, ProductKeys):
            init.normal_(module.keys, std=(self.config.key_dim // 2) ** -0.5)


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
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[Routing, ...], Cache | None]:
        """Give (hidden states, keys of the last layer, routings, cache); states and keys are (batch, time, hidden).
        With ``keys_only`` the last feed-forward layer is left out, and only the keys are of use."""
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
        key, routings = x, []
        for number, layer in enumerate(self.layers, start=1):
            x, key, routing = layer(x, rotation, mask, past_key_values, keys_only and number == len(self.layers))
            if routing is not None:
                routings.append(routing)
        return self.norm(x), key, tuple(routings), past_key_values

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
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
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
            Logits (batch, time, vocabulary); with labels the loss in nats a token, to which training adds the
            mean of the layers' auxiliary losses.
        """
        hidden, keys, routings, cache = self.model(
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
            aux_losses = [routing.loss for routing in routings if routing.loss is not None]
            if aux_losses:
                aux_loss = torch.stack(aux_losses).mean()
                loss = loss + aux_loss
        return SiloOutput(
            loss=loss,
            logits=logits,
            past_key_values=cache,
            retrieval_keys=keys if output_keys else None,
            aux_loss=aux_loss,
            router_logits=tuple(routing.logits for routing in routings if routing.logits is not None) or None,
            routings=routings or None,
        )

    def retrieval_keys(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The datastore's keys (batch, time, hidden), bit for bit those of :meth:`forward`, without the last
        feed-forward layer and the head, which only predictions need."""
        return self.model(input_ids, keys_only=True)[1]


AutoConfig.register(SiloConfig.model_type, SiloConfig, exist_ok=True)
AutoModel.register(SiloConfig, SiloModel, exist_ok=True)
AutoModelForCausalLM.register(SiloConfig, SiloForCausalLM, exist_ok=True)
