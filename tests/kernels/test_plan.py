"""Segment plans and slot numbering: host arithmetic."""

import itertools
import random

import pytest

plan_module = pytest.importorskip("cp_gdn.kernels.plan", reason="tilelang is not installed")
common = pytest.importorskip("cp_gdn.kernels.common")


@pytest.mark.parametrize("tokens, documents, heads", [(32768, 1, 64), (8192, 1, 32), (100, 4, 2)])
def test_segments_cover_the_sequence(tokens, documents, heads):
    plan = plan_module.plan_segments(tokens, documents, heads, 128, packed=False, processors=132)
    chunks = -(-(tokens // documents) // common.CHUNK)
    assert 1 <= plan.segment <= chunks
    assert plan.split == (plan.segment < chunks)


def test_few_heads_are_cut_into_more_segments_than_many():
    segments = [
        plan_module.plan_segments(32768, 1, heads, 128, packed=False, processors=132).segment
        for heads in (8, 32, 64)
    ]
    assert segments == sorted(segments) and segments[0] < segments[-1]


def test_unequal_documents_are_always_cut():
    plan = plan_module.plan_segments(32768, 64, 64, 128, packed=True, processors=132)
    assert plan.split


def test_summaries_that_are_needed_anyway_are_cut():
    """A context-parallel call summarises every chunk: in segments side by side, not in one chain."""
    for heads in (8, 32, 64):
        plan = plan_module.plan_segments(
            32768, 1, heads, 128, packed=False, processors=132, summarised=True
        )
        assert plan.split and plan.segment <= 128


@pytest.mark.parametrize("block", [64, 256])
def test_slots_of_documents_never_meet(block):
    rng = random.Random(0)
    for _ in range(200):
        offsets = [0]
        for _ in range(rng.randint(1, 12)):
            offsets.append(offsets[-1] + rng.choice([0, 1, 63, 64, 65, rng.randint(0, 700)]))
        used = [
            begin // block + i + j
            for i, (begin, end) in enumerate(itertools.pairwise(offsets))
            for j in range(max(1, -(-(end - begin) // block)))
        ]
        assert len(set(used)) == len(used)
        assert max(used) < common.slots(offsets[-1], len(offsets) - 1, block)
