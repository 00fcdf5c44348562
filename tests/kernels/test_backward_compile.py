"""The backward kernels compile for sm_90a as test_compile.py asks of the forward's."""

import re

import pytest

from .test_compile import SERIALISED, nvcc  # noqa: F401  (the fixture applies here as well)

pytestmark = pytest.mark.timeout(300)

# Options, products written in the kernel, bytes of spills. The normalising gradients keep two
# counters of their loop over items in local memory, read once an item.
CASES = {
    "chains": ({"normalize": True}, 9, 0),
    "reverse summary": ({"normalize": True, "store": False}, 6, 0),
    "gradients": ({"ratio": 4}, 20, 0),
    "normalising gradients": ({"ratio": 4, "normalize": True}, 20, 12),
    "beta_gradient": ({"smallest": 2.0**-40, "normalize": True}, 7, 0),
}
SPILLS = re.compile(r"(\d+) bytes spill stores")
REGISTERS = re.compile(r"warpgroup_reg_(?:de)?alloc<(\d+)>")


@pytest.mark.parametrize("name", CASES)
def test_compiles_without_spills_or_serialised_products(name, monkeypatch):
    variants = pytest.importorskip("cp_gdn.kernels.variants", reason="tilelang is not installed")
    from cp_gdn.kernels.backward import beta_gradient, chains, gradients

    kernels = {
        "chains": chains,
        "reverse summary": chains,
        "gradients": gradients,
        "normalising gradients": gradients,
        "beta_gradient": beta_gradient,
    }
    monkeypatch.setattr(variants, "KERNELS", kernels)
    options, products, spills = CASES[name]
    source = variants.Variant(name, options).source()
    ptx, report = variants.assemble(source)
    assert max(map(int, SPILLS.findall(report))) <= spills, report
    assert not SERIALISED.search(report), report
    assert source.count("tl::warpgroup_commit_batch();") == products
    assert "mma.sync" not in ptx.replace("wgmma.mma_async.sync", "")
    # Three warpgroups start with 168 registers a thread; asking for more in all would wait forever.
    assert sum(map(int, REGISTERS.findall(source))) <= 3 * 168
