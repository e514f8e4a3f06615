"""The flank test's generator, the area under the curve, and the probability of homology."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.pfam.cli import main
from examples.pfam.config import HELDOUT_SAMPLE, Config
from examples.pfam.decode import DECODERS
from examples.pfam.flank_report import NoFlankTest, Relatedness, flank_report
from examples.pfam.flanks import TESTS, area, flank_results, flanked, unrelated
from examples.pfam.homology import Judged, calibration_pairs, judge
from examples.pfam.model import Aligner
from examples.pfam.pairs import Family, Pair, evaluation_pairs, load_families
from examples.pfam.programs import PROGRAMS, Installed
from examples.pfam.release import TrainedAligner, load_release, save_release
from examples.pfam.stockholm import read_stockholm
from examples.pfam.verdict import FEATURES, SHORTEST, Verdict, features, fit


@pytest.fixture(scope="module")
def families() -> list[Family]:
    return load_families(read_stockholm(HELDOUT_SAMPLE))


@pytest.fixture(scope="module")
def pairs(families: list[Family]) -> tuple[Pair, ...]:
    return evaluation_pairs(families, 3, 100, 0).pairs


def test_flanks_are_as_long_as_the_test_says_and_move_the_targets(pairs: tuple[Pair, ...]) -> None:
    for test, flanks in TESTS.items():
        for pair, found in zip(pairs, flanked(pairs, test), strict=True):
            length = (len(pair.query) + len(pair.key)) / 2
            for side, shares in (("query", flanks.query), ("key", flanks.key)):
                domain, whole = getattr(pair, side), getattr(found, side)
                before = round(shares[0] * length)
                np.testing.assert_array_equal(whole[before : before + len(domain)], domain)
                assert len(whole) == len(domain) + before + round(shares[1] * length)
            i, j = found.target.T
            np.testing.assert_array_equal(found.query[i], pair.query[pair.target[:, 0]])
            np.testing.assert_array_equal(found.key[j], pair.key[pair.target[:, 1]])
    with pytest.raises(ValueError, match="no flank test is named 'both'; take one of none, one side"):
        flanked(pairs, "both")


def test_flanks_depend_on_the_seed_and_the_place_alone(pairs: tuple[Pair, ...]) -> None:
    one, same, other = (flanked(pairs, "staggered 1", seed) for seed in (0, 0, 1))
    assert all((a.query == b.query).all() and (a.key == b.key).all() for a, b in zip(one, same, strict=True))
    assert not all((a.query == b.query).all() for a, b in zip(one, other, strict=True))
    (alone,) = flanked(pairs[:1], "staggered 1")
    np.testing.assert_array_equal(alone.query, one[0].query)


def test_unrelated_pairs_are_of_two_families(families: list[Family]) -> None:
    found = unrelated(families, 20, 150, 3)
    owner = {chain.name: family.key for family in families for chain in family.sequences}
    assert all(owner[pair.names[0]] != owner[pair.names[1]] and len(pair.target) == 0 for pair in found)
    assert max(max(len(pair.query), len(pair.key)) for pair in found) <= 150
    assert [pair.names for pair in unrelated(families, 20, 150, 3)] == [pair.names for pair in found]
    with pytest.raises(ValueError, match="unrelated pairs take two families"):
        unrelated(families[:1], 2, 150)


def test_the_area_counts_pairs() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 6, 30), rng.integers(0, 5, 20)
    expected = np.mean([(x > y) + 0.5 * (x == y) for x, y in itertools.product(a, b)])
    assert area(a, b) == pytest.approx(expected)
    assert area([2, 3], [0, 1]) == 1 and area([0], [1]) == 0


def test_scores_are_of_each_aligner_and_test(pairs: tuple[Pair, ...]) -> None:
    def right(flanked_pairs: Sequence[Pair]) -> list[np.ndarray]:
        return [pair.target for pair in flanked_pairs]

    found = flank_results({"right": right, "nothing": lambda given: [pair.target[:0] for pair in given]}, pairs)
    for name, f1 in (("right", 1.0), ("nothing", 0.0)):
        assert {test: [r.values["f1"] for r in results] for test, results in found[name].items()} == {
            test: [f1] * len(pairs) for test in TESTS
        }


def test_what_is_said_of_relatedness_is_counted() -> None:
    def judged(probability: float, decoded: list[list[int]], confidence: float, target: list[list[int]]) -> Judged:
        pair = Pair("F", ("a", "b"), np.zeros(4, int), np.zeros(8, int), np.array(target, int).reshape(-1, 2))
        pairs = np.array(decoded, int).reshape(-1, 2)
        return Judged(pair, pairs, np.full(len(pairs), confidence), probability, 3 * probability)

    right, wrong = judged(0.95, [[0, 1]], 0.95, [[0, 1]]), judged(0.35, [[0, 2], [1, 3]], 0.85, [[0, 1]])
    others = [judged(0.05, [], 0.0, []), judged(0.65, [[0, 0]], 0.25, [])]
    found = Relatedness({"none": [right, wrong]}, others, [False, True])
    assert {of: one.count.sum() for of, one in found.confidences.items()} == {
        "none": 3,
        "unrelated": 1,
        "all of them": 4,
    }
    assert found.confidences["none"].calibration_error == pytest.approx((0.05 + 2 * 0.85) / 3)
    assert found.areas == {
        "none": {"probability": 0.75, "probability <= 0.2": 0.5, "log odds": 0.75, "log odds <= 0.2": 0.5}
    }
    assert found.homology.calibration_error == pytest.approx((0.05 + 0.65 + 0.05 + 0.65) / 4)
    assert found.refused == 0.5 and found.covered == 0.125
    assert json.loads(json.dumps(found.values)) == found.values
    nobody = Relatedness({"none": [right]}, others, [False])
    assert nobody.areas["none"]["probability <= 0.2"] is None and " - " in nobody.text("mine")


def test_the_report_has_programs_and_says_why_there_is_none(
    families: list[Family], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    aligner = TrainedAligner(Aligner(config := Config(dim=24, rounds=1, heads=1, hidden=4, base_iters=5)), config, ())
    calls: list[int] = []

    def program(self: Installed, pair: Pair, timeout: float) -> np.ndarray:
        calls.append(1)
        return pair.target

    monkeypatch.setattr(Installed, "align", program)
    given = ({"mine": aligner}, families, 1, 95)
    programs = {"programs": [Installed(PROGRAMS["kalign"], "", "1")], "program_results": tmp_path / "found.jsonl"}
    found = flank_report(*given, progress=False, **programs)
    assert len(calls) == len(TESTS) * len(found.pairs)
    again = flank_report(*given, progress=False, **programs)
    assert len(calls) == len(TESTS) * len(found.pairs)  # they were remembered
    assert found.text == again.text and "mine less Kalign (1)" in found.text
    assert found.values["f1"]["Kalign (1)"]["staggered 2"]["value"] == 1.0
    for unfit, message in ((families[:1], "take two families"), (families, "no pair of at most 3")):
        with pytest.raises(NoFlankTest, match=message):
            flank_report({}, unfit, 1, 3 if unfit is families else 95, progress=False)


def test_a_verdict_is_learned_and_is_calibrated() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4000, len(FEATURES)))
    truth = Verdict(-0.5, (1.5, 0.0, -1.0, 0.5, 0.0))
    p = 1 / (1 + np.exp(-(truth.bias + x @ np.array(truth.weights))))
    found = fit(list(x), (rng.random(4000) < p).tolist())
    np.testing.assert_allclose(found.to_list(), truth.to_list(), atol=0.15)
    assert Verdict.from_list(found.to_list()) == found
    with pytest.raises(ValueError, match="ten related and ten unrelated pairs, got 3 of 20"):
        fit(list(x[:20]), [True] * 3 + [False] * 17)
    for broken in ([1.0], "1", [1.0] * 5 + [float("nan")], [True] * 6, None):
        with pytest.raises(ValueError, match="verdict"):
            Verdict.from_list(broken)


def test_tiny_sequences_are_no_surer_relatives_than_the_odds_say() -> None:
    verdict = Verdict(-3.0, (1.0, 1.0, 6.0, 2.0, -1.0))  # which trusts confidence
    for n, bounded in ((1, True), (SHORTEST - 1, True), (SHORTEST, False)):
        plan = np.zeros((n + 1, 61))
        plan[np.arange(n), np.arange(n)] = 1.0
        found = verdict.probability(-1.0, plan, np.stack([np.arange(n)] * 2, axis=1))
        assert found == pytest.approx(1 / (1 + math.e)) if bounded else found > 0.9


def test_pairs_are_decoded_as_asked_and_judged_as_the_verdict_was_fitted(
    pairs: tuple[Pair, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    config = Config(dim=24, rounds=1, heads=1, hidden=4, base_iters=5)
    aligner = TrainedAligner(Aligner(config), config, (), Verdict(0.0, (0.0, 1.0, 0.0, 1.0, 0.0)))
    default, first = judge(aligner, pairs), np.array([[0, 0]])
    monkeypatch.setitem(DECODERS, "mutual", lambda plan: first)
    found = judge(aligner, pairs, decoder="mutual")
    assert all(one.decoded is first for one in found) and any(len(one.decoded) > 1 for one in default)
    assert [one.probability for one in found] == [one.probability for one in default]
    report = flank_report({"mine": aligner}, [*load_families(read_stockholm(HELDOUT_SAMPLE))], 1, 95, decoder="mutual")
    of_tests = report.relatedness["mine"].judged.values()
    assert all(one.decoded is first for judged in of_tests for one in judged)


def test_features_are_finite_for_any_plan() -> None:
    for n, m, odds in ((1, 1, -1e9), (5, 900, 1e9)):
        plan = np.full((n + 1, m + 1), 1 / (n + m))
        for decoded in (np.zeros((0, 2), dtype=np.int64), np.zeros((1, 2), dtype=np.int64)):
            found = features(odds, plan, decoded)
            assert np.isfinite(found).all() and np.abs(found).max() < 10
            assert 0 <= Verdict(0.0, (1.0,) * len(FEATURES)).probability(odds, plan, decoded) <= 1


def test_calibration_pairs_of_both_kinds_have_the_same_flanks(families: list[Family]) -> None:
    pairs, related = calibration_pairs(families)
    assert sum(related) == len(related) / 2 == len(pairs) / 2
    assert all((len(pair.target) > 0) == is_related for pair, is_related in zip(pairs, related, strict=True))
    lengths = [np.median([len(p.query) for p, r in zip(pairs, related, strict=True) if r == kind]) for kind in (0, 1)]
    assert 0.4 < lengths[0] / lengths[1] < 2.5


@pytest.mark.slow
def test_the_commands(families: list[Family], tmp_path: object, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    config = Config(dim=24, rounds=1, heads=1, hidden=4, base_iters=5)
    more = {"verdict": Verdict(0.5, (1.0,) * 5), "profiled_on": [("fn3", "PF00041")]}
    path = save_release(Aligner(config), config, f"{tmp_path}/a.safetensors", **more)
    assert load_release(path).verdict == Verdict(0.5, (1.0,) * 5)
    assert main(["flanks", str(path), "--pairs", "2", "--cap", "90", "--quiet", "--threads", "1"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("note: its context profiles were taught by 1 of the families\n")
    for words in ("F1 with flanks", "staggered 2", "Smith-Waterman", "area under the curve", "unrelated"):
        assert words in text
