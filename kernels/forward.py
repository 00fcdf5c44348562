"""The forward of the gated delta rule on Hopper: functions to call.

    prepare -> [summary -> scan] -> query_norms -> recurrence

The bracket runs where documents are cut into segments (plan.py) or continue on other ranks. For the
latter the forward comes in three stages, between which states travel:

    open_forward      prepare, and the summaries of segments that somebody asks for
    leaving_summary   S_out = M S_in + S_ext of the sequences that go on elsewhere; or, from the
    leaving_state     state that came in, S_out itself
    norm_queries      norms of the queries, which no state enters (or close_forward makes them)
    close_forward     from the states that came in: scan and recurrence

Where heads alone fill the GPU the main pass is not cut, and only what leaves is summarised.

Nothing here reads the device: the calls can be captured in a CUDA graph, and metadata of packed
documents is found by the kernels.
"""

import torch

from .common import CHUNK
from .inputs import KEY_DIM, Packed, check_states, flat, pack
from .layout import Layout, layout_of
from .opened import OpenForward, Saved
from .plan import Plan
from .scan import COLUMNS

STARTS, CLOSES, PASSES = range(3)  # scan.py


def _scan(opened: OpenForward, incoming, state, transition, *, documents, mode) -> None:
    x, external, tiles = opened.packed, opened.external, opened.shape[-1] // COLUMNS
    layout, segment = opened.layout, opened.layout.plan.summarised
    left, right = layout.open_left, layout.open_right
    few = left + right + (x.k.shape[0] - 1) // (2 * segment * CHUNK)
    listed = documents == layout.documents and few < documents
    jobs = few if listed else documents
    tiles = tiles if transition is None else 2 * tiles
    lanes = max(1, layout.processors // (tiles * opened.shape[-2]))
    layout.scan(
        external, opened.maps, opened.live, x.cu,
        external if opened.initial is None else opened.initial,
        external if incoming is None else incoming,
        external if state is None else state,
        external if transition is None else transition,
        segment, tiles, min(jobs, lanes), jobs, int(listed), layout.blocks,
        int(opened.initial is not None), left, right, mode,
    )  # fmt: skip


def open_forward(
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    open_left: int = 0,
    open_right: int = 0,
    use_qk_l2norm_in_kernel: bool = False,
    keys_normalized: bool = False,
    summarise: bool = True,
    max_seqlen: int | None = None,
    order: torch.Tensor | None = None,
    plan: Plan | None = None,
    layout: Layout | None = None,
) -> OpenForward:
    """All of a forward that needs neither the queries nor states of other ranks.

    Args:
        open_left: how many sequences, the first ones, get their state later: close_forward's
            `incoming`. Their `initial_state` is not read.
        open_right: how many, the last ones, pass their state on: leaving_summary, or leaving_state.
        summarise: False if nobody will ask for leaving_summary.
        layout: what an earlier call with arguments of the same shapes, dtypes and values of the options
            returned as `layout`; then nothing is looked up or checked.

    The other arguments are those of chunk_gdn_forward.
    """
    if layout is None:
        layout = layout_of(
            k, v, g, beta, cu_seqlens, initial_state, open_left=open_left, open_right=open_right,
            normalize=use_qk_l2norm_in_kernel, keys_normalized=keys_normalized, summarise=summarise,
            plan=plan, max_seqlen=max_seqlen,
        )  # fmt: skip
    x = pack(k, v, g, beta, cu_seqlens)
    a = k.new_empty(layout.a)
    gate = k.new_empty(layout.gate, dtype=torch.float32)
    rnorm = gate.new_empty(layout.rnorm)
    tickets = x.cu.new_empty(1)
    layout.prepare(x.k, x.g, x.beta, x.cu, a, gate, rnorm, tickets)
    if initial_state is not None:
        initial_state = initial_state.contiguous()
    external = states = gate.new_empty(layout.states)
    if layout.external is not None:
        external = gate.new_empty(layout.external)
    maps = gate.new_empty(layout.maps, dtype=torch.bfloat16)
    live = x.cu.new_empty(layout.live)
    if layout.summary is not None:
        layout.summary(
            x.k, x.v, a, gate, rnorm, x.cu, external if initial_state is None else initial_state,
            external, maps, live, *layout.summary_sizes,
        )  # fmt: skip
    kept = maps, live
    if not layout.keeps_maps:
        kept = maps.new_empty(1, *maps.shape[1:]), live.new_empty(1, *live.shape[1:])
    qnorm = torch.empty_like(rnorm)
    order = order if layout.whole else None
    saved = Saved(a, gate, rnorm, qnorm, states, x.cu, order, *kept, None, None, layout.plan)
    pending = layout.documents if layout.plan.split else 0
    return OpenForward(
        x, v.shape, initial_state, layout, saved, external, maps, live, tickets, pending
    )


def leaving_summary(
    opened: OpenForward, *, transition: bool
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """What the last `open_right` sequences do to a state: S_out = M S_in + S_ext.

    Returns M [open_right, Hv, K, K], or None without `transition`, and S_ext [open_right, Hv, K, V],
    both fp32. Where a sequence begins here, S_ext is its state and M zero. With keys of unit norm M
    is exactly zero for heads whose gates decay below 2^-24 over one of the sequence's segments.
    Once, and before close_forward.
    """
    assert not opened.asked, "leaving_summary comes once"
    layout, gate = opened.layout, opened.saved.gate
    count = layout.open_right
    heads, value_dim = opened.shape[-2:]
    state = gate.new_empty(count, heads, KEY_DIM, value_dim)
    M = gate.new_empty(count, heads, KEY_DIM, KEY_DIM) if transition else None
    if count:
        assert layout.summarised, "open_forward was told that nobody asks"
        _scan(opened, None, state, M, documents=layout.documents, mode=STARTS)
        opened.asked, opened.pending = True, min(opened.pending, layout.open_left)
    return M, state


def leaving_state(
    opened: OpenForward, *, incoming: torch.Tensor | None = None
) -> torch.Tensor | None:
    """States [open_right, Hv, K, V] fp32 that leave the last sequences, from those that enter the
    first ones; None where only close_forward finds them, as final states of the main pass.

    Step by step what one call would do that has all shards, if shards are whole segments. Once,
    before close_forward and instead of leaving_summary.
    """
    assert not opened.asked, "leaving_state comes once"
    layout = opened.layout
    if not layout.plan.split or not layout.open_right:
        return None
    state = opened.external.new_empty(layout.open_right, *opened.external.shape[1:])
    _scan(opened, incoming, state, None, documents=layout.documents, mode=PASSES)
    opened.asked, opened.pending = True, 0
    return state


def norm_queries(opened: OpenForward, q: torch.Tensor) -> None:
    """The first part of close_forward, to be called apart while a state is on its way."""
    x, layout = opened.packed, opened.layout
    expected = (*opened.shape[:2], *x.k.shape[1:])
    if q.shape != expected or q.dtype != x.k.dtype:
        raise ValueError(f"q is {tuple(q.shape)} {q.dtype}; expected {expected} {x.k.dtype}, as k")
    opened.q = flat(q)
    if layout.query_norms is not None:
        layout.query_norms(opened.q, x.cu, opened.saved.qnorm)


def close_forward(
    opened: OpenForward,
    q: torch.Tensor,
    *,
    incoming: torch.Tensor | None = None,
    scale: float | None = None,
    output_final_state: bool = False,
    keep_states: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None, Saved]:
    """The rest of a forward: o, final states and Saved as chunk_gdn_forward returns them.

    incoming: [open_left, Hv, K, V] fp32, the states that enter the first sequences.
    keep_states: as in chunk_gdn_forward.
    """
    x, saved, layout = opened.packed, opened.saved, opened.layout
    open_left, tokens = layout.open_left, x.k.shape[0]
    if (incoming is None) != (open_left == 0):
        raise ValueError(
            f"incoming is {'missing' if incoming is None else 'given'}, open_left was {open_left}: "
            "states enter exactly the sequences that were opened for them"
        )
    if opened.q is None:
        norm_queries(opened, q)
    plan, states = layout.plan, saved.states
    if incoming is not None:
        check_states(incoming, (open_left, *states.shape[1:]), "incoming")
        incoming = incoming.contiguous()
    exact = 1 if open_left else 2  # segments of a document that need no scan
    if opened.pending and tokens > exact * plan.segment * CHUNK:
        _scan(opened, incoming, None, None, documents=opened.pending, mode=CLOSES)
    o = torch.empty_like(x.v)
    final = None
    if output_final_state:
        final = states.new_empty(layout.documents, *states.shape[1:])
    scale = KEY_DIM**-0.5 if scale is None else scale
    length = plan.segment * CHUNK
    if keep_states:
        saved = opened.saved = saved.keeping()
    if plan.split or layout.documents > 1 or tokens <= length:
        _main(
            opened, opened.q, x, saved, opened.initial, incoming, states, o, final, scale,
            layout.segments,
        )  # fmt: skip
    else:
        _one_after_another(opened, opened.q, incoming, o, final, scale, length)
    return o.view(opened.shape), final, saved


def _main(
    opened, q, x, saved, initial, incoming, states, o, final, scale, segments
) -> None:  # fmt: skip
    order, ordered = saved.ordering
    inputs = q, x.k, x.v, saved.a, saved.gate, saved.rnorm, saved.qnorm
    made = (
        x.cu, order, states if initial is None else initial, states if incoming is None else incoming,
        states, o, states if final is None else final,
    )  # fmt: skip
    sizes = (
        scale, saved.plan.segment, segments, ordered, int(initial is not None), int(final is not None),
        0 if incoming is None else opened.layout.open_left,
    )  # fmt: skip
    layout = opened.layout
    if saved.entering is not None:
        layout.recurrence_kept(*inputs, x.beta, *made, saved.entering, saved.vd, *sizes)
    elif layout.persistent:
        items = segments * opened.shape[-2] * opened.shape[-1] // (2 * CHUNK)
        layout.recurrence(*inputs, *made, opened.tickets, *sizes, min(items, layout.processors))
    elif layout.plan.halves == 2:
        layout.recurrence(*inputs, *made, *sizes, 0)
    else:
        layout.recurrence(*inputs, *made, *sizes)


def _one_after_another(opened, q, incoming, o, final, scale, length) -> None:
    """The main pass of one sequence, its segments in launches of their own: the states between them
    are those that a shard of this length would send, and the backward replays from them."""
    x, saved, initial = opened.packed, opened.saved, opened.initial
    tokens = q.shape[0]
    for i, begin in enumerate(range(0, tokens, length)):
        rows = slice(begin, begin + length)
        chunks = slice(begin // CHUNK, (begin + length) // CHUNK)
        state = saved.states[i : i + 1]
        part = Packed(x.k[rows], x.v[rows], x.g, x.beta[rows], (x.cu - begin).clamp(0, length))
        parts = ["a", "gate"]
        parts += ["rnorm", "qnorm"] if opened.layout.normalize else []
        parts += ["entering", "vd"] if saved.entering is not None else []
        cut = saved._replace(**{name: getattr(saved, name)[chunks] for name in parts})
        leaving = state if begin + length < tokens else final
        _main(
            opened, q[rows], part, cut, initial, incoming, saved.states, o[rows], leaving, scale, 1
        )
        initial, incoming = state, None


def chunk_gdn_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    keys_normalized: bool = False,
    keep_states: bool = False,
    max_seqlen: int | None = None,
    order: torch.Tensor | None = None,
    plan: Plan | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, Saved]:
    """Gated delta rule of packed or batched sequences (Gated DeltaNet, arXiv:2412.06464).

    Args:
        q, k: [B, T, Hk, 128] bf16 or fp16. v: [B, T, Hv, 128], Hv a multiple of Hk.
        g: [B, T, Hv] log gate, <= 0. beta: [B, T, Hv]. Both fp32, bf16 or fp16.
        scale: of the queries, 1/sqrt(K) if None.
        initial_state: [N, Hv, K, V] fp32. cu_seqlens: [N + 1] int32 on the device, B = 1.
        use_qk_l2norm_in_kernel: q and k are divided by sqrt(|x|^2 + 1e-6).
        keys_normalized: the keys have unit norm already and beta lies in [0, 1], so that gates may
            be truncated (summary.py); implied by use_qk_l2norm_in_kernel.
        keep_states: also save what a backward that follows at once would replay, 768 bytes a token
            and value head (recurrence_kept.py). `o` differs by rounding.
        max_seqlen: tokens of the longest document, or more: if that is short enough none is cut.
        order: [N] int32 on the device, the documents, longest first: so they are begun then.
        plan: segment lengths, chosen from the shapes if None.

    Returns:
        o [B, T, Hv, V], the final state [N, Hv, K, V] fp32 or None, and what a backward needs.

    Raises:
        ValueError: for shapes, dtypes or devices outside the above.
    """
    opened = open_forward(
        k, v, g, beta, initial_state=initial_state, cu_seqlens=cu_seqlens,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, keys_normalized=keys_normalized,
        max_seqlen=max_seqlen, order=order, plan=plan,
    )  # fmt: skip
    return close_forward(
        opened, q, scale=scale, output_final_state=output_final_state, keep_states=keep_states
    )


def chunk_gdn_summary(
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    keys_normalized: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """M [N, Hv, K, K] and S_ext [N, Hv, K, V], fp32, of every sequence: S_out = M S_in + S_ext.

    Arguments as in chunk_gdn_forward.
    """
    count = k.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    opened = open_forward(
        k, v, g, beta, cu_seqlens=cu_seqlens, open_left=count, open_right=count,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, keys_normalized=keys_normalized,
    )  # fmt: skip
    M, S = leaving_summary(opened, transition=True)
    assert M is not None
    return M, S
