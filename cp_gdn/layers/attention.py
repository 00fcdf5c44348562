"""Qwen3.5's gated softmax attention over sharded, packed sequences.

    [q | gate] = W_q x (head by head)    k = W_k x    v = W_v x
    y = W_o [ attention(rotary(rmsnorm(q)), rotary(rmsnorm(k)), v) * sigmoid(gate) ]

Rotary embedding (Su et al., RoFormer, arXiv 2104.09864) turns the first ``partial_rotary_factor``
of each head by the token's position within its document. Parameters are named as in transformers'
Qwen3_5Attention.
"""

import torch
from torch import Tensor, nn

from ..context import CPContext
from ..ops.attention import causal_attention
from ..ops.chunked import compute_dtype
from .inputs import check_hidden_states
from .norm import RMSNorm


def apply_rotary(x: Tensor, positions: Tensor, dim: int, theta: float) -> Tensor:
    """Turn the first ``dim`` features of ``x`` [B, T, H, D] by their ``positions`` [T].

    Feature i is paired with i + dim / 2 and the pair turned by ``position * theta^(-2 i / dim)``
    radians, in fp32 (fp64 for fp64 inputs).
    """
    wide = compute_dtype(x.dtype)
    exponents = torch.arange(0, dim, 2, dtype=wide, device=x.device) / dim
    angles = positions.to(x.device, wide).unsqueeze(-1) * (1.0 / theta**exponents)  # [T, dim / 2]
    cos, sin = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)
    first, second = x[..., :dim].to(wide).chunk(2, -1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    return torch.cat((turned.to(x.dtype), x[..., dim:]), -1)


class CPAttention(nn.Module):
    """Gated grouped-query attention, [B, T_local, hidden_size] -> [B, T_local, hidden_size].

    Raises:
        ValueError: num_heads not a multiple of num_kv_heads, or a rotary width that is not even and
            positive.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        rope_theta: float = 1e7,
        partial_rotary_factor: float = 0.25,
        norm_eps: float = 1e-6,
    ):
        super().__init__()
        if num_heads % num_kv_heads:
            raise ValueError(
                f"num_heads is {num_heads} and num_kv_heads {num_kv_heads}; num_heads must be a "
                "multiple of num_kv_heads"
            )
        self.hidden_size, self.head_dim, self.rope_theta = hidden_size, head_dim, rope_theta
        self.rotary_dim = int(head_dim * partial_rotary_factor)
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            raise ValueError(
                f"partial_rotary_factor {partial_rotary_factor} of head_dim {head_dim} turns "
                f"{self.rotary_dim} features; rotary turns pairs, so choose them to give an even "
                "number of at least 2"
            )
        self.q_proj = nn.Linear(hidden_size, 2 * num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=False)
        self.q_norm = RMSNorm(head_dim, norm_eps)
        self.k_norm = RMSNorm(head_dim, norm_eps)

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
        if cp_context is None:
            positions = torch.arange(hidden_states.shape[1], device=hidden_states.device)
        else:
            positions = cp_context.position_ids
        heads = (-1, self.head_dim)
        q, gate = self.q_proj(hidden_states).unflatten(-1, (-1, 2 * self.head_dim)).chunk(2, -1)
        k = self.k_norm(self.k_proj(hidden_states).unflatten(-1, heads))
        v = self.v_proj(hidden_states).unflatten(-1, heads)
        q = apply_rotary(self.q_norm(q), positions, self.rotary_dim, self.rope_theta)
        k = apply_rotary(k, positions, self.rotary_dim, self.rope_theta)
        o = causal_attention(q, k, v, cp_context=cp_context)  # [B, T, Hq, D]
        return self.o_proj((o * gate.sigmoid()).flatten(-2))
