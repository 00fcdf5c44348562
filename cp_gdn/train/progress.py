"""What the person at the terminal sees: a bar there, one line a recorded step elsewhere."""

import sys

from tqdm import tqdm

from cp_gdn.train.callbacks import Callback, Record


def line(record: Record, steps: int) -> str:
    """One readable line of a record."""
    parts = [
        f"step {record['train/step']:.0f}/{steps}",
        f"loss {record['train/loss']:.4f}",
        f"grad norm {record['train/grad_norm']:.3g}",
        f"lr {record['train/lr']:.2e}",
    ]
    if "perf/tokens_per_s" in record:
        parts.append(f"{record['perf/tokens_per_s']:,.0f} tokens/s")
        parts.append(f"{record['perf/step_time_s']:.2f} s/step")
    if "perf/mfu" in record:
        parts.append(f"MFU {100 * record['perf/mfu']:.1f} %")
    if "val/loss" in record:
        parts.append(validation_text(record))
    return " | ".join(parts)


def validation_text(record: Record) -> str:
    return (
        f"validation {record['val/bits_per_byte']:.3f} bits per byte "
        f"(unigram model: {record['val/unigram_bits_per_byte']:.3f})"
    )


class Progress(Callback):
    """Shown by the first rank only."""

    def __init__(self, steps: int):
        self._steps = steps
        self._bar: tqdm | None = None

    def on_start(self, trainer) -> None:
        if trainer.topology.is_first and sys.stderr.isatty():
            self._bar = tqdm(
                total=self._steps, initial=trainer.step, unit="step", dynamic_ncols=True
            )

    def on_record(self, trainer, record: Record) -> None:
        if not trainer.topology.is_first:
            return
        if self._bar is None:
            print(line(record, self._steps), flush=True)
            return
        self._bar.update(trainer.step - self._bar.n)
        shown = {"loss": f"{record['train/loss']:.4f}", "lr": f"{record['train/lr']:.1e}"}
        if "perf/tokens_per_s" in record:
            shown["tokens/s"] = f"{record['perf/tokens_per_s']:,.0f}"
        self._bar.set_postfix(shown)
        if "val/loss" in record:
            self._bar.write(f"step {trainer.step}: {validation_text(record)}")

    def on_end(self, trainer) -> None:
        if self._bar is not None:
            self._bar.close()
