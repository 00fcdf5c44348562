"""The operator under context parallelism, its outputs and gradients put together as one rank would see them."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cp_gdn import build_cp_context, chunk_gated_delta_rule

from ..cases import Case


def run_in(
    group: Any,
    rank: int,
    add: Callable[[Tensor], Any],
    case: Case,
    cu_seqlens: list[int] | None,
    shard_sizes: list[int] | None,
    exchange: str,
    device: str = "cpu",
) -> list[Tensor]:
    """In one rank of a group: [o, final_state, gradients...] of the whole sequence; ``add`` sums gradients over it."""
    context = build_cp_context(
        group,
        seq_len=case.do.shape[1],
        cu_seqlens=cu_seqlens,
        shard_sizes=shard_sizes,
        exchange=exchange,
    )
    inputs = [x.to(device, copy=True).requires_grad_() for x in case.inputs]
    do, dfinal = case.do.to(device), case.dfinal.to(device)
    o, final = chunk_gated_delta_rule(
        *(context.shard(x) for x in inputs[:5]),
        initial_state=inputs[5],
        output_final_state=True,
        cp_context=context,
    )
    loss = (o * context.shard(do)).sum()
    # the ranks' losses add, so the final state counts on one of them only
    loss = loss + (final * dfinal).sum() * (rank == 0)
    grads = torch.autograd.grad(loss, inputs)
    for grad in grads:
        add(grad)
    return [x.detach().cpu() for x in (context.gather(o), final, *grads)]


def run_sharded(rank: int, size: int, *arguments: Any) -> list[Tensor]:
    """:func:`run_in` a rank of the default process group."""
    return run_in(dist.group.WORLD, rank, dist.all_reduce, *arguments)
