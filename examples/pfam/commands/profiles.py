"""``profiles``: the network that foretells which residues relatives have, trained on profile HMMs."""

from __future__ import annotations

import argparse
from pathlib import Path

from examples.common.settings import Range, add_quiet, add_threads
from examples.common.text import say

from ..dataset import read_families
from ..profile_hmms import read_profile_hmms, taught, without
from ..profile_training import beginning, cross_entropy, train_profile
from ..profiles import SHIPPED, save_profiles
from .options import named_path

_STEPS, _SEED = Range(1, 10**9), Range(0, 2**32 - 1)


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    text = "Train what foretells relatives' residues from one sequence, on profile HMMs"
    parser = commands.add_parser("profiles", help=text, description=f"{text}.")
    parser.set_defaults(run=run)
    text = "profile HMMs of HMMER 3, text or binary, plain or gzip, such as Pfam-A.hmm (read by pyhmmer)"
    parser.add_argument("hmms", metavar="PATH", type=named_path, help=text)
    text = "alignments of families, Stockholm, a fifth of what is learned from (default: none)"
    parser.add_argument("--data", metavar="PATH", type=named_path, help=text)
    text = "families that are left out of both, Stockholm; may be repeated"
    parser.add_argument("--without", metavar="PATH", type=named_path, action="append", default=[], help=text)
    text = "families to report the cross entropy of, Stockholm (default: none)"
    parser.add_argument("--eval-data", metavar="PATH", type=named_path, help=text)
    parser.add_argument("--steps", type=int, default=5000, metavar="N", help="training steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of all that is drawn (default: %(default)s)")
    place = SHIPPED.relative_to(SHIPPED.parents[3])
    text = f"file to write, one that exists is kept (default: %(default)s); training starts with {place}"
    parser.add_argument("--out", metavar="PATH", type=named_path, default=Path("profiles.safetensors"), help=text)
    add_quiet(parser)
    add_threads(parser)


def run(options: argparse.Namespace) -> int:
    """Train, write, and say how well it foretells. Everything is read before anything is trained."""
    _STEPS.check("--steps", options.steps)
    _SEED.check("--seed", options.seed)
    if options.out.exists():
        raise FileExistsError(f"--out {options.out} exists; remove it first, or choose another name")
    held_out = read_families(options.eval_data) if options.eval_data else []
    left_out = [family for path in options.without for family in read_families(path)]
    families = read_families(options.data) if options.data else []
    hmms = read_profile_hmms(options.hmms)
    kept, aligned = without(hmms, left_out), without(families, left_out)
    if not kept:
        raise ValueError(f"--without leaves none of the {len(hmms)} profile HMMs")
    gone = len(hmms) - len(kept), len(families) - len(aligned)
    say(f"{len(kept)} profile HMMs ({gone[0]} left out), {len(aligned)} alignments ({gone[1]} left out)")
    profile = train_profile(kept, aligned, options.steps, options.seed, not options.quiet)
    path = save_profiles(profile, taught([*kept, *aligned]), options.out)
    say(f"wrote {path}, {path.stat().st_size / 1e6:.2f} MB")
    if held_out:
        found, before = (cross_entropy(told, held_out) for told in (profile, beginning()))
        say(f"a relative's residue takes {found:.4f} nats; told the residue alone, by BLOSUM62, {before:.4f}")
    return 0
