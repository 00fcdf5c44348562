"""Which chunks a CTA of the dS chain walks: those of a block of time, segment by segment.

A block is a range of chunk slots; its boundaries cut segments. The CTAs of a head share the segments that
lie in it, even partly, and find them by themselves: where documents begin is known on the device alone.
"""

from typing import Any, NamedTuple

import tilelang.language as T

from .common import (
    CHUNK,
    CHUNK_SLOT,
    COUNT,
    DOC,
    PART,
    find_document,
    find_sequence,
)
from .summary import LOG2_NEGLIGIBLE

CHUNKS, COUNTS, FIRST = range(3)  # what find_walk leaves behind


class Spot(NamedTuple):
    """Where a CTA is: arguments of the kernel, and what it found."""

    tile: Any
    h: Any
    z: Any
    width: Any
    first: Any
    segment: Any
    ordered: Any
    truncate: Any
    open_left: Any
    NO: Any  # chunk slots of the block
    N1: Any
    at: Any
    walk: Any
    done: Any  # chunks so far
    span: Any  # segments of the block


def walks(*, store, heads):
    """The macros `find_block` and `find_walk` of backward_reverse.py."""
    C, Hv = CHUNK, heads

    @T.macro
    def locate(cu, slot, segment, documents, at, span, x):
        """span[x] <- the segment that holds a chunk's slot."""
        find_document(cu, slot, C, documents, at)
        begin, doc = cu[at[DOC]], at[DOC]
        part = T.truncdiv(slot - T.truncdiv(begin, C) - doc, segment)
        span[x] = T.truncdiv(begin, segment * C) + doc + part

    @T.macro
    def find_block(cu, spot):
        spot.span[0] = 0
        spot.span[1] = spot.width - 1
        spot.done[0] = 0
        if store:
            for x in T.unroll(2):
                locate(
                    cu, spot.first + x * (spot.NO - 1), spot.segment, spot.N1 - 1, spot.at,
                    spot.span, x,
                )  # fmt: skip

    @T.macro
    def find_walk(given, part, spot):
        """A segment, what of it to walk, and whether the state behind it counts."""
        find_sequence(given.cu, given.order, spot.ordered, part, spot.segment, spot.N1 - 1, spot.at)
        spot.walk[FIRST] = 0
        spot.walk[CHUNKS] = spot.at[COUNT]
        spot.walk[COUNTS] = 1
        if store:
            spot.walk[FIRST] = T.max(spot.first - spot.at[CHUNK_SLOT], 0)
            end = T.min(spot.at[COUNT], spot.first + spot.NO - spot.at[CHUNK_SLOT])
            spot.walk[CHUNKS] = T.max(end - spot.walk[FIRST], 0)
        else:
            if spot.at[PART] == 0 and spot.at[DOC] >= spot.open_left:
                spot.walk[CHUNKS] = 0
            if spot.truncate != 0 and spot.walk[CHUNKS] > 0:
                T.call_extern(
                    "handle",
                    "gdn::near_chunks",
                    T.access_ptr(given.gate[spot.at[CHUNK_SLOT], spot.h, C - 1], "r"),
                    -(Hv * C),
                    spot.at[COUNT],
                    LOG2_NEGLIGIBLE,
                    T.access_ptr(spot.walk[CHUNKS], "w"),
                )

    return find_block, find_walk
