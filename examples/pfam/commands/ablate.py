"""``ablate``: train variants of one setting, several seeds each, and put them in a table."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from examples.common.files import REPORT, prepare_folder, replace_text
from examples.common.settings import Range, add_quiet, add_setting
from examples.common.text import say

from ..ablation import VARIANTS, ablate, ablation_table
from ..config import Config
from ..dataset import load_dataset, nucleotide_notes
from .options import NUMBERS, add_reading, check_reading, given_settings, keep_streams, named_path

_FOLDER = "runs/ablation"
_SEEDS, _JOBS = Range(1, 100), Range(1, 256)


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    text = "Train the same model with one setting changed, several seeds each, and compare"
    parser = commands.add_parser("ablate", help=text, description=f"{text}.")
    parser.usage = f"{parser.prog} [OPTIONS]"
    parser.set_defaults(run=run)
    text = f"variants to train: {', '.join(VARIANTS)} (default: all)"
    parser.add_argument("--variants", metavar="NAME", nargs="+", choices=VARIANTS, default=list(VARIANTS), help=text)
    parser.add_argument("--seeds", type=int, metavar="N", default=3, help="seeds of each variant (default: 3)")
    text = "runs at a time, a thread each (default: 1)"
    parser.add_argument("--jobs", type=int, metavar="N", default=1, help=text)
    parser.add_argument("--data", metavar="PATH", help="alignments to train on (default: the shipped sample)")
    parser.add_argument("--eval-data", metavar="PATH", help="held-out families (default: as for train)")
    text = f"folder for the runs and the table; runs that it holds are not repeated (default: {_FOLDER})"
    parser.add_argument("--out", metavar="PATH", type=named_path, default=Path(_FOLDER), help=text)
    for name in NUMBERS:
        if name not in ("seed", "eval_every"):
            add_setting(parser, NUMBERS[name])
    add_reading(parser)
    add_quiet(parser)


def run(options: argparse.Namespace) -> int:
    """Train, print and write the table."""
    _SEEDS.check("--seeds", options.seeds)
    _JOBS.check("--jobs", options.jobs)
    check_reading(options)
    keep_streams(options)
    config = given_settings(options, Config(eval_every=0))
    prepare_folder(options.out)
    # Before the runs start, each for itself: what is wrong with the data, and what looks odd, is said once.
    dataset = load_dataset(config, options.cache, options.max_text)
    for note in nucleotide_notes((*dataset.train, *dataset.heldout_families)):
        say(note, sys.stderr)
    reading = {"cache": options.cache, "max_text": options.max_text}
    found = ablate(config, options.variants, options.seeds, options.out, options.jobs, not options.quiet, reading)
    text = ablation_table(found)
    replace_text(options.out / REPORT, text + "\n")
    say(text)
    return 0
