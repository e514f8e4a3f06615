"""The digits example: its data, the fairness of the comparison, and the command line from end to end."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

from examples.digits_vit import cli, train as training
from examples.digits_vit.cli import main
from examples.digits_vit.data import Digits, Split, load_split, shift, to_grid, to_patches
from examples.digits_vit.measure import (
    Outcome,
    attention_weights,
    class_token_view,
    first_of_each_class,
    measure,
    received,
)
from examples.digits_vit.model import DUSTBIN, SINKHORN, SOFTMAX, VisionTransformer, attentions, build
from examples.digits_vit.report import differences, reading_table, spread
from examples.digits_vit.settings import Settings
from examples.digits_vit.train import History, Learner, Score, batches, learning_rate, score, train
from torch_sinkhorn_attn import SinkhornMultiheadAttention

SHORT = Settings(epochs=1, seeds=1, batch_size=40)


@pytest.fixture(scope="module")
def split() -> Split:
    return load_split()


@pytest.fixture(scope="module")
def small(split: Split) -> Split:
    """The beginning of every part: 3 batches of SHORT's size to train on."""
    return Split(*(Digits(d.images[:n], d.labels[:n], d.positions[:n]) for d, n in zip(parts(split), (120, 30, 30))))


def parts(split: Split) -> tuple[Digits, Digits, Digits]:
    return split.train, split.validation, split.test


@pytest.fixture
def bar() -> Iterator[tqdm]:
    with tqdm(file=io.StringIO()) as bar:
        yield bar


def outcome(accuracy: float, reading: Tensor | None = None) -> Outcome:
    return Outcome(Score(accuracy, 0.0), History(), 1, torch.ones(1, 4, 16) if reading is None else reading)


def test_the_split_is_disjoint_complete_and_stratified(split: Split) -> None:
    digits = load_digits()
    assert [len(part) for part in parts(split)] == [1077, 270, 450]
    assert torch.cat([part.positions for part in parts(split)]).sort().values.tolist() == list(range(1797))
    counts = torch.bincount(torch.tensor(digits.target))
    for part in parts(split):
        expected = counts * len(part) / 1797
        assert (torch.bincount(part.labels, minlength=10) - expected).abs().max() <= 1.0
        assert torch.equal(part.labels, torch.tensor(digits.target)[part.positions])
        assert torch.equal(16 * part.images, torch.tensor(digits.images, dtype=torch.float32)[part.positions])


def test_patches_make_up_the_image(split: Split) -> None:
    images = split.test.images[:7]
    patches = to_patches(images)
    assert patches.shape == (7, 16, 4)
    assert torch.equal(F.fold(patches.transpose(1, 2), (8, 8), 2, stride=2)[:, 0], images)
    assert torch.allclose(to_grid(patches.mean(-1)), F.avg_pool2d(images[:, None], 2)[:, 0])


def test_shifts_move_by_a_pixel_and_bring_in_blank(split: Split) -> None:
    images = split.test.images[:50]
    assert torch.equal(shift(images, 0.0, torch.Generator().manual_seed(0)), images)
    shifted = shift(images, 1.0, torch.Generator().manual_seed(0))
    seen = set()
    for image, moved in zip(images, shifted, strict=True):
        canvas = F.pad(image, (1, 1, 1, 1))
        places = [(y, x) for y in range(3) for x in range(3) if torch.equal(canvas[y : y + 8, x : x + 8], moved)]
        assert places
        seen.update(places)
    assert len(seen) == 9
    some = shift(images, 0.3, torch.Generator().manual_seed(0))
    assert 3 <= sum(not torch.equal(a, b) for a, b in zip(some, images, strict=True)) <= 25


def test_one_seed_gives_every_attention_the_same_weights() -> None:
    models = {name: build(make, 3) for name, make in attentions(Settings(dustbin=True)).items()}
    softmax = models[SOFTMAX].state_dict()
    kinds = {name: type(model.blocks[0].attention) for name, model in models.items()}  # type: ignore[union-attr]
    assert kinds == {
        SOFTMAX: nn.MultiheadAttention,
        SINKHORN: SinkhornMultiheadAttention,
        DUSTBIN: SinkhornMultiheadAttention,
    }
    for name in (SINKHORN, DUSTBIN):
        others = models[name].state_dict()
        assert all(torch.equal(others[key], value) for key, value in softmax.items())
        new = set(others) - set(softmax)
        assert len(new) == (4 if name == DUSTBIN else 0) and not any(others[key].any() for key in new)
    other_seed = build(nn.MultiheadAttention, 4).state_dict()
    assert not torch.equal(
        other_seed["blocks.0.attention.in_proj_weight"], softmax["blocks.0.attention.in_proj_weight"]
    )


def test_all_models_see_the_same_batches(small: Split, bar: tqdm, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[Learner, list[tuple[Tensor, Tensor, float]]] = {}
    monkeypatch.setattr(Learner, "step", lambda learner, *batch: seen.setdefault(learner, []).append(batch))
    train(SHORT, small, 0, bar)
    first, second = seen.values()
    assert len(first) == len(second) == bar.n == 3
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and a[2] == b[2]


def test_an_epoch_holds_every_image_once(split: Split) -> None:
    positions = torch.arange(len(split.train))
    marked = Digits(split.train.images, positions, positions)
    first, second = (
        [labels for _, labels in batches(marked, 64, torch.Generator().manual_seed(seed))] for seed in (0, 1)
    )
    assert [len(labels) for labels in first] == [64] * 16 + [53]
    assert torch.equal(torch.cat(first).sort().values, positions)
    assert not torch.equal(torch.cat(first), torch.cat(second))


def test_a_run_repeats_and_does_not_depend_on_its_neighbours(small: Split, bar: tqdm) -> None:
    runs = [train(Settings(1, 1, 40, dustbin=dustbin), small, 0, bar) for dustbin in (False, False, True)]
    for name in (SOFTMAX, SINKHORN):
        first, *others = (run[name].history for run in runs)
        for history in others:
            assert history.loss == first.loss and history.validation == first.validation
    assert train(SHORT, small, 1, bar)[SOFTMAX].history.loss != runs[0][SOFTMAX].history.loss


def test_sinkhorn_reads_every_patch_equally_and_softmax_does_not(split: Split) -> None:
    makes = attentions(Settings())
    weights = {name: attention_weights(Learner(build(make, 0)), split.test.images[:20]) for name, make in makes.items()}
    for of_model in weights.values():
        assert of_model.shape == (2, 20, 4, 17, 17)
        assert torch.allclose(of_model.sum(-1), torch.ones(()), atol=1e-5)
    assert (received(weights[SINKHORN]) - 1).abs().max() < 1e-3
    assert (received(weights[SOFTMAX]) - 1).abs().max() > 0.3


def test_which_weights_are_drawn() -> None:
    weights = torch.rand(2, 3, 4, 17, 17)
    assert torch.allclose(received(weights)[1, 2, 5], weights[0, 1, 2, :, 6].sum())
    assert torch.equal(class_token_view(weights)[1, 2, 5], weights[1, 1, 2, 0, 6])


def test_pictures_show_the_first_digits(split: Split) -> None:
    shown = first_of_each_class(split.test, 5)
    assert shown.labels.tolist() == [0, 1, 2, 3, 4]
    for label, position in enumerate(shown.positions):
        earlier = split.test.labels[: (split.test.positions == position).nonzero().item()]
        assert label not in earlier


def test_scores_count_right_answers(split: Split) -> None:
    class Constant(VisionTransformer):
        def forward(self, images: Tensor) -> Tensor:
            return F.one_hot(torch.full((len(images),), 3), 10).float()

    result = score(Learner(Constant(nn.MultiheadAttention)), split.test)
    assert result.accuracy == pytest.approx((split.test.labels == 3).double().mean().item())
    learner = Learner(build(nn.MultiheadAttention, 0))
    learner.history.seconds = [1.0, 3.0, 2.0]
    measured = measure(learner, first_of_each_class(split.test, 5))
    assert (measured.seconds, measured.milliseconds_per_step) == (6.0, 2000.0)
    assert measured.parameters == sum(p.numel() for p in learner.model.parameters())


def test_a_loss_that_is_not_finite_is_refused(split: Split) -> None:
    learner = Learner(build(nn.MultiheadAttention, 0))
    with pytest.raises(FloatingPointError, match="the loss is nan; lower --learning-rate"):
        learner.step(torch.full((2, 8, 8), math.nan), torch.zeros(2, dtype=torch.int64), 1e-3)


def test_the_learning_rate_warms_up_and_decays() -> None:
    rates = [learning_rate(1.0, step, 1000) for step in range(1000)]
    assert rates[0] == pytest.approx(0.02) and max(rates) > 0.99
    assert 0 < rates[-1] < 1e-4 and rates[500] == pytest.approx(0.5)


def test_differences_are_paired_and_spreads_are_of_a_sample() -> None:
    outcomes = {SOFTMAX: [outcome(0.9), outcome(0.8)], SINKHORN: [outcome(0.91), outcome(0.78)]}
    assert differences(outcomes, 450) == [
        "Sinkhorn minus softmax: -0.50 ± 2.12 points of accuracy (seed by seed +1.00, -2.00; one image is 0.22)"
    ]
    assert spread([1.0, 3.0], 2) == "2.00 ± 1.41"
    assert spread([1.0], 1) == "1.0"
    uneven = outcome(0.9, torch.arange(1.0, 102.0))
    assert reading_table({SOFTMAX: [uneven]}).split()[-5:] == ["1.00", "2.00", "51.00", "100.00", "101.00"]


@pytest.mark.slow
def test_the_command_trains_both_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "report.txt").write_text("an earlier run")
    assert main(["--epochs", "4", "--seeds", "1", "--threads", "1", "--out", str(out)]) == 0
    text, bars = capsys.readouterr()
    assert f"the earlier run in {out} is now in {out}-1\n" in text
    assert (tmp_path / "run-1" / "report.txt").read_text() == "an earlier run"
    assert "seed 1 of 1: 100%" in bars and "68/68" in bars and "softmax" in bars
    report = (out / "report.txt").read_text()
    assert report in text and "epochs 4" in report and "450 to test" in report
    header = next(line for line in report.splitlines() if line.startswith("attention  "))
    assert "test accuracy, %" in header and "ms per step" in header
    scores = {line.split()[0]: line.split()[1:] for line in report.split("\n\n")[1].splitlines()[2:]}
    assert set(scores) == {"softmax", "Sinkhorn"}
    for accuracy, loss, seconds, per_step, parameters in scores.values():
        assert float(accuracy) > 50 and float(loss) < 0.6 * math.log(10)
        assert float(seconds) > 0 and float(per_step) > 0 and parameters == "39610"
    for name in ("learning", "reading", "matrices", "class_token"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"wrote {out / name}.png" in text


@pytest.mark.parametrize(
    "option, value, allowed",
    [
        ("--epochs", "0", "at least 1 and at most 10000"),
        ("--seeds", "0", "at least 1 and at most 100"),
        ("--batch-size", "-1", "at least 1 and at most 10000"),
        ("--learning-rate", "0.0", "above 0 and at most 1"),
        ("--learning-rate", "nan", "above 0 and at most 1"),
        ("--epsilon", "-1.0", "at least 0.01 and at most 100"),
        ("--base-iters", "-1", "at least 0 and at most 1000"),
        ("--threads", "0", "at least 1 and at most 1024"),
    ],
)
def test_values_out_of_range_are_refused_before_any_work(
    option: str, value: str, allowed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main([option, value, "--out", str(out)]) == 1
    assert capsys.readouterr().err == f"error: {option} must be {allowed}, got {value}\n"
    assert not out.exists()


def test_a_folder_that_cannot_be_written_is_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "train", None)  # calling it would be a TypeError
    (tmp_path / "file").touch()
    assert main(["--out", str(tmp_path / "file"), "--threads", "1"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: cannot write to --out {tmp_path / 'file'} (") and error.count("\n") == 1


def test_ctrl_c_is_clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training.Learner, "step", stop)
    assert main(["--out", str(tmp_path), "--threads", "1", "--quiet"]) == 130
    assert capsys.readouterr().err == "stopped\n"
    assert list(tmp_path.iterdir()) == []
