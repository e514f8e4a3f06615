"""Pictures. They need no display; names are drawn letter by letter, whatever matplotlib could take them for."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from examples.common.files import replacing
from examples.common.text import clip, visible

_WIDEST = 80


def write(artist: Text, name: str) -> None:
    """Make ``artist`` show ``name``: '$', '_', '^' and a backslash are characters, not mathematics or TeX."""
    artist.set_parse_math(False)
    artist.set_usetex(False)
    artist.set_text(clip(visible(name), _WIDEST))


def legend(axes: Axes, names: Sequence[str], fontsize: float | None = None) -> None:
    """A legend of the first artists of ``axes`` that were given a label, one for each of ``names``.

    Labels that begin with '_' would be left out; so artists carry others, and the names are written afterwards.
    """
    shown = axes.legend(frameon=False, fontsize=fontsize, loc="best")
    for text, name in zip(shown.get_texts(), names, strict=True):
        write(text, name)


def save_figure(figure: Figure, path: Path, dpi: float = 130) -> None:
    """Write the picture, by ``files.replacing``, and forget it."""
    with replacing(path) as file:
        save(figure, file, dpi)
    plt.close(figure)


def save(figure: Figure, to: BinaryIO, dpi: float = 130) -> None:
    """Write a PNG. Letters that the font lacks are drawn as boxes, without a warning for each."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure.savefig(to, format="png", dpi=dpi)
