"""The notebooks of docs/, cell by cell."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "docs/notebooks").glob("*.ipynb"))


def code(path: Path) -> str:
    cells = json.loads(path.read_text())["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_cells_run(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib.use("Agg")
    monkeypatch.chdir(Path(__file__).parents[2])
    exec(compile(code(path), path.name, "exec"), {"__name__": "notebook"})


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_output_is_stored(path: Path) -> None:
    """They are run where they are shown, so what they show is of this version."""
    assert all(not cell.get("outputs") for cell in json.loads(path.read_text())["cells"])


def test_there_are_three() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["attention_maps", "matching_points", "two_proteins"]
