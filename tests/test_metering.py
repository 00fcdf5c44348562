"""The meter of exchanges on a GPU, with events that need none."""

import pytest
import torch

from cp_gdn.metering import CommMeter, operations


class _Event:
    """A CUDA event that has ended when it is recorded; spans last one millisecond."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self, stream):
        pass

    def query(self):
        return True

    def synchronize(self):
        pass

    def elapsed_time(self, later):
        return 1.0


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


def test_a_meter_that_nobody_reads_stays_small():
    meter = CommMeter()
    for _ in range(50):
        with meter.span(8, torch.device("cuda", 0), "a message"):
            pass
    assert len(meter._spans) == 1
    assert meter.take() == {"bytes": 400, "seconds": pytest.approx(0.05), "calls": 50}
    assert not meter._spans and meter.take()["seconds"] == 0.0


def test_the_events_of_a_span_that_is_watched_are_not_used_again():
    meter, seen = CommMeter(), []
    operations.start()
    try:
        for _ in range(3):
            with meter.span(8, torch.device("cuda", 0), lambda: "a message"):
                seen.append(operations._open[-1].done)
    finally:
        operations.stop()
    assert len(set(map(id, seen))) == 3 and len(meter._spans) == 1
