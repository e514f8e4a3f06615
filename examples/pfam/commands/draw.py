"""``draw``: alignments drawn from profile HMMs, to train on."""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path

from examples.common.files import replacing
from examples.common.settings import Range
from examples.common.text import say

from ..dataset import read_families
from ..profile_hmms import LONGEST, ROWS, SHORTEST, drawn_families, read_profile_hmms, without
from .options import named_path


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    text = "Draw alignments from profile HMMs, to train on beside others"
    parser = commands.add_parser("draw", help=text, description=f"{text}: {ROWS} sequences of each.")
    parser.set_defaults(run=run)
    text = "profile HMMs of HMMER 3, text or binary, such as Pfam-A.hmm (read by pyhmmer)"
    parser.add_argument("hmms", metavar="PATH", help=text)
    text = f"of so many, or of all with {SHORTEST} to {LONGEST} columns (default: %(default)s)"
    parser.add_argument("--families", type=int, default=450, metavar="N", help=text)
    text = "families whose HMMs are left out, Stockholm; may be repeated"
    parser.add_argument("--without", metavar="PATH", action="append", default=[], help=text)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of all that is drawn (default: %(default)s)")
    text = "file to write, Stockholm in gzip, one that exists is kept (default: %(default)s)"
    parser.add_argument("--out", metavar="PATH", type=named_path, default=Path("drawn.sto.gz"), help=text)


def run(options: argparse.Namespace) -> int:
    """Write them."""
    Range(1, 10**9).check("--families", options.families)
    Range(0, 2**32 - 1).check("--seed", options.seed)
    if options.out.exists():
        raise FileExistsError(f"--out {options.out} exists; remove it first, or choose another name")
    hmms = read_profile_hmms(options.hmms)
    kept = without(hmms, [family for path in options.without for family in read_families(path)])
    records = list(drawn_families(kept, options.families, options.seed))
    if not records:
        raise ValueError(f"none of {len(hmms)} profile HMMs has {SHORTEST} to {LONGEST} columns and is not left out")
    with replacing(options.out) as file:
        file.write(gzip.compress("".join(records).encode(), mtime=0))
    say(f"wrote {options.out}: {len(records)} families, {ROWS} sequences each")
    return 0
