"""Two pictures of a run, drawn from metrics.jsonl: the loss with its validation and baseline, and the throughput."""

from pathlib import Path

from cp_gdn.train.callbacks import Callback, Record
from cp_gdn.train.metrics import read_metrics


def plot_run(folder: Path) -> list[Path]:
    """Draw ``loss.png`` and ``throughput.png`` into a run's folder; returns what was drawn."""
    import matplotlib

    matplotlib.use("Agg")
    records = read_metrics(folder / "metrics.jsonl")
    drawn = [_loss(records, folder)] if records else []
    timed = [r for r in records if "perf/tokens_per_s" in r]
    return drawn + ([_throughput(timed, folder)] if timed else [])


def _column(records: list[Record], key: str) -> tuple[list[float], list[float]]:
    having = [r for r in records if key in r]
    return [r["train/step"] for r in having], [r[key] for r in having]


def _running_mean(values: list[float], window: int) -> list[float]:
    spans = (values[max(0, i + 1 - window) : i + 1] for i in range(len(values)))
    return [sum(span) / len(span) for span in spans]


def _loss(records: list[Record], folder: Path) -> Path:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.8), layout="constrained")
    steps, losses = _column(records, "train/loss")
    window = max(1, len(losses) // 12)
    axes.plot(steps, losses, lw=1, alpha=0.35, color="tab:blue", label="training, each step")
    if window > 1:
        label = f"training, mean of the last {window} records"
        axes.plot(steps, _running_mean(losses, window), lw=2, color="tab:blue", label=label)
    validated = [r for r in records if "val/loss" in r]
    if validated:
        last = validated[-1]
        bits, unigram = last["val/bits_per_byte"], last["val/unigram_bits_per_byte"]
        axes.plot(
            *_column(validated, "val/loss"),
            "o-",
            label=f"validation (last: {bits:.2f} bits per byte)",
            color="tab:orange",
            zorder=3,
        )
        axes.axhline(
            unigram * last["val/loss"] / bits,  # bits per byte in nats per token
            ls="--",
            color="0.4",
            label=f"unigram model ({unigram:.2f} bits per byte)",
        )
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=f"{folder.name}: loss")
    _finish(axes)
    axes.legend(frameon=False)
    return _save(figure, folder / "loss.png")


def _throughput(records: list[Record], folder: Path) -> Path:
    from matplotlib import pyplot as plt

    figure, (upper, lower) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, layout="constrained")
    steps, rate = _column(records, "perf/tokens_per_s")
    median = sorted(rate)[len(rate) // 2]
    upper.plot(steps, rate, lw=1.6, color="tab:green")
    upper.axhline(median, ls="--", color="0.4", label=f"median {median:,.0f} tokens/s")
    upper.set(ylabel="tokens per second", title=f"{folder.name}: throughput")
    upper.set_ylim(0, 1.2 * max(rate))
    upper.legend(frameon=False, loc="lower right")
    lower.plot(*_column(records, "perf/step_time_s"), label="step", color="tab:blue")
    exchange_steps, milliseconds = _column(records, "comm/cp_exchange_ms")
    seconds = [ms / 1e3 for ms in milliseconds]
    lower.plot(exchange_steps, seconds, label="context-parallel exchange", color="tab:orange")
    lower.plot(*_column(records, "perf/data_time_s"), label="data", color="tab:purple")
    lower.set(xlabel="step", ylabel="seconds per step")
    lower.set_ylim(bottom=0)
    lower.legend(frameon=False)
    for axes in (upper, lower):
        _finish(axes)
    return _save(figure, folder / "throughput.png")


def _finish(axes) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.get_major_locator().set_params(integer=True)


def _save(figure, path: Path) -> Path:
    from matplotlib import pyplot as plt

    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


class Plots(Callback):
    """Draws at the end of a run."""

    def __init__(self, folder: Path):
        self._folder = folder
        self.drawn: list[Path] = []

    def on_end(self, trainer) -> None:
        if trainer.topology.is_first:
            self.drawn = plot_run(self._folder)
