"""The rules that turn plans into residue pairs, against brute force."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from examples.pfam.decode import (
    DECODERS,
    best_monotone,
    confidence,
    expected_accuracy,
    most_probable,
    mutual_argmax,
)

ROOT = Path(__file__).parents[3]


def monotone_alignments(n: int, m: int) -> list[list[tuple[int, int]]]:
    """Every set of pairs that do not cross, the empty one included."""
    return [
        list(zip(rows, cols, strict=True))
        for k in range(min(n, m) + 1)
        for rows in itertools.combinations(range(n), k)
        for cols in itertools.combinations(range(m), k)
    ]


@pytest.mark.slow
def test_the_best_monotone_alignment_against_brute_force() -> None:
    rng = np.random.default_rng(0)
    for n, m in itertools.product(range(1, 6), repeat=2):
        gain = rng.standard_normal((n, m))
        pairs = best_monotone(gain)
        assert (np.diff(pairs, axis=0) > 0).all()
        best = max(sum(gain[at] for at in alignment) for alignment in monotone_alignments(n, m))
        assert sum(gain[i, j] for i, j in pairs) == pytest.approx(best)


def test_most_probable_counts_every_residue_once_or_as_unmatched() -> None:
    rng = np.random.default_rng(1)
    for n, m in ((1, 1), (1, 4), (4, 3), (4, 5)):
        for sharpness in (0.5, 2.0, 5.0):
            plan = np.exp(sharpness * rng.standard_normal((n + 1, m + 1)))
            plan[:-1] /= plan[:-1].sum(axis=1, keepdims=True)

            def value(alignment: list[tuple[int, int]], plan: np.ndarray = plan, n: int = n, m: int = m) -> float:
                rows, cols = {i for i, _ in alignment}, {j for _, j in alignment}
                total = sum(math.log(plan[at]) for at in alignment)
                total += sum(math.log(plan[i, m]) for i in range(n) if i not in rows)
                return total + sum(math.log(plan[n, j]) for j in range(m) if j not in cols)

            found = [(int(i), int(j)) for i, j in most_probable(plan)]
            assert value(found) == pytest.approx(max(map(value, monotone_alignments(n, m))))


def test_most_probable_prefers_two_residues_matched_to_two_unmatched_only_if_likelier() -> None:
    # A pair of probability 0.3 against two dustbins of 0.6 and 0.6, then of 0.5 and 0.5.
    assert most_probable(np.array([[0.3, 0.6], [0.6, 0.0]])).tolist() == []
    assert most_probable(np.array([[0.3, 0.5], [0.5, 0.0]])).tolist() == [[0, 0]]


def test_mutual_argmax_asks_both_sides_and_the_dustbin() -> None:
    plan = np.array([[0.6, 0.1, 0.3], [0.5, 0.1, 0.4], [0.1, 0.1, 0.8], [0.0, 0.9, 0.0]])
    assert mutual_argmax(plan).tolist() == [[0, 0]]


def test_expected_accuracy_leaves_hopeless_pairs_out() -> None:
    assert expected_accuracy(np.full((4, 4), 0.1), 0.2).shape == (0, 2)
    assert expected_accuracy(np.full((4, 4), 0.3), 0.2).tolist() == [[0, 0], [1, 1], [2, 2]]


def test_mutual_argmax_may_cross_and_the_others_do_not() -> None:
    plan = np.array([[0.02, 0.9, 0.3], [0.8, 0.02, 0.3], [0.3, 0.3, 0.0]])
    assert mutual_argmax(plan).tolist() == [[0, 1], [1, 0]]
    for name in ("monotone", "accuracy"):
        assert DECODERS[name](plan).tolist() == [[0, 1]]


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_rule_takes_any_plan(name: str, dtype: type) -> None:
    rng = np.random.default_rng(2)
    for n, m in ((1, 1), (1, 9), (9, 1), (17, 8)):
        wide = rng.random((2 * (n + 1), m + 1)).astype(dtype)
        wide[0] = 0.0  # as float32 underflows
        plan = wide[::2]  # not contiguous
        before = plan.copy()
        pairs = DECODERS[name](plan)
        assert pairs.dtype == np.int64 and pairs.shape[1] == 2
        assert len(np.unique(pairs[:, 0])) == len(np.unique(pairs[:, 1])) == len(pairs)
        assert (pairs < [n, m]).all()
        assert np.array_equal(plan, before)
        assert confidence(plan, pairs).tolist() == [plan[i, j] for i, j in pairs]


@pytest.mark.slow
def test_the_compiled_loop_is_quick_without_a_cache(tmp_path: Path) -> None:
    program = """
import time, numpy
from examples.pfam.decode import DECODERS
began = time.perf_counter()
for decode in DECODERS.values():
    decode(numpy.full((40, 50), 0.02))
print(time.perf_counter() - began)
"""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    for most in (30.0, 5.0):  # compiled, then read from the cache; 0.9 s and 0.03 s on an idle core
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        assert float(done.stdout) < most
    assert list(tmp_path.rglob("*.nbi"))
