"""The forward beside its peers: ``python launch/bench.py op=forward peers=[flash_qla,flashinfer,fla]``

flash_qla: its training and its inference forward; the faster counts. flashinfer: the inference forward
of its own choice, which keeps nothing for a backward and is given exp(g), made outside the time.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from cp_gdn.kernels.forward import chunk_gdn_forward

from .timing import SCALE, TERABYTES, TFLOPS, Case, Options, run, time_peers


def flash_qla(inputs, cu, train: bool):
    from flash_qla import chunk_gated_delta_rule_fwd

    return [
        lambda x=x: chunk_gated_delta_rule_fwd(*x, scale=SCALE, cu_seqlens=cu, is_train=train)
        for x in inputs
    ]


def fla(inputs, cu):
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    offsets = None if cu is None else cu.long()  # one tensor: FLA reads it once on the host
    return [lambda x=x: chunk_gated_delta_rule(*x, scale=SCALE, cu_seqlens=offsets) for x in inputs]


def flashinfer(inputs, cu, longest: int):
    from flashinfer.gdn_prefill import chunk_gated_delta_rule

    calls = []
    for q, k, v, g, beta in ([x[0] for x in each] for each in inputs):
        alpha, o = g.float().exp(), torch.empty_like(v)
        given = {"scale": SCALE, "cu_seqlens": cu, "max_seqlen": longest, "output": o}
        calls.append(partial(chunk_gated_delta_rule, q, k, v, alpha, beta, **given))
    return calls


def distance(a: Tensor, b: Tensor) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def measure(case: Case) -> dict[str, Any]:
    options, row, offsets = case.options, case.row(), case.offsets
    inputs = [case.draw(seed) for seed in range(options.sets)]
    packed = None if case.documents == 1 else offsets
    ours = {**case.packing, "keys_normalized": True}
    calls = {"cp_gdn": [partial(chunk_gdn_forward, *x, **ours) for x in inputs]}
    if "flash_qla" in options.peers:
        calls["flash_qla_train"] = flash_qla(inputs, offsets, True)
        calls["flash_qla_inference"] = flash_qla(inputs, offsets, False)
    if "flashinfer" in options.peers:
        calls["flashinfer"] = flashinfer(inputs, offsets, case.longest)
    if "fla" in options.peers:
        calls["fla"] = fla(inputs, packed)
    time_peers(row, calls, options.replays)
    o = calls["cp_gdn"][0]()[0]
    for peer, output in (("flash_qla", 2), ("flashinfer", None)):
        names = [f"{name}_ms" for name in calls if name.startswith(peer)]
        times = [row[name] for name in names if name in row]
        if times:
            theirs = calls[names[0].removesuffix("_ms")][0]()
            theirs = theirs[None] if output is None else theirs[output]
            row[f"difference_from_{peer}"] = distance(o, theirs)
            row[f"ratio_to_{peer}"] = row["cp_gdn_ms"] / min(times)
    flops = case.tokens * case.shape[2] * (8 + 2 / case.ratio) * 2**20 / 64
    volume = case.tokens * case.shape[2] * (520 + 512 / case.ratio)
    row["tensor_share"] = flops / row["cp_gdn_ms"] / 1e9 / TFLOPS
    row["bandwidth_share"] = volume / row["cp_gdn_ms"] / 1e9 / TERABYTES
    row["us_per_chunk"] = row["cp_gdn_ms"] * 1e3 / (case.tokens / 64)
    return row


def main(arguments: list[str]) -> None:
    run(arguments, Options(op="forward", out="docs/results/forward-h200"), measure)
