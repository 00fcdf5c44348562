"""Train one decoder with our layer and with FLA's in its place: ``python launch/bench.py op=model``
or on other engines: ``python launch/bench.py op=model kinds=[float32,tilelang,torch] steps=200 tokens=4096 layers=2
hidden=256 key_heads=2 value_heads=4 intermediate=512 vocabulary=512 lr=1e-3 out=docs/results/curve-h200``

A Gated DeltaNet model, the same weights, tokens and optimizer for every kind of layer, bf16
autocast over fp32 parameters: tokens/s, peak memory and the losses, which must run together. Writes
docs/results/model-h200.json and a plot of the losses. Needs one Hopper GPU; FLA's first step tunes its
kernels for minutes. Arguments, all optional:

    kinds=[tilelang,fla]   tilelang and torch: our layer on that engine; fla: fla.layers.GatedDeltaNet;
                           float32: the torch engine in a model without autocast
    tokens=32768 layers=3 hidden=2048 key_heads=16 value_heads=32 intermediate=5632 vocabulary=32000
    steps=30 lr=3e-4 checkpointing=false out=docs/results/model-h200
"""

import gc
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from cp_gdn import CPContext, CPGatedDeltaNet
from cp_gdn.models.hybrid import HybridConfig, HybridLM

from .timing import need_gpu, parse, pyplot, results_path, write

WARM = 5  # steps that are not timed: compilers, allocator


@dataclass
class Options:
    op: str = "model"
    kinds: list[str] = field(default_factory=lambda: ["tilelang", "fla"])
    tokens: int = 32768
    layers: int = 3
    hidden: int = 2048
    key_heads: int = 16
    value_heads: int = 32
    intermediate: int = 5632
    vocabulary: int = 32000
    steps: int = 30
    lr: float = 3e-4
    checkpointing: bool = False
    out: str = "docs/results/model-h200"


class Theirs(nn.Module):
    """FLA's layer with the weights of ours, called like ours."""

    def __init__(self, ours: CPGatedDeltaNet):
        super().__init__()
        from fla.layers import GatedDeltaNet

        weights = ours.state_dict()
        head_dim = weights["norm.weight"].numel()
        values, hidden = weights["in_proj_z.weight"].shape
        keys = (len(weights["in_proj_qkv.weight"]) - values) // 2
        self.layer = GatedDeltaNet(
            hidden, 1.0, head_dim, keys // head_dim, values // head_dim, norm_eps=1e-6
        )
        sizes, given = (keys, keys, values), dict[str, Tensor]()
        for kind, name in (("in_proj_qkv", "proj"), ("conv1d", "conv1d")):
            parts = weights[f"{kind}.weight"].split(sizes)
            given |= {f"{x}_{name}.weight": w for x, w in zip("qkv", parts, strict=True)}
        for x, name in zip("abg", ("in_proj_a", "in_proj_b", "in_proj_z"), strict=True):
            given[f"{x}_proj.weight"] = weights[f"{name}.weight"]
        given |= {name: weights[name] for name in ("A_log", "dt_bias")}
        given |= {
            "o_norm.weight": weights["norm.weight"],
            "o_proj.weight": weights["out_proj.weight"],
        }
        self.layer.load_state_dict(given)

    def forward(self, x: Tensor, *, cp_context: CPContext | None) -> Tensor:
        return self.layer(x)[0]


def build(kind: str, options: Options) -> HybridLM:
    torch.manual_seed(0)
    config = HybridConfig(
        vocab_size=options.vocabulary, hidden_size=options.hidden, num_layers=options.layers,
        intermediate_size=options.intermediate, num_attention_heads=16, num_key_value_heads=4,
        head_dim=128, linear_num_key_heads=options.key_heads,
        linear_num_value_heads=options.value_heads, linear_key_head_dim=128,
        linear_value_head_dim=128, full_attention_interval=options.layers + 1,
        engine={"fla": "auto", "float32": "torch"}.get(kind, kind),
    )  # fmt: skip
    model = HybridLM(config)
    if kind == "fla":
        for layer in model.model.layers:
            assert isinstance(layer.linear_attn, CPGatedDeltaNet)
            layer.linear_attn = Theirs(layer.linear_attn)
    model.set_activation_checkpointing(options.checkpointing)
    return model.cuda()


def text(options: Options) -> Tensor:
    """Tokens with something to learn: every one of a step is drawn near the one before it. [steps, T]"""
    gen = torch.Generator("cuda").manual_seed(1)
    steps = torch.randint(
        1, 50, (options.steps, options.tokens), generator=gen, device="cuda"
    ).cumsum(1)
    return steps % options.vocabulary


def measure(kind: str, options: Options) -> dict[str, Any]:
    model = build(kind, options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, fused=True)
    losses, times = [], []
    for ids in tqdm(text(options), desc=kind, unit="step"):
        start = time.perf_counter()
        ids = ids[None]
        with torch.autocast("cuda", torch.bfloat16, enabled=kind != "float32"):
            out = model(ids, ids.roll(-1, 1))
            assert out.loss_sum is not None
            loss = out.loss_sum / ids.numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        times.append(time.perf_counter() - start)
        if len(times) == WARM:
            torch.cuda.reset_peak_memory_stats()
    low, middle, high = statistics.quantiles(times[WARM:], n=4)
    return {
        "kind": kind, "ms": middle * 1e3, "spread": (high - low) * 1e3, "first_step_s": times[0],
        "tokens_per_s": options.tokens / middle,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30, "losses": losses,
    }  # fmt: skip


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    figure, axes = pyplot().subplots(figsize=(7, 4), layout="constrained")
    for row, style in zip(rows, ("-", "--", ":"), strict=False):
        label = (
            f"{row['kind']}, {row['tokens_per_s'] / 1e3:.0f}k tokens/s, {row['peak_gib']:.1f} GiB"
        )
        axes.plot(range(1, len(row["losses"]) + 1), row["losses"], style, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats a token")
    axes.legend()
    figure.savefig(path, dpi=120)


def main(arguments: list[str]) -> None:
    options = parse(Options(), arguments)
    unknown = set(options.kinds) - {"tilelang", "torch", "fla", "float32"}
    if unknown:
        raise ValueError(f"kinds={options.kinds}; there are tilelang, torch, fla and float32")
    if options.steps < WARM + 2:
        raise ValueError(f"steps={options.steps}; the first {WARM} are not timed: give {WARM + 2}")
    need_gpu()
    path = results_path(options.out)
    rows: list[dict[str, Any]] = []
    for kind in options.kinds:
        row = measure(kind, options)
        first = rows[0] if rows else row
        row["tokens_per_s_of_first"] = row["tokens_per_s"] / first["tokens_per_s"]
        pairs = zip(row["losses"], first["losses"], strict=True)
        row["loss_difference"] = max(abs(a - b) / b for a, b in pairs)
        rows.append(row)
        write(path, options, rows)
        print(
            f"{kind:9s} {row['ms']:8.1f} ms a step {row['tokens_per_s']:10.0f} tokens/s "
            f"{row['peak_gib']:6.1f} GiB loss {row['losses'][0]:.4f} to {row['losses'][-1]:.4f}, "
            f"at most {row['loss_difference']:.1e} from {first['kind']}"
        )
        gc.collect()
        torch.cuda.empty_cache()
    plot(rows, path.with_suffix(".png"))
