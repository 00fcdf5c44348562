"""The kernels of the backward in their order: summaries, replay, and the dS chain with all gradients.

A long sequence is walked in blocks of time, from its end to its front: the dS chain of a block goes on
from the fp32 dS that the one behind it left, its gradients follow, and its dS (where chains are cut
into segments, its states and Vd, too) lies where that of the block behind it lay. The bits are those
of one block.
"""

from math import ceil

import torch

from .backward_beta import beta_gradient
from .backward_gradients import SMALLEST_BETA, gradients
from .backward_opened import FULL, OpenBackward, Walk
from .backward_replay import replay
from .backward_reverse import reverse
from .common import CHUNK, slots
from .forward import DTYPES, KEY_DIM
from .launch import multiprocessors, ready
from .reverse_scan import reverse_scan

FEW_CHAINS = 2.5  # as many summaries a multiprocessor


def halves_of(x: OpenBackward, chains: int) -> int:
    """Half the columns of a value head are a CTA's where chains are few and their latency counts. Where
    they fill the GPU both halves are: bytes count, and q, k and `a` are read once."""
    return 2 if chains >= FULL * multiprocessors(x.q.device) else 1


def summarise(x: OpenBackward) -> None:
    segment, states = x.saved.plan.summarised, x.saved.states
    count = slots(x.q.shape[0], x.documents, segment * CHUNK)
    x.external = states.new_empty(count, *states.shape[1:])
    # gates truncate most heads' chains: a few whole ones are waited for, the shorter the better
    few = count * x.v.shape[1] <= FEW_CHAINS * multiprocessors(x.q.device)
    _reverse(
        x, x.external, x.dfinal, x.external, x.external, x.entering[:1], x.do,
        halves=1 if few else 2, segment=segment, width=count, store=False,
    )  # fmt: skip


def _reverse(
    opened, dstates, dfinal, dinitial, carried, dleaving, dv, *, halves, segment, width, first=0,
    into=0, store=True,
) -> None:  # fmt: skip
    x, saved = opened, opened.saved
    ready(reverse, halves=halves, store=store, **x.kind)(
        x.q, x.k, x.do, saved.a, saved.gate, saved.rnorm, saved.qnorm, x.beta, saved.cu_seqlens,
        dstates, dstates if dfinal is None else dfinal, dinitial, carried, dleaving, dv, x.scale, width, first,
        into, segment, x.bits, int(dfinal is not None), int(x.truncate and not store), x.open_left,
    )  # fmt: skip


def _whole(x: OpenBackward) -> int:
    """A segment longer than any document, so that each is one."""
    return x.q.shape[0] // CHUNK + 2


def scan(opened, incoming, dstates, total, *, entering) -> None:
    x, saved = opened, opened.saved
    ready(reverse_scan, entering=entering)(
        x.external, saved.maps, saved.live, saved.cu_seqlens,
        x.external if incoming is None else incoming, dstates, total, saved.plan.summarised,
        int(incoming is not None),
    )  # fmt: skip


def replay_states(x: OpenBackward, first: int = 0, count: int | None = None) -> None:
    """All of it, or of one sequence the segments that begin in a block."""
    saved, segment = x.saved, x.saved.plan.segment
    width = saved.states.shape[0]
    halves = saved.plan.halves
    if count is not None and count < x.chunks:
        width = ceil(count / segment)
        halves = halves_of(x, width * x.v.shape[1])
    ready(replay, halves=halves, **x.kind)(
        x.k, x.v, saved.a, saved.gate, saved.rnorm, x.beta, saved.cu_seqlens,
        saved.states if x.initial is None else x.initial, saved.states, x.entering, x.vd, width,
        first // segment, segment, x.bits, int(x.initial is not None),
    )  # fmt: skip


def _final_gradient(opened: OpenBackward, incoming: torch.Tensor | None) -> torch.Tensor | None:
    if incoming is None or incoming.shape[0] == opened.documents:
        return opened.dfinal if incoming is None else incoming
    if opened.dfinal is None:
        dfinal = incoming.new_zeros(opened.documents, *incoming.shape[1:])
    else:
        dfinal = opened.dfinal.clone()
    dfinal[-incoming.shape[0] :] = incoming
    return dfinal


def begin_walk(x: OpenBackward, incoming: torch.Tensor | None) -> Walk:
    saved = x.saved
    dh0 = saved.gate.new_empty(x.documents, x.v.shape[1], KEY_DIM, KEY_DIM)
    dfinal = _final_gradient(x, incoming)
    if x.cut:
        dstates = torch.empty_like(saved.states)
        scan(x, incoming, dstates, dstates, entering=False)
        segment = saved.plan.segment
        halves = halves_of(x, ceil(x.block / segment) * x.v.shape[1])
    else:
        dstates, segment = dh0, _whole(x)
        halves = halves_of(x, x.documents * x.v.shape[1])
    carried = dh0.new_empty(2, *dh0.shape[1:])
    return Walk(dstates, dfinal, halves, segment, torch.empty_like(x.v), dh0, carried)


def walk_whole(x: OpenBackward, incoming: torch.Tensor | None) -> Walk:
    """The dS chain at once. Once."""
    if x.walk is None:
        x.walk = begin_walk(x, incoming)
        x.walk.whole = x.entering.new_empty(x.chunks, *x.entering.shape[1:])
        walk_block(x, x.walk, x.walk.whole, 0, 0)
    return x.walk


def walk_block(x: OpenBackward, walk: Walk, dleaving: torch.Tensor, first: int, i: int) -> None:
    """The i-th block from the end, chunk slots from `first` on."""
    heads, chunks = x.v.shape[1], x.saved.a.shape[0]
    segments = walk.dstates.shape[0]
    # those of an average block, or more if they do not fill the GPU; a CTA walks what is left after its own
    width = max(
        ceil(segments * dleaving.shape[0] / chunks) + 2,
        ceil(multiprocessors(x.q.device) * walk.halves / heads),
    )
    _reverse(
        x, walk.dstates, walk.dfinal, walk.dh0, walk.carried, dleaving, walk.dv, halves=walk.halves,
        segment=walk.segment, width=min(segments, width), first=first, into=i % 2,
    )  # fmt: skip


def walk_back(
    x: OpenBackward, walk: Walk
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk [L, Hk, K], dg and dbeta [L, Hv] fp32, block by block."""
    here = torch.cuda.current_stream(x.q.device)
    dg = x.saved.gate.new_empty(x.v.shape[:2])
    out = torch.empty_like(x.q), torch.empty_like(x.k), dg, torch.empty_like(dg)
    block, pairs, buffer = x.block, x.pairs, walk.whole
    if buffer is None:
        buffer = x.entering.new_empty(block, *x.entering.shape[1:])
    else:
        block, pairs = x.chunks, x.pairs.view(1, -1)
    if x.replayed is not None:
        here.wait_event(x.replayed)
    for i, first in enumerate(reversed(range(0, x.chunks, block))):
        dleaving = buffer[: x.chunks - first]
        if x.in_blocks:
            replay_states(x, first, dleaving.shape[0])
        if walk.whole is None:
            walk_block(x, walk, dleaving, first, i)
        _gradients(x, walk, dleaving, out, pairs[i], first)
    return out


def _gradients(x: OpenBackward, walk: Walk, dleaving: torch.Tensor, out, pairs, first: int) -> None:
    saved, sms = x.saved, multiprocessors(x.q.device)
    block = slice(first, first + dleaving.shape[0])
    states = slice(0, dleaving.shape[0]) if x.in_blocks else block
    norms = saved.rnorm, saved.qnorm
    if x.normalize:
        norms = saved.rnorm[block], saved.qnorm[block]
    around = (
        x.vd[states], walk.dv, x.entering[states], dleaving, saved.gate[block],
        *norms, x.beta, saved.cu_seqlens,
    )  # fmt: skip
    ready(gradients, ratio=x.v.shape[1] // x.k.shape[1], processors=sms, **x.kind)(
        x.q, x.k, x.do, *around, *out, pairs, x.scale, x.bits, first
    )
    ready(beta_gradient, smallest=SMALLEST_BETA[DTYPES[x.q.dtype]], processors=sms, **x.kind)(
        x.q, x.k, x.v, x.do, *around, pairs, out[3], x.scale, x.bits, first
    )
