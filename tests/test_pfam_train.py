"""The run: deterministic, resumed bitwise, interrupted without loss; the command line from end to end."""

from __future__ import annotations

import dataclasses
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.pfam import checkpoint
from examples.pfam.checkpoint import load_checkpoint, save_checkpoint, set_aside
from examples.pfam.cli import main
from examples.pfam.config import HELDOUT_SAMPLE, TRAIN_SAMPLE, Config
from examples.pfam.dataset import load_dataset
from examples.pfam.train import History, Trainer, learning_rate

ROOT = Path(__file__).resolve().parents[1]
SMALL = Config(steps=10, batch_size=2, cap=32, eval_cap=95, eval_pairs=1, eval_every=5, save_every=5, dim=24)
SMALL_FLAGS = "--batch-size=2 --cap=32 --eval-cap=95 --eval-pairs=1 --dim=24 --threads=1"


def assert_same_run(first: Trainer, second: Trainer) -> None:
    assert first.step == second.step
    assert first.history.loss == second.history.loss
    assert first.history.evaluations == second.history.evaluations
    for (name, a), b in zip(first.model.state_dict().items(), second.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    states = [trainer.optimizer.state_dict()["state"] for trainer in (first, second)]
    for index, moments in states[0].items():
        assert all(torch.equal(value, states[1][index][name]) for name, value in moments.items())


def test_resuming_is_bitwise_exact(tmp_path: Path) -> None:
    straight = Trainer(SMALL, tmp_path / "straight")
    assert straight.run(progress=False)
    draws = (torch.rand(1), np.random.rand(), random.random())

    assert Trainer(SMALL, tmp_path / "halves").run(until=5, progress=False)
    torch.rand(7), np.random.rand(3), random.random()  # what else the process draws must not matter
    resumed = Trainer.resume(tmp_path / "halves")
    assert resumed.step == 5
    assert resumed.run(progress=False)

    assert_same_run(straight, resumed)
    assert [step for step, _ in resumed.history.evaluations] == [0, 5, 10]
    assert (torch.rand(1), np.random.rand(), random.random()) == draws


def test_a_run_stopped_during_an_evaluation_makes_up_for_it(tmp_path: Path) -> None:
    trainer = Trainer(SMALL, tmp_path)
    trainer.interrupted = True
    assert not trainer.run(progress=False)
    assert trainer.history.evaluations == []
    resumed = Trainer.resume(tmp_path)
    resumed.run(until=1, progress=False)
    assert [step for step, _ in resumed.history.evaluations] == [0]


def test_a_failed_save_leaves_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"config": {}, "model": {}, "optimizer": {}, "step": 1, "history": {}}
    save_checkpoint(tmp_path, state)

    def fail(source: object, target: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            save_checkpoint(tmp_path, {**state, "step": 2})
    assert load_checkpoint(tmp_path)["step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_unreadable_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_checkpoint(tmp_path)
    (tmp_path / "checkpoint.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        load_checkpoint(tmp_path)
    torch.save({"model": {}}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="it lacks config"):
        load_checkpoint(tmp_path)


def test_starting_over_sets_an_unfinished_run_aside(tmp_path: Path) -> None:
    state = {"config": {"steps": 5}, "model": {}, "optimizer": {}, "step": 4, "history": {}}
    assert set_aside(tmp_path) is None
    save_checkpoint(tmp_path, state)
    assert set_aside(tmp_path) == tmp_path / "checkpoint.1.pt"
    assert not (tmp_path / "checkpoint.pt").exists()
    (tmp_path / "checkpoint.pt").write_text("somebody else's")
    assert set_aside(tmp_path) == tmp_path / "checkpoint.2.pt"
    save_checkpoint(tmp_path, {**state, "step": 5})
    assert set_aside(tmp_path) is None
    assert (tmp_path / "checkpoint.pt").exists()


def test_config_round_trips_and_refuses_nonsense() -> None:
    assert Config.from_dict(SMALL.to_dict()) == SMALL
    with pytest.raises(ValueError, match="unknown settings in the checkpoint: wings"):
        Config.from_dict({"wings": 2})
    for bad in ({"steps": 0}, {"holdout": 1.0}, {"dropout": -0.1}, {"learning_rate": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            dataclasses.replace(SMALL, **bad)


def test_history_round_trips(tmp_path: Path) -> None:
    trainer = Trainer(SMALL, tmp_path)
    trainer.run(until=1, progress=False)
    assert History.from_dict(trainer.history.to_dict()) == trainer.history


def test_learning_rate_warms_up_and_decays() -> None:
    config = Config(steps=1000, warmup=100, learning_rate=1.0)
    rates = [learning_rate(config, step) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01)
    assert max(rates) == pytest.approx(0.98, abs=0.02)
    assert 0 < rates[-1] < 0.03


def test_held_out_families_are_dropped_from_training() -> None:
    both = load_dataset(dataclasses.replace(SMALL, data=str(TRAIN_SAMPLE.parent)))
    assert both.dropped == ("fn3 (PF00041.20)", "COX2_TM (PF02790.17)", "ArsP_1 (PF03773.15)")
    assert len(both.train) == 10
    assert both.heldout.skipped == 1  # ArsP_1 is longer than the cap
    assert "dropped from training" in both.summary() and "skipped" in both.summary()


def test_a_share_of_the_data_is_held_out_by_family() -> None:
    config = dataclasses.replace(SMALL, data=str(TRAIN_SAMPLE.parent), eval_data=None, holdout=0.3, eval_cap=600)
    dataset = load_dataset(config)
    train, heldout = ({family.key for family in part} for part in (dataset.train, dataset.heldout_families))
    assert (len(train), len(heldout)) == (9, 4)
    assert not train & heldout
    few = load_dataset(dataclasses.replace(config, max_families=4, max_sequences=3))
    assert len(few.train) + len(few.heldout_families) == 4
    assert all(len(family.sequences) <= 3 for family in few.train)


def test_the_demo_runs_from_one_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        assert main(["--steps", "3", "--out", str(tmp_path), "--quiet", *SMALL_FLAGS.split()]) == 0
        text = capsys.readouterr().out
        assert main(["eval", str(tmp_path), "--data", str(HELDOUT_SAMPLE), "--eval-pairs", "2", "--quiet"]) == 0
    finally:
        torch.set_num_threads(threads)
    for words in ("Sinkhorn aligner", "Needleman-Wunsch", "scaled diagonal", "sparse cross-entropy", "fn3", "COX2_TM"):
        assert words in text
    assert "pairs per second" in text
    assert "Needleman-Wunsch" in (tmp_path / "report.txt").read_text()
    for name in ("plan_fn3.png", "plan_COX2_TM.png", "learning.png", "residuals.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    evaluation = capsys.readouterr().out
    assert "4 pairs, 2 skipped for length" in evaluation
    assert "Sinkhorn aligner" in evaluation


def test_plain_errors_end_without_a_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.sto"
    bad.write_text("# STOCKHOLM 1.0\na ACD\n")
    assert main(["train", "--data", str(bad), "--out", str(tmp_path)]) == 1
    assert f"error: {bad}:2: the file ends inside" in capsys.readouterr().err
    assert main(["train", "--data", str(tmp_path / "absent")]) == 1
    assert main(["train", "--resume", str(tmp_path / "absent")]) == 1
    assert "no checkpoint at" in capsys.readouterr().err


def test_ctrl_c_loses_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "examples.pfam", "train", "--steps", "100000", "--save-every", "1"]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path), *SMALL_FLAGS.split()],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 50
    while not (tmp_path / "checkpoint.pt").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=50)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "Sinkhorn aligner" in out and "evaluated at step 0" in out
    assert f"python -m examples.pfam train --resume {tmp_path}" in out
    resumed = Trainer.resume(tmp_path)
    assert resumed.step == len(resumed.history.loss) >= 1
    assert f"stopped at step {resumed.step};" in out
