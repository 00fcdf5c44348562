"""Who computes which queries of causal attention, so that every rank has about the same work. Host arithmetic only.

A query sees the tokens of its document up to itself, so a run of queries [low, high) of a document that starts at s
costs

    pairs = sum_{low <= t < high} (t - s + 1)

scores. Shards are contiguous, hence a long document's last rank has up to 2 P - 1 times the first one's. Queries stay
at home as far as they can: a rank above the mean hands over its dearest ones, a rank below takes them, the heaviest and
the lightest first, and never more than brings either to the mean. (The usual zigzag, blocks r and 2 P - 1 - r of 2 P to
rank r, balances one document and moves nearly all queries.)

The assignment follows from the context alone and is the same on every rank; :func:`plan_for` keeps a rank's part of it.
"""

import bisect
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

from .context import CPContext

BLOCK = 64  # queries move in multiples, the rows of a kernel's tile
MIN_KEYS = 8192  # a query that sees fewer keys is computed sooner than moved
TOLERANCE = 0.05  # of the mean that the heaviest rank may have in excess before anything moves
RESIDUE = 0.01  # of the mean that is not worth another message


@dataclass(frozen=True)
class Run:
    """Queries [low, high), global tokens, of the document that starts at ``doc_start``: rank ``owner`` holds them and
    rank ``rank`` computes them."""

    owner: int
    rank: int
    low: int
    high: int
    doc_start: int

    @property
    def size(self) -> int:
        return self.high - self.low

    @property
    def pairs(self) -> int:
        """Scores of these queries."""
        first, last = self.low - self.doc_start + 1, self.high - self.doc_start
        return (first + last) * self.size // 2

    def tail(self, count: int) -> "Run":
        """The last ``count`` queries."""
        return replace(self, low=self.high - count)


def assign(bounds: Sequence[int], cu_seqlens: Sequence[int]) -> tuple[Run, ...]:
    """Every query once, in runs in the order of their tokens.

    Args:
        bounds: rank r holds the tokens [bounds[r], bounds[r + 1]).
        cu_seqlens: document offsets, from 0 to bounds[-1].
    """
    home = _at_home(bounds, cu_seqlens)
    load = [sum(run.pairs for run in runs) for runs in home]
    mean = sum(load) / len(load)
    moved: list[Run] = []
    givers = [r for r, runs in enumerate(home) if load[r] > mean and any(map(_movable, runs))]
    takers = [r for r, pairs in enumerate(load) if pairs < (1 - RESIDUE) * mean]
    if max(load) <= (1 + TOLERANCE) * mean:
        givers.clear()
    while givers and takers:
        giver, taker = max(givers, key=load.__getitem__), min(takers, key=load.__getitem__)
        over, under = load[giver] - mean, mean - load[taker]
        part = _cut_off(home[giver], min(over, under)) if over > RESIDUE * mean else None
        if part is not None:
            moved.append(replace(part, rank=taker))
            load[giver] -= part.pairs
            load[taker] += part.pairs
        if not any(map(_movable, home[giver])) or (part is None and over <= under):
            givers.remove(giver)
        elif part is None or load[taker] >= (1 - RESIDUE) * mean:
            takers.remove(taker)
    return tuple(sorted([*itertools.chain(*home), *moved], key=lambda run: run.low))


def _at_home(bounds: Sequence[int], cu_seqlens: Sequence[int]) -> list[list[Run]]:
    """The runs of every rank: a document's part in its shard."""
    cuts = sorted({*bounds, *cu_seqlens})
    home: list[list[Run]] = [[] for _ in bounds[1:]]
    for low, high in itertools.pairwise(cuts):
        owner = bisect.bisect_right(bounds, low) - 1
        doc_start = cu_seqlens[bisect.bisect_right(cu_seqlens, low) - 1]
        home[owner].append(Run(owner, owner, low, high, doc_start))
    return home


def _movable(run: Run) -> int:
    """How many of its last queries may move."""
    return max(0, min(run.size, run.high - run.doc_start - MIN_KEYS + 1))


def _cut_off(runs: list[Run], room: float) -> Run | None:
    """The dearest queries of ``runs`` that cost at most ``room``, as many of one run as fit; taken out of it."""
    for run in sorted(runs, key=lambda run: run.doc_start - run.high):
        movable = _movable(run)
        if movable == run.size and run.pairs <= room:
            runs.remove(run)
            return run
        counts = range(BLOCK, movable + 1, BLOCK)
        fitting = bisect.bisect_right(counts, room, key=lambda count: run.tail(count).pairs)
        if fitting:
            part = run.tail(counts[fitting - 1])
            runs[runs.index(run)] = replace(run, high=part.low)
            return part
    return None


@dataclass(frozen=True)
class Span:
    """Keys and values of the tokens [low, high), global; they go to or come from rank ``peer``."""

    peer: int
    low: int
    high: int

    @property
    def size(self) -> int:
        return self.high - self.low


@dataclass(frozen=True)
class Plan:
    """One rank's part of an assignment.

    runs: what it computes, in the order of the tokens; given: what others compute for it. stretches: the tokens,
    disjoint and in order, whose keys its runs see: fetched from others, or kept. lent: what it has of others' ones.
    """

    rank: int
    start: int
    num_tokens: int
    runs: tuple[Run, ...]
    given: tuple[Run, ...]
    stretches: tuple[tuple[int, int], ...]
    fetched: tuple[Span, ...]
    kept: tuple[Span, ...]
    lent: tuple[Span, ...]

    @property
    def stays(self) -> bool:
        """Whether it computes its own queries and no others."""
        return not self.given and all(run.owner == self.rank for run in self.runs)

    @property
    def num_keys(self) -> int:
        """Keys that the rank holds during the call: its own where it fetches none, else those of ``stretches``."""
        if not self.fetched:
            return self.num_tokens
        return sum(high - low for low, high in self.stretches)

    def local(self, part: Run | Span) -> slice:
        """Where it lies in this rank's shard."""
        return slice(part.low - self.start, part.high - self.start)

    def rows(self, span: Span) -> slice:
        """Where its keys lie among those that the rank holds during the call."""
        return self._rows(span.low, span.high)

    def seen(self, run: Run) -> slice:
        """Where the keys that a run sees lie."""
        return self._rows(run.doc_start, run.high)

    def _rows(self, low: int, high: int) -> slice:
        before = -self.start
        if self.fetched:
            place = bisect.bisect_right(self.stretches, low, key=lambda stretch: stretch[0]) - 1
            earlier = sum(end - begin for begin, end in self.stretches[:place])
            before = earlier - self.stretches[place][0]
        return slice(before + low, before + high)


def make_plan(rank: int, bounds: Sequence[int], cu_seqlens: Sequence[int]) -> Plan:
    """The part of ``rank`` in :func:`assign`'s assignment."""
    runs = assign(bounds, cu_seqlens)
    ranks = range(len(bounds) - 1)
    needs = [_union((run.doc_start, run.high) for run in runs if run.rank == r) for r in ranks]

    def of(holder: int, reader: int) -> list[tuple[int, int]]:
        return _overlaps(needs[reader], bounds[holder], bounds[holder + 1])

    return Plan(
        rank=rank,
        start=bounds[rank],
        num_tokens=bounds[rank + 1] - bounds[rank],
        runs=tuple(run for run in runs if run.rank == rank),
        given=tuple(run for run in runs if run.owner == rank != run.rank),
        stretches=needs[rank],
        fetched=tuple(Span(r, *part) for r in ranks if r != rank for part in of(r, rank)),
        kept=tuple(Span(rank, *part) for part in of(rank, rank)),
        lent=tuple(Span(r, *part) for r in ranks if r != rank for part in of(rank, r)),
    )


def _union(stretches: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Disjoint stretches in order that cover the same tokens."""
    merged: list[tuple[int, int]] = []
    for low, high in sorted(stretches):
        if merged and low <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return tuple(merged)


def _overlaps(stretches: Iterable[tuple[int, int]], start: int, end: int) -> list[tuple[int, int]]:
    """The parts of the stretches in [start, end)."""
    parts = ((max(low, start), min(high, end)) for low, high in stretches)
    return [(low, high) for low, high in parts if low < high]


_plans: WeakKeyDictionary[CPContext, Plan] = WeakKeyDictionary()


def plan_for(context: CPContext) -> Plan:
    """The plan of the context's rank; made at the first use and kept with the context."""
    if context not in _plans:
        _plans[context] = make_plan(context.rank, context.shard_bounds, context.cu_seqlens)
    return _plans[context]
