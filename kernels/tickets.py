"""Which segment a CTA of a chain takes next, where there are more than multiprocessors.

A CTA starts with its own number; then it takes the next one that nobody has taken, from a counter in
global memory. So short documents follow one another without the start and the end of a CTA between
them, and long ones, if they are begun first, do not have to be waited for.

    take_all by a warp of its own, when the last one is loaded and not before, so that nobody waits for
             what others hold: finds where the segment lies and leaves that in one of two places
    follow   by all others: what was taken; `leave_place` when a warp has no use for it any more

Barriers and slots of a kernel go on counting from one segment to the next.
"""

from typing import Any, NamedTuple

import tilelang.language as T

from .common import COUNT, find_sequence

PLACES = 2
HEAD, TILE = 7, 8  # what `take_all` adds to find_segment's
TICKETS = r"""
namespace gdn {
__device__ __forceinline__ int take_ticket(int* next) {
  int ticket = 0;
  if ((threadIdx.x & 31) == 0) ticket = atomicAdd(next, 1);
  return __shfl_sync(~0u, ticket, 0);
}
}  // namespace gdn
"""


class Line(NamedTuple):
    """What the warps of a CTA share."""

    done: Any  # chunks so far, of each
    turn: Any = None  # segments so far, of each
    item: Any = None  # of the taker: its segment of a head
    places: Any = None
    taken: Any = None
    loaded: Any = None
    seen: Any = None


def open_line(done, warps: int) -> Line:
    """`warps` of a CTA follow."""
    line = Line(
        done,
        T.alloc_local((1,), "int32"),
        T.alloc_local((1,), "int32"),
        T.alloc_shared((PLACES, 9), "int32"),
        T.alloc_barrier([1] * PLACES),
        T.alloc_barrier([1]),
        T.alloc_barrier([warps] * PLACES),
    )
    begin(line)
    return line


@T.macro
def begin(line):
    line.turn[0] = 0
    line.item[0] = 0


@T.macro
def take_all(line, cu, order, ordered, tickets, first, segment, documents, cta, ctas, items, tiles, heads,
             at, lane):  # fmt: skip
    """Segments of heads into places, for all warps, until there are no more: COUNT is negative then."""
    while line.item[0] < items:
        if line.turn[0] > 0:
            T.mbarrier_wait_parity(line.loaded[0], (line.turn[0] - 1) % 2)
        if line.turn[0] == 0:
            line.item[0] = cta
        elif ctas < items:
            line.item[0] = ctas + T.call_extern(
                "int32", "gdn::take_ticket", T.access_ptr(tickets[0], "rw")
            )
        else:
            line.item[0] = items
        at[COUNT] = -1
        if line.item[0] < items:
            find_sequence(
                cu,
                order,
                ordered,
                first + T.truncdiv(line.item[0], tiles * heads),
                segment,
                documents,
                at,
            )
            at[HEAD] = T.truncdiv(line.item[0], tiles) % heads
            at[TILE] = line.item[0] % tiles
        place = line.turn[0] % PLACES
        T.mbarrier_wait_parity(line.seen[place], line.turn[0] // PLACES % 2 ^ 1)
        if lane == 0:
            for x in T.unroll(9):
                line.places[place, x] = at[x]
            T.mbarrier_arrive(line.taken[place])
        line.turn[0] += 1


@T.macro
def loaded_all(line, tx):
    """By the warp that loads, behind a segment's last load."""
    if tx % 32 == 0:
        T.mbarrier_arrive(line.loaded[0])


@T.macro
def look(line, at):
    """`at` <- what was taken."""
    for x in T.unroll(9):
        at[x] = line.places[line.turn[0] % PLACES, x]


@T.macro
def follow(line, at):
    """The same, when it has been."""
    T.mbarrier_wait_parity(line.taken[line.turn[0] % PLACES], line.turn[0] // PLACES % 2)
    look(line, at)


@T.macro
def leave_place(line, tx):
    """What was taken is not looked at any more by this warp."""
    T.sync_warp()
    if tx % 32 == 0:
        T.mbarrier_arrive(line.seen[line.turn[0] % PLACES])
    line.turn[0] += 1
