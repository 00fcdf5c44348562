"""How a packed batch is cut into segments that run side by side: host arithmetic on shapes only.

A segment boundary costs a summary (and, where the gates decay slowly, its M) plus a step of the
scan; too few segments leave multiprocessors idle. Document lengths live on the device, so the plan
assumes equal ones; longer documents than that are cut into more segments, never into longer ones.

From MANY heads and STEADY chunks on, the length of a segment depends on the number of heads alone: a
shard that is a multiple of it has the segments of the whole sequence, and the same bits come out.
"""

import functools
from dataclasses import dataclass
from math import ceil, inf

from .common import CHUNK

# Microseconds on an H200, fitted to the times in docs/kernels.md: a chunk of the main pass with one
# and with two halves of the value columns in a CTA, and the start and end of each of its waves of
# CTAs; for summary and scan a constant, a wave, a chunk of the serial chain, a step of the scan.
CHUNK_US = {1: 1.29, 2: 2.03}
WAVE_US = 6.0
SPLIT_US = 15.0
SUMMARY_WAVE_US = 4.0
SUMMARY_CHUNK_US = 1.06
SCAN_STEP_US = 2.2
# Share of heads assumed to decay too slowly for truncation. Gates are unknown here: at 32768 tokens
# of 32 heads 8 segments are best by 3 % if few heads are slow, 3 or 4 by 10 % if all are.
SLOW_HEADS = 0.7
MANY, STEADY = 32, 512  # heads times sequences; chunks
# Where the main pass is not cut, its summaries are: this many chains side by side are as much work
# as one, and heads that decay within a segment need but the last one.
FEWEST, SUMMARY = 4, 128  # segments; chunks a segment at most
# Of a packed batch: documents shorter than this are left whole, a summary's launch costs as much.
WHOLE = 64  # chunks
SHORT = 32  # chunks on average, up to which documents are short
BEYOND = 32  # chunks more than its share that a known document may have


@dataclass(frozen=True)
class Plan:
    """`segment` chunks a segment, `halves` blocks of 64 value columns a CTA of the main pass.

    With `split` segments run side by side, from states that summaries and a scan give them. Without,
    heads alone fill the GPU: segments run one after another. What such sequences do to a state that
    comes later is then summarised in segments of `summary` chunks."""

    segment: int
    halves: int
    split: bool
    summary: int = SUMMARY

    @property
    def summarised(self) -> int:
        """Chunks a segment of the summaries."""
        return self.segment if self.split else self.summary


def _cost(parts: int, chunks: int, lanes: int, halves: int, tiles: int, processors: int) -> float:
    segment = ceil(chunks / parts)
    ctas = lanes * parts * tiles // halves
    waves = ceil(ctas / processors)
    cost = waves * (segment * CHUNK_US[halves] + WAVE_US)
    if parts > 1:
        summaries = 2 * parts - 3  # S_ext and M, a sequence and head
        chains = max(1, SLOW_HEADS * lanes * summaries / processors)
        cost += SPLIT_US + SCAN_STEP_US * max(0, parts - 2) + chains * segment * SUMMARY_CHUNK_US
        cost += SUMMARY_WAVE_US * (parts - 1) * lanes / processors
    return cost


@functools.lru_cache(maxsize=1024)
def plan_segments(
    tokens: int,
    documents: int,
    value_heads: int,
    value_dim: int,
    *,
    packed: bool,
    processors: int,
) -> Plan:
    """Segment length for `documents` sequences of `tokens` in all; `packed` ones differ in length."""
    chunks = max(1, ceil(tokens / documents / CHUNK))
    tiles = value_dim // 64
    lanes = documents * value_heads
    steady = min(chunks, STEADY) if lanes >= MANY else chunks
    summary = min(SUMMARY, ceil(chunks / FEWEST))
    best, plan = inf, Plan(steady, 1, False, summary)
    for halves in (1, 2):
        if tiles % halves:
            continue
        for parts in range(1, min(steady, 64) + 1):
            cost = _cost(parts, steady, lanes, halves, tiles, processors)
            if cost < best:
                best, plan = cost, Plan(ceil(steady / parts), halves, parts > 1, summary)
    if not plan.split and documents > 1:  # rows of a batch
        plan = Plan(chunks, plan.halves, False, summary)
    if packed:  # lengths differ: cut whatever exceeds half of a multiprocessor's share
        share = ceil(tokens / CHUNK * value_heads * tiles / plan.halves / processors)
        longest = max(plan.segment, ceil(share / 2), min(share, WHOLE))
        if longest > WHOLE:  # nor should a document of 128 chunks lose its last three
            longest = ceil(longest / WHOLE) * WHOLE
        plan = Plan(longest, plan.halves, True)
    return plan


def takes_turns(tokens: int, documents: int) -> bool:
    """Whether CTAs of chains take one segment after another (tickets.py): where documents are so short that the start
    and the end of a CTA count. Longer ones run faster in CTAs of their own, 3 % a chunk."""
    return documents > 1 and tokens <= documents * SHORT * CHUNK


def longest_whole(
    plan: Plan, tokens: int, value_heads: int, value_dim: int, *, processors: int
) -> int:
    """Chunks of a packed document that is left whole if lengths are known: its CTAs are the first to run. What its
    last chunks take beyond a multiprocessor's share is less than summaries of all segments would."""
    share = ceil(tokens / CHUNK * value_heads * value_dim // 64 / plan.halves / processors)
    return max(plan.segment, share + BEYOND)


def entire_jobs(jobs: int, processors: int) -> int:
    """So many chains of a summary get a CTA of their own. The others, which would leave half of the
    multiprocessors without work, get one for each half of their columns."""
    rest = jobs % processors
    return jobs - rest if 2 * rest <= processors else jobs
