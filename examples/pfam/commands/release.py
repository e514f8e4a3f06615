"""``release``: a run's aligner as one small file."""

from __future__ import annotations

import argparse
from pathlib import Path

from examples.common.text import say

from ..release import load_aligner, save_release


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    text = "Write the trained aligner of a run into one small file"
    parser = commands.add_parser("release", help=text, description=f"{text}, for align and evaluate.")
    parser.set_defaults(run=run)
    parser.add_argument("checkpoint", metavar="PATH", help="a run's folder or checkpoint file")
    parser.add_argument(
        "--out",
        metavar="PATH",
        type=Path,
        default=Path("aligner.safetensors"),
        help="file to write, one that exists is kept (default: %(default)s)",
    )


def run(options: argparse.Namespace) -> int:
    """Write it, and say how large it is."""
    if options.out.exists():
        raise FileExistsError(f"--out {options.out} exists; remove it first, or choose another name")
    aligner = load_aligner(options.checkpoint)
    path = save_release(aligner.model, aligner.config, options.out, aligner.trained_on)
    say(f"wrote {path}, {path.stat().st_size / 1e6:.2f} MB")
    return 0
