"""What torch.compile leaves out of its graphs: calls that exchange messages or launch kernels of our own.

Traced, a process group's methods and an explicit backward are errors inside the compiler. Around such a call a graph
ends and another one begins; everything else of a layer is compiled.
"""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def untraced(fn: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """``fn``, run as it is where its caller is compiled.

    As torch.compiler.disable, which imports the compiler at once: as long as importing torch takes.
    """

    @functools.wraps(fn)
    def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(fn)(*args, **kwargs)
        return fn(*args, **kwargs)

    return call
