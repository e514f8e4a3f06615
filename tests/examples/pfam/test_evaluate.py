"""Intervals, calibration, and the `evaluate` command, against numbers worked out by hand."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.common import files
from examples.pfam import evaluate
from examples.pfam.calibration import Calibration, Reliability, predictor
from examples.pfam.cli import main
from examples.pfam.comparison import CONFIDENCE, FIXED_SCORES, PAIR_HMM, compare
from examples.pfam.comparison_tables import as_values, report
from examples.pfam.config import HELDOUT_SAMPLE, Config
from examples.pfam.decode import DECODERS, DEFAULT_DECODER
from examples.pfam.evaluate import ALIGNED, Result, Scores, align_pairs, measure_alignment, measure_plan
from examples.pfam.fixed_score import FixedScores
from examples.pfam.gap_grid import EXTEND, OPEN, gap_grid, grid_table
from examples.pfam.metrics import PairScore
from examples.pfam.model import Aligner
from examples.pfam.pairs import Pair, encode, evaluation_pairs, load_families
from examples.pfam.release import save_release
from examples.pfam.report import write_certificates
from examples.pfam.sampler import collate
from examples.pfam.stockholm import read_stockholm
from examples.pfam.summary import BINS, by_identity, differences, mean_interval, summarise
from examples.pfam.tables import aligner_name
from examples.pfam.train import Trainer

SMALL = Config(dim=24, base_iters=4)
STOCKHOLM = """# STOCKHOLM 1.0
#=GF ID   Mixed
#=GF AC   PF99999.1
a/1-9     ..mkVLAA-WGH
b/1-8     --.-VLgAW-GH
c/1-7     MK..V-AA-WG.
//
# STOCKHOLM 1.0
#=GF ID   full_Other
d         MKVLAAWWGHPDE
e         MKVLAA--GHPDE
//
"""


def result(
    family: str, f1: float, identity: float = 0.3, name: str = "a", counts: tuple[int, ...] = (1, 1, 1)
) -> Result:
    return Result(family, (name, "b"), identity, PairScore(*counts), {"f1": f1, "barycentre": 1 - f1})


@pytest.fixture
def stockholm(tmp_path: Path) -> Path:
    path = tmp_path / "mixed.sto"
    path.write_text(STOCKHOLM)
    return path


def test_lower_case_and_gaps_of_both_kinds_are_no_target(stockholm: Path) -> None:
    families = load_families(read_stockholm(stockholm))
    pairs = {pair.names: pair for pair in evaluation_pairs(families, 9, 99, 0).pairs}
    first = pairs["a/1-9", "b/1-8"]
    # mkVLAAWGH and VLgAWGH: V, L, the second A, G and H stand in one column and in upper case.
    assert first.target.tolist() == [[2, 0], [3, 1], [5, 3], [7, 5], [8, 6]]
    measured = measure_alignment(first, np.array([[2, 0], [3, 1], [4, 2], [5, 3]]))
    assert (measured.counts.hits, measured.counts.predicted, measured.counts.target) == (3, 4, 5)
    assert measured.identity == 1.0
    assert pairs["a/1-9", "c/1-7"].target.tolist() == [[2, 2], [4, 3], [5, 4], [6, 5], [7, 6]]


def test_a_plan_is_measured_in_every_way() -> None:
    pair = Pair("F", ("a", "b"), encode("AC"), encode("ACD"), np.array([[0, 0], [1, 2]]))
    plan = np.array([[0.8, 0.1, 0.0, 0.1], [0.1, 0.2, 0.5, 0.2], [0.1, 0.7, 0.5, 1.7]])
    measured = measure_plan(pair, plan, np.array([[0, 0], [1, 1]]))
    assert measured.values["f1"] == 0.5 and measured.values["row accuracy"] == 1.0
    assert measured.values["confidence"] == pytest.approx((0.8 + 0.2) / 2)
    assert measured.values["sparse cross-entropy"] == pytest.approx(-(math.log(0.8 / 0.9) + math.log(0.5 / 0.8)) / 2)
    assert measured.identity == 0.5
    assert measure_plan(pair, plan, np.zeros((0, 2), dtype=np.int64)).values["confidence"] == 0.0


def test_pairs_are_aligned_in_small_batches_and_alike_in_any(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Aligner(SMALL).train()
    pairs = evaluation_pairs(load_families(read_stockholm(HELDOUT_SAMPLE)), 3, 100, 0).pairs
    alone = {pair.names: plan for pair, plan in align_pairs(model, pairs, 1)}
    batches = []
    monkeypatch.setattr(evaluate, "collate", lambda chunk: batches.append(collate(chunk)) or batches[-1])
    monkeypatch.setattr(evaluate, "CELLS", 22_000)
    together = {pair.names: plan for pair, plan in align_pairs(model, pairs, 4)}
    sizes = [(*batch.query.shape, batch.key.shape[1]) for batch in batches]
    assert all(count == 1 or (count <= 4 and count * rows * cols <= 22_000) for count, rows, cols in sizes)
    assert max(sizes)[0] > 1 and sum(count for count, _, _ in sizes) == len(pairs)
    assert set(alone) == set(together) == {pair.names for pair in pairs}
    for names, plan in alone.items():
        np.testing.assert_allclose(together[names], plan, atol=1e-4)
    assert model.training


def test_macro_and_micro_by_hand() -> None:
    results = [
        result("x", 1.0, counts=(4, 4, 4)),
        result("x", 0.0, counts=(0, 6, 2)),
        result("y", 0.25, counts=(1, 4, 4)),
    ]
    summary = summarise(results)
    assert (summary.pairs, summary.families) == (3, 2)
    assert summary.macro["f1"].value == pytest.approx((0.5 + 0.25) / 2)
    assert summary.micro == PairScore(5, 14, 10)
    # Of two families, resampled means are 0.5, 0.375 or 0.25 with probabilities 1/4, 1/2, 1/4.
    assert summary.macro["f1"][1:] == (0.25, 0.5)


def test_identity_bins_hold_their_upper_ends() -> None:
    identities = (0.0, 0.2, 0.2001, 0.4, 0.9, 0.95, 1.0)
    binned = by_identity([result("x", 1.0, identity) for identity in identities])
    assert [[r.identity for r in part] for part in binned.values()] == [
        [0.0, 0.2],
        [0.2001, 0.4],
        [0.9],
        [0.95, 1.0],
    ]
    assert list(binned) == list(BINS)


def test_intervals_are_reproducible_and_about_as_wide_as_theory_says() -> None:
    values = np.random.default_rng(0).standard_normal((400, 2)) * [1.0, 3.0]
    first = mean_interval(values, seed=5)
    assert np.array_equal(first, mean_interval(values, seed=5))
    assert not np.array_equal(first, mean_interval(values, seed=6))
    assert first[:, 0] == pytest.approx(values.mean(axis=0))
    width = 2 * 1.96 * values.std(axis=0) / math.sqrt(400)
    assert first[:, 2] - first[:, 1] == pytest.approx(width, rel=0.05)
    assert np.isnan(mean_interval(values[:1])[:, 1:]).all()


def test_paired_differences_are_narrower_than_what_they_are_differences_of() -> None:
    rng = np.random.default_rng(0)
    levels = rng.random(12)
    a = [result(str(k), level) for k, level in enumerate(levels)]
    b = [result(str(k), level - 0.1) for k, level in enumerate(levels)]
    found = differences(a, b)["f1"]
    assert found == pytest.approx((0.1, 0.1, 0.1))
    with pytest.raises(ValueError, match="same pairs"):
        differences(a, b[1:])


def test_reliability_by_hand() -> None:
    found = Reliability()
    found.add(np.array([0.05, 0.95, 0.91, 1.0 + 1e-7]), np.array([False, True, False, True]))
    mean, frequency, count = found.curve
    assert mean == pytest.approx([0.05, (0.95 + 0.91 + 1.0) / 3])
    assert frequency == pytest.approx([0.0, 2 / 3])
    assert count.tolist() == [1, 3]
    assert found.calibration_error == pytest.approx((0.05 + abs(0.95 + 0.91 + 1.0 - 2)) / 4)
    assert found.brier == pytest.approx((0.05**2 + 0.05**2 + 0.91**2) / 4)
    assert Reliability().calibration_error == Reliability().brier == 0.0


def test_probabilities_that_are_true_as_often_as_they_say_are_calibrated() -> None:
    rng = np.random.default_rng(0)
    probability = rng.random(200_000)
    honest, boastful = Reliability(), Reliability()
    honest.add(probability, rng.random(200_000) < probability)
    boastful.add(probability, rng.random(200_000) < probability**2)
    assert honest.calibration_error < 0.005 < 0.1 < boastful.calibration_error


def test_calibration_counts_entries_above_the_floor_decoded_pairs_and_gaps() -> None:
    pair = Pair("F", ("a", "b"), encode("AC"), encode("ACD"), np.array([[0, 0], [1, 2]]))
    plan = np.array([[0.8, 0.1, 0.001, 0.1], [0.1, 0.2, 0.5, 0.2], [0.1, 0.7, 0.5, 1.7]])
    found = Calibration()
    found.add(pair, plan, np.array([[0, 0], [1, 1]]))
    assert found.entries.count.sum() == 5 and found.entries.true.sum() == 2
    assert found.decoded.count.sum() == 2 and found.decoded.true.sum() == 1
    assert found.unpaired.count.sum() == 1 and found.unpaired.true.sum() == 0  # the third key residue has a partner
    found.add(pair, plan, np.array([[1, 2]]))
    assert found.unpaired.count.sum() == 4 and found.unpaired.true.sum() == 1


def test_a_predictor_is_judged_by_rank_and_by_its_quarters() -> None:
    rng = np.random.default_rng(0)
    results = [result(str(k % 8), float(f1)) for k, f1 in enumerate(rng.random(80))]
    error = np.array([1 - r.values["f1"] for r in results])
    right = predictor(results, np.exp(error))
    assert right.spearman == pytest.approx((1.0, 1.0, 1.0))
    assert right.f1[0] == pytest.approx(np.sort(1 - error)[-20:].mean())
    assert right.f1[1] == pytest.approx(np.sort(1 - error)[:20].mean())
    assert right.verdict == "foretells errors"
    assert predictor(results, -error).verdict == "points the wrong way"
    assert predictor(results, rng.random(80)).verdict == "tells nothing"
    unbounded = predictor(results, [math.inf] * 80)
    assert unbounded.finite == 0 and math.isnan(unbounded.spearman.value) and unbounded.verdict == "tells nothing"


def test_fixed_scores_average_along_diagonals() -> None:
    pair = Pair("F", ("a", "b"), encode("W" * 50), encode("W" * 25 + "A" * 25), np.array([[0, 0]]))
    scores = FixedScores(reach=2.0, position=0.0).scores(pair)
    assert scores[20, 10] == pytest.approx(11.0)  # W-W as far as the Gaussian reaches
    assert scores[30, 40] == pytest.approx(-3.0)  # W-A
    # Six residues before the change of the key, three standard deviations: nearly all still W-W.
    assert 10.9 < scores[20, 18] < 11.0
    assert scores[20, 24] == pytest.approx(11 * 0.6 - 3 * 0.4, abs=0.2)  # the Gaussian's weight on k <= 0: 0.6
    biased = FixedScores(reach=2.0, position=40.0).scores(pair)
    assert biased[20, 10] == pytest.approx(11.0 - 40 * (10 / 50) ** 2)
    far = FixedScores(position=40.0).scores(dataclasses.replace(pair, key=encode("W" * 25)))
    near = FixedScores(position=0.0).scores(dataclasses.replace(pair, key=encode("W" * 25)))
    assert (far - near)[5, 15] == pytest.approx(-40 * (5.5 / 50 - 15.5 / 25) ** 2)


def test_fixed_scores_make_a_balanced_plan_that_finds_an_easy_alignment() -> None:
    letters = "MKVLAAWWGHPDEFIQRSTYCN"
    pair = Pair("F", ("a", "b"), encode(letters), encode(letters), np.stack([np.arange(22)] * 2, axis=1))
    plan = FixedScores(reach=1.0).plan(pair)
    assert plan.shape == (23, 23)
    assert plan[:-1].sum(axis=1) == pytest.approx(np.ones(22), abs=1e-3)
    assert plan[:, :-1].sum(axis=0) == pytest.approx(np.ones(22), abs=0.01)
    assert plan[:-1].argmax(axis=1).tolist() == list(range(22))


def test_the_plan_of_a_single_pair_has_a_closed_form() -> None:
    # Mass 1 in every row and column of [[P, 1 - P], [1 - P, P]], corner score 0: P = sigmoid((S - 2 bin) / 2 epsilon).
    pair = Pair("F", ("a", "b"), encode("W"), encode("W"), np.array([[0, 0]]))
    for epsilon, dustbin in ((0.25, 2.1), (1.0, 2.1), (1.0, 1.0)):
        fixed = FixedScores(reach=1.0, dustbin=dustbin, epsilon=epsilon)
        score = fixed.scores(pair)[0, 0]
        assert score == pytest.approx(11 * 0.399, abs=0.01)  # the Gaussian's weight on its centre
        assert fixed.plan(pair)[0, 0] == pytest.approx(
            1 / (1 + math.exp(-(score - 2 * dustbin) / (2 * epsilon))), abs=1e-4
        )


def test_gap_grid_scores_every_cost() -> None:
    # Shifted by one, 59 less two gaps of one; unshifted, 42: the first gap's cost decides between 8 and 9.
    shifted = np.stack([np.arange(1, 7), np.arange(6)], axis=1)[:5]
    grid = gap_grid([Pair("F", ("a", "b"), encode("AWWWWWA"), encode("WWWWWAA"), shifted)], progress=False)
    found = grid["Needleman-Wunsch"]
    assert (found[0] > 0.9).all() and (found[1:] == 0).all()


def test_gap_grid_names_its_best(stockholm: Path) -> None:
    pairs = evaluation_pairs(load_families(read_stockholm(stockholm)), 9, 99, 0).pairs
    grids = gap_grid(pairs, progress=False)
    assert {name: grid.shape for name, grid in grids.items()} == {
        "Needleman-Wunsch": (len(OPEN), len(EXTEND)),
        "Smith-Waterman": (len(OPEN), len(EXTEND)),
    }
    at = OPEN.index(15.0), EXTEND.index(1.0)
    expected = Scores.of(compare({}, pairs, progress=False).results["Needleman-Wunsch"]).macro["f1"]
    assert grids["Needleman-Wunsch"][at] == pytest.approx(expected)
    grid = np.zeros((len(OPEN), len(EXTEND)))
    grid[2, 3] = 0.5
    assert grid_table({"Needleman-Wunsch": grid}).endswith("best: 10 and 2 with 0.5000")


def test_a_comparison_without_models_and_its_refusals(stockholm: Path) -> None:
    pairs = evaluation_pairs(load_families(read_stockholm(stockholm)), 9, 99, 0).pairs
    comparison = compare({}, pairs, progress=False)
    assert set(comparison.calibration) == {FIXED_SCORES, PAIR_HMM} and comparison.models == []
    assert "Smith-Waterman" in report(comparison)
    with pytest.raises(ValueError, match=r"'best'.*monotone, accuracy, mutual"):
        compare({}, pairs, decoder="best")
    with pytest.raises(ValueError, match="no pair"):
        compare({}, ())


@pytest.mark.slow
def test_a_model_is_compared_on_the_same_pairs() -> None:
    torch.manual_seed(0)
    pairs = evaluation_pairs(load_families(read_stockholm(HELDOUT_SAMPLE)), 2, 100, 0).pairs
    comparison = compare({"mine": Aligner(SMALL)}, pairs, progress=False)
    doubts = comparison.doubts["mine"]
    assert len(doubts.results) == len(pairs)
    confidences = [1 - r.values["confidence"] for r in doubts.results]
    assert doubts.numbers[CONFIDENCE] == confidences
    assert {len(numbers) for numbers in doubts.numbers.values()} == {len(pairs)}
    assert set(comparison.decoded["mine"]) == set(DECODERS)
    counts = {rule: [r.counts for r in found] for rule, found in comparison.decoded["mine"].items()}
    assert counts[DEFAULT_DECODER] == [r.counts for r in comparison.results["mine"]] != counts["mutual"]
    values = as_values(comparison)
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert set(ALIGNED) <= set(values["mine"]["macro"])
    assert values["mine"]["f1_by_decoder"][DEFAULT_DECODER] == values["mine"]["macro"]["f1"]
    assert values["mine"]["macro"]["perplexity"]["value"] == pytest.approx(
        math.exp(values["mine"]["macro"]["sparse cross-entropy"]["value"])
    )


def test_attentions_without_a_transport_plan_have_no_certificates(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, attention="dual-softmax", eval_pairs=1, eval_cap=95)
    pairs = evaluation_pairs(load_families(read_stockholm(HELDOUT_SAMPLE)), 1, 100, 0).pairs
    comparison = compare({"mine": Aligner(config)}, pairs, progress=False)
    assert list(comparison.doubts["mine"].numbers) == [CONFIDENCE]
    assert aligner_name(config) == "Dual-softmax aligner"
    trainer = Trainer(config, tmp_path)
    assert write_certificates(trainer).startswith("no certificates: dual-softmax")


@pytest.mark.slow
def test_evaluate_several_checkpoints_on_any_stockholm_file(
    stockholm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    paths = [str(save_release(Aligner(SMALL), SMALL, tmp_path / f"{name}.safetensors")) for name in ("one", "two")]
    out = tmp_path / "out"
    options = ["--data", str(stockholm), "--exclude", "full_", "--cap", "8", "--out", str(out), "--quiet"]
    rename, moved = os.replace, set()
    monkeypatch.setattr(files.os, "replace", lambda old, new: moved.add(new) or rename(old, new))
    assert main(["evaluate", *paths, *options]) == 0
    text, bars = capsys.readouterr()
    assert bars == ""
    assert "1 families, 1 pairs" in text and "2 skipped" in text  # a/1-9 is longer than eight
    for words in ("one", "two", "Needleman-Wunsch", FIXED_SCORES, "identity <= 0.2", "perplexity", "row accuracy"):
        assert words in text
    assert "full_Other" not in text and "warning" not in text
    assert (out / "report.txt").read_text() in text
    assert (
        {path.name for path in out.iterdir()}
        == {path.name for path in moved if path.parent == out}
        == {
            "report.txt",
            "scores.json",
            "reliability.png",
            "errors_one.png",
            "errors_two.png",
        }
    )
    scores = json.loads((out / "scores.json").read_text())
    assert scores["protocol"]["skipped"] == 2 and scores["protocol"]["exclude"] == ["full_"]
    assert scores["aligners"]["one"]["pairs"] == 1


@pytest.mark.slow
def test_evaluate_says_which_families_were_trained_on(
    stockholm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no installed program
    records = {"old": [], "seen": [("PF00041", "other_PF00041")], "unseen": [("PF00069", "Pkinase")]}
    told = {"seen": [("PF02790", "any")]}
    paths = [
        str(save_release(Aligner(SMALL), SMALL, tmp_path / f"{n}.safetensors", r, profiled_on=told.get(n, ())))
        for n, r in records.items()
    ]
    options = ["--pairs", "1", "--cap", "95", "--flanks", "0", "--out", str(tmp_path / "out"), "--quiet"]
    assert main(["evaluate", *paths, *options]) == 0
    head = capsys.readouterr().out.split("\n\n")[0]
    assert head.splitlines()[1:4] == [
        "note: the families that old was trained on are not recorded; these may be among them",
        "warning: seen was trained on 1 of the families: fn3 (PF00041.20)",
        "note: the context profiles of seen were taught by 1 of them: COX2_TM (PF02790.17)",
    ]
    assert (tmp_path / "out" / "report.txt").read_text().startswith(head)

    run = tmp_path / "run"  # a run's checkpoint has the record too, whatever becomes of its data
    data = stockholm.rename(tmp_path / "training.sto")
    Trainer(dataclasses.replace(SMALL, data=str(data), eval_pairs=1), run).save()
    data.rename(stockholm)
    assert main(["evaluate", str(run), "--data", str(stockholm), *options]) == 0
    warning = "\nwarning: Sinkhorn aligner was trained on 2 of the families: Mixed (PF99999.1), full_Other\n"
    assert warning in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pairs", "0"], "--pairs must be at least 1, got 0"),
        (["--cap", "0"], "--cap must be at least 1, got 0"),
        (["--exclude", "Mixed", "--exclude", "full_"], "2 being left out by --exclude"),
        (["--cap", "2"], "no pair to evaluate on"),
        (["--data", "absent"], "no Stockholm file or directory at absent"),
    ],
)
def test_what_evaluate_refuses(
    stockholm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    path = save_release(Aligner(SMALL), SMALL, tmp_path / "a.safetensors")
    arguments = ["evaluate", str(path), "--data", str(stockholm), "--out", str(tmp_path / "out"), "--quiet", *options]
    assert main(arguments) == 1
    assert message in capsys.readouterr().err


def test_evaluate_leaves_a_training_run_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "checkpoint.pt").touch()
    assert main(["evaluate", "--out", str(tmp_path), "--quiet"]) == 1
    assert "holds a training run" in capsys.readouterr().err
    (tmp_path / "out" / "scores.json").mkdir(parents=True)
    assert main(["evaluate", "--out", str(tmp_path / "out"), "--quiet"]) == 1
    assert "holds a folder scores.json, where a file goes; choose another one" in capsys.readouterr().err


def test_the_gap_grid_needs_no_aligner(stockholm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--gap-grid", "--data", str(stockholm), "--quiet"]) == 0
    assert capsys.readouterr().out.count("best: ") == 2
