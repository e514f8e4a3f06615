"""``profiles``: the network that foretells which residues relatives have, trained on profile HMMs."""

from __future__ import annotations

import argparse
from pathlib import Path

from examples.common.settings import Range, add_quiet, add_threads
from examples.common.text import say

from ..dataset import read_families
from ..profile_hmms import read_profile_hmms, taught, without
from ..profile_training import cross_entropy, train_profile
from ..profiles import save_profiles
from .options import named_path

_STEPS, _SEED = Range(1, 10**9), Range(0, 2**32 - 1)


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    text = "Train what foretells relatives' residues from one sequence, on profile HMMs"
    parser = commands.add_parser("profiles", help=text, description=f"{text}.")
    parser.set_defaults(run=run)
    text = "profile HMMs of HMMER 3, text or binary, such as Pfam-A.hmm (read by pyhmmer)"
    parser.add_argument("hmms", metavar="PATH", help=text)
    text = "alignments of families, Stockholm, a fifth of what is learned from (default: none)"
    parser.add_argument("--data", metavar="PATH", help=text)
    text = "families whose HMMs are left out, Stockholm; may be repeated"
    parser.add_argument("--without", metavar="PATH", action="append", default=[], help=text)
    text = "families to report the cross entropy of, Stockholm (default: none)"
    parser.add_argument("--eval-data", metavar="PATH", help=text)
    parser.add_argument("--steps", type=int, default=5000, metavar="N", help="training steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of all that is drawn (default: %(default)s)")
    text = "file to write, one that exists is kept (default: %(default)s)"
    parser.add_argument("--out", metavar="PATH", type=named_path, default=Path("profiles.safetensors"), help=text)
    add_quiet(parser)
    add_threads(parser)


def run(options: argparse.Namespace) -> int:
    """Train, write, and say how well it foretells."""
    _STEPS.check("--steps", options.steps)
    _SEED.check("--seed", options.seed)
    if options.out.exists():
        raise FileExistsError(f"--out {options.out} exists; remove it first, or choose another name")
    hmms = read_profile_hmms(options.hmms)
    left_out = [family for path in options.without for family in read_families(path)]
    kept = without(hmms, left_out)
    if not kept:
        raise ValueError(f"--without leaves none of the {len(hmms)} profile HMMs")
    families = read_families(options.data) if options.data else []
    say(f"{len(kept)} profile HMMs ({len(hmms) - len(kept)} left out), {len(families)} alignments")
    profile = train_profile(kept, families, options.steps, options.seed, not options.quiet)
    if options.eval_data:
        found = cross_entropy(profile, read_families(options.eval_data))
        say(f"a relative's residue takes {found:.4f} nats")
    path = save_profiles(profile, taught(kept), options.out)
    say(f"wrote {path}, {path.stat().st_size / 1e6:.2f} MB")
    return 0
