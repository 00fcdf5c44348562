"""Throughput, model FLOPs utilisation, exchange and memory.

    tokens/s = seq_len * dp * accumulation / step time
    MFU      = flops_per_token(seq_len) * tokens/s / (ranks * peak)

A token of a pack counts once, however many ranks share it. Peak is the dense bf16 rate that the
maker states, also for fp32 runs; hardware that is not in the table gets no MFU. The first step of a
process (allocation, compilation, NCCL setup) is not counted.
"""

import resource
import sys
import time

import torch

from cp_gdn import comm
from cp_gdn.train.callbacks import Callback, Record

# Dense bf16 FLOP/s by a part of the device's name; the first that fits counts
PEAK_FLOPS = (
    ("B200", 2250e12),
    ("GH200", 989e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H20", 148e12),
    ("A100", 312e12),
    ("L40S", 362e12),
)
GIB = 2.0**30


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a device by its name, or None where it is not known."""
    return next((peak for part, peak in PEAK_FLOPS if part in device_name), None)


class PerfMonitor(Callback):
    """Adds perf/, comm/ and memory/ to the records: means over the steps since the last one, maxima over the ranks."""

    def __init__(self, *, flops_per_token: float, tokens_per_step: int):
        self._flops_per_token, self._tokens_per_step = flops_per_token, tokens_per_step
        self._peak: float | None = None
        self._steps = 0
        self._seconds = 0.0
        self._data_seconds = 0.0
        self._started = 0.0
        self._first = True

    def on_start(self, trainer) -> None:
        device = trainer.topology.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        self._peak = peak_flops(name)
        if self._peak is None and trainer.topology.is_first:
            print(f"perf/mfu is not recorded: the peak FLOP/s of this device ({name}) is not known")
        comm.meter.timed = True
        comm.meter.take()
        self._started = time.perf_counter()

    def step_done(self, data_seconds: float) -> None:
        """Called after every step, recorded or not."""
        now = time.perf_counter()
        if self._first:
            comm.meter.take()
        else:
            self._steps += 1
            self._seconds += now - self._started
            self._data_seconds += data_seconds
        self._first = False
        self._started = now

    def on_record(self, trainer, record: Record) -> None:
        topology = trainer.topology
        memory_name, memory = _memory(topology.device)
        exchange = comm.meter.take()
        maxima = torch.tensor([exchange["seconds"], exchange["bytes"], memory], dtype=torch.float64)
        seconds, sent, memory = comm.all_reduce_max(maxima.to(topology.device)).tolist()
        record[memory_name] = memory
        if self._steps:
            step_time = self._seconds / self._steps
            rate = self._tokens_per_step / step_time
            record["perf/step_time_s"] = step_time
            record["perf/data_time_s"] = self._data_seconds / self._steps
            record["perf/tokens_per_s"] = rate
            record["perf/tokens_per_s_per_gpu"] = rate / topology.world_size
            if self._peak is not None:
                record["perf/mfu"] = (
                    self._flops_per_token * rate / (topology.world_size * self._peak)
                )
            record["comm/cp_exchange_ms"] = 1e3 * seconds / self._steps
            record["comm/cp_exchange_mib"] = sent / 2.0**20 / self._steps
        self._steps, self._seconds, self._data_seconds = 0, 0.0, 0.0

    def on_pause(self, trainer) -> None:
        comm.meter.take()
        self._started = time.perf_counter()


def _memory(device: torch.device) -> tuple[str, float]:
    if device.type == "cuda":
        return "memory/max_active_gib", torch.cuda.memory_stats(device)[
            "active_bytes.all.peak"
        ] / GIB
    unit = 1 if sys.platform == "darwin" else 1024
    return "memory/max_rss_gib", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
