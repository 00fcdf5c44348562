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


def test_packed_documents_of_usual_lengths_are_left_whole():
    """Where the multiprocessors have enough to do: documents of 4,096 and 8,192 tokens."""
    for heads, chunks in ((32, 64), (64, 128)):
        plan = plan_module.plan_segments(32768, 8, heads, 128, packed=True, processors=132)
        assert plan.segment == chunks


def test_documents_of_known_lengths_are_cut_if_they_would_be_waited_for():
    """32 heads, 32,768 tokens: 124 chunks are a multiprocessor's share."""
    plan = plan_module.plan_segments(32768, 32, 32, 128, packed=True, processors=132)
    assert plan.segment == 64
    assert plan_module.longest_whole(plan, 32768, 32, 128, processors=132) == 125 + 32
    few = plan_module.plan_segments(4096, 8, 8, 128, packed=True, processors=132)
    assert plan_module.longest_whole(few, 4096, 8, 128, processors=132) < 48


def test_jobs_that_leave_multiprocessors_idle_are_halved():
    assert plan_module.entire_jobs(160, 132) == 132
    assert plan_module.entire_jobs(64, 132) == 0
    for jobs in (96, 132, 232, 264):
        assert plan_module.entire_jobs(jobs, 132) == jobs


def test_a_shard_has_the_segments_of_the_whole_sequence():
    """From STEADY chunks on, so that two GPUs can give the bits of one."""
    for heads in (32, 40, 48, 64, 128):
        plans = [
            plan_module.plan_segments(tokens, 1, heads, 128, packed=False, processors=132)
            for tokens in (32768, 65536, 131072)
        ]
        assert plans[0] == plans[1] == plans[2]
        if heads in (32, 64, 128):
            assert plan_module.STEADY % plans[0].segment == 0


def test_heads_that_fill_the_gpu_are_summarised_in_segments_of_their_own():
    plan = plan_module.plan_segments(32768, 1, 64, 128, packed=False, processors=132)
    assert not plan.split and plan.segment == 512 and plan.summarised == plan.summary == 128
    few = plan_module.plan_segments(32768, 1, 32, 128, packed=False, processors=132)
    assert few.split and few.summarised == few.segment


def test_rows_of_a_batch_are_not_run_in_parts():
    plan = plan_module.plan_segments(2 * 65536, 2, 64, 128, packed=False, processors=132)
    assert not plan.split and plan.segment == 1024


def packed_offsets():
    rng = random.Random(0)
    for _ in range(200):
        offsets = [0]
        for _ in range(rng.randint(1, 12)):
            offsets.append(offsets[-1] + rng.choice([0, 1, 63, 64, 65, rng.randint(0, 700)]))
        yield offsets


@pytest.mark.parametrize("block", [64, 256])
def test_slots_of_documents_never_meet(block):
    for offsets in packed_offsets():
        used = [
            begin // block + i + j
            for i, (begin, end) in enumerate(itertools.pairwise(offsets))
            for j in range(max(1, -(-(end - begin) // block)))
        ]
        assert len(set(used)) == len(used)
        assert max(used) < common.slots(offsets[-1], len(offsets) - 1, block)


@pytest.mark.parametrize("block", [64, 128])
def test_tokens_that_number_the_segments_to_summarise(block):
    """Each segment but a document's last holds one token that is -1 modulo the segment."""
    for offsets in packed_offsets():
        wanted = {
            (i, j)
            for i, (begin, end) in enumerate(itertools.pairwise(offsets))
            for j in range((end - begin - 1) // block)
        }
        found = []
        for item in range(max(0, (offsets[-1] - 1) // block)):
            token = (item + 1) * block - 1
            document = max(i for i, begin in enumerate(offsets[:-1]) if begin <= token)
            begin, end = offsets[document : document + 2]
            part = (token - begin) // block
            if part < -(-(end - begin) // block) - 1:
                found.append((document, part))
        assert set(found) == wanted and len(found) == len(wanted)
        numbers = [offsets[i] // block + j for i, j in wanted]
        assert len(set(numbers)) == len(numbers)
        assert all(0 <= n < common.cuts(offsets[-1], block) for n in numbers)


@pytest.mark.parametrize("segment", [64, 128])
def test_tokens_that_number_the_documents_to_scan(segment):
    """Documents of three segments and more are found, each once, by the first of their tokens that
    is -1 modulo two segments."""
    for offsets in packed_offsets():
        found = []
        for item in range(max(0, (offsets[-1] - 1) // (2 * segment))):
            token = (item + 1) * 2 * segment - 1
            document = max(i for i, begin in enumerate(offsets[:-1]) if begin <= token)
            if token - offsets[document] < 2 * segment:
                found.append(document)
        lengths = [end - begin for begin, end in itertools.pairwise(offsets)]
        assert len(set(found)) == len(found)
        assert set(found) >= {i for i, n in enumerate(lengths) if n > 2 * segment}
