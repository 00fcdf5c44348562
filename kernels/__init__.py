"""Hopper kernels of the gated delta rule, written in TileLang.

They know tensors and shapes, nothing of ranks: no process groups, no collectives, no imports from
the package around them. `forward.py` holds the functions to call, the other modules one kernel
each. docs/kernels.md explains the data flow and what was measured.
"""
