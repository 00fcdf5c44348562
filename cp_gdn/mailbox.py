"""Messages of a few megabytes between the GPUs of one host, without a kernel.

Every rank has a box for each peer in its memory, which the peer maps (CUDA IPC). In stream order

    sender      waits until its box at the peer is empty, copies into it, sets the flag "full" there
    receiver    waits for "full", clears it, copies out, sets the flag "empty" at the sender

by copy engines and by waits and writes of the stream itself. So a message neither needs a multiprocessor nor holds one
while it waits, as NCCL's kernels do, and costs the host three calls of the driver a side. It can be captured in a CUDA
graph. Whoever has no such memory (other hosts, no IPC) goes by NCCL: comm.py.
"""

import ctypes
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CAPACITY = 8 << 20  # bytes of a box: 128 value heads of boundary states
_LINE = 64  # bytes from one flag to the next
_WAIT, _WRITE = 1, 2  # operations of cuStreamBatchMemOp
_EQUAL = 1
_LAZY_PEER_ACCESS = 1

Messages = list[tuple[int, Tensor]]


class _Handle(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_char * 64)]


class _Operation(ctypes.Structure):
    """CUstreamBatchMemOpParams, of waits and writes of 32 bits."""

    _fields_ = [
        ("operation", ctypes.c_uint),
        ("address", ctypes.c_uint64),
        ("value", ctypes.c_uint64),
        ("flags", ctypes.c_uint),
        ("reserved", 2 * ctypes.c_uint64),
    ]


@functools.cache
def _driver() -> ctypes.CDLL:
    driver = ctypes.CDLL("libcuda.so.1")
    address, size, word = ctypes.c_uint64, ctypes.c_size_t, ctypes.c_uint
    stream = ctypes.c_void_p
    for name, arguments in {
        "cuMemAlloc_v2": [ctypes.POINTER(address), size],
        "cuMemsetD32_v2": [address, word, size],
        "cuIpcGetMemHandle": [ctypes.POINTER(_Handle), address],
        "cuIpcOpenMemHandle_v2": [ctypes.POINTER(address), _Handle, word],
        "cuMemcpyAsync": [address, address, size, stream],
        "cuStreamBatchMemOp_v2": [stream, word, ctypes.POINTER(_Operation), word],
        "cuStreamWriteValue32_v2": [stream, address, word, word],
    }.items():
        function = getattr(driver, name)
        function.argtypes, function.restype = arguments, ctypes.c_int
    return driver


def _call(name: str, *arguments: Any) -> None:
    code = getattr(_driver(), name)(*arguments)
    if code:
        raise RuntimeError(f"{name} failed with CUDA error {code}")


class Mailbox:
    """The boxes of one rank and its peers: ``bases`` are the addresses of every rank's memory in this process."""

    def __init__(self, rank: int, bases: Sequence[int]):
        self._rank, self._bases, size = rank, bases, len(bases)
        flags = size * CAPACITY
        self._box = [
            CAPACITY * r for r in range(size)
        ]  # of what rank r sends, at whoever receives it
        self._full = [flags + _LINE * r for r in range(size)]
        self._empty = [flags + _LINE * (size + r) for r in range(size)]  # my box at rank r
        self._take_full = [_take(bases[rank] + flag) for flag in self._full]
        self._take_empty = [_take(bases[rank] + flag) for flag in self._empty]

    def send(self, peer: int, tensors: Sequence[Tensor], stream: int) -> None:
        """On the stream (its handle), contiguous tensors of at most CAPACITY bytes in all."""
        driver, there = _driver(), self._bases[peer]
        codes = driver.cuStreamBatchMemOp_v2(stream, 2, self._take_empty[peer], 0)
        place = there + self._box[self._rank]
        for x in tensors:
            codes |= driver.cuMemcpyAsync(place, x.data_ptr(), x.nbytes, stream)
            place += x.nbytes
        codes |= driver.cuStreamWriteValue32_v2(stream, there + self._full[self._rank], 1, 0)
        _check(codes, "send")

    def receive(self, peer: int, tensors: Sequence[Tensor], stream: int) -> None:
        """What the peer's ``send`` of tensors of the same sizes brings."""
        driver, here, there = _driver(), self._bases[self._rank], self._bases[peer]
        codes = driver.cuStreamBatchMemOp_v2(stream, 2, self._take_full[peer], 0)
        place = here + self._box[peer]
        for x in tensors:
            codes |= driver.cuMemcpyAsync(x.data_ptr(), place, x.nbytes, stream)
            place += x.nbytes
        codes |= driver.cuStreamWriteValue32_v2(stream, there + self._empty[self._rank], 1, 0)
        _check(codes, "receive")


def _take(flag: int) -> ctypes.Array:
    """Wait until a flag is set, and clear it: what cuStreamBatchMemOp does in one go."""
    return (_Operation * 2)(_Operation(_WAIT, flag, 1, _EQUAL), _Operation(_WRITE, flag, 0, 0))


def _check(codes: int, what: str) -> None:
    if codes:
        raise RuntimeError(
            f"a {what} between GPUs failed in the CUDA driver (error bits {codes:#x})"
        )


def open_mailbox(rank: int, size: int, share: Callable[[Any], list[Any]]) -> Mailbox | None:
    """Boxes between all ranks of a group, or None on every rank if any of them cannot reach another.

    ``share`` gives every rank's picklable value, in rank order; all ranks call.
    """
    made = _allocate(size)
    mine = None if made is None else (_host(), bytes(memoryview(made[1])))
    every = share(mine)
    if made is None or any(one is None or one[0] != every[0][0] for one in every):
        return None
    bases = []
    try:
        for peer, (_, given) in enumerate(every):
            opened = ctypes.c_uint64(made[0])
            if peer != rank:
                theirs = _Handle.from_buffer_copy(given)
                _call("cuIpcOpenMemHandle_v2", ctypes.byref(opened), theirs, _LAZY_PEER_ACCESS)
            bases.append(opened.value)
    except RuntimeError:
        bases.clear()
    return Mailbox(rank, bases) if all(share(bool(bases))) else None


def _allocate(size: int) -> tuple[int, _Handle] | None:
    """Boxes for ``size`` ranks, empty, and by what others map them; None if that does not work here."""
    base, handle, flags = ctypes.c_uint64(), _Handle(), size * _LINE
    try:
        torch.cuda.synchronize()  # makes the context, too
        _call("cuMemAlloc_v2", ctypes.byref(base), size * CAPACITY + 2 * flags)
        full = base.value + size * CAPACITY
        _call("cuMemsetD32_v2", full, 0, flags // 4)
        _call("cuMemsetD32_v2", full + flags, 1, flags // 4)
        _call("cuIpcGetMemHandle", ctypes.byref(handle), base)
        torch.cuda.synchronize()
    except (OSError, AttributeError, RuntimeError):  # no driver, an old one, no IPC
        return None
    return base.value, handle


def _host() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text()
