"""The backward beside its peers, each from what its own forward kept.

FLA has no entry for the backward alone: it is timed in op=step.
"""

from typing import Any

import torch

from cp_gdn.kernels.backward import chunk_gdn_backward
from cp_gdn.kernels.forward import chunk_gdn_forward

from .timing import SCALE, TERABYTES, TFLOPS, Case, Options, peak, run, time_peers

NAMES = ("dq", "dk", "dv", "dg", "dbeta")


def ours(x, do, packing):
    saved = chunk_gdn_forward(*x, **packing, keys_normalized=True)[2]
    return lambda: chunk_gdn_backward(*x, saved, do, keys_normalized=True)


def flash_qla(x, do, offsets):
    """A call that returns dq, dk, dv, dbeta, dg, dh0."""
    from flash_qla import chunk_gated_delta_rule_bwd, chunk_gated_delta_rule_fwd

    q, k, v, g, beta = x
    options = {"scale": SCALE, "cu_seqlens": offsets}
    sums, A, *_, cache = chunk_gated_delta_rule_fwd(
        q, k, v, g, beta, enable_fwd_cp_cache=True, **options
    )
    return lambda: chunk_gated_delta_rule_bwd(
        q, k, v, sums, beta, A, do, dht=None, cp_cache=cache, **options
    )


def difference(ours, theirs) -> dict[str, float]:
    order = (theirs[0], theirs[1], theirs[2], theirs[4], theirs[3])
    pairs = zip(NAMES, ours[:5], order, strict=True)
    return {
        name: ((a.float() - b.float()).norm() / b.float().norm()).item() for name, a, b in pairs
    }


def measure(case: Case) -> dict[str, Any]:
    options, row, offsets = case.options, case.row(), case.offsets
    calls: dict[str, list] = {"cp_gdn": []}
    for seed in range(options.sets):
        x = case.draw(seed)
        do = torch.randn_like(x[2])
        calls["cp_gdn"].append(ours(x, do, case.packing))
        if "flash_qla" in options.peers:
            calls.setdefault("flash_qla", []).append(flash_qla(x, do, offsets))
    for name, each in calls.items():
        each[0]()
        row[f"{name}_peak_gib"] = peak(each[0])
    if "flash_qla" in calls:
        row["difference_from_flash_qla"] = difference(calls["cp_gdn"][0](), calls["flash_qla"][0]())
    time_peers(row, calls, options.replays)
    if "flash_qla_ms" in row:
        row["ratio_to_flash_qla"] = row["cp_gdn_ms"] / row["flash_qla_ms"]
    flops = case.tokens * case.shape[2] * (38 + 2 / case.ratio) * 2**20 / 64
    volume = case.tokens * case.shape[2] * (908 + 1024 / case.ratio)
    row["tensor_share"] = flops / row["cp_gdn_ms"] / 1e9 / TFLOPS
    row["bandwidth_share"] = volume / row["cp_gdn_ms"] / 1e9 / TERABYTES
    return row


def main(arguments: list[str]) -> None:
    run(arguments, Options(op="backward", out="docs/results/backward-h200"), measure)
