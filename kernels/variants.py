"""Which compiled kernels a model needs, and what the compiler says of them. No GPU is touched."""

import os
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import tilelang
from tilelang import tvm
from tilelang.engine.lower import lower

from .backward_beta import beta_gradient
from .backward_gradients import SMALLEST_BETA, gradients
from .backward_replay import replay
from .backward_reverse import reverse
from .common import FLAGS, TARGET
from .conv import conv_forward
from .conv_backward import conv_backward
from .gates import gates_backward, gates_forward
from .norm import norm_backward, norm_forward
from .prepare import prepare
from .qnorm import query_norms
from .recurrence import recurrence
from .recurrence_alone import recurrence_alone
from .reverse_scan import reverse_scan
from .scan import scan
from .summary import summary

KERNELS = {
    "prepare": prepare,
    "query_norms": query_norms,
    "summary": summary,
    "scan": scan,
    "recurrence": recurrence,
    "recurrence_alone": recurrence_alone,
    "replay": replay,
    "reverse": reverse,
    "reverse_scan": reverse_scan,
    "gradients": gradients,
    "beta_gradient": beta_gradient,
    "conv_forward": conv_forward,
    "conv_backward": conv_backward,
    "gates_forward": gates_forward,
    "gates_backward": gates_backward,
    "norm_forward": norm_forward,
    "norm_backward": norm_backward,
}


class Variant(NamedTuple):
    kernel: str
    options: dict[str, Any]

    def compile(self):
        """Into TileLang's cache, unless it is there. The explicit target makes the entry portable
        to a machine with a GPU."""
        return KERNELS[self.kernel](**self.options)

    def source(self) -> str:
        """CUDA source of the kernel, without calling nvcc."""
        function = KERNELS[self.kernel].get_tir(**self.options)
        flags = {flag.value: on for flag, on in FLAGS.items()}
        target = tvm.target.Target(TARGET)
        with tvm.transform.PassContext(opt_level=3, config=flags), target:
            return lower(function, target=target).kernel_source

    def __str__(self) -> str:
        options = ", ".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.kernel}({options})"


def surroundings(
    key_heads: int, value_heads: int, dtype: str, key_dim: int, value_dim: int
) -> Iterator[Variant]:
    """The kernels of a layer around the rule."""
    sizes = (key_heads * key_dim, key_heads * key_dim, value_heads * value_dim)
    for way in ("forward", "backward"):
        for packed in (False, True):
            yield Variant(f"conv_{way}", {"sizes": sizes, "dtype": dtype, "packed": packed})
        yield Variant(f"gates_{way}", {"heads": value_heads, "dtype": dtype})
        if value_dim in (64, 128, 256):
            yield Variant(f"norm_{way}", {"dim": value_dim, "dtype": dtype})


def rule(
    ratio: int,
    *,
    dtype: str = "bfloat16",
    gate_dtype: str = "float32",
    beta_dtype: str = "float32",
    normalize: tuple[bool, ...] = (False, True),
    processors: int = 132,
) -> Iterator[Variant]:
    """The kernels of the delta rule, for `ratio` value heads of 128 columns a key head."""
    for entering in (False, True):
        yield Variant("reverse_scan", {"entering": entering})
    if True in normalize:
        yield Variant("query_norms", {"dtype": dtype})
    for norm in normalize:
        common = {"dtype": dtype, "normalize": norm}
        chain = {"beta_dtype": beta_dtype, **common}
        yield Variant(
            "prepare",
            {"ratio": ratio, "gate_dtype": gate_dtype, "beta_dtype": beta_dtype, **common},
        )
        yield Variant("summary", common)
        yield Variant("recurrence_alone", {"value_dim": 128, **common})
        for persistent in (False, True):
            yield Variant("recurrence", {"persistent": persistent, "value_dim": 128, **common})
        yield Variant("recurrence_alone", {"value_dim": 128, **chain, "keep": True})
        for halves in (1, 2):
            yield Variant("replay", {"halves": halves, **chain})
            for store in (True, False):
                yield Variant("reverse", {"halves": halves, "store": store, **chain})
        last = {"processors": processors, **chain}
        yield Variant("gradients", {"ratio": ratio, **last})
        yield Variant("beta_gradient", {"smallest": SMALLEST_BETA[dtype], **last})
    yield Variant("scan", {})


def variants(
    key_heads: int,
    value_heads: int,
    *,
    key_dim: int = 128,
    value_dim: int = 128,
    dtype: str = "bfloat16",
    **options: Any,
) -> Iterator[Variant]:
    """Every kernel that a model with these heads can call, whatever its sequences look like.

    key_dim, value_dim: of a head. The rule is called with heads of 128, for every value head as many
        as hold its columns; only the layer's own kernels have the model's sizes.
    options: gate_dtype, beta_dtype; normalize, by the kernels or not, both unless told; processors,
        multiprocessors of the GPU that will run them (132: H100 and H200 SXM).
    """
    yield from surroundings(key_heads, value_heads, dtype, key_dim, value_dim)
    ratio = value_heads * -(-value_dim // 128) // key_heads
    yield from rule(ratio, dtype=dtype, **options)


class Assembled(NamedTuple):
    ptx: str
    report: str  # ptxas': registers, spills, C75xx messages
    cubin: bytes


def assemble(source: str) -> Assembled:
    """What nvcc makes of a kernel's CUDA source."""
    root = os.path.dirname(tilelang.__file__)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cu")
        with open(path, "w") as file:
            file.write(source)
        command = [
            "nvcc", "-std=c++20", "-O3", "--use_fast_math", "-DENABLE_BF16", "-keep", "-keep-dir",
            folder, "-gencode=arch=compute_90a,code=sm_90a", "-cubin", "-Xptxas", "-v",
            f"-I{root}/src", f"-I{root}/3rdparty/cutlass/include", path,
            "-o", os.path.join(folder, "kernel.cubin"),
        ]  # fmt: skip
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            raise RuntimeError(run.stderr)
        with (
            open(os.path.join(folder, "kernel.ptx")) as ptx,
            open(os.path.join(folder, "kernel.cubin"), "rb") as cubin,
        ):
            return Assembled(ptx.read(), run.stderr, cubin.read())
