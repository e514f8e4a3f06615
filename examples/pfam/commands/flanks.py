"""``flanks``: aligners on domains within longer proteins, and on pairs that have nothing in common."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

from examples.common.settings import Range, add_quiet, add_threads
from examples.common.tables import table
from examples.common.text import say

from ..baselines import needleman_wunsch, smith_waterman
from ..config import HELDOUT_SAMPLE
from ..dataset import read_families
from ..decode import expected_accuracy
from ..fixed_score import pair_hmm_plan
from ..flanks import TESTS, Align, flank_scores, unrelated
from ..homology import Judged, judge, relatedness
from ..metrics import sequence_identity
from ..pairs import IntArray, Pair, evaluation_pairs
from ..release import load_aligner
from ..runs import BEGINNINGS
from .options import add_reading, check_reading

_PAIRS, _CAP, _LOW = 8, 250, 0.2


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
    parser.add_argument("--cap", type=int, metavar="N", default=_CAP, help=text)
    text = "of the pairs and their flanks (default: 0)"
    parser.add_argument("--seed", type=int, metavar="N", default=0, help=text)
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
    chosen = evaluation_pairs(families, options.pairs, options.cap, options.seed).pairs
    if not chosen:
        raise ValueError(f"no pair of at most {options.cap} residues a side; raise --cap")
    aligner, progress = load_aligner(options.checkpoint), not options.quiet
    if seen := aligner.seen(families):
        say(f"warning: the aligner was trained on {len(seen)} of the families")
    judged: dict[str, list[Judged]] = {}

    def model(pairs: Sequence[Pair]) -> list[IntArray]:
        found = judge(aligner, pairs, progress)
        judged[list(TESTS)[len(judged)]] = found
        return [one.decoded for one in found]

    begun = BEGINNINGS["fitted"]
    untrained = replace(begun.costs, pair=-begun.offset)
    aligners: dict[str, Align] = {
        "Needleman-Wunsch": lambda pairs: [needleman_wunsch(pair.query, pair.key) for pair in pairs],
        "Smith-Waterman": lambda pairs: [smith_waterman(pair.query, pair.key) for pair in pairs],
        "pair HMM, free ends": lambda pairs: [
            expected_accuracy(pair_hmm_plan(pair, untrained, begun.gain)) for pair in pairs
        ],
        "aligner": model,
    }
    say(f"{len(chosen)} pairs of {len({pair.family for pair in chosen})} families\n")
    scores = flank_scores(aligners, chosen, seed=options.seed)
    rows = [[name, *(f"{of_tests[test]:.3f}" for test in TESTS)] for name, of_tests in scores.items()]
    say(table(["F1 with flanks", *TESTS], rows) + "\n")
    others = judge(aligner, unrelated(families, len(chosen), options.cap, options.seed), progress)
    low = [sequence_identity(pair.query, pair.key, pair.target) <= _LOW for pair in chosen]
    say(relatedness(judged, others, low, _LOW))
    return 0
