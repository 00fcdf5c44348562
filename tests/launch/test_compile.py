"""The heads that launch/compile.py compiles for, from recipes and arguments. Nothing is compiled."""

import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "compile.py"


@pytest.fixture(scope="module")
def script():
    pytest.importorskip("tilelang", reason="tilelang is not installed")
    return runpy.run_path(str(SCRIPT))


@pytest.mark.parametrize(
    ("options", "heads"),
    [
        ({}, (16, 32, 128, 128)),
        ({"key_heads": 2, "value_heads": 8, "value_dim": 256}, (2, 8, 128, 256)),
        ({"model": "tiny"}, (2, 4, 32, 32)),
        ({"model": "qwen3_5_0_8b"}, (16, 16, 128, 128)),
    ],
)
def test_heads(script, options, heads):
    assert script["heads"](script["Options"](**options)) == heads


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("key_dim=256", "key heads of 256 columns; the kernels take up to 128"),
        ("value_heads=24", "24 value heads are no multiple of 16 key heads"),
        ("model=huge", "model=huge is not in .* there are .*tiny"),
        ("model=tiny value_heads=8", "model=tiny has its own value_heads; leave one out"),
        ("key_heads=0", "key_heads=0; it must be at least 1"),
        ("jobs=0", "jobs=0; it must be at least 1"),
        ("suite=true model=tiny jobs=1", "suite has its own model; leave one out"),
        ("dtype=float32", "dtype=float32; the kernels take bfloat16 and float16"),
        ("gate_dtype=float16", "gate_dtype=float16; it may be float32 or dtype, bfloat16"),
    ],
)
def test_what_no_kernel_takes_is_refused(script, arguments, message):
    with pytest.raises(ValueError, match=message):
        script["main"](arguments.split())


def test_the_suite_has_what_models_of_its_heads_call(script):
    from cp_gdn.kernels.variants import KERNELS, variants

    suite = list(script["suite"]())
    assert {variant.kernel for variant in suite} == set(KERNELS)
    assert all(variant in suite for variant in variants(16, 32))
