"""The flank test: the same domains within longer proteins, and pairs that have nothing in common.

Structure-based and curated alignments hold whole domains, so an aligner that can only align from end to end looks good
on them. Here random residues, which nothing of the other sequence is aligned with, stand around the domains of known
alignments: on one side of one of them, or staggered, after the one and before the other. Every pair is a function of
the seed and its place in the list.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from .augment import BACKGROUND
from .evaluate import Result, measure_alignment
from .identity import related
from .pairs import Family, IntArray, Pair

LENGTHS = (0.5, 1.0, 2.0)
"""Of a flank, in mean lengths of the two domains."""
UNRELATED = "unrelated"


@dataclass(frozen=True)
class Flanks:
    """How long the flanks are in ``LENGTHS``' unit: before and after the query, before and after the key."""

    query: tuple[float, float] = (0.0, 0.0)
    key: tuple[float, float] = (0.0, 0.0)


TESTS: dict[str, Flanks] = {
    "none": Flanks(),
    "one side": Flanks(query=(1.0, 0.0)),
    **{f"staggered {length:g}": Flanks((length, 0.0), (0.0, length)) for length in LENGTHS},
    "within both": Flanks((0.5, 0.5), (0.5, 0.5)),
}
"""The tests by name."""


def flanked(pairs: Sequence[Pair], test: str, seed: int = 0) -> tuple[Pair, ...]:
    """The pairs with the flanks of a test: residues in the background's composition, the targets moved along.

    Raises:
        ValueError: no test is called so.
    """
    if test not in TESTS:
        raise ValueError(f"no flank test is named {test!r}; take one of {', '.join(TESTS)}")
    flanks, number = TESTS[test], list(TESTS).index(test)
    return tuple(_set(pair, flanks, np.random.default_rng([seed, number, at])) for at, pair in enumerate(pairs))


def _set(pair: Pair, flanks: Flanks, rng: np.random.Generator) -> Pair:
    length = (len(pair.query) + len(pair.key)) / 2

    def around(side: IntArray, shares: tuple[float, float]) -> tuple[IntArray, int]:
        before, after = (
            rng.choice(20, round(share * length), p=BACKGROUND / BACKGROUND.sum()).astype(np.int64) for share in shares
        )
        return np.concatenate([before, side, after]), len(before)

    query, query_shift = around(pair.query, flanks.query)
    key, key_shift = around(pair.key, flanks.key)
    return replace(pair, query=query, key=key, target=pair.target + np.array([query_shift, key_shift]))


def unrelated(families: Sequence[Family], count: int, cap: int, seed: int = 0) -> tuple[Pair, ...]:
    """``count`` pairs of sequences of at most ``cap`` residues, of families that are certainly not one; no targets.

    Raises:
        ValueError: there are no two such families.
    """
    groups = np.array(related(families))
    rng = np.random.default_rng([seed, len(TESTS)])
    short = [np.array([k for k, s in enumerate(family.sequences) if len(s) <= cap]) for family in families]
    held = np.array([index for index, chosen in enumerate(short) if len(chosen)])
    if len(set(groups[held])) < 2:
        raise ValueError(f"unrelated pairs take two families with sequences of at most {cap} residues")
    pairs: list[Pair] = []
    while len(pairs) < count:
        first, second = rng.choice(held, 2)
        if groups[first] == groups[second]:
            continue
        a, b = (families[index].sequences[int(rng.choice(short[index]))] for index in (first, second))
        sides = (a.residues.astype(np.int64), b.residues.astype(np.int64))
        pairs.append(Pair(UNRELATED, (a.name, b.name), *sides, np.zeros((0, 2), dtype=np.int64), len(pairs)))
    return tuple(pairs)


def area(related_scores: npt.ArrayLike, unrelated_scores: npt.ArrayLike) -> float:
    """Area under the receiver operating characteristic: how often a related pair scores above an unrelated one, ties
    counting half (Hanley and McNeil, Radiology 143 (1982) 29)."""
    a, b = np.asarray(related_scores, dtype=np.float64), np.asarray(unrelated_scores, dtype=np.float64)
    order = np.sort(b)
    below = (np.searchsorted(order, a, "left") + np.searchsorted(order, a, "right")) / 2
    return float(below.mean() / len(b))


Align = Callable[[Sequence[Pair]], Sequence[IntArray]]
"""Residue pairs [p, 2] of each of some pairs, in their order."""


def flank_results(
    aligners: Mapping[str, Align], pairs: Sequence[Pair], tests: Sequence[str] = tuple(TESTS), seed: int = 0
) -> dict[str, dict[str, list[Result]]]:
    """Results on every pair of every aligner, by its name and by the test's."""
    found: dict[str, dict[str, list[Result]]] = {name: {} for name in aligners}
    for test in tests:
        chosen = flanked(pairs, test, seed)
        for name, align in aligners.items():
            aligned = zip(chosen, align(chosen), strict=True)
            found[name][test] = [measure_alignment(pair, decoded) for pair, decoded in aligned]
    return found
