"""Domains in a context: nothing of the domain is lost or moved, flanks stand where they should, what is cut is cut."""

from __future__ import annotations

import numpy as np
import pytest

from examples.pfam.context import Setting, domain_cap, draw_setting, flanked, joined, truncated, unrelated
from examples.pfam.pairs import IntArray, Pair

RNG = np.random.default_rng(0)
PAIR = Pair(
    "F", ("a", "b"), RNG.integers(0, 20, 40), RNG.integers(0, 20, 35), np.stack([np.arange(30), np.arange(30) + 4], 1)
)
STRANGE = 20
"""X, which no domain here holds: foreign residues are known by it."""


def foreign() -> IntArray:
    return np.full(7, STRANGE)


def paired(pair: Pair) -> list[tuple[int, int]]:
    return [(int(pair.query[i]), int(pair.key[j])) for i, j in pair.target]


def test_flanks_leave_the_domain_as_it_is() -> None:
    before, after, ends = [], [], set()
    for seed in range(200):
        found = flanked(PAIR, 100, foreign, np.random.default_rng(seed))
        assert paired(found) == paired(PAIR) and max(len(found.query), len(found.key)) <= 100
        shift = found.target[0] - PAIR.target[0]
        np.testing.assert_array_equal(found.query[shift[0] : shift[0] + 40], PAIR.query)
        np.testing.assert_array_equal(found.key[shift[1] : shift[1] + 35], PAIR.key)
        before.append(shift)
        after.append(np.array([len(found.query) - shift[0] - 40, len(found.key) - shift[1] - 35]))
        ends.add(tuple((np.concatenate([before[-1], after[-1]]) > 0).tolist()))
    assert len(ends) >= 12  # of the fifteen combinations of ends that have a flank
    assert np.max(before) > 40 and np.max(after) > 40
    again = flanked(PAIR, 100, foreign, np.random.default_rng(3))
    np.testing.assert_array_equal(again.query, flanked(PAIR, 100, foreign, np.random.default_rng(3)).query)


def test_a_domain_that_fills_the_room_gets_no_flank() -> None:
    found = flanked(PAIR, 10, foreign, np.random.default_rng(0))
    np.testing.assert_array_equal(found.query, PAIR.query)
    np.testing.assert_array_equal(found.target, PAIR.target)


def test_a_truncated_pair_keeps_its_targets_in_place() -> None:
    lengths = set()
    for seed in range(50):
        found = truncated(PAIR, 5, np.random.default_rng(seed))
        assert set(paired(found)) <= set(paired(PAIR)) and len(found.target) >= 5
        lengths.add((len(found.query) < 40, len(found.key) < 35))
    assert {(True, False), (False, True)} <= lengths
    assert truncated(PAIR, 30, np.random.default_rng(1)).target.shape == (30, 2)


def test_two_domains_stand_in_a_row() -> None:
    found = joined(PAIR, PAIR)
    assert paired(found) == 2 * paired(PAIR) and (np.diff(found.target, axis=0) > 0).all()
    assert (len(found.query), len(found.key)) == (80, 70)


def test_unrelated_pairs_are_foreign_or_shuffled() -> None:
    kinds = set()
    for seed in range(30):
        found = unrelated(PAIR, foreign, 5, np.random.default_rng(seed))
        assert len(found.target) == 0 and len(found.key) == 5
        kinds.add(bool((found.key == STRANGE).all()))
    assert kinds == {True, False}


def test_settings_have_their_probabilities() -> None:
    rng = np.random.default_rng(0)
    drawn = [draw_setting(0.5, 0.2, 200, rng) for _ in range(2000)]
    shares = {kind: np.mean([setting.kind == kind for setting in drawn]) for kind in ("plain", "flanked", "unrelated")}
    assert shares == pytest.approx({"plain": 0.3, "flanked": 0.5, "unrelated": 0.2}, abs=0.04)
    lengths = [setting.length for setting in drawn if setting.kind == "flanked"]
    assert min(lengths) >= 90 and max(lengths) <= 200
    assert {setting.length for setting in drawn if setting.kind != "flanked"} == {0}
    assert draw_setting(0.0, 0.0, 200, rng) == Setting("plain")
    assert all(30 <= domain_cap(length, rng) <= max(0.8 * length, 30) for length in (90, 150, 200))
