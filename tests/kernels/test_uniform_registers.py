"""Loops with products find their addresses in uniform registers, where the compiler knows that all lanes share them.

Else each wait and each product first moves an address there: 9 % of a forward at 16/64, with the same
bits (docs/kernels.md, "Uniform registers").
"""

import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import pytest

from .test_compile import nvcc  # noqa: F401  (the fixture applies here as well)

pytestmark = pytest.mark.timeout(300)

INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?);")
LABEL = re.compile(r"^\.(L_x_\d+):")
# Waits at uniform addresses in the loops with products, at least.
WAITS = {
    "chain alone": ("recurrence_alone", {}, 16),
    "chain alone, normalising": ("recurrence_alone", {"normalize": True}, 16),
    "chain alone, keeping": ("recurrence_alone", {"keep": True}, 16),
    "two chains": ("recurrence", {}, 4),
    "dS chain alone": ("reverse", {"halves": 1}, 9),
}


@pytest.fixture(scope="module")
def disassembler():
    try:
        found = [path for path in files("nvidia-cuda-nvdisasm") or () if path.name == "nvdisasm"]
    except PackageNotFoundError:
        message = f"nvidia-cuda-nvdisasm is not installed ({sys.platform}): the loops were not read"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    path = Path(found[0].locate())
    path.chmod(0o755)
    return path


def disassemble(disassembler, cubin, folder):
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    command = [disassembler, "-c", path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def product_loops(sass):
    """Instructions of the innermost loops that have products."""
    instructions, labels, loops = [], {}, []
    for line in sass.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif instruction := INSTRUCTION.match(line):
            instructions.append(instruction[1])
    for end, text in enumerate(instructions):
        target = re.search(r"BRA.*`\(\.(L_x_\d+)\)", text)
        start = labels.get(target[1], end + 1) if target else end + 1
        if start <= end and any("HGMMA" in x for x in instructions[start:end]):
            loops.append((start, end))
    inner = [
        (a, b)
        for a, b in loops
        if not any((a, b) != (c, d) and a <= c and d <= b for c, d in loops)
    ]
    return [instructions[a:b] for a, b in inner]


def uniform_waits(loops):
    return sum("SYNCS" in x and "[UR" in x for loop in loops for x in loop)


@pytest.mark.parametrize("name", WAITS)
def test_waits_at_uniform_addresses(name, disassembler, tmp_path):
    variants = pytest.importorskip("cp_gdn.kernels.variants", reason="tilelang is not installed")
    kernel, options, least = WAITS[name]
    cubin = variants.assemble(variants.Variant(kernel, options).source()).cubin
    loops = product_loops(disassemble(disassembler, cubin, tmp_path))
    assert uniform_waits(loops) >= least


def test_a_search_by_ballots_would_show(disassembler, tmp_path):
    variants = pytest.importorskip("cp_gdn.kernels.variants", reason="tilelang is not installed")
    source = variants.Variant("recurrence_alone", {}).source()
    slow, count = re.subn(r"gdn::halve_documents(\(\(&.*)\);", r"gdn::find_document\1, 1);", source)
    assert count == 1
    loops = product_loops(disassemble(disassembler, variants.assemble(slow).cubin, tmp_path))
    assert uniform_waits(loops) < WAITS["chain alone"][2]
