"""The backward kernels compile for sm_90a as test_compile.py asks of the forward's."""

import re

import pytest

from .test_compile import nvcc  # noqa: F401  (the fixture applies here as well)

pytestmark = pytest.mark.timeout(300)

# Options, products written in the kernel, bytes of spills, warpgroups. What spills are counters of loops over
# items and segments, two of them read once a head or chunk, and an address or two: never accumulators.
CASES = {
    "replay": ({"halves": 2, "normalize": True}, 3, 0, 3),
    "reverse": ({"halves": 2, "normalize": True}, 6, 16, 4),
    "reverse alone": ({"halves": 1, "normalize": True}, 7, 0, 3),
    "reverse summary": ({"halves": 2, "normalize": True, "store": False}, 6, 8, 4),
    "reverse summary alone": ({"halves": 1, "normalize": True, "store": False}, 7, 0, 3),
    "reverse_scan": ({"entering": False}, 3, 0, 1),
    "reverse_scan entering": ({"entering": True}, 3, 0, 1),
    "gradients": ({"ratio": 4}, 9, 0, 3),
    "gradients normalising": ({"ratio": 4, "normalize": True}, 9, 0, 3),
    "beta_gradient": ({"smallest": 2.0**-40, "normalize": True}, 7, 0, 1),
}
# In gradients, C7520 is what a wait inside a branch between products costs.
SERIALISED = re.compile(r"C75[12][0-9]\)")
PRODUCTS = re.compile(r"tl::warpgroup_commit_batch\(\);| gdn::product<")
SPILLS = re.compile(r"(\d+) bytes spill stores")
REGISTERS = re.compile(r"warpgroup_reg_(de)?alloc<(\d+)>")


@pytest.mark.parametrize("name", CASES)
def test_compiles_without_spills_or_serialised_products(name):
    variants = pytest.importorskip("cp_gdn.kernels.variants", reason="tilelang is not installed")
    options, products, spills, warpgroups = CASES[name]
    source = variants.Variant(name.split()[0], options).source()
    ptx, report, _ = variants.assemble(source)
    assert max(map(int, SPILLS.findall(report))) <= spills, report
    assert not SERIALISED.search(report), report
    assert len(PRODUCTS.findall(source)) == products
    if not name.startswith("gradients"):  # whose trace is on mma.sync
        assert "mma.sync" not in ptx.replace("wgmma.mma_async.sync", "")
    # Warpgroups start with 168 or 128 registers a thread; more in all would be waited for forever, and to
    # "dealloc" up or "alloc" down is an illegal instruction.
    start = 128 if warpgroups == 4 else 168
    asked = [(bool(less), int(count)) for less, count in REGISTERS.findall(source)]
    assert sum(count for _, count in asked) <= start * warpgroups
    assert all(count <= start if less else count >= start for less, count in asked), asked
