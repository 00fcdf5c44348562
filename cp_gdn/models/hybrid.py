"""A decoder language model in the Qwen3.5 shape: Gated DeltaNet layers, every fourth softmax.

    x = x + mixer(rmsnorm(x))        x = x + swiglu(rmsnorm(x))        logits = W rmsnorm(x)

Every layer takes the sharded sequence and the context of the batch; the model itself knows nothing
of ranks. Its state dict has the names of transformers' Qwen3_5ForCausalLM.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..context import CPContext
from ..layers.attention import CPAttention
from ..layers.gated_delta_net import CPGatedDeltaNet
from ..layers.lm_head import IGNORE_INDEX, LMHead
from ..layers.mlp import SwiGLU
from ..layers.norm import RMSNorm
from ..ops.engines import check_engine
from ..ops.recompute import checkpoint_contexts
from .flops import train_flops_per_token


@dataclass
class HybridSizes:
    """A :class:`HybridLM` but for its vocabulary, named as in transformers' Qwen3_5TextConfig.

    Every ``full_attention_interval``-th layer is softmax attention, the others Gated DeltaNet with
    ``engine`` (see :class:`CPGatedDeltaNet`). Raises ValueError for what does not fit together.
    """

    hidden_size: int
    num_layers: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int = 4
    full_attention_interval: int = 4
    rope_theta: float = 1e7
    partial_rotary_factor: float = 0.25
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    engine: str = "auto"

    def __post_init__(self) -> None:
        check_engine(self.engine)
        for name, value in vars(self).items():
            if name not in ("tie_word_embeddings", "engine") and not value > 0:
                raise ValueError(f"{name} is {value}; it must be positive")
        for many, few in (
            ("num_attention_heads", "num_key_value_heads"),
            ("linear_num_value_heads", "linear_num_key_heads"),
        ):
            if getattr(self, many) % getattr(self, few):
                raise ValueError(
                    f"{many} is {getattr(self, many)} and {few} {getattr(self, few)}; {many} must "
                    f"be a multiple of {few}"
                )
        rotary = int(self.head_dim * self.partial_rotary_factor)
        if self.partial_rotary_factor > 1 or rotary < 2 or rotary % 2:
            raise ValueError(
                f"partial_rotary_factor {self.partial_rotary_factor} of head_dim {self.head_dim} "
                f"turns {rotary} features; it must be at most 1 and turn an even number of them, at "
                "least 2"
            )

    @property
    def layer_types(self) -> tuple[str, ...]:
        """The kind of every layer, "linear_attention" or "full_attention"."""
        return tuple(
            "linear_attention" if (i + 1) % self.full_attention_interval else "full_attention"
            for i in range(self.num_layers)
        )


@dataclass(kw_only=True)
class HybridConfig(HybridSizes):
    """A :class:`HybridLM`: its sizes and its vocabulary."""

    vocab_size: int


class HybridOutput(NamedTuple):
    """Without labels the logits; with labels the sum and the number of this rank's losses."""

    logits: Tensor | None  # [B, T_local, vocab_size]
    loss_sum: Tensor | None  # scalar, fp32 (fp64 in an fp64 model), in nats
    num_valid: Tensor | None  # scalar, int64


class DecoderLayer(nn.Module):
    """Mixer and MLP, each behind a norm and a residual connection."""

    def __init__(self, config: HybridConfig, kind: str):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if kind == "linear_attention":
            self.linear_attn = CPGatedDeltaNet(
                config.hidden_size,
                config.linear_num_key_heads,
                config.linear_num_value_heads,
                config.linear_key_head_dim,
                config.linear_value_head_dim,
                config.linear_conv_kernel_dim,
                config.rms_norm_eps,
                config.engine,
            )
        else:
            self.self_attn = CPAttention(
                config.hidden_size,
                config.num_attention_heads,
                config.num_key_value_heads,
                config.head_dim,
                rope_theta=config.rope_theta,
                partial_rotary_factor=config.partial_rotary_factor,
                norm_eps=config.rms_norm_eps,
            )
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)
        self._linear = kind == "linear_attention"

    def forward(self, x: Tensor, *, cp_context: CPContext | None) -> Tensor:
        mixer = self.linear_attn if self._linear else self.self_attn
        x = x + mixer(self.input_layernorm(x), cp_context=cp_context)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, layers and the last norm: [B, T_local] token ids -> [B, T_local, hidden_size]."""

    def __init__(self, config: HybridConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, kind) for kind in config.layer_types)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.activation_checkpointing = False

    def forward(self, input_ids: Tensor, *, cp_context: CPContext | None) -> Tensor:
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            if self.activation_checkpointing:
                x = checkpoint(
                    layer, x, cp_context=cp_context, use_reentrant=False, preserve_rng_state=False,
                    context_fn=checkpoint_contexts,
                )  # fmt: skip
            else:
                x = layer(x, cp_context=cp_context)
        return self.norm(x)


class HybridLM(nn.Module):
    """The language model of a :class:`HybridConfig`.

    Linear and embedding weights start from a normal distribution with ``initializer_range``; norms,
    convolutions, ``A_log`` and ``dt_bias`` as their layers say.
    """

    def __init__(self, config: HybridConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        embedding = self.model.embed_tokens.weight
        tied = config.tie_word_embeddings
        self.lm_head = LMHead(embedding if tied else nn.Parameter(torch.empty_like(embedding)))
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding, LMHead)):
                nn.init.normal_(module.weight, std=config.initializer_range)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        *,
        cp_context: CPContext | None = None,
    ) -> HybridOutput:
        """Logits, or the loss, of this rank's tokens.

        Collective: every rank of the context's group must call, and backpropagate.

        Args:
            input_ids: [B, T_local] int64.
            labels: [B, T_local] int64, already shifted: ``labels[t]`` is the target of
                ``input_ids[t]``, -100 for none. Shift before the sequence is cut, or the last token
                of every shard is lost.
            cp_context: carries the shards and the documents; None: one rank, one document a row.

        Returns:
            :class:`HybridOutput`. The ranks' losses add: divide by the sum of ``num_valid`` over
            all ranks.

        Raises:
            ValueError: shapes that differ or do not belong to the context, B > 1 with packed
                documents.
        """
        if input_ids.ndim != 2 or (labels is not None and labels.shape != input_ids.shape):
            raise ValueError(
                f"input_ids has shape {tuple(input_ids.shape)} and labels "
                f"{None if labels is None else tuple(labels.shape)}; expected [B, T_local] for both"
            )
        if cp_context is not None:
            cp_context.check_tokens(input_ids)
        hidden_states = self.model(input_ids, cp_context=cp_context)
        if labels is None:
            return HybridOutput(self.lm_head(hidden_states), None, None)
        loss_sum = self.lm_head(hidden_states, labels)
        return HybridOutput(None, loss_sum, (labels != IGNORE_INDEX).sum())

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Keep only each layer's input in the forward and run the layer again in the backward.

        The collectives of a layer run again too, on every rank at the same place: after the backward
        of the layer above, before its own.
        """
        self.model.activation_checkpointing = enabled

    def cast(self, dtype: torch.dtype) -> "HybridLM":
        """Cast the parameters to ``dtype`` in place, ``A_log`` and ``dt_bias`` never below fp32."""
        if not dtype.is_floating_point:
            raise ValueError(
                f"cannot cast a model to {dtype}; choose a floating-point dtype such as "
                "torch.bfloat16"
            )
        return self.to(dtype)

    def flops_per_token(self, seq_len: int) -> float:
        """Forward and backward operations a token; see :func:`train_flops_per_token`."""
        return train_flops_per_token(self.config, seq_len)
