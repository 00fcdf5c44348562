"""The backward of the gated delta rule on Hopper: functions to call.

    open_backward      the inputs, held for what follows
    begin_replay       the replay, where it runs beside the next
    entering_summary   gradients of the states that enter the first sequences, while none comes in
    replay             the states, from what the forward saved (backward_replay.py), beside the rest
    close_backward     the dS chain, then all gradients

chunk_gdn_backward is all of them in one go. The stages are for sequences that go on in other calls:
the gradient of their last state arrives while the states are replayed. The dS chain runs cut into
segments (summaries, reverse_scan, reverse), or over whole sequences where there are many: then what
enters a sequence that nothing comes into is the chain's own result, known before the replay. Nothing
here reads the device, and two calls on the same inputs give the same bits.

What they hold is in backward_opened.py, which kernels they run in backward_walk.py.
"""

from typing import NamedTuple

import torch

from .backward_opened import MANY_CHAINS, Layout, OpenBackward, hold, layout_of
from .backward_opened import keeping_pays as keeping_pays
from .backward_walk import begin_walk, replay_states, scan, summarise, walk_back, walk_whole
from .common import CHUNK
from .forward import KEY_DIM, Saved
from .inputs import flat
from .launch import record, side_stream, wait
from .plan import STEADY

# Value heads from which dS chains of whole sequences take no longer than the replay beside them unless
# they are long or have to wait.
ENOUGH_CHAINS = 32


class Gradients(NamedTuple):
    """In the order of the forward's arguments; shapes and dtypes are theirs."""

    dq: torch.Tensor  # [B, T, Hk, K]
    dk: torch.Tensor  # [B, T, Hk, K]
    dv: torch.Tensor  # [B, T, Hv, V]
    dg: torch.Tensor  # [B, T, Hv]
    dbeta: torch.Tensor  # [B, T, Hv]
    dh0: torch.Tensor  # [n, Hv, K, V] fp32, of the first sequences, see initial_state


def layout_for(q, v, g, beta, saved, do, dfinal, *, normalize: bool, whole: bool) -> Layout:
    """Of open_backward's arguments, or if `whole` of chunk_gdn_backward's; ValueError if they do not fit."""
    chains = v.shape[2] * q.shape[0]
    cut = saved.plan.split and chains < MANY_CHAINS
    if whole:
        documents = saved.cu_seqlens.numel() - 1
        long = q.numel() >= STEADY * CHUNK * documents * q.shape[2] * q.shape[3]
        few = chains < ENOUGH_CHAINS or (long and v.shape[2] * documents < MANY_CHAINS)
        cut = saved.plan.split and few
    return layout_of(q, v, g, beta, saved, do, dfinal, normalize=normalize, cut=cut, at_once=whole)


def _prepared(layout, q, k, v, g, beta, saved, do, dfinal, *, normalize, whole):
    """The layout, and q, k, v, beta with batch and time in one axis: who gives a layout gives them so."""
    if layout is not None:
        return layout, q, k, v, beta
    layout = layout_for(q, v, g, beta, saved, do, dfinal, normalize=normalize, whole=whole)
    return layout, flat(q), flat(k), flat(v), flat(beta)


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
    layout: Layout | None = None,
) -> OpenBackward:
    """Begin the backward of a forward with the same arguments.

    Args:
        saved: what the forward returned.
        do: [B, T, Hv, V] in the dtype of q. dfinal: [N, Hv, K, V] fp32, zero if None.
        initial_state: the true states that enter, [n, Hv, K, V] fp32: of all sequences or the first n, zero
            elsewhere. dh0 has those alone, and the open_left ones.
        open_left: so many first sequences get an entering_summary; the forward was told the same.
        open_right: of so many last sequences the gradient of the final state arrives later, at
            close_backward; their rows of `dfinal` are zero.
        layout: of arguments of the same shapes, dtypes and options, from layout_for (`whole` false).
            Then nothing is looked up or checked, and q to beta have batch and time in one axis.

    Raises:
        ValueError: if do, dfinal or saved do not fit the inputs.
    """
    layout, q, k, v, beta = _prepared(
        layout, q, k, v, g, beta, saved, do, dfinal, normalize=use_qk_l2norm_in_kernel, whole=False
    )
    opened = hold(
        layout, q, k, v, beta, saved, do, dfinal, scale, initial_state, use_qk_l2norm_in_kernel,
        keys_normalized, open_left, open_right,
    )  # fmt: skip
    if layout.cut:
        summarise(opened)
    return opened


def entering_summary(opened: OpenBackward, *, incoming: torch.Tensor | None = None) -> torch.Tensor:
    """Gradients [open_left, Hv, K, V] fp32 of the states that enter the first sequences.

    Without `incoming` they are dS_ext, what they are while the late gradients are zero (`dfinal`
    counts); with it, [open_right, Hv, K, V] fp32, the true ones, step by step as in one call that has
    all shards; close_backward is then told the same.
    """
    x = opened
    if x.layout.cut or (x.open_right and incoming is None):
        if x.external is None:
            summarise(x)
        total = x.saved.gate.new_empty(x.open_left, *x.saved.states.shape[1:])
        if x.open_left:
            scan(x, _incoming(x, incoming), x.external, total, entering=True)
        return total
    return walk_whole(x, _incoming(x, incoming)).dh0[: x.open_left]


def replay(opened: OpenBackward, *, at_once: bool = False) -> None:
    """Replay the states, which needs no gradient that is late.

    Where chains do not fill the GPU it runs beside the current stream: from the beginning, or from
    here on if somebody waits for what entering_summary found and gets it by a kernel, which must not
    wait for multiprocessors; `at_once`: it needs none. Once: a second call does nothing. Nothing is
    replayed that the forward kept.
    """
    x, device = opened, opened.q.device
    if x.asked:
        return
    x.asked = True
    if not x.layout.beside:
        x.lists.zero_()
        if x.saved.entering is None and not x.layout.in_blocks:  # else block by block
            replay_states(x)
        return
    beside = side_stream(device)
    assert x.begun is not None
    wait(beside, record(x.stream) if x.open_left and not at_once else x.begun)
    torch.cuda.set_stream(beside)
    try:
        # a dS chain that is launched beside it gets its multiprocessors first
        x.lists.zero_()
        replay_states(x)
        x.replayed = record(beside)
    finally:
        torch.cuda.set_stream(x.stream)


def begin_replay(opened: OpenBackward, *, at_once: bool) -> None:
    """Replay before entering_summary, if it runs beside that from the beginning anyway: the sooner the
    host launches it the better."""
    x = opened
    if x.layout.beside and (at_once or not x.open_left):
        replay(x, at_once=at_once)


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


def close_backward(opened: OpenBackward, *, incoming: torch.Tensor | None = None) -> Gradients:
    """All gradients, after `replay`.

    incoming: [open_right, Hv, K, V] fp32, gradients of the states that leave the last `open_right`
        sequences, zero if None.
    """
    x = opened
    incoming = _incoming(x, incoming)
    if x.walk is None:
        x.walk = begin_walk(x, incoming)
    layout = x.layout
    gates = layout.v[:3]
    dq, dk, dg, dbeta = walk_back(x, x.walk)
    return Gradients(
        dq.view(layout.q),
        dk.view(layout.q),
        x.walk.dv.view(layout.v),
        dg.view(gates).to(layout.gate_dtype),
        dbeta.view(gates).to(layout.beta_dtype),
        x.walk.dh0,
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
    layout: Layout | None = None,
) -> Gradients:
    """Gradients of chunk_gdn_forward, whose arguments q to beta and keywords are repeated here; see
    open_backward (`layout`: from layout_for, `whole`). Between its kernels lie at most 1280 bytes a
    token and value head, free again on return; of a long sequence less (backward_opened.py)."""
    layout, q, k, v, beta = _prepared(
        layout, q, k, v, g, beta, saved, do, dfinal, normalize=use_qk_l2norm_in_kernel, whole=True
    )
    x = hold(
        layout, q, k, v, beta, saved, do, dfinal, scale, initial_state, use_qk_l2norm_in_kernel,
        keys_normalized,
    )  # fmt: skip
    if layout.cut:
        summarise(x)
    elif layout.block >= layout.chunks and not layout.many:
        walk_whole(x, None)  # before the replay beside it, which would take the multiprocessors
    replay(x)
    return close_backward(x)
