"""The norms of the queries against float64, by chunk slots, on a Hopper GPU."""

import pytest
import torch

from .reference import CHUNK, draw

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("kernels")]


def by_slots(x):
    """1 / |q| in float64, [NC, Hk, 64]: zero past the end of a document, NaN in slots of none."""
    norm = torch.rsqrt(x.q[0].double().square().sum(-1) + 1e-6)
    cu = x.cu.tolist()
    slots = norm.new_full((cu[-1] // CHUNK + len(x.lengths), norm.shape[1], CHUNK), torch.nan)
    for i, n in enumerate(x.lengths):
        for j in range(0, n, CHUNK):
            rows = norm[cu[i] + j : cu[i] + min(j + CHUNK, n)]
            slot = slots[cu[i] // CHUNK + i + j // CHUNK]
            slot.zero_()
            slot[:, : rows.shape[0]] = rows.T
    return slots


@pytest.mark.parametrize("size", [1e-3, 1, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms(dtype, size):
    from cp_gdn.kernels.inputs import DTYPES
    from cp_gdn.kernels.qnorm import query_norms

    x = draw([1, 63, 64, 65, 200, 0, 130, 700], 3, 3, norm=False, dtype=dtype, device="cuda")
    x.q = (x.q * size).to(dtype)
    want = by_slots(x)
    got = torch.full_like(want, torch.nan, dtype=torch.float32)
    query_norms(dtype=DTYPES[dtype])(x.q[0], x.cu, got)
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0, equal_nan=True)
