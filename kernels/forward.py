"""The forward of the gated delta rule on Hopper: functions to call.

    prepare -> [summary -> scan] -> recurrence

The bracket runs where documents are cut into segments (plan.py) or continue on other ranks. For the
latter the forward comes in three stages, between which states travel:

    open_forward      prepare, and the summaries of all segments
    leaving_summary   S_out = M S_in + S_ext of the sequences that go on elsewhere
    close_forward     from the states that came in: scan and recurrence

Nothing here reads the device: the calls can be captured in a CUDA graph, and metadata of packed
documents is found by the kernels.
"""

from dataclasses import dataclass

import torch

from .common import CHUNK, slots
from .inputs import DTYPES, KEY_DIM, Packed, check, check_states, pack
from .plan import Plan, plan_segments
from .prepare import prepare
from .recurrence import recurrence
from .scan import COLUMNS, scan
from .summary import summary


@dataclass(frozen=True)
class Saved:
    """What a backward needs beside the inputs: 132 bytes a token and value head, and 128 KiB a
    segment and head. `a` and `gate` are read as they are; preparing them again would cost as much
    time as writing and reading them, and nothing else of the forward is worth its bytes. Where
    nothing was summarised the last two are placeholders."""

    a: torch.Tensor  # [NC, Hv, 64, 64], see prepare.py
    gate: torch.Tensor  # [NC, Hv, 64] fp32
    rnorm: torch.Tensor  # [NC, Hk, 64] fp32 if the kernels normalise, else a placeholder
    states: torch.Tensor  # [NS, Hv, K, V] fp32: the state that leaves each segment but the last
    cu_seqlens: torch.Tensor  # [N + 1] int32
    maps: torch.Tensor  # [NS, Hv, 2, K, K] bf16: M of each segment, high and low half (summary.py)
    live: torch.Tensor  # [NS, Hv] int32: whether its M was written
    plan: Plan


@dataclass
class OpenForward:
    """A forward between open_forward and close_forward."""

    packed: Packed
    shape: tuple[int, ...]  # of v and o
    initial: torch.Tensor | None
    open_left: int
    open_right: int
    normalize: bool
    saved: Saved
    scanned: bool = False  # documents that begin here, by leaving_summary


def _prepare(x: Packed, normalize: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens, key_heads = x.k.shape[:2]
    value_heads = x.v.shape[1]
    chunks = slots(tokens, x.documents, CHUNK)
    a = torch.empty(chunks, value_heads, CHUNK, CHUNK, dtype=x.k.dtype, device=x.k.device)
    gate = torch.empty(chunks, value_heads, CHUNK, dtype=torch.float32, device=x.k.device)
    rnorm = gate.new_empty(chunks if normalize else 1, key_heads, CHUNK)
    kernel = prepare(
        ratio=value_heads // key_heads,
        dtype=DTYPES[x.k.dtype],
        gate_dtype=DTYPES[x.g.dtype],
        beta_dtype=DTYPES[x.beta.dtype],
        normalize=normalize,
    )
    kernel(x.k, x.g, x.beta, x.cu, a, gate, rnorm, x.bits)
    return a, gate, rnorm


def _scan(opened: OpenForward, incoming, state, transition, *, documents, closing) -> None:
    x, saved, tiles = opened.packed, opened.saved, opened.shape[-1] // COLUMNS
    states = saved.states
    scan()(
        states, saved.maps, saved.live, x.cu,
        states if opened.initial is None else opened.initial,
        states if incoming is None else incoming,
        states if state is None else state,
        states if transition is None else transition,
        saved.plan.segment, tiles if transition is None else 2 * tiles, documents,
        int(opened.initial is not None), opened.open_left, opened.open_right, int(closing),
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
    plan: Plan | None = None,
) -> OpenForward:
    """All of a forward that needs neither the queries nor states of other ranks.

    Args:
        open_left: how many sequences, the first ones, get their state later: close_forward's
            `incoming`. Their `initial_state` is not read.
        open_right: how many, the last ones, pass their state on: leaving_summary.

    The other arguments are those of chunk_gdn_forward.
    """
    check(k, v, g, beta, cu_seqlens, initial_state)
    x = pack(k, v, g, beta, cu_seqlens)
    for name, count in (("open_left", open_left), ("open_right", open_right)):
        if not 0 <= count <= x.documents:
            raise ValueError(f"{name} = {count}; there are {x.documents} sequences: 0 to that many")
    tokens, value_heads, value_dim = x.v.shape
    normalize = use_qk_l2norm_in_kernel
    if plan is None:
        plan = plan_segments(
            tokens,
            x.documents,
            value_heads,
            value_dim,
            packed=cu_seqlens is not None and x.documents > 1,
            processors=torch.cuda.get_device_properties(k.device).multi_processor_count,
            summarised=open_right > 0,
        )
    if initial_state is not None:
        initial_state = initial_state.contiguous()
    a, gate, rnorm = _prepare(x, normalize)
    count = slots(tokens, x.documents, plan.segment * CHUNK)
    states = gate.new_empty(count, value_heads, KEY_DIM, value_dim)
    used = count if plan.split or open_right else 1
    maps = torch.empty(
        used, value_heads, 2, KEY_DIM, KEY_DIM, dtype=torch.bfloat16, device=k.device
    )
    live = torch.empty(used, value_heads, dtype=torch.int32, device=k.device)
    if plan.split or open_right:
        summary(dtype=DTYPES[k.dtype], normalize=normalize)(
            x.k, x.v, a, gate, rnorm, x.cu, states if initial_state is None else initial_state,
            states, maps, live, plan.segment, x.bits, int(initial_state is not None),
            int(normalize or keys_normalized), open_left, open_right,
        )  # fmt: skip
    saved = Saved(a, gate, rnorm, states, x.cu, maps, live, plan)
    return OpenForward(x, tuple(v.shape), initial_state, open_left, open_right, normalize, saved)


def leaving_summary(
    opened: OpenForward, *, transition: bool
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """What the last `open_right` sequences do to a state: S_out = M S_in + S_ext.

    Returns M [open_right, Hv, K, K], or None without `transition`, and S_ext [open_right, Hv, K, V],
    both fp32. Where a sequence begins here, S_ext is its state and M zero. With keys of unit norm M
    is exactly zero for heads whose gates decay below 2^-24 over one of the sequence's segments.
    Once, and before close_forward.
    """
    assert not opened.scanned, "leaving_summary comes once"
    x, count, gate = opened.packed, opened.open_right, opened.saved.gate
    heads, value_dim = opened.shape[-2:]
    state = gate.new_empty(count, heads, KEY_DIM, value_dim)
    M = gate.new_empty(count, heads, KEY_DIM, KEY_DIM) if transition else None
    if count:
        _scan(opened, None, state, M, documents=x.documents, closing=False)
        opened.scanned = True
    return M, state


def close_forward(
    opened: OpenForward,
    q: torch.Tensor,
    *,
    incoming: torch.Tensor | None = None,
    scale: float | None = None,
    output_final_state: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None, Saved]:
    """The rest of a forward: o, final states and Saved as chunk_gdn_forward returns them.

    incoming: [open_left, Hv, K, V] fp32, the states that enter the first sequences.
    """
    x, saved, open_left = opened.packed, opened.saved, opened.open_left
    value_heads, value_dim = opened.shape[-2:]
    batch, tokens = opened.shape[:2]
    if (incoming is None) != (open_left == 0):
        raise ValueError(
            f"incoming is {'missing' if incoming is None else 'given'}, open_left was {open_left}: "
            "states enter exactly the sequences that were opened for them"
        )
    if q.shape != (batch, tokens, *x.k.shape[1:]) or q.dtype != x.k.dtype:
        raise ValueError(
            f"q is {tuple(q.shape)} {q.dtype}; expected {(batch, tokens, *x.k.shape[1:])} "
            f"{x.k.dtype}, as k"
        )
    if incoming is not None:
        check_states(incoming, (open_left, value_heads, KEY_DIM, value_dim), "incoming")
        incoming = incoming.contiguous()
    initial, plan, states = opened.initial, saved.plan, saved.states
    documents = open_left if opened.scanned else x.documents
    exact = 1 if open_left else 2  # segments of a document that need no scan
    if plan.split and documents and tokens > exact * plan.segment * CHUNK:
        _scan(opened, incoming, None, None, documents=documents, closing=True)
    o = torch.empty_like(x.v)
    final = None
    if output_final_state:
        final = states.new_empty(x.documents, value_heads, KEY_DIM, value_dim)
    kernel = recurrence(
        dtype=DTYPES[x.k.dtype],
        value_dim=value_dim,
        halves=plan.halves,
        normalize=opened.normalize,
    )
    kernel(
        q.reshape(x.k.shape).contiguous(), x.k, x.v, saved.a, saved.gate, saved.rnorm, x.cu,
        states if initial is None else initial, states if incoming is None else incoming,
        states, o, states if final is None else final,
        KEY_DIM**-0.5 if scale is None else scale, plan.segment, x.bits,
        int(initial is not None), int(output_final_state), open_left,
    )  # fmt: skip
    return o.view(opened.shape), final, saved


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
        plan: segment lengths, chosen from the shapes if None.

    Returns:
        o [B, T, Hv, V], the final state [N, Hv, K, V] fp32 or None, and what a backward needs.

    Raises:
        ValueError: for shapes, dtypes or devices outside the above.
    """
    opened = open_forward(
        k, v, g, beta, initial_state=initial_state, cu_seqlens=cu_seqlens,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, keys_normalized=keys_normalized, plan=plan,
    )  # fmt: skip
    return close_forward(opened, q, scale=scale, output_final_state=output_final_state)


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
