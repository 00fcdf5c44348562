"""How long a block of time of the backward is: host arithmetic on shapes, no GPU."""

from types import SimpleNamespace

import pytest
import torch

backward = pytest.importorskip("cp_gdn.kernels.backward_opened", reason="tilelang is not installed")

WHOLE = None


@pytest.mark.parametrize("tokens, heads, documents, segment, cut, block", [
    (32768, 64, 1, 512, False, 171), (131072, 64, 1, 512, False, 683), (32768, 64, 8, 125, False, WHOLE),
    (32768, 32, 1, 128, True, WHOLE), (65536, 32, 1, 128, True, 512), (131072, 32, 1, 128, True, 1024),
    (32768, 8, 1, 32, True, WHOLE), (8192, 32, 1, 32, False, WHOLE), (131072, 32, 1, 128, False, WHOLE),
])  # fmt: skip
def test_length_of_a_block(tokens, heads, documents, segment, cut, block):
    slots = tokens // 64 + documents
    saved = SimpleNamespace(
        a=torch.empty(slots, heads, 64, 64, device="meta"),
        cu_seqlens=torch.empty(documents + 1),
        plan=SimpleNamespace(segment=segment),
    )
    found = backward.block_length(saved, cut, 132)
    assert found == (slots if block is WHOLE else block)
    if cut and found < slots:  # a block begins where a segment does
        assert found % segment == 0


@pytest.mark.parametrize("tokens, heads, rows, documents, segment, pays", [
    (32768, 64, 1, 1, 512, True), (8192, 64, 1, 1, 128, True), (8192, 32, 2, 2, 128, True),
    (32768, 32, 1, 1, 128, True), (32768, 32, 1, 8, 64, True), (131072, 64, 1, 1, 512, True),
    (16384, 32, 1, 8, 32, True), (65536, 8, 1, 8, 64, True), (16384, 48, 1, 1, 64, True), (1024, 64, 1, 1, 16, True),
    (24576, 32, 1, 1, 96, False), (8192, 32, 1, 1, 32, False), (32768, 8, 1, 1, 32, False),
    (32768, 48, 1, 1, 128, False), (65536, 32, 1, 1, 128, False), (131072, 32, 1, 1, 128, False),
])  # fmt: skip
def test_states_are_kept_where_that_pays(tokens, heads, rows, documents, segment, pays):
    """Not where the replay hides beside few dS chains, nor where the backward walks blocks."""
    opened = SimpleNamespace(
        saved=SimpleNamespace(
            a=torch.empty(tokens // 64 + documents, heads, 64, 64, device="meta"),
            cu_seqlens=torch.empty(documents + 1),
            plan=SimpleNamespace(segment=segment),
        ),
        layout=SimpleNamespace(
            plan=SimpleNamespace(split=heads < 64), processors=132, documents=documents
        ),
        shape=(rows, tokens // rows, heads, 128),
    )
    assert backward.keeping_pays(opened) == pays
