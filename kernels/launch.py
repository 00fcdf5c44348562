"""Launching kernels at little cost to the host: what a call would look up again is kept."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from tilelang.jit import JITImpl
from tvm.runtime import Executable

KEPT = 1024  # layouts, of forwards and of backwards

_ready: dict[tuple[Any, ...], Callable[..., None]] = {}


def ready(factory: JITImpl, **options: Any) -> Callable[..., None]:
    """The compiled kernel of a factory, called without TileLang's care for outputs that ours do not have."""
    key = (id(factory), *options.items())
    if key not in _ready:
        executable = factory(**options).adapter.get_exportable_executable()
        if isinstance(executable, Executable):  # compiled just now, not loaded
            executable = executable.jit()
        _ready[key] = executable.main
    return _ready[key]


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


_streams: dict[tuple[int, int], torch.cuda.Stream] = {}


def current_stream(device: torch.device) -> torch.cuda.Stream:
    """As torch.cuda.current_stream, which makes an object each time; here each stream has one."""
    key = device.index, torch._C._cuda_getCurrentRawStream(device.index)
    stream = _streams.get(key)
    if stream is None:
        stream = _streams[key] = torch.cuda.current_stream(device)
    return stream


@functools.cache
def _idle(device: torch.device) -> list[torch.cuda.Event]:
    """Events to be recorded anew: making one costs the host as much as recording it."""
    return []


def record(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """Where a stream stands, for one :func:`wait`."""
    try:
        event = _idle(stream.device).pop()
    except IndexError:
        event = torch.cuda.Event()
    event.record(stream)
    return event


def wait(stream: torch.cuda.Stream, event: torch.cuda.Event) -> None:
    """Let a stream wait for what was recorded; the event may then be recorded anew."""
    event.wait(stream)
    _idle(stream.device).append(event)


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream for work beside the current one."""
    return torch.cuda.Stream(device)
