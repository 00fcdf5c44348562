"""The operations counted for a model: against its parameters, a hand count, and torch's counter."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cp_gdn.models.flops import causal_attention_flops, gated_delta_rule_flops
from cp_gdn.models.hybrid import HybridLM
from tests.models.common import TINY

CONFIG = replace(TINY, num_layers=8)


@pytest.mark.parametrize("tied", [True, False])
def test_projections_count_six_a_weight(tied):
    """What is left after the rule, attention and convolution is 6 times the matrices' weights."""
    config = replace(CONFIG, tie_word_embeddings=tied)
    model = HybridLM(config)
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2)
    matrices -= 0 if tied else model.model.embed_tokens.weight.numel()
    filters = sum(p.numel() for p in model.parameters() if p.ndim == 3)
    rule = 6 * gated_delta_rule_flops(2, 4, 8, 12)
    triangle = 2 * causal_attention_flops(4, 16, 1000)
    assert model.flops_per_token(1000) == 6 * (matrices + filters) + 3 * (rule + triangle)


@pytest.mark.parametrize("group", [1, 2, 4])
def test_rule_counts_its_products(group):
    """(8 + 2 / G) products of 64 x 64 x 128 for every chunk of 64 tokens and value head."""
    count = gated_delta_rule_flops(16, 16 * group, 128, 128)
    product = 2 * 64 * 64 * 128
    assert count == pytest.approx((8 + 2 / group) * product * 16 * group / 64)


def test_attention_counts_the_triangle():
    """Half of what a counter sees that takes the mask for work, and the diagonal's half more."""
    q = torch.randn(1, 4, 256, 16)
    with FlopCounterMode(display=False) as counter:
        scores = torch.matmul(q, q.mT)
        torch.matmul(scores, q)
    square = counter.get_total_flops() / 256
    assert causal_attention_flops(4, 16, 256) == square / 2 * 257 / 256


def test_attention_overtakes_the_rule_in_long_documents():
    """A layer of the 35B shape: Gated DeltaNet costs the same at any length, attention does not."""
    rule = gated_delta_rule_flops(16, 32, 128, 128)
    assert causal_attention_flops(16, 256, 256) < rule < causal_attention_flops(16, 256, 1024)
