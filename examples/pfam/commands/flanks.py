"""``flanks``: aligners on domains within longer proteins, and on pairs that have nothing in common."""

from __future__ import annotations

import argparse

from examples.common.settings import Range, add_quiet, add_threads
from examples.common.text import say

from ..config import HELDOUT_SAMPLE
from ..dataset import read_families
from ..decode import DECODERS, DEFAULT_DECODER
from ..flank_report import CAP, flank_report
from ..release import load_aligner
from .options import add_reading, check_reading

_PAIRS = 8


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    text = "Score aligners on domains between random flanks, and on unrelated pairs"
    parser = commands.add_parser("flanks", help=text, description=f"{text}. Macro F1 over families.")
    parser.set_defaults(run=run)
    text = "a release (.safetensors), a run's folder or checkpoint file (default: the shipped aligner)"
    parser.add_argument("checkpoint", metavar="PATH", nargs="?", help=text)
    text = "Stockholm file or directory, plain or gzip (default: the shipped held-out families)"
    parser.add_argument("--data", metavar="PATH", default=str(HELDOUT_SAMPLE), help=text)
    text = "at most so many pairs of each family (default: %(default)s)"
    parser.add_argument("--pairs", type=int, metavar="N", default=_PAIRS, help=text)
    text = "pairs with a longer domain are skipped (default: %(default)s)"
    parser.add_argument("--cap", type=int, metavar="N", default=CAP, help=text)
    text = "of the pairs and their flanks (default: 0)"
    parser.add_argument("--seed", type=int, metavar="N", default=0, help=text)
    text = f"from plans to pairs: {', '.join(DECODERS)} (default: {DEFAULT_DECODER})"
    parser.add_argument("--decoder", metavar="NAME", choices=DECODERS, default=DEFAULT_DECODER, help=text)
    add_reading(parser)
    add_quiet(parser)
    add_threads(parser)


def run(options: argparse.Namespace) -> int:
    """Print the tables."""
    for name in ("pairs", "cap"):
        Range(1).check(f"--{name}", getattr(options, name))
    Range(0).check("--seed", options.seed)
    check_reading(options)
    families = read_families(options.data, cache=options.cache, max_text=options.max_text)
    aligner = load_aligner(options.checkpoint)
    if seen := aligner.seen(families):
        say(f"warning: the aligner was trained on {len(seen)} of the families")
    if told := aligner.profiled(families):
        say(f"note: its context profiles were taught by {len(told)} of the families")
    chosen = options.pairs, options.cap, options.seed
    found = flank_report({"aligner": aligner}, families, *chosen, not options.quiet, decoder=options.decoder)
    say(found.text)
    return 0
