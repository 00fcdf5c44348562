"""Causal attention over shards against an explicit masked softmax in float64."""

from functools import partial
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

import cp_gdn
from cp_gdn import balance, comm
from cp_gdn.ops.attention import causal_attention
from cp_gdn.ops.flash_attention import _padded, _TwoParts, attend
from cp_gdn.virtual import run_virtual_ranks
from tests.distributed import run_ranks

TOLERANCE = 1e-10
NAMES = ("o", "dq", "dk", "dv")


def moving(min_keys=1):
    """Queries travel between ranks of few tokens, too."""
    return patch.multiple(balance, BLOCK=2, MIN_KEYS=min_keys)


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


def step(group, sizes, q, k, v, w, cu_seqlens):
    """o of this rank, and the gradients of q, k, v of the whole sequence."""
    context = cp_gdn.build_cp_context(
        group, seq_len=q.shape[1], shard_sizes=sizes, cu_seqlens=cu_seqlens
    )

    def local(q, k, v):
        q, k, v = (context.shard(x) for x in (q, k, v))
        return causal_attention(q, k, v, cp_context=context)

    return differentiate(local, q, k, v, context.shard(w))


def together(outs):
    """o put together and the gradients summed over the ranks."""
    grads = (torch.stack([out[i] for out in outs]).sum(0) for i in (1, 2, 3))
    return torch.cat([out[0] for out in outs], 1), *grads


def on_ranks(sizes, *arguments, mutation=None):
    def rank_main(rank, size):
        if mutation is None:
            return step(dist.group.WORLD, sizes, *arguments)
        with patch.object(comm, *mutation):
            return step(dist.group.WORLD, sizes, *arguments)

    return together(run_ranks(len(sizes), rank_main))


def num_moved(sizes, cu_seqlens):
    """Queries that another rank computes."""
    bounds = torch.tensor([0, *sizes]).cumsum(0).tolist()
    runs = balance.assign(bounds, cu_seqlens or (0, bounds[-1]))
    return sum(run.size for run in runs if run.owner != run.rank)


def errors(ours, theirs) -> dict[str, float]:
    pairs = zip(NAMES, ours, theirs, strict=True)
    return {name: ((a - b).norm() / b.norm()).item() for name, a, b in pairs}


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
def test_packed_documents_equal_the_oracle(sizes, cu_seqlens):
    torch.manual_seed(0)
    q, k, v, w = inputs(1, 64)
    expected = differentiate(lambda *x: oracle(*x, cu_seqlens), q, k, v, w)
    found = errors(on_ranks(sizes, q, k, v, w, cu_seqlens), expected)
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize(
    ("sizes", "cu_seqlens"),
    [
        ((32, 32), (0, 64)),
        ((20, 20, 24), (0, 64)),
        ((16, 16, 16, 16), (0, 64)),
        ((1, 19, 30, 14), (0, 64)),
        ((60, 2, 2), (0, 64)),  # a rank in front is the heavy one
        ((20, 44), (0, 20, 41, 64)),
        ((20, 20, 24), (0, 10, 60, 64)),
        ((20, 20, 24), (0, 20, 40, 45, 50, 55, 64)),  # no document crosses a cut
        ((16, 16, 16, 16), (0, 30, 34, 64)),  # two that are cut, handed over to one another
        ((16, 16, 16, 16), (0, 40, 48, 64)),  # the first rank fetches keys from two documents
    ],
)
def test_queries_that_travel_equal_the_oracle(sizes, cu_seqlens):
    torch.manual_seed(5)
    q, k, v, w = inputs(1, 64)
    expected = differentiate(lambda *x: oracle(*x, cu_seqlens), q, k, v, w)
    with moving():
        assert num_moved(sizes, cu_seqlens)
        found = errors(on_ranks(sizes, q, k, v, w, cu_seqlens), expected)
    assert max(found.values()) < TOLERANCE, found


def test_fp32():
    torch.manual_seed(6)
    q, k, v, w = (x.float() for x in inputs(1, 64))
    expected = differentiate(lambda *x: oracle(*x, (0, 50, 64)), q, k, v, w)
    with moving():
        found = errors(on_ranks((20, 20, 24), q, k, v, w, (0, 50, 64)), expected)
    assert max(found.values()) < 1e-6, found


@pytest.mark.parametrize("min_keys", [1, 100, 10**6])
@pytest.mark.parametrize("cu_seqlens", [(0, 512), (0, 3, 200, 201, 470, 512), (0, 100, 512)])
def test_eight_ranks_equal_the_oracle(cu_seqlens, min_keys):
    torch.manual_seed(7)
    arguments = inputs(1, 512)
    expected = differentiate(lambda *x: oracle(*x, cu_seqlens), *arguments)
    with moving(min_keys):
        assert (num_moved((64,) * 8, cu_seqlens) > 0) == (min_keys < 512)
        outs = run_virtual_ranks(8, step, (64,) * 8, *arguments, cu_seqlens)
    found = errors(together(outs), expected)
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_rows_of_a_batch_equal_the_oracle(kv_heads):
    torch.manual_seed(1)
    q, k, v, w = inputs(3, 40, kv_heads=kv_heads)
    expected = differentiate(lambda *x: oracle(*x, (0, 40)), q, k, v, w)
    alone = differentiate(causal_attention, q, k, v, w)
    assert max(errors(alone, expected).values()) < TOLERANCE
    with moving():
        assert num_moved((9, 11, 20), None)
        found = errors(on_ranks((9, 11, 20), q, k, v, w, None), expected)
    assert max(found.values()) < TOLERANCE, found


def test_nothing_is_exchanged_where_no_document_crosses():
    torch.manual_seed(2)
    q, k, v, w = inputs(1, 64)
    cu_seqlens = (0, 10, 20, 40, 64)
    expected = differentiate(lambda *x: oracle(*x, cu_seqlens), q, k, v, w)

    def refuse(outgoing, incoming, context):
        assert not outgoing and not incoming

    found = errors(
        on_ranks((20, 20, 24), q, k, v, w, cu_seqlens, mutation=("swap", refuse)), expected
    )
    assert max(found.values()) < TOLERANCE, found


def test_gradients_of_some_inputs_only():
    """Frozen keys and values, or queries, on every rank: nobody waits for a backward that does not come."""
    torch.manual_seed(8)
    q, k, v, w = inputs(1, 64)
    expected = differentiate(lambda *x: oracle(*x, (0, 64)), q, k, v, w)

    def some(group, wanted):
        context = cp_gdn.build_cp_context(group, seq_len=64)
        leaves = [
            context.shard(x).clone().requires_grad_(i in wanted) for i, x in enumerate((q, k, v))
        ]
        o = causal_attention(*leaves, cp_context=context)
        (o * context.shard(w)).sum().backward()
        return [x.grad for x in leaves]

    for wanted in ((0,), (1, 2)):
        with moving():
            outs = run_virtual_ranks(4, some, wanted)
        for i in range(3):
            if i in wanted:
                found = torch.cat([out[i] for out in outs], 1)
                torch.testing.assert_close(found, expected[1 + i], rtol=1e-9, atol=1e-9)
            else:
                assert all(out[i] is None for out in outs)


def test_activation_checkpointing_changes_nothing():
    torch.manual_seed(10)
    q, k, v, w = inputs(1, 64)

    def gradients(group, again):
        context = cp_gdn.build_cp_context(group, seq_len=64, cu_seqlens=(0, 10, 64))
        call = partial(causal_attention, cp_context=context)
        if again:
            call = partial(checkpoint, call, use_reentrant=False)
        return differentiate(call, *(context.shard(x) for x in (q, k, v, w)))

    with moving():
        plain, again = (run_virtual_ranks(4, gradients, twice) for twice in (False, True))
    for ours, theirs in zip(again, plain, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def own_parts(parts, rows):
    """A sum that forgets the gradients of the other ranks: the first parts are those kept."""
    rank = dist.get_rank()
    return sum_parts([part for part in parts if part[0] == rank], rows)


def shifted(purpose):
    """Messages that land a token off."""

    def broken(outgoing, incoming, context):
        swap(outgoing, incoming, context)
        if comm.operations._purpose.get() == purpose:
            for _, buffer in incoming:
                buffer.copy_(buffer.roll(1, 0))

    return "swap", broken


swap, sum_parts = comm.swap, comm.sum_parts


@pytest.mark.parametrize(
    ("mutation", "wrong"),
    [
        (("sum_parts", own_parts), ("dk", "dv")),
        (shifted("queries, keys and values of attention"), NAMES),
        (shifted("outputs of attention"), ("o",)),
        (shifted("gradients of outputs of attention"), ("dq", "dk", "dv")),
        (shifted("gradients of queries, keys and values of attention"), ("dq", "dk", "dv")),
    ],
)
def test_the_oracle_sees_a_broken_exchange(mutation, wrong):
    torch.manual_seed(3)
    q, k, v, w = inputs(1, 64)
    expected = differentiate(lambda *x: oracle(*x, (0, 10, 64)), q, k, v, w)
    with moving():
        found = errors(on_ranks((20, 20, 24), q, k, v, w, (0, 10, 64), mutation=mutation), expected)
    assert {name for name, error in found.items() if error > 1e-2} == set(wrong), found


def _bytes(rank, size, balanced):
    q, k, v, _ = inputs(1, 64, heads=4, kv_heads=2, D=8)
    context = cp_gdn.build_cp_context(dist.group.WORLD, seq_len=64, shard_sizes=(24, 40))
    with patch.object(balance, "TOLERANCE", 0.05 if balanced else 1e9):
        given = sum(run.size for run in balance.plan_for(context).given)
    leaves = [context.shard(x).clone().requires_grad_() for x in (q, k, v)]
    comm.meter.take()
    o = causal_attention(*leaves, cp_context=context)
    forward = comm.meter.take()["bytes"]
    o.sum().backward()
    return given, forward, comm.meter.take()["bytes"]


def test_bytes_sent_per_rank():
    """Queries out and outputs back; keys and values to who sees them, their gradients back."""
    of_queries, of_keys = 4 * 8 * 8, 2 * 2 * 8 * 8  # bytes a token
    with moving():
        (_, *first), (given, *second) = run_ranks(2, _bytes, True)
        assert given > 0
        moved = given * of_queries
        # the first rank computes the last queries, so it sees the 40 keys of the second, which sees its 24
        assert first == [24 * of_keys + moved, 40 * of_keys + moved]
        assert second == [40 * of_keys + moved, 24 * of_keys + moved]
        # unbalanced: the first rank's queries see its own keys only
        assert run_ranks(2, _bytes, False) == [(0, 24 * of_keys, 0), (0, 0, 24 * of_keys)]


def on_gpu(n, m, dtype, cudnn, D=32):
    """Queries at the end of more keys: inputs, results and the memory that it took."""
    q, w = (torch.randn(1, n, 4, D, device="cuda", dtype=dtype) for _ in range(2))
    k, v = (torch.randn(1, m, 2, D, device="cuda", dtype=dtype) for _ in range(2))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = differentiate(lambda *x: attend(*x, None, new_shape=not cudnn), q, k, v, w)
    return (q, k, v, w), found, torch.cuda.max_memory_allocated() - before


@pytest.mark.gpu
@pytest.mark.parametrize("n", [500, 1300])
@pytest.mark.parametrize(
    ("dtype", "cudnn", "D", "tolerance"),
    [
        (torch.bfloat16, True, 32, 1e-2),
        (torch.bfloat16, True, 256, 1e-2),
        (torch.bfloat16, False, 32, 1e-2),
        (torch.float32, False, 32, 1e-5),
    ],
)
def test_lower_right_mask_on_the_gpu(dtype, cudnn, D, tolerance, n):
    torch.manual_seed(4)
    with patch.object(_TwoParts, "apply", wraps=_TwoParts.apply) as two_parts:
        tensors, found, _ = on_gpu(n, 1300, dtype, cudnn, D)
    assert two_parts.called == (cudnn and n < 1300)
    on_cpu = (x.cpu().double() for x in tensors)
    expected = differentiate(lambda *x: attend(*x, None, new_shape=False), *on_cpu)
    wrong = errors([x.cpu().double() for x in found], expected)
    assert max(wrong.values()) < tolerance, wrong


@pytest.mark.gpu
@pytest.mark.parametrize("cudnn", [True, False])
def test_no_mask_is_stored_on_the_gpu(cudnn):
    n, m = 8192, 32768
    used = on_gpu(n, m, torch.bfloat16, cudnn)[2]
    assert used < n * m, f"{used} bytes for {n} queries and {m} keys"


def _on_two_gpus(rank, size, cu_seqlens):
    """Worst relative error of the ranks' o, dq, dk, dv against one GPU's, eagerly and from a graph."""
    torch.manual_seed(9)
    T = 16384
    whole = [
        torch.randn(1, T, h, 128, device="cuda", dtype=torch.bfloat16).requires_grad_(i < 3)
        for i, h in enumerate((8, 2, 2, 8))
    ]
    context, alone = (
        cp_gdn.build_cp_context(group, seq_len=T, cu_seqlens=cu_seqlens, device="cuda")
        for group in (dist.group.WORLD, None)
    )

    def results(context):
        *leaves, w = (context.shard(x).detach() for x in whole)
        leaves = [x.requires_grad_() for x in leaves]
        o = causal_attention(*leaves, cp_context=context)
        return [o.detach(), *torch.autograd.grad(o, leaves, w)]

    expected = [context.shard(x) for x in results(alone)]
    eager = results(context)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(context)
    graph.replay()
    moved = sum(run.size for run in balance.plan_for(context).given)
    return moved, errors(eager, expected), errors(captured, expected)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("cu_seqlens", [None, (0, 900, 12000, 16384)])
def test_two_gpus_equal_one(cu_seqlens):
    outs = run_ranks(2, _on_two_gpus, cu_seqlens, backend="nccl")
    assert sum(moved for moved, _, _ in outs) > 0
    for _, eager, captured in outs:
        assert max(*eager.values(), *captured.values()) < 1e-2, (eager, captured)


def test_few_sizes_of_padded_squares():
    sizes = range(1024, 65537)
    padded = [_padded(n) for n in sizes]
    assert all(n <= p <= n * 1.125 for n, p in zip(sizes, padded, strict=True))
    assert len(set(padded)) == 6 * 8 + 1


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
