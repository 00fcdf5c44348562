"""The convolution against a token loop, sharded down to shards shorter than the filter; a dropped halo must be seen."""

import itertools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from cp_gdn import boundary, build_cp_context
from cp_gdn.ops.causal_conv1d import causal_conv1d

from ..cases import assert_close
from ..distributed import run_ranks

NAMES = ("y", "dx", "dweight", "dbias")


def token_loop(x, weight, bias, cu_seqlens):
    W = weight.shape[1]
    rows = []
    for low, high in itertools.pairwise(cu_seqlens):
        for t in range(low, high):
            y = bias
            for s in range(min(W, t - low + 1)):
                y = y + weight[:, W - 1 - s] * x[:, t - s]
            rows.append(y if y.ndim == 2 else y.expand(x.shape[0], -1))
    return F.silu(torch.stack(rows, 1))


def case(T, D, W, B=1):
    gen = torch.Generator().manual_seed(T)
    return [
        torch.randn(*s, generator=gen, dtype=torch.float64)
        for s in ((B, T, D), (D, W), (D,), (B, T, D))
    ]


def reference(T, D, W, cu_seqlens, B=1):
    x, weight, bias, dy = case(T, D, W, B)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    y = token_loop(*leaves, cu_seqlens)
    return [y.detach(), *torch.autograd.grad((y * dy).sum(), leaves)]


def sharded(rank, size, T, D, W, cu_seqlens, sizes, B=1):
    x, weight, bias, dy = case(T, D, W, B)
    context = build_cp_context(
        dist.group.WORLD,
        seq_len=T,
        cu_seqlens=cu_seqlens if len(cu_seqlens) > 2 else None,
        shard_sizes=sizes,
    )
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    y = causal_conv1d(context.shard(leaves[0]), leaves[1], leaves[2], cp_context=context)
    grads = torch.autograd.grad((y * context.shard(dy)).sum(), leaves)
    for grad in grads:
        dist.all_reduce(grad)
    return [context.gather(y).detach(), *grads]


CASES = [
    (40, 3, 4, [0, 40], [20, 20], 2),
    (40, 3, 4, [0, 40], [1, 1, 2, 36], 2),  # shards shorter than the filter
    (12, 2, 6, [0, 12], [1, 1, 1, 9], 1),  # a halo from three ranks
    (40, 3, 4, [0, 2, 20, 21, 40], [20, 20], 1),  # a document ends on the cut
    (
        40,
        3,
        4,
        [0, 19, 22, 40],
        [20, 1, 19],
        1,
    ),  # one token before it, and one shorter than the filter
    (40, 3, 1, [0, 21, 40], [20, 20], 1),  # one tap: nothing to send
    (40, 3, 4, [0, 21, 40], [20, 20], 1),
    (40, 3, 1, [0, 40], [20, 20], 1),  # no history at all
]


@pytest.mark.parametrize(("T", "D", "W", "cu_seqlens", "sizes", "B"), CASES)
def test_matches_the_token_loop(T, D, W, cu_seqlens, sizes, B):
    ref = reference(T, D, W, cu_seqlens, B)
    for got in run_ranks(len(sizes), sharded, T, D, W, cu_seqlens, sizes, B):
        assert_close(got, ref, 1e-12, NAMES)


@pytest.mark.parametrize("attribute", ["exchange_halo", "return_halo"])
@pytest.mark.parametrize(("T", "D", "W", "cu_seqlens", "sizes", "B"), CASES[:3])
def test_a_dropped_halo_is_seen(monkeypatch, attribute, T, D, W, cu_seqlens, sizes, B):
    true = getattr(boundary, attribute)

    def dropped(*args):
        out = true(*args)
        return torch.zeros_like(out) if attribute == "exchange_halo" else []

    monkeypatch.setattr(boundary, attribute, dropped)
    got = run_ranks(len(sizes), sharded, T, D, W, cu_seqlens, sizes, B)[0]
    with pytest.raises(AssertionError):
        assert_close(got, reference(T, D, W, cu_seqlens, B), 1e-3, NAMES)


def test_one_rank_without_context():
    ref = reference(30, 4, 4, [0, 30], 2)
    x, weight, bias, dy = case(30, 4, 4, 2)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    y = causal_conv1d(leaves[0], leaves[1].unsqueeze(1), leaves[2])
    assert_close([y.detach(), *torch.autograd.grad((y * dy).sum(), leaves)], ref, 1e-12, NAMES)


def test_bad_input():
    with pytest.raises(ValueError, match=r"expected \[B, T, D\]"):
        causal_conv1d(torch.zeros(1, 4, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="silu"):
        causal_conv1d(torch.zeros(1, 4, 3), torch.zeros(3, 4), activation="gelu")
    with pytest.raises(ValueError, match=r"ctx\.shard"):
        causal_conv1d(
            torch.zeros(1, 4, 3), torch.zeros(3, 4), cp_context=build_cp_context(seq_len=5)
        )
