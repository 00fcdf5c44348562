"""Who computes which queries: every one once, about the same work a rank, and as little moved as that takes."""

import time
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cp_gdn import balance, build_cp_context
from cp_gdn.balance import assign, make_plan, plan_for


def loads(runs, ranks):
    """Scores of every rank."""
    return [sum(run.pairs for run in runs if run.rank == rank) for rank in range(ranks)]


def even(T, ranks):
    return [T * rank // ranks for rank in range(ranks + 1)]


def test_pairs_are_counted():
    run = balance.Run(1, 0, 13, 17, 10)
    assert run.pairs == 4 + 5 + 6 + 7
    assert run.tail(2).pairs == 6 + 7


@pytest.mark.parametrize("T", [65536, 1_000_000])
@pytest.mark.parametrize("ranks", [2, 3, 4, 8, 16])
def test_one_long_document_is_balanced(ranks, T):
    bounds = even(T, ranks)
    runs = assign(bounds, (0, T))
    load = loads(runs, ranks)
    assert sum(load) == T * (T + 1) // 2
    assert max(load) / (sum(load) / ranks) < 1.05
    moved = [run for run in runs if run.rank != run.owner]
    assert len(moved) <= ranks - 1  # few messages
    assert sum(run.size for run in moved) < T / 6  # zigzag: about T (1 - 1 / P)
    unmoved = [run.rank for run in runs if run.rank == run.owner]
    assert sorted(set(unmoved)) == list(range(ranks))  # everybody keeps some of its own


def test_two_ranks_share_one_document():
    """Rank 1 keeps what brings both to the mean: T / 2 + x with x (T - x / 2) = T^2 / 8 queries moved, x = 0.134 T."""
    T = 131072
    home, kept, moved = assign(even(T, 2), (0, T))
    assert (home.rank, kept.rank, moved.rank) == (0, 1, 0)
    assert moved.size % balance.BLOCK == 0
    assert abs(moved.size / T - (1 - 0.75**0.5)) < 1e-3


def test_a_long_document_among_short_ones():
    """Nothing crosses a cut, yet the rank of the long document hands queries to that of the short ones."""
    T = 65536
    cu_seqlens = [*range(0, T // 2, 1024), T // 2, T]
    runs = assign(even(T, 2), cu_seqlens)
    load = loads(runs, 2)
    assert max(load) / (sum(load) / 2) < 1.01
    assert [(run.owner, run.rank) for run in runs if run.rank != run.owner] == [(1, 0)]


def moved(bounds, cu_seqlens):
    return [run for run in assign(bounds, cu_seqlens) if run.rank != run.owner]


def test_what_is_not_worth_it_stays():
    T = 65536
    short = range(0, T + 1, 4096)
    assert not moved(even(T, 1), (0, T))
    assert not moved(even(T, 2), short)
    assert not moved((0, 3 * T // 4, T), short)  # uneven, but no query sees enough keys
    # the heaviest rank is 4 % over the mean, then 7 %
    near = (T // 2) * 2**0.5
    assert not moved((0, int(near * 1.02), T), (0, T))
    assert moved((0, int(near * 1.035), T), (0, T))


def test_only_queries_of_many_keys_move():
    T = 40960
    for run in moved((0, 2048, T), [0, *range(2048, 34816, 4096), T]):
        assert run.low - run.doc_start + 1 >= balance.MIN_KEYS


@st.composite
def shardings(draw):
    T = draw(st.integers(8, 300))
    inner = st.lists(st.integers(1, T - 1), max_size=7, unique=True).map(sorted)
    return [0, *draw(inner), T], [0, *draw(inner), T]


@settings(deadline=None, max_examples=300)
@given(shardings(), st.sampled_from([1, 4, 16]), st.sampled_from([1, 20]))
def test_every_plan_fits_the_others(sharding, block, min_keys):
    bounds, cu_seqlens = sharding
    ranks = range(len(bounds) - 1)
    with patch.multiple(balance, BLOCK=block, MIN_KEYS=min_keys):
        runs = assign(bounds, cu_seqlens)
        plans = [make_plan(rank, bounds, cu_seqlens) for rank in ranks]
    assert [0, *(run.high for run in runs)] == [*(run.low for run in runs), bounds[-1]]
    for run in runs:
        assert bounds[run.owner] <= run.low < run.high <= bounds[run.owner + 1]
        assert run.doc_start == max(c for c in cu_seqlens if c <= run.low)
        assert not any(run.low < c < run.high for c in cu_seqlens)
        assert run.rank == run.owner or run.low - run.doc_start + 1 >= min_keys
    before = assign_nothing(bounds, cu_seqlens)
    assert max(loads(runs, len(ranks))) <= max(loads(before, len(ranks)))

    planned = [run for plan in plans for run in plan.runs]
    assert len(planned) == len(runs) and set(planned) == set(runs)
    for plan in plans:
        assert plan.runs and all(run.rank == plan.rank for run in plan.runs)
        # what travels between two ranks is listed by both, in the same order
        for other in plans:
            taken = [run for run in other.runs if run.owner == plan.rank != other.rank]
            assert [run for run in plan.given if run.rank == other.rank] == taken
            lent = [(s.low, s.high) for s in plan.lent if s.peer == other.rank]
            assert lent == [(s.low, s.high) for s in other.fetched if s.peer == plan.rank]
        # the keys that are held are those that some run sees, each at a row of its own
        seen = {token for run in plan.runs for token in range(run.doc_start, run.high)}
        spans = [*plan.fetched, *plan.kept]
        assert sorted(t for s in spans for t in range(s.low, s.high)) == sorted(seen)
        place = {t: r for s in spans for t, r in zip(span_tokens(s), rows(plan, s), strict=True)}
        if plan.fetched:
            assert sorted(place.values()) == list(range(plan.num_keys))
        for run in plan.runs:
            keys = plan.seen(run)
            assert [place[t] for t in range(run.doc_start, run.high)] == list(
                range(keys.start, keys.stop)
            )


def assign_nothing(bounds, cu_seqlens):
    with patch.object(balance, "TOLERANCE", float("inf")):
        runs = assign(bounds, cu_seqlens)
    assert all(run.rank == run.owner for run in runs)
    return runs


def span_tokens(span):
    return range(span.low, span.high)


def rows(plan, span):
    return range(plan.rows(span).start, plan.rows(span).stop)


def test_a_plan_is_made_once_a_context():
    context = build_cp_context(seq_len=64, cu_seqlens=(0, 10, 64))
    assert plan_for(context) is plan_for(context)
    assert plan_for(context) is not plan_for(build_cp_context(seq_len=64))
    pieces = [(p.start, p.end, p.doc_start) for p in context.pieces]
    assert [(run.low, run.high, run.doc_start) for run in plan_for(context).runs] == pieces


def test_thousands_of_documents_are_planned_quickly():
    T = 1 << 20
    cu_seqlens = [*range(0, T // 2, 128), T // 2, T]
    started = time.perf_counter()
    plan = make_plan(0, even(T, 16), cu_seqlens)
    assert time.perf_counter() - started < 0.5
    assert len(plan.runs) > 512 and len(plan.stretches) == 2
