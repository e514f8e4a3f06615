"""`python -m docs.figures [FOLDER]`: draws every picture anew, some ten seconds."""

from __future__ import annotations

import argparse
from pathlib import Path

from docs.figures import animation, book, choosing
from examples.common.plots import save_figure

FOLDER = Path(__file__).parent.parent / "_figures"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m docs.figures", description="Draw every picture of the site.")
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER, help=f"where to (default: {FOLDER.name})")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in (*book.pictures(), *choosing.pictures()):
        save_figure(figure, folder / f"{name}.png", dpi=110)
    animation.animations(folder)
    print(f"{len(list(folder.iterdir()))} pictures in {folder}")


if __name__ == "__main__":
    main()
