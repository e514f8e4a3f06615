"""``align``: two proteins, with the confidence of every column."""

from __future__ import annotations

import argparse
import sys

import numpy as np

from examples.common.settings import Range, add_threads
from examples.common.text import clip, say, visible

from ..align_files import check_folder, write_files
from ..alignment import PairwiseAlignment
from ..alignment_picture import draw_alignment
from ..decode import DECODERS, DEFAULT_DECODER
from ..evaluate import aligned
from ..pairs import Pair, encode
from ..release import SHIPPED, load_aligner
from ..runs import MODES
from ..sequences import LONGEST, Protein, read_proteins
from ..three_lines import LEGEND, display_names, summary_lines, three_lines

_FOLDER = "runs/align"
# Mutual argmax may cross pairs, which columns cannot show.
_DECODERS = tuple(name for name in DECODERS if name != "mutual")
_PAIRS = Range(1, 1_000_000_000)


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    text = "Align two proteins, and say how sure each column is"
    parser = commands.add_parser("align", help=text, description=f"{text}. Writes FASTA, Stockholm, JSON, a picture.")
    parser.set_defaults(run=run)
    parser.add_argument(
        "sequences",
        nargs="+",
        metavar="FASTA",
        help="two FASTA files, plain or gzip, or two sequences as letters, or one of each, or one file that holds two; "
        "pipes are files, and - is standard input",
    )
    parser.add_argument(
        "--checkpoint",
        metavar="PATH",
        help="a released aligner, a run's folder or checkpoint file (default: the shipped aligner)",
    )
    text = f"{' or '.join(_DECODERS)} (default: %(default)s)"
    parser.add_argument("--decoder", choices=_DECODERS, default=DEFAULT_DECODER, metavar="NAME", help=text)
    text = "auto: ends as the sequences suggest; global: from end to end; local: only a part is shared (default: auto)"
    parser.add_argument("--mode", choices=MODES, default="auto", metavar="NAME", help=text)
    parser.add_argument(
        "--out",
        metavar="PATH",
        default=_FOLDER,
        help="folder for what is written (default: %(default)s)",
    )
    text = "refuse sequences with more pairs of residues, of which each takes 0.5 kB of memory (default: %(default)s)"
    parser.add_argument("--most-pairs", type=int, metavar="N", default=LONGEST, help=text)
    parser.add_argument("--quiet", action="store_true", help="print the alignment alone, without what it amounts to")
    add_threads(parser)


def run(options: argparse.Namespace) -> int:
    """Print the alignment to standard output, notes to standard error; write the files."""
    _PAIRS.check("--most-pairs", options.most_pairs)
    notes: list[str] = []
    proteins = read_proteins(options.sequences, notes, options.most_pairs)
    _check_size(proteins, options.most_pairs)
    for note in notes:
        say(f"note: {note}", sys.stderr)
    check_folder(options.out)
    aligner = load_aligner(options.checkpoint)
    aligner.model.mode = options.mode
    names = display_names(proteins)
    query, key = (protein.letters for protein in proteins)
    pair = Pair("", names, encode(query), encode(key), np.zeros((0, 2), dtype=np.int64))
    (found,) = aligned(aligner.model, [pair], batch_size=1)
    pairs = DECODERS[options.decoder](found.plan)
    alignment = PairwiseAlignment.from_plan((query, key), found.plan, pairs)
    # What the probability was fitted on had nothing said of its ends.
    judged = options.mode == "auto" and found.log_odds is not None
    homology = aligner.verdict.probability(found.log_odds or 0.0, found.plan, pairs) if judged else None
    say(three_lines(alignment, names))
    if not options.quiet:
        say(f"\n{LEGEND}\n\n{summary_lines(alignment, names, homology)}\n")
    made_with = {"checkpoint": visible(str(options.checkpoint or SHIPPED.name)), "decoder": options.decoder}
    made_with["mode"] = options.mode
    picture = draw_alignment(alignment, found.plan, names)
    for path in write_files(options.out, proteins, alignment, picture, made_with, homology):
        if not options.quiet:
            say(f"wrote {path}")
    return 0


def _check_size(proteins: tuple[Protein, Protein], most: int) -> None:
    n, m = (len(protein.letters) for protein in proteins)
    if n * m > most:
        first, second = (clip(protein.name) for protein in proteins)
        raise ValueError(
            f"{first} has {n} residues and {second} {m}: {n * m / 1e6:.0f} million pairs, where memory for "
            f"{most / 1e6:g} million is foreseen; cut the sequences, for example into domains, or see --most-pairs"
        )
