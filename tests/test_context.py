"""Sharding plans: bounds, pieces, which cuts are crossed, and what is refused."""

import bisect
import itertools

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from cp_gdn import build_cp_context
from cp_gdn.context import _check_bounds

from .distributed import run_ranks


@given(seq_len=st.integers(1, 2000), size=st.integers(1, 9))
def test_default_bounds_cover_every_token_once(seq_len, size):
    if seq_len < size:
        with pytest.raises(ValueError, match="smaller than"):
            _check_bounds(None, seq_len, size)
        return
    bounds = _check_bounds(None, seq_len, size)
    sizes = [b - a for a, b in itertools.pairwise(bounds)]
    assert bounds[0] == 0 and bounds[-1] == seq_len and min(sizes) > 0
    unit = 64 if -(-seq_len // 64) >= size else 1
    assert all(b % unit == 0 for b in bounds[:-1])
    assert max(sizes) - min(sizes[:-1] or sizes) <= unit


def _plan(rank, size, seq_len, cu_seqlens, sizes):
    context = build_cp_context(
        dist.group.WORLD, seq_len=seq_len, cu_seqlens=cu_seqlens, shard_sizes=sizes
    )
    return {
        "pieces": context.pieces,
        "positions": context.position_ids.tolist(),
        "crosses": [context.crosses(c) for c in range(size + 1)],
        "through": [context.through(r) for r in range(size)],
    }


@pytest.mark.parametrize(
    ("cu_seqlens", "sizes"),
    [
        ([0, 30], [10, 10, 10]),
        ([0, 10, 11, 30], [10, 10, 10]),
        ([0, 9, 29, 30], [10, 10, 10]),
        ([0, 3, 5, 30], [4, 25, 1]),
    ],
)
def test_plan_agrees_with_a_token_by_token_count(cu_seqlens, sizes):
    bounds = [0, sizes[0], sizes[0] + sizes[1], 30]
    doc = [bisect.bisect_right(cu_seqlens, t) - 1 for t in range(30)]
    for rank, plan in enumerate(run_ranks(3, _plan, 30, cu_seqlens, sizes)):
        tokens = [
            (t, p.doc)
            for p in plan["pieces"]
            for t in range(bounds[rank] + p.start, bounds[rank] + p.end)
        ]
        assert tokens == [(t, doc[t]) for t in range(bounds[rank], bounds[rank + 1])]
        assert plan["positions"] == [
            t - cu_seqlens[doc[t]] for t in range(bounds[rank], bounds[rank + 1])
        ]
        crossed = [0 < c < 3 and doc[bounds[c]] == doc[bounds[c] - 1] for c in range(4)]
        assert plan["crosses"] == crossed
        for r in range(3):
            whole = doc[bounds[r]] == doc[bounds[r + 1] - 1]
            assert plan["through"][r] == (crossed[r] and crossed[r + 1] and whole)


def test_one_rank_needs_no_process_group():
    context = build_cp_context(seq_len=10, cu_seqlens=torch.tensor([0, 4, 10]))
    assert (context.size, context.num_tokens, context.cu_seqlens) == (1, 10, (0, 4, 10))
    x = torch.randn(1, 10, 2)
    assert torch.equal(context.gather(context.shard(x)), x)


def test_integers_may_be_of_numpy():
    context = build_cp_context(seq_len=np.int64(10), cu_seqlens=np.array([0, 4, 10], np.int32))
    assert (context.seq_len, context.cu_seqlens) == (10, (0, 4, 10))


def _mesh_and_groups(rank, size):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    context = build_cp_context(mesh["cp"], seq_len=8)
    assert (context.size, context.rank) == (2, rank % 2)
    errors = []
    other = dist.new_group([0, 1])
    for group in (mesh, other):
        try:
            build_cp_context(group, seq_len=8)
        except ValueError as error:
            errors.append(str(error))
    return errors


def test_mesh_and_groups_that_do_not_fit():
    results = run_ranks(4, _mesh_and_groups)
    assert all("2 axes" in r[0] and 'mesh["cp"]' in r[0] for r in results)
    assert [len(r) for r in results] == [1, 1, 2, 2]
    assert "not a member" in results[2][1]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(seq_len=0), "positive int"),
        (dict(seq_len=8, shard_sizes=[4]), "shard_sizes sum to 4 but seq_len is 8"),
        (dict(seq_len=8, shard_sizes=[4, 4]), "one positive number"),
        (dict(seq_len=8, cu_seqlens=[0, 5, 4, 8]), "not increasing: entry 2 is 4 after 5"),
        (dict(seq_len=8, cu_seqlens=[1, 8]), "must run from 0"),
        (dict(seq_len=8, cu_seqlens=[0, 9]), "must run from 0"),
        (dict(seq_len=8, cu_seqlens=torch.tensor([0.0, 8.0])), "1-D tensor of integers"),
        (dict(seq_len=8, cu_seqlens=torch.tensor([[0, 8]])), "1-D tensor of integers"),
        (dict(seq_len=8, cu_seqlens=[0, 3.5, 8]), r"cu_seqlens is \[0, 3.5, 8\]; it must be"),
        (dict(seq_len=8, cu_seqlens=8), "cu_seqlens is 8; it must be document offsets"),
        (dict(seq_len=8, shard_sizes=[8.9]), r"shard_sizes is \[8.9\]; it must be one integer"),
        (dict(seq_len=8.5), "positive int"),
        (dict(seq_len=8, exchange="tree"), "choose one of ring"),
    ],
)
def test_bad_plans(kwargs, message):
    with pytest.raises(ValueError, match=message):
        build_cp_context(**kwargs)


def _disagree(rank, size):
    errors = []
    for odd in (128, 2):  # another plan, and one that cannot be: no rank waits for it in vain
        try:
            build_cp_context(dist.group.WORLD, seq_len=odd if rank == 2 else 64)
        except ValueError as error:
            errors.append(str(error))
    return errors


def test_debug_mode_refuses_plans_that_differ(monkeypatch):
    monkeypatch.setenv("CP_GDN_DEBUG", "1")
    results = run_ranks(3, _disagree)
    assert results[0] == results[1] == results[2]
    assert all("ranks [2] planned another sharding" in error for error in results[0])
    assert "rank 2: seq_len 2 is smaller than the 3 ranks" in results[0][1]


def test_many_documents_take_no_operation_each():
    """Planning is host work before every step: tensors are made of all pieces at once."""

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.calls += 1
            return function(*args, **(kwargs or {}))

    counts = []
    for step in (2000, 4):
        with Count() as count:
            build_cp_context(seq_len=2000, cu_seqlens=list(range(0, 2001, step)))
        counts.append(count.calls)
    assert counts[1] <= counts[0] + 5


def test_pieces_are_known_by_length():
    context = build_cp_context(seq_len=20, cu_seqlens=[0, 3, 10, 11, 18, 20])
    assert context.longest_piece == 7
    assert context.local_order.tolist() == [1, 3, 0, 4, 2]
    assert context.local_order.dtype == torch.int32
