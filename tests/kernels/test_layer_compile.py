"""The kernels around the rule compile for sm_90a without spills, and move 16 bytes at a time where
their plan says so."""

import re

import pytest

from .test_compile import nvcc  # noqa: F401  (the fixture applies here as well)

pytestmark = pytest.mark.timeout(300)

SIZES = (2048, 2048, 4096)
# Options, and the widest load and store of global memory in bits.
CASES = {
    "conv_forward": ({"sizes": SIZES}, 128),
    "conv_forward, packed": ({"sizes": SIZES, "packed": True}, 128),
    "conv_backward": ({"sizes": SIZES}, 64),
    "conv_backward, packed": ({"sizes": SIZES, "packed": True}, 64),
    "conv_backward, fp16": ({"sizes": (128, 128, 384), "dtype": "float16"}, 64),
    "gates_forward": ({"heads": 32}, 128),
    "gates_backward": ({"heads": 32}, 128),
    "gates_backward, odd heads": ({"heads": 3}, 16),
    "norm_forward": ({"dim": 128}, 128),
    "norm_backward": ({"dim": 128}, 128),
    "norm_backward, fp16": ({"dim": 256, "dtype": "float16"}, 128),
}
ACCESS = re.compile(r"(?:ld|st)\.global(?:\.nc)?(?:\.v(\d))?\.[bfsu](\d+)")


@pytest.mark.parametrize("name", CASES)
def test_compiles_without_spills(name):
    variants = pytest.importorskip("cp_gdn.kernels.variants", reason="tilelang is not installed")
    options, widest = CASES[name]
    source = variants.Variant(name.split(",")[0], options).source()
    ptx, report, _ = variants.assemble(source)
    assert "0 bytes spill stores, 0 bytes spill loads" in report, report
    bits = {int(count or 1) * int(size) for count, size in ACCESS.findall(ptx)}
    assert widest in bits and "atom" not in ptx, bits


def test_a_model_names_every_kernel_of_its_layers():
    variants = pytest.importorskip("cp_gdn.kernels.variants", reason="tilelang is not installed")
    named = [v.kernel for v in variants.variants(16, 32)]
    assert {"conv_forward", "gates_backward", "norm_forward"} <= set(named)
    assert named.count("conv_backward") == 2
    assert set(named) <= set(variants.KERNELS)


def test_other_head_dimensions_take_the_rule_of_128():
    variants = pytest.importorskip("cp_gdn.kernels.variants", reason="tilelang is not installed")
    layer = ("conv", "gates", "norm")
    alike = [v for v in variants.variants(16, 64) if not v.kernel.startswith(layer)]
    wide = list(variants.variants(16, 32, key_dim=64, value_dim=256))
    assert [v for v in wide if not v.kernel.startswith(layer)] == alike
    own = {v.kernel: v.options for v in wide if v.kernel.startswith(layer)}
    assert own["conv_forward"]["sizes"] == (1024, 1024, 8192)
    assert own["norm_backward"]["dim"] == 256 and own["gates_forward"]["heads"] == 32
    narrow = {v.kernel for v in variants.variants(16, 32, key_dim=32, value_dim=32)}
    assert "recurrence" in narrow and "norm_forward" not in narrow
