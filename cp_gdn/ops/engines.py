"""Which implementation an operator takes: the kernels of :mod:`cp_gdn.kernels`, or PyTorch.

The kernels take 16-bit activations on Hopper; PyTorch takes everything, and is what they are tested
against.
"""

import functools
import importlib.util

import torch
from torch import Tensor

ENGINES = ("auto", "torch", "tilelang")


def check_engine(engine: str) -> None:
    """Raise ValueError unless ``engine`` is one of ENGINES."""
    if engine not in ENGINES:
        raise ValueError(f"engine={engine!r} is unknown; choose torch, tilelang or auto")


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) == (9, 0)


@functools.cache
def _has_tilelang() -> bool:
    return importlib.util.find_spec("tilelang") is not None


def obstacle(x: Tensor) -> str | None:
    """Why no kernel can take activations such as ``x``, or None."""
    if not x.is_cuda or not _is_hopper(x.device):
        return "it runs on Hopper GPUs (compute capability 9.0)"
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bf16 and fp16, not {x.dtype}"
    if not _has_tilelang():
        return "TileLang is not installed (pip install 'cp-gdn[hopper]')"
    return None


def use_kernels(engine: str, reason: str | None) -> bool:
    """Whether the kernels run, where ``reason`` says why they cannot (None: they can).

    Raises:
        ValueError: an unknown engine, or "tilelang" for a call that it cannot take.
    """
    check_engine(engine)
    if engine == "tilelang" and reason is not None:
        raise ValueError(
            f'engine="tilelang" cannot take this call: {reason}; use engine="torch", or "auto", '
            "which picks it"
        )
    return engine != "torch" and reason is None
