"""shard and gather: values, gradients, uneven shards, any dimension."""

import pytest
import torch
import torch.distributed as dist

from cp_gdn import build_cp_context

from .distributed import run_ranks


def _round_trip(rank, size, dim, dtype):
    context = build_cp_context(dist.group.WORLD, seq_len=11, shard_sizes=[5, 1, 5])
    shape = [2, 3, 4]
    shape[dim] = 11
    whole = (
        torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    )
    local = context.shard(whole, dim)
    back = context.gather(local, dim)
    weights = torch.arange(whole.numel()).view(shape).to(dtype) % 7
    (back * weights * (rank + 1)).sum().backward()
    inside = [slice(None)] * 3
    inside[dim] = slice(context.start, context.end)
    expected = torch.zeros_like(whole)
    expected[tuple(inside)] = (6 * weights)[tuple(inside)]
    return torch.equal(back, whole), torch.equal(whole.grad, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_gather_inverts_shard_and_sums_gradients(dim, dtype):
    assert run_ranks(3, _round_trip, dim, dtype) == [(True, True)] * 3


def test_wrong_lengths():
    context = build_cp_context(seq_len=8)
    with pytest.raises(ValueError, match="has 7 entries but seq_len is 8"):
        context.shard(torch.zeros(1, 7))
    with pytest.raises(ValueError, match="has 7 entries but num_tokens is 8"):
        context.gather(torch.zeros(1, 7))
    with pytest.raises(ValueError, match="dim=3"):
        context.shard(torch.zeros(1, 8), 3)
