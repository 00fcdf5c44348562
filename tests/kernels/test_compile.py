"""Every kernel compiles for sm_90a, without spills and with its products on the tensor cores.

Needs nvcc of a CUDA 13 toolkit, no GPU. Without nvcc the tests fail where CI is set, so that they
cannot vanish unseen, and are skipped elsewhere.
"""

import os
import re
import shutil

import pytest

pytestmark = pytest.mark.timeout(300)

# Products written in each kernel.
PRODUCTS = {
    ("prepare", 2): 2,  # halves of K's columns
    ("query_norms", None): 0,
    ("summary", None): 3,
    ("recurrence", None): 6,
    ("recurrence", "persistent"): 6,
    ("recurrence_alone", None): 9,  # its outputs are made by two warpgroups in turn
    ("recurrence_alone", "keep"): 9,
    ("scan", None): 3,
}
ONE_WAY = ("query_norms", "scan")  # these do not ask who normalises
CASES = [
    (*key, normalize)
    for key in PRODUCTS
    for normalize in (True, False)[: 1 + (key[0] not in ONE_WAY)]
]
SERIALISED = re.compile(r"C75(?:1[0-9])\)")


def variant(kernel, option, normalize=True):
    variants = pytest.importorskip("cp_gdn.kernels.variants", reason="tilelang is not installed")
    options = {
        "prepare": {"ratio": option, "normalize": normalize, "gate_dtype": "bfloat16"},
        "query_norms": {},
        "summary": {"normalize": normalize},
        "recurrence": {"normalize": normalize, "persistent": option == "persistent"},
        "recurrence_alone": {"normalize": normalize, "keep": option == "keep"},
        "scan": {},
    }
    return variants, variants.Variant(kernel, options[kernel])


@pytest.fixture(scope="module", autouse=True)
def nvcc():
    if shutil.which("nvcc") is None:
        message = "nvcc is not on PATH: the kernels were not compiled (install the CUDA 13 toolkit)"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)


@pytest.mark.parametrize("kernel, option, normalize", CASES, ids=str)
def test_compiles_without_spills_or_serialised_products(kernel, option, normalize):
    module, v = variant(kernel, option, normalize)
    source = v.source()
    ptx, report, _ = module.assemble(source)
    assert "0 bytes spill stores, 0 bytes spill loads" in report, report
    assert not SERIALISED.search(report), report
    assert source.count("tl::warpgroup_commit_batch();") == PRODUCTS[kernel, option]
    assert ("wgmma.mma_async" in ptx) == (PRODUCTS[kernel, option] > 0)
    if kernel != "prepare":  # whose inverse is bf16 pairs on mma.sync
        assert "mma.sync" not in ptx.replace("wgmma.mma_async.sync", "")


def test_a_spill_or_a_serialised_product_would_show():
    """The report does tell: fewer registers than the accumulators need serialise every product."""
    module, v = variant("recurrence", None)
    starved = v.source().replace("warpgroup_reg_alloc<208>", "warpgroup_reg_alloc<136>")
    report = module.assemble(starved).report
    assert SERIALISED.search(report) or "0 bytes spill stores" not in report
