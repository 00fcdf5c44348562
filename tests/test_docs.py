"""What README and docs/ point to exists, and the README's example runs."""

import re
from pathlib import Path

import pytest
import torch.distributed as dist

from .distributed import run_ranks

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def _anchors(page: Path) -> set[str]:
    """Those that are made of its headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_lead_somewhere(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if not link.startswith("http"):
            name, _, anchor = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            assert target.exists(), link
            assert not anchor or anchor in _anchors(target), link
    for name in re.findall(r"`((?:cp_gdn|kernels|launch|recipes|tests)/[\w/.-]+)`", text):
        assert (ROOT / name).exists(), name


def _example(rank, size):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    dist.init_process_group = lambda backend: None  # it is there
    names: dict = {}
    exec(code, names)
    return tuple(names["y"].shape), names["ctx"].num_tokens


def test_the_example_of_the_readme_runs():
    results = run_ranks(2, _example)
    assert [shape for shape, _ in results] == [(1, tokens, 256) for _, tokens in results]
    assert sum(tokens for _, tokens in results) == 10000
