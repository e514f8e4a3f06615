"""Files of results: whole or as they were."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from examples.common import files
from examples.common.files import replace_text
from examples.common.plots import save_figure


def test_text_and_pictures_replace_what_was_there(tmp_path: Path) -> None:
    text, picture = tmp_path / "new" / "a.txt", tmp_path / "new" / "a.png"
    for words in ("a", "\u00c5ngstr\u00f6m\n"):
        replace_text(text, words)
        save_figure(Figure(), picture)
    assert text.read_bytes() == "\u00c5ngstr\u00f6m\n".encode() and picture.read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in text.parent.iterdir()} == {"a.txt", "a.png"}


@pytest.mark.parametrize("at", ["fsync", "replace"])
def test_what_was_there_outlives_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    paths = [tmp_path / "a.txt", tmp_path / "a.png"]
    for path in paths:
        path.write_text("old")
    monkeypatch.setattr(files.os, at, full)
    with pytest.raises(OSError, match="No space"):
        replace_text(paths[0], "new")
    with pytest.raises(OSError, match="No space"):
        save_figure(Figure(), paths[1])
    assert [path.read_text() for path in paths] == ["old", "old"] and len(os.listdir(tmp_path)) == 2


def test_an_interrupted_picture_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(self: Figure, to: object, **_: object) -> None:
        to.write(b"half")  # type: ignore[attr-defined]
        raise KeyboardInterrupt

    monkeypatch.setattr(Figure, "savefig", stopped)
    with pytest.raises(KeyboardInterrupt):
        save_figure(Figure(), tmp_path / "a.png")
    assert not os.listdir(tmp_path)
