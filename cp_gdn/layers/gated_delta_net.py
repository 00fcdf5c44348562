"""The Gated DeltaNet layer over sharded, packed sequences.

As Qwen3.5 builds it on the rule of Yang et al. (arXiv 2412.06464):

    [q k v] = silu(conv(W_qkv x))    beta = sigmoid(W_b x)    g = -exp(A_log) softplus(W_a x + dt_bias)
    y = W_out [ rmsnorm(rule(q / |q|, k / |k|, v, g, beta)) * silu(W_z x) ]

Parameters are named as in transformers' Qwen3_5GatedDeltaNet, so state dicts go both ways.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..context import CPContext
from ..ops.autocast import share_copy
from ..ops.engines import check_engine
from ..ops.gated_delta_rule import chunk_gated_delta_rule
from ..ops.gates import decay_and_strength
from .conv import CausalConv1d
from .inputs import check_hidden_states
from .norm import GatedRMSNorm

_FLAT = ("Qwen3_5GatedDeltaNet", "Qwen3_5MoeGatedDeltaNet")
_INTERLEAVED = ("Qwen3NextGatedDeltaNet",)


class CPGatedDeltaNet(nn.Module):
    """Gated DeltaNet layer, [B, T_local, hidden_size] -> [B, T_local, hidden_size].

    ``A_log`` and ``dt_bias`` [num_v_heads] stay in fp32 or wider whatever the module is cast to
    (``.to(torch.bfloat16)``, ``.half()``, ...): the decay of a slow head is exp of them, and a
    rounding error there grows with the sequence. Loading or sharing parameters keeps the dtype they
    come in.

    ``engine`` is that of :func:`cp_gdn.chunk_gated_delta_rule`. "torch" keeps convolution, gates and
    norm in PyTorch as well; otherwise these take their own kernels wherever those run, which is for
    16-bit activations on Hopper.

    Raises:
        ValueError: a size that is not positive, num_v_heads not a multiple of num_k_heads, or an
            unknown engine.
    """

    def __init__(
        self,
        hidden_size: int,
        num_k_heads: int,
        num_v_heads: int,
        head_k_dim: int = 128,
        head_v_dim: int = 128,
        conv_size: int = 4,
        norm_eps: float = 1e-6,
        engine: str = "auto",
    ):
        super().__init__()
        check_engine(engine)
        sizes = {
            "hidden_size": hidden_size,
            "num_k_heads": num_k_heads,
            "num_v_heads": num_v_heads,
            "head_k_dim": head_k_dim,
            "head_v_dim": head_v_dim,
            "conv_size": conv_size,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} is {size}; it must be at least 1")
        if num_v_heads % num_k_heads:
            raise ValueError(
                f"num_v_heads is {num_v_heads} and num_k_heads {num_k_heads}; every key head serves "
                "the same number of value heads, so num_v_heads must be a multiple of num_k_heads"
            )
        self.engine, self.hidden_size = engine, hidden_size
        self.num_k_heads, self.num_v_heads = num_k_heads, num_v_heads
        self.head_k_dim, self.head_v_dim = head_k_dim, head_v_dim
        self.key_dim = num_k_heads * head_k_dim
        self.value_dim = num_v_heads * head_v_dim
        conv_dim = 2 * self.key_dim + self.value_dim

        self.in_proj_qkv = nn.Linear(hidden_size, conv_dim, bias=False)
        self.in_proj_z = nn.Linear(hidden_size, self.value_dim, bias=False)
        self.in_proj_b = nn.Linear(hidden_size, num_v_heads, bias=False)
        self.in_proj_a = nn.Linear(hidden_size, num_v_heads, bias=False)
        self.conv1d = CausalConv1d(conv_dim, conv_size)
        self.dt_bias = nn.Parameter(torch.ones(num_v_heads, dtype=torch.float32))
        decay = torch.empty(num_v_heads, dtype=torch.float32).uniform_(0.01, 16)
        self.A_log = nn.Parameter(decay.log())
        self.norm = GatedRMSNorm(head_v_dim, norm_eps)
        self.out_proj = nn.Linear(self.value_dim, hidden_size, bias=False)

    def forward(self, hidden_states: Tensor, *, cp_context: CPContext | None = None) -> Tensor:
        """This rank's tokens through the layer.

        Collective: every rank of the context's group must call, and backpropagate.

        Args:
            hidden_states: [B, T_local, hidden_size].
            cp_context: carries the shards and the documents; None: one rank, one document a row.

        Raises:
            ValueError: another shape, tokens that the context does not expect, B > 1 with packed
                documents.
        """
        check_hidden_states(hidden_states, self.hidden_size, cp_context)
        around = "torch" if self.engine == "torch" else "auto"
        for_qkv, for_z, for_a, for_b = share_copy(hidden_states, 4)
        qkv, halo = self.conv1d.send_halo(self.in_proj_qkv(for_qkv), cp_context)
        z = self.in_proj_z(for_z)
        g, beta = decay_and_strength(
            self.in_proj_a(for_a),
            self.in_proj_b(for_b),
            self.A_log,
            self.dt_bias,
            engine=around,
        )  # [B, T, Hv]
        q, k, v = self.conv1d(
            qkv,
            (self.key_dim, self.key_dim, self.value_dim),
            cp_context=cp_context,
            halo=halo,
            engine=around,
        )
        o, _ = chunk_gated_delta_rule(
            q.unflatten(-1, (self.num_k_heads, self.head_k_dim)),
            k.unflatten(-1, (self.num_k_heads, self.head_k_dim)),
            v.unflatten(-1, (self.num_v_heads, self.head_v_dim)),
            g,
            beta,
            use_qk_l2norm_in_kernel=True,
            cp_context=cp_context,
            engine=self.engine,
        )  # [B, T, Hv, V]
        return self.out_proj(self.norm(o, z.view_as(o), engine=around).flatten(-2))

    @classmethod
    def from_transformers(cls, hf_layer: nn.Module, *, engine: str = "auto") -> "CPGatedDeltaNet":
        """The same function as a transformers Gated DeltaNet layer.

        Qwen3_5GatedDeltaNet and Qwen3_5MoeGatedDeltaNet share every parameter with the result (the
        same Parameter objects). Qwen3NextGatedDeltaNet interleaves its projections by key head:
        those become copies in the flat layout, the rest is shared.

        Raises:
            ValueError: another class, an activation that is not SiLU, or an unknown engine.
        """
        classes = {base.__name__ for base in type(hf_layer).__mro__}
        interleaved = bool(classes.intersection(_INTERLEAVED))
        if not interleaved and not classes.intersection(_FLAT):
            raise ValueError(
                f"from_transformers got a {type(hf_layer).__name__}; it takes "
                f"{', '.join(_FLAT + _INTERLEAVED)}: pass the linear_attn module of a decoder layer"
            )
        source: Any = hf_layer
        if source.activation not in ("silu", "swish"):
            raise ValueError(
                f"the layer's activation is {source.activation!r}; only silu is supported"
            )
        with torch.device("meta"):
            layer = cls(
                source.hidden_size,
                source.num_k_heads,
                source.num_v_heads,
                source.head_k_dim,
                source.head_v_dim,
                source.conv_kernel_size,
                source.layer_norm_epsilon,
                engine,
            )
        if interleaved:
            layer._relay(source.in_proj_qkvz.weight, source.in_proj_ba.weight)
        else:
            for name in ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"):
                getattr(layer, name).weight = getattr(source, name).weight
        for name in ("conv1d", "norm", "out_proj"):
            getattr(layer, name).weight = getattr(source, name).weight
        layer.dt_bias, layer.A_log = source.dt_bias, source.A_log
        return layer.train(hf_layer.training)

    def _relay(self, qkvz: nn.Parameter, ba: nn.Parameter) -> None:
        """Copy Qwen3-Next's projections: rows by key head, [q | k | v's | z's] and [b's | a's]."""
        values = self.num_v_heads // self.num_k_heads * self.head_v_dim
        widths = (self.head_k_dim, self.head_k_dim, values, values)
        q, k, v, z = (
            part.flatten(0, 1)
            for part in qkvz.detach().unflatten(0, (self.num_k_heads, -1)).split(widths, 1)
        )
        b, a = (
            part.flatten(0, 1)
            for part in ba.detach().unflatten(0, (self.num_k_heads, -1)).chunk(2, 1)
        )
        for linear, rows, origin in (
            (self.in_proj_qkv, torch.cat((q, k, v)), qkvz),
            (self.in_proj_z, z, qkvz),
            (self.in_proj_b, b, ba),
            (self.in_proj_a, a, ba),
        ):
            linear.weight = nn.Parameter(rows.clone(), requires_grad=origin.requires_grad)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "CPGatedDeltaNet":
        if recurse:
            for child in self.children():
                child._apply(fn)

        def at_least_fp32(t: Tensor) -> Tensor:
            out = fn(t)
            if out.element_size() < 4 <= t.element_size():
                return t.to(out.device, torch.float32)
            return out

        return super()._apply(at_least_fp32, recurse=False)
