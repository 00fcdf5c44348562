"""Streams of a GPU at little cost to the host: torch makes an object for each question and for each event.

An exchange runs on a stream of its own, its lane, which waits for an event of the caller's stream and is
waited for by another. Both events are recorded anew once whoever waits for them has been told.
"""

import functools

import torch

_streams: dict[tuple[int, int], torch.cuda.Stream] = {}


def current_stream(device: torch.device) -> torch.cuda.Stream:
    """As torch.cuda.current_stream, which makes an object each time; here each stream has one."""
    key = device.index, torch._C._cuda_getCurrentRawStream(device.index)
    stream = _streams.get(key)
    if stream is None:
        stream = _streams[key] = torch.cuda.current_stream(device)
    return stream


class Lane:
    """A device's stream for exchanges, and the events between it and others."""

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device, priority=-1)
        self._idle: list[torch.cuda.Event] = []

    def record(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        """Where a stream stands, for one :meth:`wait`."""
        try:
            event = self._idle.pop()
        except IndexError:
            event = torch.cuda.Event()
        event.record(stream)
        return event

    def wait(self, stream: torch.cuda.Stream, event: torch.cuda.Event) -> None:
        """Let a stream wait for what was recorded."""
        event.wait(stream)
        self._idle.append(event)


@functools.cache
def lane_of(device: torch.device) -> Lane:
    return Lane(device)
