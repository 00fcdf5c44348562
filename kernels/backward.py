"""The backward of the gated delta rule on Hopper: functions to call.

    open_backward      the inputs, held for what follows
    entering_summary   gradients of the states that enter the first sequences, while none comes in
    replay             the states, from what the forward saved (backward_replay.py), beside the rest
    close_backward     the dS chain, then all gradients

chunk_gdn_backward is all of them in one go. The stages are for sequences that go on in other calls:
the gradient of their last state arrives while the states are replayed. The dS chain runs cut into
segments (summaries, reverse_scan, reverse), or over whole sequences where there are many: then what
enters a sequence that nothing comes into is the chain's own result, known before the replay. Nothing
here reads the device, and two calls on the same inputs give the same bits.

A long sequence is walked in blocks of time, from its end to its front: the dS chain of a block goes on
from the fp32 dS that the one behind it left, its gradients follow, and its dS (where chains are cut
into segments, its states and Vd, too) lies where that of the block behind it lay. The bits are those
of one block.
"""

from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

import torch

from .backward_beta import beta_gradient
from .backward_gradients import SMALLEST_BETA, gradients
from .backward_replay import replay as replay_kernel
from .backward_reverse import reverse
from .common import CHUNK, slots
from .forward import DTYPES, KEY_DIM, Saved
from .launch import multiprocessors, ready, side_stream
from .plan import STEADY
from .reverse_scan import reverse_scan

# Value heads (times rows of a batch) from which dS chains of whole sequences fill the GPU, and from
# which they take no longer than the replay beside them unless they are long or have to wait.
MANY_CHAINS, ENOUGH_CHAINS = 64, 32
BETWEEN = 1280  # bytes a token and value head between the kernels: S, dS, Vd
FULL = 7 / 8  # of the multiprocessors
FEW_CHAINS = 2.5  # as many summaries a multiprocessor
LARGE = 2**30  # so many of them, and a single sequence goes block by block


class Gradients(NamedTuple):
    """In the order of the forward's arguments; shapes and dtypes are theirs."""

    dq: torch.Tensor  # [B, T, Hk, K]
    dk: torch.Tensor  # [B, T, Hk, K]
    dv: torch.Tensor  # [B, T, Hv, V]
    dg: torch.Tensor  # [B, T, Hv]
    dbeta: torch.Tensor  # [B, T, Hv]
    dh0: torch.Tensor  # [N, Hv, K, V] fp32


def _check(q, saved, do, dfinal, value_heads) -> None:
    expected = (*q.shape[:2], value_heads, q.shape[-1])
    if tuple(do.shape) != expected or do.dtype != q.dtype:
        raise ValueError(f"do is {tuple(do.shape)} {do.dtype}; expected {expected} in {q.dtype}")
    if saved.a.shape[1] != value_heads or saved.a.dtype != q.dtype:
        raise ValueError(
            f"saved is of {saved.a.shape[1]} value heads in {saved.a.dtype}, the inputs of "
            f"{value_heads} in {q.dtype}: pass what the forward of these inputs returned"
        )
    if dfinal is not None:
        expected = (saved.cu_seqlens.numel() - 1, value_heads, KEY_DIM, KEY_DIM)
        if tuple(dfinal.shape) != expected or dfinal.dtype != torch.float32:
            raise ValueError(
                f"dfinal is {tuple(dfinal.shape)} {dfinal.dtype}; expected {expected} in fp32"
            )


def _flat(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, *x.shape[2:]).contiguous()


@dataclass
class Walk:
    """The dS chain, and how far it is."""

    dstates: torch.Tensor  # [NS, Hv, K, V] fp32, of the states that leave the segments
    dfinal: torch.Tensor | None
    halves: int
    segment: int
    dv: torch.Tensor  # [L, Hv, V]
    dh0: torch.Tensor  # [N, Hv, K, V] fp32
    carried: torch.Tensor  # [2, Hv, K, V] fp32, what goes on from one block to the next
    whole: torch.Tensor | None = None  # [NC, Hv, V, K], dS after each chunk, where all is there


@dataclass
class OpenBackward:
    """A backward between its stages: its inputs with batch and time in one axis, and what it made."""

    inputs: tuple[torch.Tensor, ...]  # q, k, v, g, beta as given
    q: torch.Tensor  # [L, Hk, K]
    k: torch.Tensor
    v: torch.Tensor  # [L, Hv, V]
    do: torch.Tensor
    beta: torch.Tensor  # [L, Hv]
    saved: Saved
    dfinal: torch.Tensor | None  # [N, Hv, K, V] fp32
    initial: torch.Tensor | None
    scale: float
    normalize: bool
    open_left: int
    open_right: int
    truncate: bool
    cut: bool  # the dS chain runs in the forward's segments
    block: int  # chunk slots of a block of time
    in_blocks: bool  # the states, too, are made and used block by block
    entering: torch.Tensor  # [NC or block, Hv, V, K], the state that enters each chunk: replay's
    vd: torch.Tensor  # [NC or block, Hv, 64, V]
    pairs: torch.Tensor  # [blocks, 1 + pairs] int32: how many hold a beta of nearly zero, which
    begun: torch.cuda.Event  # when the inputs were there
    external: torch.Tensor | None = None  # [NS, Hv, K, V] fp32, dS_ext of summarised segments
    walk: "Walk | None" = None
    replayed: torch.cuda.Event | None = None

    @property
    def documents(self) -> int:
        return self.saved.cu_seqlens.numel() - 1

    @property
    def chunks(self) -> int:
        """Chunk slots; the last one of a single sequence is never in use."""
        slots = self.saved.a.shape[0]
        return max(1, ceil(self.q.shape[0] / CHUNK)) if self.documents == 1 else slots

    @property
    def bits(self) -> int:
        return (self.documents - 1).bit_length()

    @property
    def kind(self) -> dict:
        return {
            "dtype": DTYPES[self.q.dtype],
            "beta_dtype": DTYPES[self.beta.dtype],
            "normalize": self.normalize,
        }


def open_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    saved: Saved,
    do: torch.Tensor,
    dfinal: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    keys_normalized: bool = False,
    open_left: int = 0,
    open_right: int = 0,
) -> OpenBackward:
    """Begin the backward of a forward with the same arguments.

    Args:
        saved: what the forward returned.
        do: [B, T, Hv, V] in the dtype of q. dfinal: [N, Hv, K, V] fp32, zero if None.
        initial_state: the true states that enter, [N, Hv, K, V] fp32, zero if None.
        open_left: so many first sequences get an entering_summary; the forward was told the same.
        open_right: of so many last sequences the gradient of the final state arrives later, at
            close_backward; their rows of `dfinal` are zero.

    Raises:
        ValueError: if do, dfinal or saved do not fit the inputs.
    """
    opened = _open(
        q, k, v, g, beta, saved, do, dfinal, scale, initial_state, use_qk_l2norm_in_kernel,
        keys_normalized, open_left, open_right,
        cut=saved.plan.split and v.shape[2] * q.shape[0] < MANY_CHAINS,
    )  # fmt: skip
    if opened.cut:
        _summarise(opened)
    return opened


def _open(
    q, k, v, g, beta, saved, do, dfinal, scale, initial, normalize, normalized, left=0, right=0, *,
    cut, at_once=False,
):  # fmt: skip
    chunks, value_heads = saved.a.shape[:2]
    _check(q, saved, do, dfinal, v.shape[2])
    q_, k_, v_, do_, beta_ = (_flat(x) for x in (q, k, v, do, beta))
    dfinal, initial = (None if x is None else x.contiguous() for x in (dfinal, initial))
    block = _block(saved, cut, multiprocessors(q.device))
    in_blocks = at_once and cut and block < chunks and saved.cu_seqlens.numel() == 2
    room = block if in_blocks else chunks
    entering = q_.new_empty(room, value_heads, KEY_DIM, KEY_DIM)
    vd = q_.new_empty(room, value_heads, CHUNK, KEY_DIM)
    pairs = torch.empty(
        ceil(chunks / block), 1 + block * value_heads, dtype=torch.int32, device=q.device
    )
    begun = torch.cuda.current_stream(q.device).record_event()
    return OpenBackward(
        (q, k, v, g, beta), q_, k_, v_, do_, beta_, saved, dfinal, initial,
        KEY_DIM**-0.5 if scale is None else scale, normalize, left, right,
        normalize or normalized, cut, block, in_blocks, entering, vd, pairs, begun,
    )  # fmt: skip


def _block(saved: Saved, cut: bool, processors: int) -> int:
    """Chunk slots of a block of time. One long sequence has a few: where chains are not cut thirds, whose
    dS alone makes room; else halves, of whole segments that fill the GPU. Documents would fill it worse."""
    chunks, heads = saved.a.shape[:2]
    many = cut or heads >= MANY_CHAINS
    if saved.cu_seqlens.numel() > 2 or not many or chunks * CHUNK * heads * BETWEEN < LARGE:
        return chunks
    if not cut:
        return ceil(chunks / 3)
    filling = saved.plan.segment * ceil(FULL * processors / heads)
    block = filling * ceil(chunks // 2 / filling)
    return block if block < chunks - 1 else chunks  # the last slot is not in use


def _halves(x: OpenBackward, chains: int) -> int:
    """Half the columns of a value head are a CTA's where chains are few and their latency counts. Where
    they fill the GPU both halves are: bytes count, and q, k and `a` are read once."""
    return 2 if chains >= FULL * multiprocessors(x.q.device) else 1


def _summarise(x: OpenBackward) -> None:
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
        x.q, x.k, x.do, saved.a, saved.gate, saved.rnorm, x.beta, saved.cu_seqlens, dstates,
        dstates if dfinal is None else dfinal, dinitial, carried, dleaving, dv, x.scale, width, first,
        into, segment, x.bits, int(dfinal is not None), int(x.truncate and not store), x.open_left,
    )  # fmt: skip


def _whole(x: OpenBackward) -> int:
    """A segment longer than any document, so that each is one."""
    return x.q.shape[0] // CHUNK + 2


def _scan(opened, incoming, dstates, total, *, entering) -> None:
    x, saved = opened, opened.saved
    ready(reverse_scan, entering=entering)(
        x.external, saved.maps, saved.live, saved.cu_seqlens,
        x.external if incoming is None else incoming, dstates, total, saved.plan.summarised,
        int(incoming is not None),
    )  # fmt: skip


def entering_summary(opened: OpenBackward, *, incoming: torch.Tensor | None = None) -> torch.Tensor:
    """Gradients [open_left, Hv, K, V] fp32 of the states that enter the first sequences.

    Without `incoming` they are dS_ext, what they are while the late gradients are zero (`dfinal`
    counts); with it, [open_right, Hv, K, V] fp32, the true ones, step by step as in one call that has
    all shards; close_backward is then told the same.
    """
    x = opened
    if x.cut or (x.open_right and incoming is None):
        if x.external is None:
            _summarise(x)
        total = x.saved.gate.new_empty(x.open_left, *x.saved.states.shape[1:])
        if x.open_left:
            _scan(x, _incoming(x, incoming), x.external, total, entering=True)
        return total
    return _walk_whole(x, _incoming(x, incoming)).dh0[: x.open_left]


def replay(opened: OpenBackward, *, at_once: bool = False) -> None:
    """Replay the states, which needs no gradient that is late.

    Where chains do not fill the GPU it runs beside the current stream: from the beginning, or from
    here on if somebody waits for what entering_summary found and gets it by a kernel, which must not
    wait for multiprocessors; `at_once`: it needs none.
    """
    x = opened
    here = torch.cuda.current_stream(x.q.device)
    if x.in_blocks:
        x.pairs[:, :1].zero_()
        return
    if _many(x):
        x.pairs[:, :1].zero_()
        _replay(x)
        return
    beside = side_stream(x.q.device)
    beside.wait_event(here.record_event() if x.open_left and not at_once else x.begun)
    with torch.cuda.stream(beside):
        x.pairs[
            :, :1
        ].zero_()  # a dS chain that is launched beside it gets its multiprocessors first
        _replay(x)
        x.replayed = beside.record_event()


def _many(x: OpenBackward) -> bool:
    return x.v.shape[1] * x.inputs[0].shape[0] >= MANY_CHAINS


def _replay(x: OpenBackward, first: int = 0, count: int | None = None) -> None:
    """All of it, or of one sequence the segments that begin in a block."""
    saved, segment = x.saved, x.saved.plan.segment
    width = saved.states.shape[0]
    halves = saved.plan.halves
    if count is not None and count < x.chunks:
        width = ceil(count / segment)
        halves = _halves(x, width * x.v.shape[1])
    ready(replay_kernel, halves=halves, **x.kind)(
        x.k, x.v, saved.a, saved.gate, saved.rnorm, x.beta, saved.cu_seqlens,
        saved.states if x.initial is None else x.initial, saved.states, x.entering, x.vd, width,
        first // segment, segment, x.bits, int(x.initial is not None),
    )  # fmt: skip


def _incoming(x: OpenBackward, incoming: torch.Tensor | None) -> torch.Tensor | None:
    if incoming is None:
        return None
    expected = (x.open_right, x.v.shape[1], KEY_DIM, KEY_DIM)
    if tuple(incoming.shape) != expected or incoming.dtype != torch.float32:
        raise ValueError(
            f"incoming is {tuple(incoming.shape)} {incoming.dtype}; expected {expected} in fp32: "
            "open_backward was told open_right"
        )
    return incoming.contiguous() if x.open_right else None


def _final_gradient(opened: OpenBackward, incoming: torch.Tensor | None) -> torch.Tensor | None:
    if incoming is None or incoming.shape[0] == opened.documents:
        return opened.dfinal if incoming is None else incoming
    if opened.dfinal is None:
        dfinal = incoming.new_zeros(opened.documents, *incoming.shape[1:])
    else:
        dfinal = opened.dfinal.clone()
    dfinal[-incoming.shape[0] :] = incoming
    return dfinal


def close_backward(opened: OpenBackward, *, incoming: torch.Tensor | None = None) -> Gradients:
    """All gradients, after `replay`.

    incoming: [open_right, Hv, K, V] fp32, gradients of the states that leave the last `open_right`
        sequences, zero if None.
    """
    x = opened
    incoming = _incoming(x, incoming)
    if x.walk is None:
        x.walk = _begin_walk(x, incoming)
    walk, here = x.walk, torch.cuda.current_stream(x.q.device)
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
            _replay(x, first, dleaving.shape[0])
        if walk.whole is None:
            _walk_block(x, walk, dleaving, first, i)
        _gradients(x, walk, dleaving, out, pairs[i], first)
    q, k, v, g, beta = x.inputs
    dq, dk, dg, dbeta = out
    return Gradients(
        dq.view(q.shape),
        dk.view(k.shape),
        walk.dv.view(v.shape),
        dg.view(g.shape).to(g.dtype),
        dbeta.view(beta.shape).to(beta.dtype),
        walk.dh0,
    )


def _begin_walk(x: OpenBackward, incoming: torch.Tensor | None) -> Walk:
    saved = x.saved
    dh0 = saved.gate.new_empty(x.documents, x.v.shape[1], KEY_DIM, KEY_DIM)
    dfinal = _final_gradient(x, incoming)
    if x.cut:
        dstates = torch.empty_like(saved.states)
        _scan(x, incoming, dstates, dstates, entering=False)
        segment = saved.plan.segment
        halves = _halves(x, ceil(x.block / segment) * x.v.shape[1])
    else:
        dstates, segment = dh0, _whole(x)
        halves = _halves(x, x.documents * x.v.shape[1])
    carried = dh0.new_empty(2, *dh0.shape[1:])
    return Walk(dstates, dfinal, halves, segment, torch.empty_like(x.v), dh0, carried)


def _walk_whole(x: OpenBackward, incoming: torch.Tensor | None) -> Walk:
    """The dS chain at once. Once."""
    if x.walk is None:
        x.walk = _begin_walk(x, incoming)
        x.walk.whole = x.entering.new_empty(x.chunks, *x.entering.shape[1:])
        _walk_block(x, x.walk, x.walk.whole, 0, 0)
    return x.walk


def _walk_block(x: OpenBackward, walk: Walk, dleaving: torch.Tensor, first: int, i: int) -> None:
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


def _gradients(x: OpenBackward, walk: Walk, dleaving: torch.Tensor, out, pairs, first: int) -> None:
    saved, sms = x.saved, multiprocessors(x.q.device)
    block = slice(first, first + dleaving.shape[0])
    states = slice(0, dleaving.shape[0]) if x.in_blocks else block
    around = (
        x.vd[states], walk.dv, x.entering[states], dleaving, saved.gate[block],
        saved.rnorm[block] if x.normalize else saved.rnorm, x.beta, saved.cu_seqlens,
    )  # fmt: skip
    ready(gradients, ratio=x.v.shape[1] // x.k.shape[1], processors=sms, **x.kind)(
        x.q, x.k, x.do, *around, *out, pairs, x.scale, x.bits, first
    )
    ready(beta_gradient, smallest=SMALLEST_BETA[DTYPES[x.q.dtype]], processors=sms, **x.kind)(
        x.q, x.k, x.v, x.do, *around, pairs, out[3], x.scale, x.bits, first
    )


def chunk_gdn_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    saved: Saved,
    do: torch.Tensor,
    dfinal: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    keys_normalized: bool = False,
) -> Gradients:
    """Gradients of chunk_gdn_forward, whose arguments q to beta and keywords are repeated here; see
    open_backward. Between its kernels lie at most 1280 bytes a token and value head, free again on
    return; of a long sequence less (`_block`)."""
    chains = v.shape[2] * q.shape[0]
    documents = saved.cu_seqlens.numel() - 1
    long = q.numel() >= STEADY * CHUNK * documents * q.shape[2] * q.shape[3]
    cut = saved.plan.split and (
        chains < ENOUGH_CHAINS or (long and v.shape[2] * documents < MANY_CHAINS)
    )
    x = _open(
        q, k, v, g, beta, saved, do, dfinal, scale, initial_state, use_qk_l2norm_in_kernel,
        keys_normalized, cut=cut, at_once=True,
    )  # fmt: skip
    if x.cut:
        _summarise(x)
    elif x.block >= x.chunks and not _many(x):
        _walk_whole(x, None)  # before the replay beside it, which would take the multiprocessors
    replay(x)
    return close_backward(x)
