"""``python -m examples.pfam.notebook``: run ``align.ipynb`` again and keep what it prints; needs no Jupyter."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

from examples.common.files import replacing
from examples.common.text import say

NOTEBOOK = Path(__file__).with_name("align.ipynb")


def run_cells(book: dict[str, Any]) -> list[str]:
    """What each code cell of a notebook prints, run one after the other in one namespace."""
    space: dict[str, Any] = {"__name__": "__main__"}
    printed = []
    for number, cell in enumerate(book["cells"]):
        if cell["cell_type"] == "code":
            with contextlib.redirect_stdout(io.StringIO()) as text:
                exec(compile("".join(cell["source"]), f"cell {number}", "exec"), space)
            printed.append(text.getvalue())
    return printed


def main() -> int:
    """Write the notebook with its outputs."""
    book = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    cells = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    for count, (cell, text) in enumerate(zip(cells, run_cells(book), strict=True), start=1):
        output = {"name": "stdout", "output_type": "stream", "text": text.splitlines(keepends=True)}
        cell.update(execution_count=count, outputs=[output] if text else [])
    with replacing(NOTEBOOK) as file:
        file.write((json.dumps(book, indent=1, ensure_ascii=False) + "\n").encode())
    say(f"wrote {NOTEBOOK}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
