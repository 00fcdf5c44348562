"""The operator under context parallelism, its outputs and gradients put together as one rank would see them."""

import torch
import torch.distributed as dist
from torch import Tensor

from cp_gdn import build_cp_context, chunk_gated_delta_rule

from ..cases import Case


def run_sharded(
    rank: int,
    size: int,
    case: Case,
    cu_seqlens: list[int] | None,
    shard_sizes: list[int] | None,
    exchange: str,
    device: str = "cpu",
) -> list[Tensor]:
    """In one rank: [o, final_state, gradients...] of the whole sequence, gradients summed over the ranks."""
    context = build_cp_context(
        dist.group.WORLD,
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
        dist.all_reduce(grad)
    return [x.detach().cpu() for x in (context.gather(o), final, *grads)]
