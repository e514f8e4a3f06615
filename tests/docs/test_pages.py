"""The code in docs/, page by page, from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parents[2] / "docs"
ELSEWHERE = {"torchtpu.md", "tpu.md"}  # needs a TPU; test_tpu.py, on several devices
PAGES = sorted(x.name for x in DOCS.glob("*.md") if "```python" in x.read_text() and x.name not in ELSEWHERE)


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(page: str) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), flags=re.M | re.S)
    assert blocks
    precision = torch.get_float32_matmul_precision()
    try:
        exec(compile("\n".join(blocks), page, "exec"), {})
    finally:
        torch.set_float32_matmul_precision(precision)


@pytest.mark.parametrize("page", sorted(x.name for x in DOCS.glob("*.md")))
def test_links_lead_somewhere(page: str) -> None:
    """To pages and files that are there; pictures are drawn when the site is built."""
    text = re.sub(r"^```.*?^```", "", (DOCS / page).read_text(), flags=re.M | re.S)
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    missing = [x for x in targets if "://" not in x and not x.startswith("_figures/") and not (DOCS / x).exists()]
    assert not missing


def test_every_public_name_is_on_the_page_of_all() -> None:
    import torch_sinkhorn_attn

    shown = re.findall(r"^\.\. auto\w+:: (\w+)$", (DOCS / "api.md").read_text(), flags=re.M)
    assert sorted(shown) == sorted(torch_sinkhorn_attn.__all__)
