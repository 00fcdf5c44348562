"""Who may import whom: launch -> train -> models -> layers -> ops -> {comm, scan, kernels}; collectives in
comm.py only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BASE = {
    "balance",
    "context",
    "eager",
    "sharding",
    "layout",
    "scan",
    "comm",
    "boundary",
    "lanes",
    "mailbox",
    "metering",
    "virtual",
    "watchdog",
}
LEVELS = {"kernels": 0, "ops": 1, "layers": 2, "models": 3, "train": 4}
COLLECTIVES = {
    "all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_single", "all_gather_object", "reduce_scatter",
    "reduce_scatter_tensor", "all_to_all", "all_to_all_single", "broadcast", "broadcast_object_list", "send", "recv",
    "isend", "irecv", "batch_isend_irecv", "barrier", "gather", "scatter", "reduce",
}  # fmt: skip


def _imports(path: Path) -> set[str]:
    """Absolute names of what a file imports, relative imports resolved."""
    package = ("cp_gdn." + ".".join(path.relative_to(ROOT / "cp_gdn").parts[:-1])).rstrip(".")
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, *filter(None, [node.module])])
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return names


LIBRARY = sorted(
    p for p in (ROOT / "cp_gdn").rglob("*.py") if "kernels" not in p.relative_to(ROOT).parts
)
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: str(p.relative_to(ROOT)))
def test_direction_of_imports(path):
    part = path.relative_to(ROOT / "cp_gdn").parts[0].removesuffix(".py")
    if part == "__init__":
        return
    level = LEVELS.get(part, 0)
    for name in _imports(path):
        if not name.startswith("cp_gdn."):
            continue
        target = name.split(".")[1]
        if part in BASE:
            assert target not in LEVELS, f"{path.name} imports {name}"
        assert LEVELS.get(target, 0) <= level, f"{path.name} imports {name}, which lies above it"
    if part != "train":
        foreign = {n.split(".")[0] for n in _imports(path)} & {
            "hydra",
            "omegaconf",
            "wandb",
            "deepspeed",
        }
        assert not foreign, f"{path.name} imports {foreign}"


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: str(p.relative_to(ROOT)))
def test_kernels_know_nothing_of_ranks(path):
    text = path.read_text()
    tree = ast.parse(text)
    for node in ast.walk(tree):
        names = (
            [a.name for a in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        )
        module = node.module or "" if isinstance(node, ast.ImportFrom) and not node.level else ""
        for name in [*names, module]:
            assert not name.startswith(("cp_gdn", "torch.distributed")), (
                f"{path.name} imports {name}"
            )


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: str(p.relative_to(ROOT)))
def test_collectives_live_in_comm(path):
    if path.name == "comm.py":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in COLLECTIVES
        ):
            owner = node.func.value
            is_dist = isinstance(owner, ast.Name) and owner.id in ("dist", "distributed")
            is_dist |= isinstance(owner, ast.Attribute) and owner.attr == "distributed"
            assert not is_dist, f"{path.name}:{node.lineno} calls the collective {node.func.attr}"


def test_the_walker_sees_relative_imports():
    assert "cp_gdn.comm" in _imports(ROOT / "cp_gdn" / "ops" / "gated_delta_rule.py")
    assert "cp_gdn.ops.chunked" in _imports(ROOT / "cp_gdn" / "ops" / "gated_delta_rule.py")


def test_everything_imports_without_a_gpu_and_without_training_packages():
    code = (
        "import sys\n"
        "for name in ('hydra', 'omegaconf', 'wandb', 'deepspeed', 'tilelang', 'transformers'): "
        "sys.modules[name] = None\n"
        "import cp_gdn, cp_gdn.kernels\n"
        "import torch; assert not torch.cuda.is_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
