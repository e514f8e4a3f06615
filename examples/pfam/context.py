"""Training pairs as they come in nature: a domain within longer proteins, parts of domains, and proteins unrelated.

Pairs of whole domains teach that everything can be aligned from end to end. Here the domain of either sequence is set
between flanks that have nothing to do with each other, loses an end, is followed by another domain that both have, or
the two sequences share nothing at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from .augment import BACKGROUND
from .pairs import IntArray, Pair, slice_pair

KINDS = ("plain", "flanked", "unrelated")
_SMALLEST_DOMAIN = 30
_LEAST_KEPT = 0.5

Foreign = Callable[[], IntArray]
"""A sequence of a family that is neither the pair's own nor one that was returned before."""


@dataclass(frozen=True)
class Setting:
    """What a pair will be: one of ``KINDS``, about how long its sides, and whether there is room for a second domain.

    ``length`` is 0 for the pair's own.
    """

    kind: str
    length: int = 0
    second_domain: bool = False


def draw_setting(flanked: float, unrelated: float, cap: int, rng: np.random.Generator) -> Setting:
    """With those probabilities flanked and unrelated; a flanked pair is at most ``cap`` residues long."""
    drawn, share, second = rng.random(), rng.uniform(0.45, 1.0), rng.random() < 0.1
    if drawn < flanked:
        return Setting("flanked", max(int(share * cap), min(cap, 16)), second)
    return Setting("unrelated" if drawn < flanked + unrelated else "plain")


def truncated(pair: Pair, fewest: int, rng: np.random.Generator) -> Pair:
    """One end of one side is cut off, up to half of it; the pair itself where fewer than ``fewest`` targets remain."""
    ends = [[0, len(pair.query)], [0, len(pair.key)]]
    side, end = int(rng.integers(2)), int(rng.integers(2))
    cut = int(rng.uniform(0, 1 - _LEAST_KEPT) * ends[side][1])
    ends[side][end] += -cut if end else cut
    found = slice_pair(pair, (ends[0][0], ends[0][1]), (ends[1][0], ends[1][1]))
    return found if len(found.target) >= fewest else pair


def domain_cap(length: int, rng: np.random.Generator) -> int:
    """How long the domain of a flanked pair may be."""
    return max(int(rng.uniform(0.3, 0.8) * length), min(_SMALLEST_DOMAIN, length))


def flanked(pair: Pair, length: int, foreign: Foreign, rng: np.random.Generator) -> Pair:
    """With flanks at some of its four ends, a side of at most ``length`` residues unless it was longer.

    Any of the ends may have one, so the domains stand at either end, are staggered, or are in the midst of one or both.
    A flank is of random residues in ``BACKGROUND``'s composition, of the domain's own residues shuffled, or a piece of
    a ``foreign`` sequence.
    """
    which = rng.random((2, 2)) < 0.5
    which[rng.integers(2), rng.integers(2)] = True
    sides, shifts = [], []
    for domain, ends in zip((pair.query, pair.key), which, strict=True):
        room = max(length - len(domain), 0)
        # From a few residues to all the room there is; half of the time much of it.
        total = int(room * rng.random() ** 0.7)
        share = rng.random() if ends.all() else float(ends[0])
        counts = [int(total * share), total - int(total * share)] if ends.any() else [0, 0]
        before, after = (_flank(count, domain, foreign, rng) for count in counts)
        sides.append(np.concatenate([before, domain, after]))
        shifts.append(len(before))
    return replace(pair, query=sides[0], key=sides[1], target=pair.target + np.array(shifts))


def _flank(count: int, domain: IntArray, foreign: Foreign, rng: np.random.Generator) -> IntArray:
    source = rng.random()
    if count == 0:
        return np.zeros(0, dtype=np.int64)
    if source < 0.25:
        return rng.choice(20, count, p=BACKGROUND / BACKGROUND.sum())
    if source < 0.4:
        return rng.choice(domain, count)
    found = foreign()
    while len(found) < count:
        found = np.concatenate([found, foreign()])
    start = int(rng.integers(len(found) - count + 1))
    return found[start : start + count]


def joined(first: Pair, second: Pair) -> Pair:
    """Two domains in a row on both sides."""
    target = np.concatenate([first.target, second.target + np.array([len(first.query), len(first.key)])])
    query, key = (np.concatenate([getattr(pair, side) for pair in (first, second)]) for side in ("query", "key"))
    return replace(first, query=query, key=key, target=target)


def unrelated(pair: Pair, foreign: Foreign, cap: int, rng: np.random.Generator) -> Pair:
    """The query with another family's sequence, or, once in four, with its own partner's residues shuffled."""
    other = rng.permutation(pair.key) if rng.random() < 0.25 else foreign()
    start = int(rng.integers(max(len(other) - cap, 0) + 1))
    return replace(pair, key=other[start : start + cap], target=np.zeros((0, 2), dtype=np.int64))
