"""Compile the Hopper kernels of a model ahead of time: ``python launch/compile.py model=1b``

Fills TileLang's cache (TILELANG_CACHE_DIR) on any machine with nvcc, GPU or not, so that the first
training step does not wait for a compiler; copied to the training machine, the entries are found
there. Arguments, all optional:

    model=NAME                      a file of recipes/model; or key_heads=16 value_heads=64
                                    key_dim=128 value_dim=128
    dtype=bfloat16 gate_dtype=float32 beta_dtype=float32
    suite=true                      instead: all that the GPU tests and the benchmarks call (4 minutes)
    jobs=2                          compilers side by side
"""

import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tqdm import tqdm

from cp_gdn.kernels.variants import Variant, rule, surroundings, variants
from cp_gdn.ops.head_dims import DIM

SIZES = ("key_heads", "value_heads", "key_dim", "value_dim")
DTYPES = ("bfloat16", "float16")
MODELS = Path(__file__).resolve().parent.parent / "recipes" / "model"


@dataclass
class Options:
    model: str | None = None
    key_heads: int = 16
    value_heads: int = 32
    key_dim: int = 128
    value_dim: int = 128
    dtype: str = "bfloat16"
    gate_dtype: str = "float32"
    beta_dtype: str = "float32"
    suite: bool = False
    jobs: int = 2


def check(options: Options, given: set[str]) -> None:
    """Raise ValueError for what no kernel takes and for heads beside a model that has its own."""
    if options.suite and len(given - {"jobs"}) > 1:
        others = ", ".join(sorted(given - {"suite", "jobs"}))
        raise ValueError(f"suite has its own {others}; leave one out")
    twice = sorted(given.intersection(SIZES))
    if options.model is not None and twice:
        raise ValueError(f"model={options.model} has its own {', '.join(twice)}; leave one out")
    for name in (*SIZES, "jobs"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name}={getattr(options, name)}; it must be at least 1")
    if options.dtype not in DTYPES:
        raise ValueError(f"dtype={options.dtype}; the kernels take {' and '.join(DTYPES)}")
    for name in ("gate_dtype", "beta_dtype"):
        if getattr(options, name) not in ("float32", options.dtype):
            raise ValueError(
                f"{name}={getattr(options, name)}; it may be float32 or dtype, {options.dtype}"
            )


def heads(options: Options) -> tuple[int, int, int, int]:
    """Key heads, value heads and the columns of either."""
    if options.model is None:
        return options.key_heads, options.value_heads, options.key_dim, options.value_dim
    path = MODELS / f"{options.model}.yaml"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in MODELS.glob("*.yaml")))
        raise ValueError(f"model={options.model} is not in {MODELS}; there are {known}")
    recipe = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(recipe, dict)
    names = ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim")
    key_heads, value_heads, key_dim, value_dim = (recipe[f"linear_{name}"] for name in names)
    return key_heads, value_heads, key_dim, value_dim


def suite() -> Iterator[Variant]:
    """What the GPU tests and the benchmarks call: their heads, types, and sizes of convolutions and norms."""
    for ratio in (2, 4, 8):
        yield from rule(ratio)
    for ratio in (1, 3, 6):
        yield from rule(ratio, normalize=(False,))
    yield from rule(
        2, dtype="float16", gate_dtype="bfloat16", beta_dtype="bfloat16", normalize=(False,)
    )
    for key_heads, value_heads, key_dim, value_dim in (
        (16, 32, 128, 128), (16, 64, 128, 128), (2, 4, 128, 128), (2, 4, 64, 256)
    ):  # fmt: skip
        yield from surroundings(key_heads, value_heads, "bfloat16", key_dim, value_dim)
    for dtype in DTYPES:
        yield Variant("query_norms", {"dtype": dtype})
        for way in ("forward", "backward"):
            for packed in (False, True):
                sizes = (256, 128, 320)
                yield Variant(f"conv_{way}", {"sizes": sizes, "dtype": dtype, "packed": packed})
            for heads in (6, 32):
                yield Variant(f"gates_{way}", {"heads": heads, "dtype": dtype})
            for dim in (64, 128, 256):
                yield Variant(f"norm_{way}", {"dim": dim, "dtype": dtype})


def build(variant: Variant) -> tuple[Variant, float]:
    start = time.perf_counter()
    variant.compile()
    return variant, time.perf_counter() - start


def of_model(options: Options) -> Iterator[Variant]:
    key_heads, value_heads, key_dim, value_dim = heads(options)
    if value_heads % key_heads:
        raise ValueError(f"{value_heads} value heads are no multiple of {key_heads} key heads")
    if key_dim > DIM:
        raise ValueError(
            f"key heads of {key_dim} columns; the kernels take up to {DIM}, other models train with "
            "model.engine=torch"
        )
    return variants(
        key_heads,
        value_heads,
        key_dim=key_dim,
        value_dim=value_dim,
        dtype=options.dtype,
        gate_dtype=options.gate_dtype,
        beta_dtype=options.beta_dtype,
    )


def main(arguments: list[str]) -> None:
    schema = OmegaConf.structured(Options)
    given = OmegaConf.from_dotlist(arguments)
    options = OmegaConf.to_object(OmegaConf.merge(schema, given))
    assert isinstance(options, Options)
    check(options, {str(name) for name in given})
    wanted = list(suite() if options.suite else of_model(options))
    wanted = [variant for i, variant in enumerate(wanted) if variant not in wanted[:i]]
    with ProcessPoolExecutor(options.jobs) as pool, tqdm(total=len(wanted), unit="kernel") as bar:
        for done in as_completed([pool.submit(build, variant) for variant in wanted]):
            variant, seconds = done.result()
            bar.update()
            bar.write(f"{seconds:6.1f} s  {variant}")


if __name__ == "__main__":
    if {"-h", "--help"}.intersection(sys.argv):
        print(__doc__)
        raise SystemExit
    try:
        main(sys.argv[1:])
    except (ValueError, OmegaConfBaseException) as problem:
        print(f"{type(problem).__name__}: {problem}", file=sys.stderr)
        raise SystemExit(2) from problem
