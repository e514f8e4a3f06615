"""The code in docs/, page by page, from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGES = ["matching.md"]
DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(page: str) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), flags=re.M | re.S)
    assert blocks
    exec(compile("\n".join(blocks), page, "exec"), {})
