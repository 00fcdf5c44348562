"""Causal attention over shards against an explicit masked softmax in float64."""

from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

import cp_gdn
from cp_gdn import comm
from cp_gdn.ops import attention
from cp_gdn.ops.attention import causal_attention
from tests.distributed import run_ranks

TOLERANCE = 1e-10
NAMES = ("o", "dq", "dk", "dv")


def inputs(B: int, T: int, heads: int = 4, kv_heads: int = 2, D: int = 8):
    """q, k, v and the weights of the output in the loss, float64."""
    q, w = (torch.randn(B, T, heads, D, dtype=torch.float64) for _ in range(2))
    k, v = (torch.randn(B, T, kv_heads, D, dtype=torch.float64) for _ in range(2))
    return q, k, v, w


def oracle(q, k, v, cu_seqlens):
    """softmax over the tokens of the same document that are not later."""
    T, group = q.shape[1], q.shape[2] // k.shape[2]
    document = torch.bucketize(torch.arange(T), torch.tensor(cu_seqlens[1:]), right=True)
    seen = (document[:, None] == document[None]) & torch.ones(T, T, dtype=torch.bool).tril()
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhts,bshd->bthd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def differentiate(function, q, k, v, w):
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    o = function(*leaves)
    (o * w).sum().backward()
    return o.detach(), *(x.grad for x in leaves)


def on_ranks(sizes, q, k, v, w, cu_seqlens, mutation=None):
    """o put together and the gradients summed over the ranks, each rank given everything."""

    def rank_main(rank, size):
        context = cp_gdn.build_cp_context(
            dist.group.WORLD, seq_len=q.shape[1], shard_sizes=sizes, cu_seqlens=cu_seqlens
        )

        def local(q, k, v):
            q, k, v = (context.shard(x) for x in (q, k, v))
            return causal_attention(q, k, v, cp_context=context)

        if mutation is None:
            return differentiate(local, q, k, v, context.shard(w))
        with patch.object(comm, *mutation):
            return differentiate(local, q, k, v, context.shard(w))

    outs = run_ranks(len(sizes), rank_main)
    grads = (torch.stack([out[i] for out in outs]).sum(0) for i in (1, 2, 3))
    return torch.cat([out[0] for out in outs], 1), *grads


def errors(ours, theirs) -> dict[str, float]:
    pairs = zip(NAMES, ours, theirs, strict=True)
    return {name: ((a - b).norm() / b.norm()).item() for name, a, b in pairs}


@pytest.mark.parametrize("block", [7, 512])
@pytest.mark.parametrize(
    "cu_seqlens",
    [
        (0, 64),
        (0, 20, 41, 64),  # the last ends on a cut, the second one token after one
        (0, 10, 60, 64),  # the second covers the middle shards whole
        (0, 1, 2, 64),
        (0, 20, 40, 50, 64),  # no document crosses a cut of the first sizes
    ],
)
@pytest.mark.parametrize("sizes", [(64,), (20, 44), (20, 20, 24), (1, 19, 30, 14)])
def test_packed_documents_equal_the_oracle(sizes, cu_seqlens, block):
    torch.manual_seed(0)
    q, k, v, w = inputs(1, 64)
    expected = differentiate(lambda *x: oracle(*x, cu_seqlens), q, k, v, w)
    with patch.object(attention, "_CPU_BLOCK", block):
        found = errors(on_ranks(sizes, q, k, v, w, cu_seqlens), expected)
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_rows_of_a_batch_equal_the_oracle(kv_heads):
    torch.manual_seed(1)
    q, k, v, w = inputs(3, 40, kv_heads=kv_heads)
    expected = differentiate(lambda *x: oracle(*x, (0, 40)), q, k, v, w)
    alone = differentiate(causal_attention, q, k, v, w)
    assert max(errors(alone, expected).values()) < TOLERANCE
    found = errors(on_ranks((9, 11, 20), q, k, v, w, None), expected)
    assert max(found.values()) < TOLERANCE, found


def test_nothing_is_gathered_where_no_document_crosses():
    torch.manual_seed(2)
    q, k, v, w = inputs(1, 64)
    cu_seqlens = (0, 10, 20, 40, 64)
    expected = differentiate(lambda *x: oracle(*x, cu_seqlens), q, k, v, w)
    refuse = ("gather_rows", None)
    found = errors(on_ranks((20, 20, 24), q, k, v, w, cu_seqlens, refuse), expected)
    assert max(found.values()) < TOLERANCE, found


def own_rows(x, context):
    """A gather's backward that forgets the gradients of the other ranks."""
    return x[context.start : context.end]


def shifted_rows(x, context):
    """A gather that puts the ranks' parts together in the wrong order."""
    return gather_rows(x, context).roll(context.shard_sizes[0], 0)


gather_rows = comm.gather_rows


@pytest.mark.parametrize(
    ("mutation", "wrong"),
    [(("sum_rows", own_rows), ("dk", "dv")), (("gather_rows", shifted_rows), NAMES)],
)
def test_the_oracle_sees_a_broken_gather(mutation, wrong):
    torch.manual_seed(3)
    q, k, v, w = inputs(1, 64)
    expected = differentiate(lambda *x: oracle(*x, (0, 10, 64)), q, k, v, w)
    found = errors(on_ranks((20, 20, 24), q, k, v, w, (0, 10, 64), mutation), expected)
    assert {name for name, error in found.items() if error > 1e-2} == set(wrong), found


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float32, 1e-5)])
def test_lower_right_mask_on_the_gpu(dtype, tolerance):
    """Queries at the end of more keys: right, and with less memory than a mask [n, m] takes."""
    torch.manual_seed(4)

    def on_gpu(n, m):
        q, w = (torch.randn(1, n, 4, 32, device="cuda", dtype=dtype) for _ in range(2))
        k, v = (torch.randn(1, m, 2, 32, device="cuda", dtype=dtype) for _ in range(2))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found = differentiate(lambda *x: attention._attend(*x, None), q, k, v, w)
        return (q, k, v, w), found, torch.cuda.max_memory_allocated() - before

    tensors, found, _ = on_gpu(500, 1300)
    on_cpu = [x.cpu().double() for x in tensors]
    expected = differentiate(lambda *x: attention._attend(*x, None), *on_cpu)
    wrong = errors([x.cpu().double() for x in found], expected)
    assert max(wrong.values()) < tolerance, wrong

    n, m = 8192, 32768
    used = on_gpu(n, m)[2]
    assert used < n * m, f"{used} bytes for {n} queries and {m} keys"


def test_bad_arguments_are_refused():
    q, k, v, _ = inputs(2, 10)
    with pytest.raises(ValueError, match=r"expected \[B, T, Hq, D\]"):
        causal_attention(q, k[:, :9], v[:, :9])
    with pytest.raises(ValueError, match="4 query heads and 3 key heads"):
        causal_attention(q, *(torch.randn(2, 10, 3, 8) for _ in range(2)))
    with pytest.raises(ValueError, match=r"dtypes torch\.float64, torch\.float32"):
        causal_attention(q, k.float(), v)
    with pytest.raises(ValueError, match="got 10 tokens but the context gives rank 0 12 of 12"):
        causal_attention(q, k, v, cp_context=cp_gdn.build_cp_context(seq_len=12))
    packed = cp_gdn.build_cp_context(seq_len=10, cu_seqlens=(0, 4, 10))
    with pytest.raises(ValueError, match="batch size 2 with 2 packed documents"):
        causal_attention(q, k, v, cp_context=packed)
