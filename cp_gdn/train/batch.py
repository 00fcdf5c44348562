"""From packs to what the layers take: this rank's slice on the device, and the context that says how it was cut."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cp_gdn import build_cp_context
from cp_gdn.context import CPContext
from cp_gdn.train.data import IGNORE_INDEX, Pack
from cp_gdn.train.topology import Topology


@dataclass(frozen=True)
class Batch:
    """input_ids, labels: [1, T_local] on the device; num_valid: labels of this rank that count, a device scalar."""

    input_ids: Tensor
    labels: Tensor
    num_valid: Tensor
    context: CPContext


def place(pack: Pack, topology: Topology, exchange: str) -> Batch:
    """Slice a pack by this rank's context. The labels were shifted in the pack, before this cut."""
    device = topology.device
    context = build_cp_context(
        topology.cp_group,
        seq_len=len(pack.input_ids),
        cu_seqlens=pack.cu_seqlens,
        exchange=exchange,
        device=device,
    )
    span = slice(context.start, context.end)
    ids, labels = (_to_device(x[None, span], device) for x in (pack.input_ids, pack.labels))
    return Batch(ids, labels, (labels != IGNORE_INDEX).sum().float(), context)


def _to_device(x: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)
