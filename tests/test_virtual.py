"""Virtual ranks: the same numbers as process groups, for more ranks than there are devices, and failures that end."""

import itertools
import threading

import pytest
import torch

from cp_gdn import CPGatedDeltaNet, boundary, build_cp_context, comm
from cp_gdn.ops.reference import recurrent_gated_delta_rule
from cp_gdn.virtual import run_virtual_ranks

from .cases import assert_close, make_case, outputs_and_gradients
from .ops.cp_runs import run_in

EXCHANGES = ["ring", "all_to_all", "all_gather", "serial"]
SPANNING = [0, 3, 200, 201, 470, 512]  # documents over several ranks, one of a token, one at an end


def sharded(group, *arguments):
    return run_in(group, group.rank, group.all_reduce, *arguments)


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize(
    ("size", "cu_seqlens", "sizes"),
    [(8, None, None), (16, SPANNING, None), (16, SPANNING, [1] * 8 + [63] * 8)],
)
def test_many_ranks_match_the_recurrence(size, exchange, cu_seqlens, sizes):
    case = make_case(512, 1, 4, 6, 8, N=len(cu_seqlens) - 1 if cu_seqlens else 1)

    def oracle(*inputs):
        return recurrent_gated_delta_rule(
            *inputs[:5], initial_state=inputs[5], cu_seqlens=cu_seqlens
        )

    ref = outputs_and_gradients(oracle, case)
    results = run_virtual_ranks(size, sharded, case, cu_seqlens, sizes, exchange)
    for got in results[:: size - 1]:
        assert_close(got, ref, 1e-10)


def test_a_dropped_state_is_seen(monkeypatch):
    case = make_case(512, 1, 4, 6, 8)
    ref = outputs_and_gradients(
        lambda *x: recurrent_gated_delta_rule(*x[:5], initial_state=x[5]), case
    )
    true = boundary.exchange_states

    def dropped(summary, context):
        S, transitions = true(summary, context)
        return (None if S is None else torch.zeros_like(S)), transitions

    monkeypatch.setattr(boundary, "exchange_states", dropped)
    got = run_virtual_ranks(8, sharded, case, None, None, "ring")[0]
    with pytest.raises(AssertionError):
        assert_close(got, ref, 1e-5)


def _layer(group, x):
    torch.manual_seed(0)
    layer = CPGatedDeltaNet(32, 2, 4, head_k_dim=8, head_v_dim=8).double()
    context = build_cp_context(group, seq_len=x.shape[1], cu_seqlens=SPANNING)
    local = context.shard(x).requires_grad_()
    y = layer(local, cp_context=context)
    y.square().sum().backward()
    return torch.cat((context.gather(y), context.gather(local.grad)))


def test_a_layer_with_its_halo_on_more_ranks_than_it_has_tokens_a_filter():
    x = torch.randn(1, 512, 32, dtype=torch.float64)
    alone = run_virtual_ranks(1, _layer, x)[0]
    for got in run_virtual_ranks(16, _layer, x):
        torch.testing.assert_close(got, alone, rtol=1e-9, atol=1e-9)


def test_ranks_do_not_name_one_another_s_operations():
    def named(group):
        with comm.operations.named(f"step of rank {group.rank}"):
            group.share(0, "a meeting")
            with comm.operations.issue("message", None):
                seen = comm.operations.oldest().name
        return seen

    comm.operations.start()
    try:
        assert run_virtual_ranks(3, named) == [f"step of rank {r} (message)" for r in range(3)]
        with comm.operations.issue("message", None):
            assert comm.operations.oldest().name == "message"
    finally:
        comm.operations.stop()


def test_a_rank_that_raises_ends_the_others_and_is_the_one_reported():
    def broken(group):
        if group.rank == 2:
            raise KeyError("rank two")
        group.share(0, "a sum")

    before = threading.active_count()
    with pytest.raises(KeyError, match="rank two"):
        run_virtual_ranks(4, broken)
    assert threading.active_count() == before


def test_a_rank_that_never_comes_is_named():
    def absent(group):
        if group.rank != 1:
            group.share(0, "all_gather")

    with pytest.raises(TimeoutError, match=r"all_gather; missing: ranks \[1\]"):
        run_virtual_ranks(3, absent, timeout_s=0.2)
    with pytest.raises(TimeoutError, match=r"messages; missing: ranks \[1\]"):
        run_virtual_ranks(
            2, lambda g: g.rank or g.exchange([], [(1, torch.zeros(1))]), timeout_s=0.2
        )


def test_no_ranks_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        run_virtual_ranks(0, print)


def _rounds(group):
    for _ in range(3):
        group.share(group.rank, "round")
    return group.take_turns()


def test_turns_of_ranks_do_not_meet():
    """One rank runs at a time, so a profiler can tell whose work it saw."""
    every = run_virtual_ranks(4, _rounds)
    assert all(turns and start <= stop for turns in every for start, stop in turns)
    order = sorted(turn for turns in every for turn in turns)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(order))
