"""The pictures of the site: drawn anew from what the repository ships."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from docs.figures import book, choosing, inputs
from examples.common.plots import save_figure

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("make", [inputs.digits, inputs.sentences, inputs.points, inputs.proteins])
def test_inputs_are_scores_of_unit_spread(make) -> None:
    shown = make()
    assert shown.scores.ndim == 2 and abs(float(shown.scores.std()) - 1) < 1e-6 and shown is make()
    for places, lines in ((shown.row_places, shown.scores.shape[0]), (shown.col_places, shown.scores.shape[1])):
        assert places is None or places.shape == (lines, 2)


def test_transport_gives_every_key_its_share_and_softmax_does_not() -> None:
    points = inputs.points()
    assert np.allclose(book.transport(points, 0.2).sum(0), 1, atol=1e-2)
    assert np.ptp(book.softmax(points, 0.2).sum(0)) > 1


@pytest.mark.slow
def test_pictures_are_drawn(tmp_path: Path) -> None:
    drawn = [("epsilon", book.of_epsilon(inputs.digits())), ("supports", book.of_supports(inputs.sentences()))]
    for name, figure in (*drawn, *choosing.pictures()):
        save_figure(figure, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 5000


def test_the_guide_shows_what_was_measured() -> None:
    """Iterations until balance in docs/choosing.md are those of docs/figures/choosing.json."""
    measured = json.loads(choosing.MEASURED.read_text())["kinds"]
    rows = re.findall(
        r"^\| (dense|banded|padded|unequal masses).*?((?:\| \d+, \d+ )+)\|$", (DOCS / "choosing.md").read_text(), re.M
    )
    assert len(rows) == 4
    for kind, cells in rows:
        shown = [tuple(map(int, x.split(", "))) for x in re.findall(r"\d+, \d+", cells)]
        assert shown == [(x["plain"], x["accelerated"]) for x in measured[kind].values()], kind
