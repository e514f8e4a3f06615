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

from examples.pfam import decode
from examples.pfam.decode import (
    DECODERS,
    best_monotone,
    confidence,
    expected_accuracy,
    expected_f1,
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


def test_expected_f1_against_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "MODESTY", 1.0)
    monkeypatch.setattr(decode, "LEAST", 0.0)
    rng = np.random.default_rng(4)
    for n, m in ((2, 2), (3, 5), (4, 4)):
        for sharpness in (0.5, 2.0, 4.0):
            plan = np.exp(sharpness * rng.standard_normal((n + 1, m + 1)))
            plan[:-1] /= plan[:-1].sum(axis=1, keepdims=True)
            real = plan[:-1, :-1]

            def value(alignment: list[tuple[int, int]], real: np.ndarray = real) -> float:
                return 2 * sum(real[at] for at in alignment) / (len(alignment) + real.sum())

            found = expected_f1(plan).tolist()
            best = max(map(value, monotone_alignments(n, m)))
            # What is completed at the ends is beyond the best alignment, which is among the pairs found.
            assert max(value(list(map(tuple, part))) for part in parts_of(found)) == pytest.approx(best)


def parts_of(pairs: list[list[int]]) -> list[list[list[int]]]:
    """Every run of neighbours in a list."""
    return [pairs[start:end] for start in range(len(pairs)) for end in range(start + 1, len(pairs) + 1)] or [[]]


def test_expected_f1_asks_more_of_a_pair_where_the_others_are_sure() -> None:
    sure = np.zeros((8, 8))
    sure[range(7), range(7)] = 0.95
    sure[3, 3] = 0.3
    assert [3, 3] not in expected_f1(sure).tolist() and [3, 3] in expected_accuracy(sure).tolist()
    doubtful = np.where(sure > 0, 0.3, 0.0)
    assert [3, 3] in expected_f1(doubtful).tolist()
    for end in (0, 6):  # beyond the outermost pair it asks less
        at_end = np.where(sure > 0, 0.95, 0.0)
        at_end[end, end] = 0.3
        assert [end, end] in expected_f1(at_end).tolist()
    assert expected_f1(np.full((5, 5), 0.1)).shape == (0, 2)


def test_mutual_argmax_may_cross_and_the_others_do_not() -> None:
    plan = np.array([[0.02, 0.9, 0.3], [0.8, 0.02, 0.3], [0.3, 0.3, 0.0]])
    assert mutual_argmax(plan).tolist() == [[0, 1], [1, 0]]
    for name in ("f1", "monotone", "accuracy"):
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
