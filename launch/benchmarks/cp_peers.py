"""Other ways to run the delta rule over the ranks of a group, as functions of this rank's inputs.

Each returns ``step(q, k, v, g, beta) -> o``, differentiable; inputs are this rank's [1, T / P, ...], q and k of unit
length.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from cp_gdn import chunk_gated_delta_rule

Step = Callable[..., Tensor]


def flash_qla(seq_len: int, group: dist.ProcessGroup, value_heads: int) -> Step:
    """FlashQLA's inter-card context parallelism."""
    from flash_qla.ops.gated_delta_rule.chunk import build_cp_context
    from flash_qla.ops.gated_delta_rule.chunk import chunk_gated_delta_rule as theirs

    offsets = torch.tensor([0, seq_len], dtype=torch.int32)
    context = build_cp_context(
        offsets.cuda(),
        enable_inter=True,
        group=group,
        num_v_heads=value_heads,
        chunk_size=64,
        cu_seqlens_cpu=offsets,
        is_train=True,
    )
    return lambda *x: theirs(*x, cp_context=context, cu_seqlens=context.cu_seqlens)[0]


def flash_qla_alone() -> Step:
    """FlashQLA on one GPU."""
    from flash_qla.ops.gated_delta_rule.chunk import chunk_gated_delta_rule as theirs

    return lambda *x: theirs(*x)[0]


def fla(seq_len: int, group: dist.ProcessGroup, value_heads: int) -> Step:
    """Flash Linear Attention's context parallelism."""
    from fla.ops.cp import build_cp_context
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule as theirs

    offsets = torch.tensor([0, seq_len], dtype=torch.int64)
    context = build_cp_context(offsets.cuda(), group=group, cu_seqlens_cpu=offsets)
    return lambda *x: theirs(*x, cp_context=context)[0]


class _Transpose(torch.autograd.Function):
    """[1, T / P, H, D] of all heads -> [1, T, H / P, D] of all tokens (or back): one all-to-all."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup, to_heads: bool) -> Tensor:
        ctx.group, ctx.to_heads = group, to_heads
        P = dist.get_world_size(group)
        T, H, D = x.shape[1:]
        if to_heads:
            given = x.view(T, P, H // P, D).transpose(0, 1).contiguous()  # [P, T / P, H / P, D]
        else:
            given = x.view(P, T // P, H, D).contiguous()
        out = torch.empty_like(given)
        dist.all_to_all_single(out, given, group=group)
        if to_heads:
            return out.view(1, P * T, H // P, D)
        return out.permute(1, 0, 2, 3).reshape(1, T // P, P * H, D)

    @staticmethod
    def backward(ctx, dx: Tensor):
        return _Transpose.apply(dx.contiguous(), ctx.group, not ctx.to_heads), None, None


def ulysses(seq_len: int, group: dist.ProcessGroup, value_heads: int) -> Step:
    """Head-parallel all-to-all (DeepSpeed Ulysses) around our own kernels: whole sequences of H / P heads a rank."""

    def step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        inputs = [_Transpose.apply(x, group, True) for x in (q, k, v)]
        inputs += [_Transpose.apply(x.unsqueeze(-1), group, True).squeeze(-1) for x in (g, beta)]
        q, k, v, g, beta = inputs
        o = chunk_gated_delta_rule(q, k, v, g, beta, use_qk_l2norm_in_kernel=True)[0]
        return _Transpose.apply(o, group, False)

    return step


PEERS = {"flash_qla": flash_qla, "fla": fla, "ulysses": ulysses}
