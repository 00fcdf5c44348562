"""Forwards whose backward follows at once: the second ones of activation checkpointing.

A forward saves little, and its backward replays the states of all chunks. Where a forward is run again
only for the sake of its backward, it may keep them instead: the memory is about to be needed anyway.
The first forward then has to save as many tensors as the second one; it saves stand-ins.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from enum import Enum


class States(Enum):
    """What a forward saves of the states that its backward would replay."""

    NONE = 0
    PROMISED = 1  # stand-ins: a second forward comes before the backward, and keeps them
    KEPT = 2


_states = ContextVar("states", default=States.NONE)


@contextmanager
def _saving(states: States) -> Iterator[None]:
    token = _states.set(states)
    try:
        yield
    finally:
        _states.reset(token)


def keep_states() -> AbstractContextManager[None]:
    """Calls of :func:`cp_gdn.chunk_gated_delta_rule` inside keep what their backward would replay, where that was
    measured to save time (``keeping_pays`` in kernels/backward_opened.py).

    768 bytes a token and value head of 128 columns more until the backward has run. The torch engine keeps its
    states anyway. For activation checkpointing: :func:`checkpoint_contexts`.
    """
    return _saving(States.KEPT)


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Around a layer's forward and around its second one: ``checkpoint(layer, x, use_reentrant=False,
    context_fn=checkpoint_contexts)``. Gradients are those of a forward that keeps nothing, up to the rounding of the
    outputs that later layers see."""
    return _saving(States.PROMISED), keep_states()


def states() -> States:
    return _states.get()
