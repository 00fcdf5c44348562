"""The meter of exchanges on a GPU, with events that need none."""

import pytest
import torch

from cp_gdn.metering import MANY_SPANS, CommMeter, operations

DEVICE, STREAM = torch.device("cuda", 0), object()


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
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


def test_a_meter_that_nobody_reads_stays_small():
    meter = CommMeter(timed=True)
    for _ in range(150):
        meter.end(meter.begin(8, DEVICE, "a message", STREAM))
    assert len(meter._spans) + len(meter._free) == MANY_SPANS
    assert meter.take() == {"bytes": 1200, "seconds": pytest.approx(0.15), "calls": 150}
    assert not meter._spans and meter.take()["seconds"] == 0.0


def test_what_nobody_times_or_watches_takes_no_events(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", None)
    meter = CommMeter()
    meter.end(meter.begin(8, DEVICE, "a message", STREAM))
    assert meter.take() == {"bytes": 8, "seconds": 0.0, "calls": 1}


def test_the_events_of_a_span_that_is_watched_are_not_used_again():
    meter, seen = CommMeter(), []
    operations.start()
    try:
        for _ in range(2 * MANY_SPANS):
            exchange = meter.begin(8, DEVICE, lambda: "a message", STREAM)
            seen.append(operations._open[-1].done)
            meter.end(exchange)
    finally:
        operations.stop()
    assert len(set(map(id, seen))) == 2 * MANY_SPANS and not meter._free
    assert len(meter._spans) == MANY_SPANS
