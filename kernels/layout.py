"""What forwards of the same shapes, dtypes and options have in common: their sizes, and their kernels.

Found at the first of such calls, so that the host of a later one only makes tensors and launches.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .common import CHUNK, cuts, slots
from .inputs import DTYPES, KEY_DIM, check
from .launch import KEPT, multiprocessors, ready
from .plan import Plan, entire_jobs, longest_whole, plan_segments, takes_turns
from .prepare import prepare
from .qnorm import query_norms
from .recurrence import recurrence
from .recurrence_alone import recurrence_alone
from .scan import scan
from .summary import summary

MOST_CHUNKS = 65535  # of a launch's second grid dimension


@dataclass(frozen=True, eq=False)
class Layout:
    documents: int
    plan: Plan
    segments: int  # slots of the main pass
    whole: bool  # they are documents
    persistent: bool  # the main pass takes them in turn
    blocks: int  # summarised segments that are not a document's last, at most
    processors: int  # multiprocessors of the GPU
    normalize: bool
    open_left: int
    open_right: int
    a: tuple[int, ...]  # shapes of what the forward makes
    gate: tuple[int, ...]
    rnorm: tuple[int, ...]
    states: tuple[int, ...]
    external: tuple[int, ...] | None  # None: they lie in `states`
    maps: tuple[int, ...]
    live: tuple[int, ...]
    summarised: bool
    keeps_maps: bool  # for the backward
    prepare: Callable[..., None]
    query_norms: Callable[..., None] | None
    summary: Callable[..., None] | None
    summary_sizes: tuple[int, ...]  # its last arguments
    scan: Callable[..., None] | None
    recurrence: Callable[..., None]
    kept: dict[str, Any]  # options of a main pass that keeps states

    @cached_property
    def recurrence_kept(self) -> Callable[..., None]:
        return ready(recurrence_alone, **self.kept)


_layouts: dict[tuple[Any, ...], Layout] = {}


def layout_of(
    k, v, g, beta, cu_seqlens, initial_state, *, open_left, open_right, normalize, keys_normalized,
    summarise, plan, max_seqlen,
) -> Layout:  # fmt: skip
    """The layout of open_forward's arguments, whose checks it makes; ValueError if they do not fit."""
    if plan is None and max_seqlen is not None and not (open_left or open_right):
        plan = _plan_of_whole(k, v, cu_seqlens, max_seqlen)
    kind = (
        k.device, k.shape, v.shape, g.shape, beta.shape, k.dtype, v.dtype, g.dtype, beta.dtype,
        None if cu_seqlens is None else (cu_seqlens.device, cu_seqlens.shape, cu_seqlens.dtype),
        None if initial_state is None else (initial_state.shape, initial_state.dtype),
        open_left, open_right, normalize, keys_normalized, summarise, plan,
    )  # fmt: skip
    layout = _layouts.get(kind)
    if layout is None:
        check(k, v, g, beta, cu_seqlens, initial_state)
        documents = k.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        for name, count in (("open_left", open_left), ("open_right", open_right)):
            if not 0 <= count <= documents:
                raise ValueError(
                    f"{name} = {count}; there are {documents} sequences: 0 to that many"
                )
        layout = _lay_out(
            k, v, g, beta, documents, cu_seqlens is not None, initial_state is not None, open_left,
            open_right, normalize, keys_normalized, summarise, plan,
        )  # fmt: skip
        if len(_layouts) == KEPT:
            _layouts.clear()
        _layouts[kind] = layout
    return layout


def _plan(k, v, documents: int, packed: bool) -> Plan:
    return plan_segments(
        k.shape[0] * k.shape[1], documents, *v.shape[2:], packed=packed and documents > 1,
        processors=multiprocessors(k.device),
    )  # fmt: skip


def _plan_of_whole(k, v, cu_seqlens, max_seqlen: int) -> Plan | None:
    """Of packed documents that are better not cut, or None."""
    if cu_seqlens is None or k.ndim != 4 or v.ndim != 4 or cu_seqlens.numel() <= 2:
        return None
    tokens, documents = k.shape[1], cu_seqlens.numel() - 1
    plan = _plan(k, v, documents, True)
    most = longest_whole(plan, tokens, *v.shape[2:], processors=multiprocessors(k.device))
    if max_seqlen > most * CHUNK:
        return None
    return Plan(tokens // CHUNK + 1, plan.halves, False)


def _lay_out(
    k, v, g, beta, documents, packed, given, left, right, normalize, keys_normalized, summarise, plan
) -> Layout:  # fmt: skip
    tokens = k.shape[0] * k.shape[1]
    key_heads, (value_heads, value_dim) = k.shape[2], v.shape[2:]
    processors = multiprocessors(k.device)
    if plan is None:
        plan = _plan(k, v, documents, packed)
    chunks = slots(tokens, documents, CHUNK)
    if chunks > MOST_CHUNKS:
        raise ValueError(
            f"{tokens} tokens in {documents} documents are more than {MOST_CHUNKS} chunks of "
            f"{CHUNK}, the most of one call: use more ranks, or fewer sequences a call"
        )
    summarised = plan.split or (summarise and right > 0)
    blocks = cuts(tokens, plan.summarised * CHUNK)
    count = max(1, blocks + right) if summarised else 1
    known = int(blocks > 0 and left == 0 and documents == 1)
    jobs = value_heads * (2 * (blocks + right) - known)
    dtype = DTYPES[k.dtype]
    options = {"dtype": dtype, "value_dim": value_dim, "normalize": normalize}
    persistent = plan.halves == 2 and takes_turns(tokens, documents)
    return Layout(
        documents=documents,
        plan=plan,
        segments=slots(tokens, documents, plan.segment * CHUNK),
        whole=packed and not plan.split and documents > 1,
        persistent=persistent,
        blocks=blocks,
        processors=processors,
        normalize=normalize,
        open_left=left,
        open_right=right,
        a=(chunks, value_heads, CHUNK, CHUNK),
        gate=(chunks, value_heads, CHUNK),
        rnorm=(chunks if normalize else 1, key_heads, CHUNK),
        states=(
            count if plan.split else 1 if documents > 1 else max(1, cuts(tokens, plan.segment * CHUNK)),
            value_heads, KEY_DIM, value_dim,
        ),
        external=(count, value_heads, KEY_DIM, value_dim) if summarised and not plan.split else None,
        maps=(count, value_heads, 2, KEY_DIM, KEY_DIM),
        live=(count, value_heads),
        summarised=summarised,
        # without segments of the main pass their only use is to compose S_ext
        keeps_maps=not summarised or plan.split or left > 0,
        prepare=ready(
            prepare,
            ratio=value_heads // key_heads,
            dtype=dtype,
            gate_dtype=DTYPES[g.dtype],
            beta_dtype=DTYPES[beta.dtype],
            normalize=normalize,
        ),
        query_norms=ready(query_norms, dtype=dtype) if normalize else None,
        summary=(
            ready(summary, dtype=dtype, normalize=normalize)
            if summarised and blocks + right > 0
            else None
        ),
        summary_sizes=(
            plan.summarised, int(given), int(normalize or keys_normalized), left, right,
            blocks, known, jobs, entire_jobs(jobs, processors),
        ),
        scan=ready(scan) if summarised else None,
        recurrence=ready(recurrence_alone, **options)
        if plan.halves == 1
        else ready(recurrence, persistent=persistent, **options),
        kept={
            "dtype": dtype, "beta_dtype": DTYPES[beta.dtype], "value_dim": value_dim,
            "normalize": normalize, "keep": True,
        },
    )  # fmt: skip
