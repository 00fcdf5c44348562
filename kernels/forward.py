"""The forward of the gated delta rule on Hopper, and summaries of whole shards: functions to call.

    prepare -> [summary -> scan] -> recurrence

The bracket runs where documents are cut into segments (plan.py). Nothing here reads the device: the
calls can be captured in a CUDA graph, and metadata of packed documents is found by the kernels.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from .common import CHUNK, slots
from .plan import Plan, plan_segments
from .prepare import prepare
from .recurrence import recurrence
from .scan import scan
from .summary import summary

KEY_DIM = 128
MOST_CHUNKS = 65535  # of a launch's second grid dimension
SUMMARY_PARTS = 16  # segments that a whole shard's summary is composed of, at most
DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


@dataclass(frozen=True)
class Saved:
    """What a backward needs beside the inputs: 132 bytes a token and value head, and 128 KiB a
    segment and head. `a` and `gate` are read as they are; preparing them again would cost as much
    time as writing and reading them, and nothing else of the forward is worth its bytes. Without
    `plan.split` the last two are placeholders."""

    a: torch.Tensor  # [NC, Hv, 64, 64], see prepare.py
    gate: torch.Tensor  # [NC, Hv, 64] fp32
    rnorm: torch.Tensor  # [NC, Hk, 64] fp32 if the kernels normalise, else a placeholder
    states: torch.Tensor  # [NS, Hv, K, V] fp32: the state that leaves each segment but the last
    cu_seqlens: torch.Tensor  # [N + 1] int32
    maps: torch.Tensor  # [NS, Hv, 2, K, K] bf16: M of each segment, high and low half (summary.py)
    live: torch.Tensor  # [NS, Hv] int32: whether its M was written
    plan: Plan


class _Packed(NamedTuple):
    """Inputs with batch and time in one axis."""

    k: torch.Tensor  # [L, Hk, K]
    v: torch.Tensor  # [L, Hv, V]
    g: torch.Tensor  # [L, Hv]
    beta: torch.Tensor  # [L, Hv]
    cu: torch.Tensor  # [N + 1] int32
    documents: int

    @property
    def bits(self) -> int:
        return (self.documents - 1).bit_length()


def _check(k, v, g, beta, cu_seqlens, initial_state, q=None) -> None:
    batch, tokens, key_heads, key_dim = k.shape
    value_heads, value_dim = v.shape[2:]
    if not k.is_cuda:
        raise ValueError(f"the inputs are on {k.device}; the kernels need a Hopper GPU")
    if key_dim != KEY_DIM or value_dim != 128:
        raise ValueError(f"K = {key_dim}, V = {value_dim}; the kernels take K = V = 128")
    if k.dtype not in (torch.bfloat16, torch.float16) or v.dtype != k.dtype:
        raise ValueError(
            f"k is {k.dtype} and v {v.dtype}; the kernels take bf16 or fp16, one for all"
        )
    if q is not None and (q.shape != k.shape or q.dtype != k.dtype):
        raise ValueError(
            f"q is {tuple(q.shape)} {q.dtype}, k {tuple(k.shape)} {k.dtype}: make them equal"
        )
    if value_heads % key_heads:
        raise ValueError(f"{value_heads} value heads are no multiple of {key_heads} key heads")
    for name, x in (("g", g), ("beta", beta)):
        if x.shape != (batch, tokens, value_heads) or x.dtype not in DTYPES:
            raise ValueError(
                f"{name} is {tuple(x.shape)} {x.dtype}; expected {(batch, tokens, value_heads)} in "
                "fp32, bf16 or fp16"
            )
    if cu_seqlens is not None:
        if batch != 1:
            raise ValueError(f"cu_seqlens needs B = 1, got B = {batch}: flatten the batch")
        if cu_seqlens.dtype != torch.int32 or cu_seqlens.device != k.device:
            raise ValueError(
                f"cu_seqlens is {cu_seqlens.dtype} on {cu_seqlens.device}; expected int32 on {k.device}"
            )
    if initial_state is not None:
        documents = batch if cu_seqlens is None else cu_seqlens.numel() - 1
        expected = (documents, value_heads, key_dim, value_dim)
        if tuple(initial_state.shape) != expected or initial_state.dtype != torch.float32:
            raise ValueError(
                f"initial_state is {tuple(initial_state.shape)} {initial_state.dtype}; expected "
                f"{expected} in fp32"
            )


def _pack(k, v, g, beta, cu_seqlens) -> _Packed:
    batch, tokens = k.shape[:2]
    if cu_seqlens is None:
        cu = torch.arange(batch + 1, device=k.device, dtype=torch.int32) * tokens
    else:
        cu = cu_seqlens.contiguous()
    k, v, g, beta = (x.reshape(batch * tokens, *x.shape[2:]).contiguous() for x in (k, v, g, beta))
    documents = cu.numel() - 1
    if slots(batch * tokens, documents, CHUNK) > MOST_CHUNKS:
        raise ValueError(
            f"{batch * tokens} tokens in {documents} documents are more than {MOST_CHUNKS} chunks of "
            f"{CHUNK}, the most of one call: use more ranks, or fewer sequences a call"
        )
    return _Packed(k, v, g, beta, cu, documents)


def _prepare(x: _Packed, normalize: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
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


def _summarise(x: _Packed, a, gate, rnorm, segment, initial, *, normalize, truncate, whole):
    """states, maps and live of every segment slot; see summary.py."""
    value_heads, value_dim = x.v.shape[1:]
    count = slots(x.v.shape[0], x.documents, segment * CHUNK)
    states = gate.new_empty(count, value_heads, KEY_DIM, value_dim)
    maps = torch.empty(
        count, value_heads, 2, KEY_DIM, KEY_DIM, dtype=torch.bfloat16, device=gate.device
    )
    live = torch.empty(count, value_heads, dtype=torch.int32, device=gate.device)
    kernel = summary(dtype=DTYPES[x.k.dtype], normalize=normalize)
    kernel(
        x.k, x.v, a, gate, rnorm, x.cu, states if initial is None else initial, states, maps, live,
        segment, x.bits, int(initial is not None), int(truncate), int(whole),
    )  # fmt: skip
    return states, maps, live


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
    _check(k, v, g, beta, cu_seqlens, initial_state, q)
    x = _pack(k, v, g, beta, cu_seqlens)
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
        )
    if initial_state is not None:
        initial_state = initial_state.contiguous()
    a, gate, rnorm = _prepare(x, normalize)
    if plan.split:
        states, maps, live = _summarise(
            x, a, gate, rnorm, plan.segment, initial_state, normalize=normalize,
            truncate=normalize or keys_normalized, whole=False,
        )  # fmt: skip
        if cu_seqlens is not None or 2 * plan.segment * CHUNK < tokens // x.documents:
            scan()(states, maps, live, x.cu, states, states, plan.segment)
    else:
        count = slots(tokens, x.documents, plan.segment * CHUNK)
        states = gate.new_empty(count, value_heads, KEY_DIM, value_dim)
        maps = torch.empty(
            1, value_heads, 2, KEY_DIM, KEY_DIM, dtype=torch.bfloat16, device=k.device
        )
        live = torch.empty(1, value_heads, dtype=torch.int32, device=k.device)
    o = torch.empty_like(x.v)
    final = None
    if output_final_state:
        final = gate.new_empty(x.documents, value_heads, KEY_DIM, value_dim)
    kernel = recurrence(
        dtype=DTYPES[k.dtype], value_dim=value_dim, halves=plan.halves, normalize=normalize
    )
    kernel(
        q.reshape(x.k.shape).contiguous(), x.k, x.v, a, gate, rnorm, x.cu,
        states if initial_state is None else initial_state, states, o,
        states if final is None else final,
        KEY_DIM**-0.5 if scale is None else scale, plan.segment, x.bits,
        int(initial_state is not None), int(output_final_state),
    )  # fmt: skip
    saved = Saved(a, gate, rnorm, states, x.cu, maps, live, plan)
    return o.view(v.shape), final, saved


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

    Arguments as in chunk_gdn_forward. Where the keys have unit norm, M is exactly zero for heads
    whose gates decay below 2^-24 over one of the segments that the sequence is summarised in.
    """
    _check(k, v, g, beta, cu_seqlens, None)
    x = _pack(k, v, g, beta, cu_seqlens)
    tokens, value_heads, value_dim = x.v.shape
    normalize = use_qk_l2norm_in_kernel
    a, gate, rnorm = _prepare(x, normalize)
    chunks = -(-tokens // CHUNK)
    processors = torch.cuda.get_device_properties(k.device).multi_processor_count
    parts = min(SUMMARY_PARTS, max(1, processors // (2 * value_heads)) * 2)
    segment = max(1, -(-chunks // parts))
    states, maps, live = _summarise(
        x, a, gate, rnorm, segment, None, normalize=normalize,
        truncate=normalize or keys_normalized, whole=True,
    )  # fmt: skip
    total = gate.new_empty(x.documents, value_heads, KEY_DIM, value_dim)
    transition = gate.new_empty(x.documents, value_heads, KEY_DIM, KEY_DIM)
    scan(whole=True)(states, maps, live, x.cu, total, transition, segment)
    return transition, total
