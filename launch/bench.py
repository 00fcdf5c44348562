"""Time the kernels beside their peers: ``python launch/bench.py op=forward peers=[flash_qla]``

Needs Hopper GPUs. Prints a table and writes docs/results/<op>-h200.json and .png. `op` is a module of
launch/benchmarks, which names its own arguments; those of forward, backward, step and recompute (a
step under activation checkpointing, which has no peers), one GPU each, all optional:

    peers=[flash_qla]     flash_qla; fla in forward and step, where its autotuning takes minutes
    shapes=[[32768,16,64],...]     T, key heads, value heads
    packed=[[32768,16,32],...]     the same with 8 equal and with 32 skewed documents
    gates=[qwen,flash_qla,slow]    as Qwen3.5 initialises them, as FlashQLA's benchmark draws them,
                                   all near -1e-4
    sets=2 replays=20 out=docs/results/forward-h200

numerics and model compare errors and whole training steps, cp, timeline and scaling run over GPUs.

Times are medians of CUDA-graph replays; between two replays of one input set another one runs, so
that nothing is found in the L2 cache.
"""

import sys
from importlib import import_module
from pathlib import Path

from omegaconf.errors import OmegaConfBaseException

HERE = Path(__file__).resolve().parent
ELSEWHERE = {"timeline": "cp_timeline"}  # operations whose module is called otherwise
HELPERS = ("inputs", "timing", "cp_layers", "cp_peers", "cp_timing", *ELSEWHERE.values())


def main(arguments: list[str]) -> None:
    names = [x[3:] for x in arguments if x.startswith("op=")] or ["forward"]
    known = {path.stem for path in (HERE / "benchmarks").glob("[a-z]*.py")} - {*HELPERS}
    known |= {op for op, module in ELSEWHERE.items() if (HERE / f"benchmarks/{module}.py").exists()}
    if names[-1] not in known:
        raise ValueError(f"op={names[-1]}; there are {', '.join(sorted(known))}")
    sys.path.insert(0, str(HERE))
    import_module(f"benchmarks.{ELSEWHERE.get(names[-1], names[-1])}").main(arguments)


if __name__ == "__main__":
    if {"-h", "--help"}.intersection(sys.argv):
        print(__doc__)
        raise SystemExit
    try:
        main(sys.argv[1:])
    except (ValueError, OmegaConfBaseException) as problem:
        print(f"{type(problem).__name__}: {problem}", file=sys.stderr)
        raise SystemExit(2) from problem
