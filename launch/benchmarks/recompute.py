"""A step under activation checkpointing: a forward, the same again, and the backward, on the kernels.

The second forward keeps what the backward would replay (`keep`), or nothing (`replay`), whatever
`keeping_pays` (kernels/backward_opened.py) says of the shape; the rows tell. Peak memory is that of the second
forward and the backward, beyond the inputs, results included.
"""

from typing import Any

import torch

from cp_gdn.kernels.backward import chunk_gdn_backward, keeping_pays
from cp_gdn.kernels.forward import chunk_gdn_forward, open_forward

from .timing import Case, Options, peak, run, time_peers


def steps(x, do, packing, keep):
    """The second forward with the backward, and all of it."""

    def forward(**how):
        return chunk_gdn_forward(*x, **packing, keys_normalized=True, **how)

    def again():
        o, _, saved = forward(keep_states=keep)
        return o, chunk_gdn_backward(*x, saved, do, keys_normalized=True)

    def step():
        return forward()[0], again()

    return again, step


def measure(case: Case) -> dict[str, Any]:
    row, packing = case.row(), case.packing
    calls: dict[str, list] = {"replay": [], "keep": []}
    for seed in range(case.options.sets):
        x = case.draw(seed)
        do = torch.randn_like(x[2])
        for name, each in calls.items():
            again, step = steps(x, do, packing, name == "keep")
            each.append(step)
            if seed == 0:
                again()
                row[f"{name}_peak_gib"] = peak(again)
    row["keeping_pays"] = keeping_pays(open_forward(*x[1:], **packing))
    time_peers(row, calls, case.options.replays)
    row["ratio_to_replay"] = row["keep_ms"] / row["replay_ms"]
    return row


def main(arguments: list[str]) -> None:
    run(arguments, Options(op="recompute", peers=[], out="docs/results/recompute-h200"), measure)
