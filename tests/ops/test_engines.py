"""Which engine is picked, and that a slow one is not picked in silence."""

import logging

import torch

from cp_gdn import chunk_gated_delta_rule
from cp_gdn.ops import gated_delta_rule


def test_the_torch_engine_on_a_gpu_is_told_once(caplog):
    gated_delta_rule._announce.cache_clear()
    for _ in range(2):
        gated_delta_rule._announce("torch", "cuda", "it takes bf16 and fp16, not torch.float32")
    (told,) = caplog.records
    assert told.levelno == logging.WARNING
    assert "picked torch" in told.getMessage()
    assert "it takes bf16 and fp16, not torch.float32" in told.getMessage()


def test_on_a_cpu_it_is_no_warning(caplog):
    gated_delta_rule._announce.cache_clear()
    caplog.set_level(logging.INFO, "cp_gdn")
    x, gate = torch.zeros(1, 8, 2, 4), torch.zeros(1, 8, 2)
    for _ in range(2):
        chunk_gated_delta_rule(x, x, x, gate, gate)
    assert [record.levelno for record in caplog.records] == [logging.INFO]
