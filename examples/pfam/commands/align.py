"""``align``: two proteins, with the confidence of every column; or, with ``--pairs``, many."""

from __future__ import annotations

import argparse
import sys

from examples.common.settings import Range, add_threads, option_name
from examples.common.text import clip, say, visible

from ..align_files import check_folder, write_files
from ..alignment_picture import draw_alignment
from ..decode import DEFAULT_DECODER
from ..library import BATCH, MONOTONE, Asked, solve
from ..pair_formats import FORMATS
from ..release import SHIPPED, load_aligner
from ..runs import MODES
from ..sequences import MOST_PAIRS, Protein, count_of_pairs, read_proteins
from ..three_lines import LEGEND, display_names, summary_lines, three_lines
from . import align_many

_FOLDER, _FOLDER_OF_MANY = "runs/align", "runs/align-many"
_PAIRS = Range(1, 1_000_000_000)


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    text = "Align two proteins, and say how sure each column is"
    more = "Writes FASTA, Stockholm, JSON, a picture. With --pairs, many proteins, into one table; a run that was "
    more += "stopped goes on when it is started again."
    parser = commands.add_parser("align", help=text, description=f"{text}. {more}")
    parser.set_defaults(run=run)
    parser.add_argument(
        "sequences",
        nargs="+",
        metavar="FASTA",
        help="two FASTA files, plain or gzip, or two sequences as letters, or one of each, or one file that holds two; "
        "pipes are files, and - is standard input; with --pairs any number of files, each of any number",
    )
    text = f"many pairs: {align_many.WHICH} (default: the two that are given)"
    parser.add_argument("--pairs", metavar="WHICH", help=text)
    text = f"with --pairs, files to write: names of {', '.join(FORMATS)}, with commas between (default: tsv)"
    parser.add_argument("--format", metavar="NAMES", help=text)
    text = f"with --pairs, pairs that are aligned at once; of long ones fewer (default: {BATCH})"
    parser.add_argument("--batch-size", type=int, metavar="N", help=text)
    parser.add_argument(
        "--checkpoint",
        metavar="PATH",
        help="a released aligner, a run's folder or checkpoint file (default: the shipped aligner)",
    )
    text = f"{' or '.join(MONOTONE)} (default: %(default)s)"
    parser.add_argument("--decoder", choices=MONOTONE, default=DEFAULT_DECODER, metavar="NAME", help=text)
    text = "auto: ends as the sequences suggest; global: from end to end; local: only a part is shared (default: auto)"
    parser.add_argument("--mode", choices=MODES, default="auto", metavar="NAME", help=text)
    parser.add_argument(
        "--out",
        metavar="PATH",
        help=f"folder for what is written (default: {_FOLDER}, of many pairs {_FOLDER_OF_MANY})",
    )
    text = "refuse sequences with more pairs of residues (default: %(default)s, twice three thousand residues)"
    parser.add_argument("--most-pairs", type=int, metavar="N", default=MOST_PAIRS, help=text)
    parser.add_argument("--quiet", action="store_true", help="print the alignment alone; of many, nothing but notes")
    add_threads(parser)


def run(options: argparse.Namespace) -> int:
    """Print the alignment to standard output, notes to standard error; write the files."""
    _PAIRS.check("--most-pairs", options.most_pairs)
    if options.pairs is not None:
        return align_many.run(options, _FOLDER_OF_MANY if options.out is None else options.out)
    for name in ("format", "batch_size"):
        if getattr(options, name) is not None:
            raise ValueError(f"{option_name(name)} is for many pairs; give --pairs too, or leave it out")
    notes: list[str] = []
    proteins = read_proteins(options.sequences, notes)
    _check_size(proteins, options.most_pairs)
    for note in notes:
        say(f"note: {note}", sys.stderr)
    folder = _FOLDER if options.out is None else options.out
    check_folder(folder)
    aligner = load_aligner(options.checkpoint)
    names = display_names(proteins)
    asked = [Asked(0, names, (proteins[0].letters, proteins[1].letters))]
    ((_, found),) = solve(aligner, asked, options.mode, options.decoder, batch_size=1, keep_plans=True)
    alignment, homology = found.alignment, found.homology
    assert found.plan is not None
    say(three_lines(alignment, names))
    if not options.quiet:
        say(f"\n{LEGEND}\n\n{summary_lines(alignment, names, homology)}\n")
    made_with = {"checkpoint": visible(str(options.checkpoint or SHIPPED.name)), "decoder": options.decoder}
    made_with["mode"] = options.mode
    picture = draw_alignment(alignment, found.plan, names)
    for path in write_files(folder, proteins, alignment, picture, made_with, homology):
        if not options.quiet:
            say(f"wrote {path}")
    return 0


def _check_size(proteins: tuple[Protein, Protein], most: int) -> None:
    n, m = (len(protein.letters) for protein in proteins)
    if n * m > most:
        first, second = (clip(protein.name) for protein in proteins)
        raise ValueError(
            f"{first} has {n} residues and {second} {m}: {count_of_pairs(n * m)} pairs, where memory for "
            f"{count_of_pairs(most)} is foreseen; cut the sequences, for example into domains, or see --most-pairs"
        )
