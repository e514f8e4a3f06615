"""``release``: a run's aligner as one small file."""

from __future__ import annotations

import argparse
from pathlib import Path

from examples.common.settings import add_quiet, add_threads
from examples.common.text import say

from ..dataset import in_brief, read_families
from ..homology import fitted
from ..release import load_aligner, save_release, with_hmms
from ..runs import BEGINNINGS, RELATIVES
from ..stockholm import shown
from .options import named_path


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    text = "Write the trained aligner of a run into one small file"
    parser = commands.add_parser("release", help=text, description=f"{text}, for align and evaluate.")
    parser.set_defaults(run=run)
    parser.add_argument("checkpoint", metavar="PATH", help="a run's folder or checkpoint file")
    parser.add_argument(
        "--out",
        metavar="PATH",
        type=named_path,
        default=Path("aligner.safetensors"),
        help="file to write, one that exists is kept (default: %(default)s)",
    )
    text = "families it was not trained on, Stockholm, to fit the probability of homology on (default: none)"
    parser.add_argument("--calibrate", metavar="PATH", help=text)
    text = "align with other costs of gaps than those trained with (default: the same)"
    parser.add_argument("--gaps", metavar="NAME", choices=list(BEGINNINGS), help=text)
    text = "align with other pair HMMs than those trained with (default: the same)"
    parser.add_argument("--kin", metavar="NAME", choices=list(RELATIVES), help=text)
    add_quiet(parser)
    add_threads(parser)


def run(options: argparse.Namespace) -> int:
    """Write it, and say how large it is."""
    if options.out.exists():
        raise FileExistsError(f"--out {options.out} exists; remove it first, or choose another name")
    aligner = load_aligner(options.checkpoint)
    if options.gaps is not None or options.kin is not None:
        aligner = with_hmms(aligner, options.gaps, options.kin)
    verdict = aligner.verdict
    if options.calibrate is not None:
        families = read_families(options.calibrate)
        if seen := aligner.seen(families):
            raise ValueError(f"--calibrate {shown(options.calibrate)} holds families of the training: {in_brief(seen)}")
        if told := aligner.profiled(families):
            say(f"note: {len(told)} of the families of --calibrate taught its context profiles: {in_brief(told)}")
        verdict = fitted(aligner.model, families, not options.quiet)
    path = save_release(aligner.model, aligner.config, options.out, aligner.trained_on, verdict, aligner.profiled_on)
    say(f"wrote {path}, {path.stat().st_size / 1e6:.2f} MB")
    return 0
