"""The kernels of the backward in their order: summaries, replay, and the dS chain with all gradients.

A long sequence is walked in blocks of time, from its end to its front: the dS chain of a block goes on
from the fp32 dS that the one behind it left, its gradients follow, and its dS (where chains are cut
into segments, its states and Vd, too) lies where that of the block behind it lay. The bits are those
of one block.
"""

from math import ceil

import torch

from .backward_opened import OpenBackward, Walk, halves_of
from .backward_replay import replay
from .common import CHUNK
from .inputs import KEY_DIM
from .launch import ready, wait
from .reverse_scan import reverse_scan
from .scan import COLUMNS


def summarise(x: OpenBackward) -> None:
    layout = x.layout
    places = max(1, layout.blocks + x.open_left)
    x.external = x.saved.gate.new_empty(places, x.v.shape[1], KEY_DIM, KEY_DIM)
    _reverse(
        x, x.external, x.dfinal, x.external, x.external, x.entering, x.do,
        segment=x.saved.plan.summarised, width=layout.summaries, store=False,
    )  # fmt: skip


def _reverse(
    opened, dstates, dfinal, dinitial, carried, dleaving, dv, *, segment, width, first=0, into=0,
    store=True, initials=0,
) -> None:  # fmt: skip
    x, saved = opened, opened.saved
    order, ordered = saved.ordering
    dfinal, finals = (dstates, 0) if dfinal is None else (dfinal, dfinal.shape[0])
    kernel = x.layout.reverse if store else x.layout.summary
    kernel(
        x.q, x.k, x.do, saved.a, saved.gate, saved.rnorm, saved.qnorm, x.beta, saved.cu_seqlens, order,
        dstates, dfinal, dinitial, carried, dleaving, dv, x.scale, width, first, into, segment, ordered,
        x.layout.blocks, initials, finals, int(x.truncate and not store), x.open_left,
    )  # fmt: skip


def scan(opened, incoming, dstates, total, *, entering) -> None:
    x, saved = opened, opened.saved
    documents = total.shape[0] if entering else x.layout.documents
    lanes = max(1, x.layout.processors // (KEY_DIM // COLUMNS * x.v.shape[1]))
    ready(reverse_scan, entering=entering)(
        x.external, saved.maps, saved.live, saved.cu_seqlens,
        x.external if incoming is None else incoming, dstates, total, saved.plan.summarised,
        x.layout.blocks, min(documents, lanes), int(incoming is not None),
    )  # fmt: skip


def replay_states(x: OpenBackward, first: int = 0, count: int | None = None) -> None:
    """All of it, or of one sequence the segments that begin in a block."""
    saved, layout, segment = x.saved, x.layout, x.saved.plan.segment
    width, halves, kernel = layout.segments, layout.replay_halves, layout.replay
    block = count is not None and count < layout.chunks
    if block:
        width = ceil(count / segment)
        halves = halves_of(width * x.v.shape[1], layout.processors)
        kernel = ready(replay, halves=halves, **layout.kind)
    ctas = width * x.v.shape[1] * KEY_DIM // (CHUNK * halves)
    if layout.persistent:
        ctas = min(ctas, layout.processors)
    order, ordered = saved.ordering
    initial, initials = (saved.states, 0) if x.initial is None else (x.initial, x.initial.shape[0])
    kernel(
        x.k, x.v, saved.a, saved.gate, saved.rnorm, x.beta, saved.cu_seqlens, order, initial,
        saved.states, x.entering, x.vd, x.tickets, width, first // segment, segment, ordered, initials,
        ctas,
    )  # fmt: skip


def _final_gradient(opened: OpenBackward, incoming: torch.Tensor | None) -> torch.Tensor | None:
    """Of all documents, or of the last ones, to which alone anything comes in."""
    if incoming is None or opened.dfinal is None:
        return opened.dfinal if incoming is None else incoming
    dfinal = opened.dfinal.clone()
    dfinal[-incoming.shape[0] :] = incoming
    return dfinal


def begin_walk(x: OpenBackward, incoming: torch.Tensor | None) -> Walk:
    saved = x.saved
    layout, kind = x.layout, (x.v.shape[1], KEY_DIM, KEY_DIM)
    wanted = max(x.open_left, 0 if x.initial is None else x.initial.shape[0])
    dh0 = saved.gate.new_empty(wanted, *kind)
    dstates = carried = dh0.new_empty(2, *kind)
    if layout.cut:
        dstates = dh0.new_empty(max(1, layout.blocks), *kind)
        scan(x, incoming, dstates, dstates, entering=False)
    return Walk(dstates, _final_gradient(x, incoming), torch.empty_like(x.v), dh0, carried)


def walk_whole(x: OpenBackward, incoming: torch.Tensor | None) -> Walk:
    """The dS chain at once. Once."""
    if x.walk is None:
        x.walk = begin_walk(x, incoming)
        x.walk.whole = x.entering.new_empty(x.layout.chunks, *x.entering.shape[1:])
        walk_block(x, x.walk, x.walk.whole, 0, 0)
    return x.walk


def walk_block(x: OpenBackward, walk: Walk, dleaving: torch.Tensor, first: int, i: int) -> None:
    """The i-th block from the end, chunk slots from `first` on."""
    layout, heads, chunks = x.layout, x.v.shape[1], x.saved.a.shape[0]
    segments = layout.segments if layout.cut else layout.documents
    wanted = walk.dh0.shape[0]
    # those of an average block, or more if they do not fill the GPU; a CTA walks what is left after its own
    width = max(
        ceil(segments * dleaving.shape[0] / chunks) + 2,
        ceil(layout.processors * layout.halves / heads),
    )
    _reverse(
        x, walk.dstates, walk.dfinal, walk.dh0 if wanted else walk.carried, walk.carried, dleaving,
        walk.dv, initials=wanted,
        segment=layout.segment, width=min(segments, width), first=first, into=i % 2,
    )  # fmt: skip


def walk_back(
    x: OpenBackward, walk: Walk
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk [L, Hk, K], dg and dbeta [L, Hv] fp32, block by block."""
    layout, out = x.layout, None
    block, pairs, buffer = layout.block, x.pairs, walk.whole
    if buffer is None:
        buffer = x.entering.new_empty(min(block, layout.chunks), *x.entering.shape[1:])
    else:
        block, pairs = layout.chunks, x.pairs.view(1, -1)
    if x.replayed is not None:
        wait(x.stream, x.replayed)
        x.replayed = None
    for i, first in enumerate(reversed(range(0, layout.chunks, block))):
        count = layout.chunks - first
        dleaving = buffer[:count] if count < buffer.shape[0] else buffer
        if layout.in_blocks:
            replay_states(x, first, dleaving.shape[0])
        if walk.whole is None:
            walk_block(x, walk, dleaving, first, i)
        if out is None:  # not before the device has its next work
            dg = x.saved.gate.new_empty(x.v.shape[:2])
            out = torch.empty_like(x.q), torch.empty_like(x.k), dg, torch.empty_like(dg)
        _gradients(x, walk, dleaving, out, pairs[i], first)
    assert out is not None
    return out


def _gradients(x: OpenBackward, walk: Walk, dleaving: torch.Tensor, out, pairs, first: int) -> None:
    saved, layout = x.saved, x.layout
    block = slice(first, first + dleaving.shape[0])
    states = slice(0, dleaving.shape[0]) if layout.in_blocks else block
    norms = saved.rnorm, saved.qnorm
    if x.normalize:
        norms = saved.rnorm[block], saved.qnorm[block]
    around = (
        x.vd[states], walk.dv, x.entering[states], dleaving, saved.gate[block],
        *norms, x.beta, saved.cu_seqlens,
    )  # fmt: skip
    layout.gradients(x.q, x.k, x.do, *around, *out, pairs, x.scale, first)
    layout.beta_gradient(x.q, x.k, x.v, x.do, *around, pairs, out[3], x.scale, first)
