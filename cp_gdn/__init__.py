"""Context parallelism for Gated DeltaNet: sequences too long for one GPU, cut over many."""

from .context import CPContext, build_cp_context
from .layers.gated_delta_net import CPGatedDeltaNet
from .ops.gated_delta_rule import chunk_gated_delta_rule
from .virtual import run_virtual_ranks

__all__ = [
    "CPContext",
    "CPGatedDeltaNet",
    "build_cp_context",
    "chunk_gated_delta_rule",
    "run_virtual_ranks",
]
__version__ = "0.1.0"
