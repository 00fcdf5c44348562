"""Forwards whose backward follows at once: the second ones of activation checkpointing.

A forward saves little, and its backward replays the states of all chunks. Where a forward is run again
only for the sake of its backward, it may keep them instead: the memory is about to be needed anyway.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_keeps = ContextVar("keeps_states", default=False)


@contextmanager
def keep_states() -> Iterator[None]:
    """Calls of :func:`cp_gdn.chunk_gated_delta_rule` inside keep what their backward would replay.

    768 bytes a token and value head of 128 columns more until the backward has run. For the context of
    recomputation, ``checkpoint(..., use_reentrant=False, context_fn=lambda: (nullcontext(), keep_states()))``.
    The torch engine keeps its states anyway.
    """
    token = _keeps.set(True)
    try:
        yield
    finally:
        _keeps.reset(token)


def keeps_states() -> bool:
    return _keeps.get()
