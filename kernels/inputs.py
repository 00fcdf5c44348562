"""What a call of the kernels is given: checks, and batch and time in one axis."""

from typing import NamedTuple

import torch

KEY_DIM = 128
DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


class Packed(NamedTuple):
    """Inputs with batch and time in one axis."""

    k: torch.Tensor  # [L, Hk, K]
    v: torch.Tensor  # [L, Hv, V]
    g: torch.Tensor  # [L, Hv]
    beta: torch.Tensor  # [L, Hv]
    cu: torch.Tensor  # [N + 1] int32


def check_states(states, expected: tuple[int, ...], name: str) -> None:
    if states.shape != expected or states.dtype != torch.float32:
        raise ValueError(
            f"{name} is {tuple(states.shape)} {states.dtype}; expected {expected} in fp32"
        )


def check(k, v, g, beta, cu_seqlens, initial_state) -> None:
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
        check_states(initial_state, (documents, value_heads, key_dim, value_dim), "initial_state")


def flat(x: torch.Tensor) -> torch.Tensor:
    """Batch and time in one axis."""
    return x.flatten(0, 1).contiguous()


def pack(k, v, g, beta, cu_seqlens) -> Packed:
    batch, tokens = k.shape[:2]
    if cu_seqlens is None:
        cu = torch.arange(batch + 1, device=k.device, dtype=torch.int32) * tokens
    else:
        cu = cu_seqlens.contiguous()
    return Packed(flat(k), flat(v), flat(g), flat(beta), cu)
