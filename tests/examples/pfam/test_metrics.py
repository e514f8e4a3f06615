"""Metrics, decoders, baselines and the loss, against results worked out by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from examples.common.tables import table
from examples.pfam.baselines import blosum62, diagonal, needleman_wunsch, scaled_diagonal, smith_waterman
from examples.pfam.evaluate import score_baselines, unpad
from examples.pfam.metrics import (
    LOG_FLOOR,
    PairScore,
    barycentre_error,
    best_partners,
    hard_barycentre,
    macro,
    pair_score,
    partners,
    plan_barycentre,
    reconstruction,
    row_accuracy,
    sequence_identity,
    sparse_cross_entropy,
)
from examples.pfam.model import Output
from examples.pfam.objective import barycentre_loss, plan_loss, training_loss
from examples.pfam.pairs import ALPHABET, Pair, encode
from examples.pfam.sampler import collate

TARGET = np.array([[0, 0], [1, 2]])
# Query of 2, keys of 3, the dustbin last: key 1 is unmatched.
PLAN = np.array([[0.8, 0.1, 0.0, 0.1], [0.1, 0.2, 0.5, 0.2], [0.1, 0.7, 0.5, 1.7]])


def test_pair_scores_by_hand() -> None:
    score = pair_score(np.array([[0, 0], [1, 1], [2, 2]]), np.array([[0, 0], [2, 2], [3, 3], [4, 4]]))
    assert score.precision == pytest.approx(2 / 3)
    assert score.recall == pytest.approx(2 / 4)
    assert score.f1 == pytest.approx(4 / 7)


def test_pair_scores_tell_pairs_with_equal_sums_apart() -> None:
    assert pair_score(np.array([[0, 5], [1, 0]]), np.array([[1, 1], [0, 6]])).f1 == 0.0
    assert pair_score(np.zeros((0, 2), dtype=np.int64), TARGET).f1 == 0.0


def test_micro_averages_are_the_scores_of_summed_counts() -> None:
    total = PairScore(3, 4, 6) + PairScore(1, 6, 4)
    assert (total.precision, total.recall, total.f1) == (4 / 10, 4 / 10, 8 / 20)
    assert PairScore(0, 0, 5).precision == 0.0


def test_identity_counts_aligned_columns_alone() -> None:
    # Aligned: M-M, K-R, X-X (unknown is never identical), W-W; the rest stands in no target pair.
    query, key = encode("MKXAW"), encode("GMRXW")
    target = np.array([[0, 1], [1, 2], [2, 3], [4, 4]])
    assert sequence_identity(query, key, target) == 2 / 4
    assert sequence_identity(query, key, target[:0]) == 0.0


def test_row_accuracy_asks_every_residue_of_both_sides() -> None:
    # Query 0 finds key 0 and query 1 key 2; key 1's largest entry is 0.7, the dustbin's: all five are right.
    assert row_accuracy(best_partners(PLAN), TARGET) == 1.0
    wrong = PLAN.copy()
    wrong[1, 3], wrong[2, 1] = 0.6, 0.1  # query 1 to the dustbin; key 1 to query 1
    assert row_accuracy(best_partners(wrong), TARGET) == 3 / 5
    # A hard alignment 0-0, 1-1 has query 0 and key 0 right; query 1, key 1 and key 2 are wrong.
    assert row_accuracy(partners(np.array([[0, 0], [1, 1]]), 2, 3), TARGET) == 2 / 5
    assert row_accuracy(partners(TARGET[:0], 2, 3), TARGET) == 1 / 5


def test_reconstruction_counts_every_residue_once() -> None:
    expected = -(2 * math.log(0.8) + 2 * math.log(0.5) + math.log(0.7)) / 5
    assert reconstruction(PLAN, TARGET) == pytest.approx(expected)


def test_sparse_cross_entropy_ignores_the_dustbin() -> None:
    expected = -(math.log(0.8 / 0.9) + math.log(0.5 / 0.8)) / 2
    assert sparse_cross_entropy(PLAN, TARGET) == pytest.approx(expected)


def test_barycentres_by_hand() -> None:
    centres = plan_barycentre(PLAN)
    assert centres == pytest.approx([0.1 / 0.9, (0.2 + 1.0) / 0.8])
    assert barycentre_error(centres, TARGET) == pytest.approx((0.1 / 0.9 + 0.5) / 2)
    assert hard_barycentre(np.array([[1, 3], [3, 9]]), 5, 10) == pytest.approx([3, 3, 6, 9, 9])
    assert hard_barycentre(np.zeros((0, 2), dtype=np.int64), 2, 5) == pytest.approx([2, 2])


def test_an_empty_plan_row_is_finite() -> None:
    plan = np.zeros((3, 4))
    assert np.isfinite(plan_barycentre(plan)).all()
    assert reconstruction(plan, TARGET) == pytest.approx(-math.log(LOG_FLOOR))
    assert np.isfinite(sparse_cross_entropy(plan, TARGET))


def test_macro_weighs_families_equally() -> None:
    means, families = macro([("a", {"f1": 0.0}), ("a", {"f1": 0.5}), ("a", {"f1": 1.0}), ("b", {"f1": 1.0})])
    assert families == {"a": {"f1": 0.5}, "b": {"f1": 1.0}}
    assert means == {"f1": 0.75}


def test_diagonals() -> None:
    assert diagonal(2, 3).tolist() == [[0, 0], [1, 1]]
    assert scaled_diagonal(3, 3).tolist() == [[0, 0], [1, 1], [2, 2]]
    assert scaled_diagonal(2, 6).tolist() == [[0, 1], [1, 4]]
    assert scaled_diagonal(6, 2).tolist() == [[1, 0], [4, 1]]
    for n, m in itertools.product((1, 5, 8, 13), repeat=2):
        pairs = scaled_diagonal(n, m)
        assert len(pairs) == min(n, m)
        assert (np.diff(pairs, axis=0) > 0).all()
        assert pairs.min() >= 0 and (pairs < [n, m]).all()


def test_blosum62_is_the_published_table() -> None:
    scores = blosum62()
    assert np.array_equal(scores, scores.T)
    at = ALPHABET.index
    assert (scores[at("W"), at("W")], scores[at("A"), at("A")], scores[at("I"), at("V")]) == (11, 4, 3)
    assert (scores[at("G"), at("I")], scores[at("A"), at("X")]) == (-4, 0)


def test_needleman_wunsch_by_hand() -> None:
    # Two tryptophans less: one gap of two, 15 + 1, beats every alternative.
    pairs = needleman_wunsch(encode("MKVLAAWWGHPDE"), encode("MKVLAAGHPDE"))
    assert pairs.tolist() == [[i, i] for i in range(6)] + [[i, i - 2] for i in range(8, 13)]


def test_one_long_gap_is_cheaper_than_two() -> None:
    # Opening costs 15 and extending 1, so two gaps of one would need over 13 more in matches.
    pairs = needleman_wunsch(encode("WWWWAAWWWW"), encode("WWWWWWWW"))
    assert pairs.tolist() == [[i, i] for i in range(4)] + [[i, i - 2] for i in range(6, 10)]


def test_a_short_gap_is_dearer_than_mismatches() -> None:
    # Shifted by one, five W-W and one A-A score 59 and pay for two gaps: 29. Unshifted: 4 * 11 + 4 - 2 * 3 = 42.
    assert needleman_wunsch(encode("AWWWWWA"), encode("WWWWWAA")).tolist() == [[i, i] for i in range(7)]


def pair(query: str, key: str, target: list[list[int]]) -> Pair:
    return Pair("F", ("a", "b"), encode(query), encode(key), np.array(target, dtype=np.int64).reshape(-1, 2))


def test_the_loss_is_the_mean_reconstruction_whatever_the_padding() -> None:
    pairs = [pair("AC", "ACD", TARGET.tolist()), pair("ACDE", "A", [[3, 0]])]
    rng = np.random.default_rng(0)
    plans = rng.random((2, 5, 4))
    expected = np.mean(
        [reconstruction(unpad(p, len(x.query), len(x.key)), x.target) for p, x in zip(plans, pairs, strict=True)]
    )
    tensor = torch.tensor(plans, requires_grad=True)
    loss = plan_loss(tensor, pairs)
    assert loss.item() == pytest.approx(expected)
    assert training_loss(Output(tensor, tensor), pairs, 0.0).item() == pytest.approx(1.3 * expected)


def test_the_barycentre_loss_is_the_metric_in_both_directions() -> None:
    one = pair("AC", "ACD", TARGET.tolist())
    backwards = barycentre_error(plan_barycentre(PLAN.T), TARGET[:, ::-1])
    expected = (barycentre_error(plan_barycentre(PLAN), TARGET) + backwards) / 2
    plan = torch.tensor(PLAN)[None]
    assert barycentre_loss(plan, [one]).item() == pytest.approx(expected)
    difference = training_loss(Output(plan, plan), [one], 2.0) - training_loss(Output(plan, plan), [one], 0.0)
    assert difference.item() == pytest.approx(2 * expected)


def test_the_loss_survives_an_underflowed_plan() -> None:
    plan = torch.zeros(1, 3, 4, requires_grad=True)
    loss = training_loss(Output(plan, plan), [pair("AC", "ACD", TARGET.tolist())], 1.0)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(plan.grad).all()


def test_a_pair_with_nothing_to_align_has_a_loss() -> None:
    plan = torch.tensor(PLAN)[None].requires_grad_()
    loss = training_loss(Output(plan, plan), [pair("AC", "ACD", [])], 1.0)
    loss.backward()
    expected = 1.3 * reconstruction(PLAN, np.zeros((0, 2), dtype=np.int64))
    assert loss.item() == pytest.approx(expected) and torch.isfinite(plan.grad).all()


def test_unpad_keeps_the_dustbin() -> None:
    padded = np.arange(20.0).reshape(4, 5)
    assert unpad(padded, 2, 3).tolist() == [[0, 1, 2, 4], [5, 6, 7, 9], [15, 16, 17, 19]]
    assert collate([pair("AC", "ACD", [[0, 0]])]).key_lengths.tolist() == [3]


def test_baselines_on_an_easy_pair() -> None:
    scores = score_baselines(
        [pair("MKVLAAWWGHPDE", "MKVLAAGHPDE", [[i, i if i < 6 else i - 2] for i in (0, 5, 8, 12)])]
    )
    assert scores["Needleman-Wunsch"].macro["recall"] == 1.0
    assert scores["Needleman-Wunsch"].macro["barycentre"] == 0.0
    assert scores["diagonal"].macro["recall"] == 0.5
    assert scores["diagonal"].macro["barycentre"] == pytest.approx((0 + 0 + 2 + 0) / 4)


def test_smith_waterman_by_hand() -> None:
    # The common stretch WWHKW scores 11 + 11 + 8 + 5 + 11; what surrounds it only costs.
    pairs = smith_waterman(encode("GGGGWWHKWPPPP"), encode("IWWHKWL"))
    assert pairs.tolist() == [[4 + k, 1 + k] for k in range(5)]
    assert smith_waterman(encode("GGG"), encode("III")).shape == (0, 2)


def test_gap_costs_are_taken() -> None:
    def identical(align: Callable[..., np.ndarray], query: str, key: str, gap: float) -> int:
        a, b = encode(query), encode(key)
        pairs = align(a, b, (gap, 1.0))
        return int((a[pairs[:, 0]] == b[pairs[:, 1]]).sum())

    # Two end gaps, cheap, bring one more pair of tryptophans together; dear, they do not.
    assert identical(needleman_wunsch, "AWWWWWA", "WWWWWAA", 1.0) == 6
    assert identical(needleman_wunsch, "AWWWWWA", "WWWWWAA", 100.0) == 5
    # A gap of two, cheap, skips the alanines; dear, they are forced on tryptophans.
    assert identical(smith_waterman, "WWWWAAWWWW", "WWWWWWWW", 1.0) == 8
    assert identical(smith_waterman, "WWWWAAWWWW", "WWWWWWWW", 100.0) == 6


def test_tables_align() -> None:
    assert table(["name", "F1"], [["a", "0.5"], ["longer", "1"]]).splitlines() == [
        "name     F1",
        "------  ---",
        "a       0.5",
        "longer    1",
    ]
