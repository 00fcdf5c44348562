"""What the forward's tests on a GPU share."""

import pytest
import torch


@pytest.fixture(scope="module")
def kernels():
    pytest.importorskip("tilelang")
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    from cp_gdn.kernels import forward

    return forward


@pytest.fixture
def poison():
    """Memory that nobody wrote is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
