"""``download``: more data."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from examples.common.settings import add_quiet
from examples.common.text import say

from ..download import PFAM_SEED_URL, download
from .options import command_line, named_path


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    text = "Fetch all Pfam seed alignments (about 200 MB)"
    parser = commands.add_parser("download", help=text, description=f"{text}.")
    parser.set_defaults(run=run)
    parser.add_argument("--url", metavar="URL", default=PFAM_SEED_URL, help="gzip file to fetch (default: %(default)s)")
    parser.add_argument(
        "--out",
        metavar="PATH",
        type=named_path,
        default=Path("Pfam-A.seed.gz"),
        help="file to write; one that exists is kept (default: %(default)s)",
    )
    add_quiet(parser)


def run(options: argparse.Namespace) -> int:
    """Fetch, and say what to do with it."""
    path = download(options.url, options.out, progress=not options.quiet)
    say(f"{path} is ready: {command_line()} train --data {shlex.quote(str(path))}")
    return 0
