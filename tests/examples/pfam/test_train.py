"""The run: deterministic, resumed bitwise, interrupted without loss; the command line from end to end."""

from __future__ import annotations

import dataclasses
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.common import files
from examples.common.files import set_aside
from examples.pfam import cli, commands, plots, train
from examples.pfam.checkpoint import load_checkpoint, save_checkpoint
from examples.pfam.cli import main
from examples.pfam.commands.options import command_line
from examples.pfam.config import HELDOUT_SAMPLE, TRAIN_SAMPLE, Config
from examples.pfam.dataset import load_dataset
from examples.pfam.evaluate import Scores
from examples.pfam.profiles import shipped
from examples.pfam.train import History, Trainer, learning_rate

ROOT = Path(__file__).resolve().parents[3]
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


@pytest.mark.slow
def test_resuming_is_bitwise_exact(tmp_path: Path) -> None:
    small = dataclasses.replace(SMALL, hmm_steps=3)
    straight = Trainer(small, tmp_path / "straight")
    assert straight.run(progress=False)
    draws = (torch.rand(1), np.random.rand(), random.random())

    assert Trainer(small, tmp_path / "halves").run(until=5, progress=False)
    torch.rand(7), np.random.rand(3), random.random()  # what else the process draws must not matter
    resumed = Trainer.resume(tmp_path / "halves")
    assert resumed.step == 5
    assert resumed.run(progress=False)

    assert_same_run(straight, resumed)
    assert [step for step, _ in resumed.history.evaluations] == [0, 5, 10]
    assert (torch.rand(1), np.random.rand(), random.random()) == draws


def test_what_taught_the_profiles_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = Trainer(SMALL, tmp_path)
    assert trainer.profiled_on == [list(family) for family in shipped().families]
    trainer.profiled_on = [["cox2_tm", "pf02790"]]
    trainer.save()
    resumed = Trainer.resume(tmp_path)
    assert resumed.profiled_on == [["cox2_tm", "pf02790"]]
    assert Trainer(dataclasses.replace(SMALL, profiles="none"), tmp_path / "none").profiled_on == []
    told = commands.train._profiled(resumed)
    assert "taught by 1 of the held-out families (COX2_TM (PF02790.17)); --profiles none" in told
    assert commands.train._profiled(Trainer(SMALL, tmp_path / "new")) == ""


def test_the_pair_hmm_is_trained_alone_first(tmp_path: Path) -> None:
    trainer = Trainer(dataclasses.replace(SMALL, steps=3, hmm_steps=2, eval_every=0, dropout=0.0), tmp_path)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}

    def changed() -> set[str]:
        now = trainer.model.state_dict().items()
        different = {name for name, value in now if not torch.equal(value, before[name])}
        assert not any(name.startswith("encoder.profile.") for name in different)  # they stay as they are
        return {name.split(".")[0] for name in different}

    assert trainer.run(until=2, progress=False)
    assert changed() == {"encoder", "norm", "runs"}
    assert torch.equal(trainer.model.runs.dustbin, before["runs.dustbin"])
    assert trainer.run(progress=False)
    assert {"first", "second", "dustbin"} <= changed()
    rates = [learning_rate(trainer.config, step) for step in range(3)]
    assert rates[2] == rates[0], "each of the two has its own warm-up"


@pytest.mark.parametrize("setting", [{"hmm_steps": 10}, {"hmm_steps": 2, "gaps": "single"}])
def test_a_pair_hmm_that_is_never_used_is_not_trained(setting: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"--hmm-steps \d+ are the first of --steps 10"):
        dataclasses.replace(SMALL, **setting)


def test_a_run_stopped_during_an_evaluation_makes_up_for_it(tmp_path: Path) -> None:
    trainer = Trainer(SMALL, tmp_path)
    trainer.interrupted = True
    assert not trainer.run(progress=False)
    assert trainer.history.evaluations == []
    resumed = Trainer.resume(tmp_path)
    resumed.run(until=1, progress=False)
    assert [step for step, _ in resumed.history.evaluations] == [0]


def test_evaluations_start_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "EARLY", 1)
    trainer = Trainer(dataclasses.replace(SMALL, eval_every=2), tmp_path)
    trainer.run(until=3, progress=False)
    assert [step for step, _ in trainer.history.evaluations] == [0, 1, 2]


def test_a_failed_save_leaves_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"config": {}, "model": {}, "optimizer": {}, "step": 1, "history": {}}
    save_checkpoint(tmp_path, state)

    def fail(source: object, target: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            save_checkpoint(tmp_path, {**state, "step": 2})
    assert load_checkpoint(tmp_path)["step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_unreadable_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_checkpoint(tmp_path)
    path = tmp_path / "checkpoint.pt"
    torch.save({"model": torch.zeros(1000)}, path)
    for damaged in (b"", b"not a checkpoint", path.read_bytes()[:2000]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError) as error:
            load_checkpoint(tmp_path)
        assert str(error.value) == f"{path} is not a readable checkpoint; it is damaged, or not one"
    torch.save({"model": {}}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="it lacks config"):
        load_checkpoint(tmp_path)


def test_an_earlier_run_is_set_aside_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    assert set_aside(run) is None
    run.mkdir()
    (run / "notes.txt").write_text("not a run's")
    assert set_aside(run) is None
    for number, name in enumerate(("checkpoint.pt", "report.txt"), start=1):
        (run / name).write_text(f"run {number}")
        (run / "plan.png").write_text(f"picture {number}")
        assert set_aside(run) == tmp_path / f"run-{number}"
        assert list(run.iterdir()) == []
        assert (tmp_path / f"run-{number}" / name).read_text() == f"run {number}"
        assert (tmp_path / f"run-{number}" / "plan.png").read_text() == f"picture {number}"
    (run / "report.txt").touch()
    monkeypatch.chdir(run)
    with pytest.raises(OSError, match=r"--out \. holds an earlier run .* \(it is the current folder"):
        set_aside(".")
    assert [path.name for path in run.iterdir()] == ["report.txt"]


def test_config_round_trips_and_refuses_nonsense() -> None:
    assert Config.from_dict(SMALL.to_dict()) == SMALL
    with pytest.raises(ValueError, match="unknown settings in the checkpoint: wings"):
        Config.from_dict({"wings": 2})
    with pytest.raises(ValueError, match="settings that the checkpoint lacks: gaps, steps"):
        Config.from_dict({name: value for name, value in SMALL.to_dict().items() if name not in ("gaps", "steps")})
    with pytest.raises(ValueError, match="are Sinkhorn's: softmax has no masses"):
        Config(attention="softmax", capacity="one")


@pytest.mark.parametrize(
    "option, value, allowed",
    [
        ("--threads", "-1", "at least 1 and at most 1024"),
        ("--threads", "0", "at least 1 and at most 1024"),
        ("--steps", "0", "at least 1"),
        ("--holdout", "1.0", "above 0 and below 1"),
        ("--dropout", "5.0", "at least 0 and below 1"),
        ("--indels", "-1.0", "at least 0 and at most 100"),
        ("--barycentre-weight", "nan", "at least 0"),
        ("--barycentre-weight", "-1.0", "at least 0"),
        ("--max-families", "0", "at least 1"),
        ("--max-sequences", "0", "at least 2"),
        ("--max-sequences", "1", "at least 2"),
        ("--cap", "1", "at least 16"),
        ("--seed", "-1", "at least 0 and at most 4294967295"),
        ("--dropout", "1.0", "at least 0 and below 1"),
        ("--mutation-rate", "-0.1", "at least 0 and below 1"),
        ("--learning-rate", "nan", "above 0 and at most 1"),
        ("--learning-rate", "0.0", "above 0 and at most 1"),
        ("--weight-decay", "inf", "at least 0"),
        ("--warmup", "-1", "at least 0"),
        ("--tail-iters", "-1", "at least 0 and at most 1000"),
        ("--dim", "20", "at least 21 and at most 1024"),
        ("--dim", "100000", "at least 21 and at most 1024"),
        ("--steps", "1" + "0" * 400, "at least 1 and at most 1000000000"),
        ("--batch-cells", "0", "at least 1"),
        ("--batch-cells", "1" + "0" * 19, "at least 1 and at most 1000000000000000000"),
    ],
)
def test_values_out_of_range_are_refused_before_any_work(
    option: str, value: str, allowed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(["train", option, value, "--data", str(tmp_path / "absent"), "--out", str(out)]) == 1
    shown = value if len(value) <= 40 else f"{value[:37]}..."
    assert capsys.readouterr().err == f"error: {option} must be {allowed}, got {shown}\n"
    assert not out.exists()


def test_a_batch_may_be_computed_in_one_part() -> None:
    """As `examples.pfam.aot` and `examples.tpu_vm` have it: as many cells as there are."""
    for cells in (2**40, 128 * 256 * 8192**2):
        assert Config(batch_cells=cells).batch_cells == cells


def test_evaluation_settings_are_checked_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Trainer(SMALL, tmp_path).save()
    assert main(["eval", str(tmp_path), "--pairs", "0"]) == 1
    assert capsys.readouterr().err == "error: --pairs must be at least 1, got 0\n"


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


@pytest.mark.slow
def test_the_demo_runs_from_one_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    threads = torch.get_num_threads()
    try:
        for _ in range(2):
            assert main(["--steps", "3", "--out", str(run), *SMALL_FLAGS.split()]) == 0
        evaluate = ["eval", str(run), "--data", str(HELDOUT_SAMPLE), "--pairs", "2", "--out", str(tmp_path / "scores")]
        assert main([*evaluate, "--cap", "95", "--quiet"]) == 0
    finally:
        torch.set_num_threads(threads)
    text, bars = capsys.readouterr()
    for words in ("Sinkhorn aligner", "Needleman-Wunsch", "scaled diagonal", "sparse cross-entropy", "fn3", "COX2_TM"):
        assert words in text
    assert "pairs per second" in text
    assert f"the earlier run in {run} is now in {run}-1\n" in text
    for stage in ("training", "evaluating", "certifying", "drawing plans", "residuals of the last attention"):
        assert f"{stage}: " in bars
    for folder in (run, tmp_path / "run-1"):
        report = (folder / "report.txt").read_text()
        assert "Needleman-Wunsch" in report
        for shown in (report, text):
            assert (
                shown.index("col residual: the largest") < shown.index("not certified: ") < shown.index("row residual")
            )
        assert load_checkpoint(folder)["step"] == 3
        for name in ("plan_fn3.png", "plan_COX2_TM.png", "learning.png", "residuals.png"):
            assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert "4 pairs, at most 2 a family, 2 skipped" in text


def test_barycentre_errors_are_drawn_on_a_log_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
    names = ("f1", "barycentre", "reconstruction", "sparse cross-entropy")
    scores = Scores(dict.fromkeys(names, 0.5), {})
    levels = dict.fromkeys(("a", "b", "c"), scores)
    plots.plot_learning(History([1.0], [1], [1.0], [(0, scores)]), levels, tmp_path / "learning.png")
    assert [axis.get_yscale() for axis in figures[0].axes] == ["linear", "linear", "linear", "log"]
    plots.plt.close(figures[0])


def test_plain_errors_end_without_a_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.sto"
    bad.write_text("# STOCKHOLM 1.0\na ACD\n")
    out = ["--out", str(tmp_path / "run")]
    assert main(["train", "--data", str(bad), *out]) == 1
    assert f"error: {bad}:2: the file ends inside" in capsys.readouterr().err
    assert main(["train", "--data", str(tmp_path / "absent"), *out]) == 1
    assert main(["train", "--resume", str(tmp_path / "absent")]) == 1
    assert "no checkpoint at" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(commands.train, "Trainer", None)  # calling it would be a TypeError
    file = tmp_path / "file"
    file.touch()
    for out in (file, file / "below"):
        assert main(["train", "--out", str(out)]) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"error: cannot write to --out {out} (") and error.count("\n") == 1

    def full(**options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.tempfile, "TemporaryFile", full)
    assert main(["train", "--out", str(tmp_path)]) == 1
    assert "(No space left on device); choose another folder" in capsys.readouterr().err


def test_an_os_error_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(options: object) -> int:
        raise OSError("disk full")

    monkeypatch.setattr(commands.train, "run", fail)
    assert main([]) == 1
    assert capsys.readouterr().err == "error: disk full\n"


@pytest.mark.parametrize(
    "settings", [["--seed", "0"], ["--steps", "9"], ["--data", "x"], ["--eval-data", "x"], ["--out", "runs/pfam"]]
)
def test_resume_refuses_settings(settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "--resume", str(tmp_path), "--quiet", "--threads", "1", *settings])
    assert stop.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"error: {settings[0]}: --resume goes on with" in last and "leave out --resume" in last


@pytest.mark.slow
def test_resume_goes_on_with_threads_and_quiet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Trainer(dataclasses.replace(SMALL, steps=1), tmp_path).save()
    threads = torch.get_num_threads()
    try:
        assert main(["train", "--resume", str(tmp_path), "--quiet", "--threads", "1"]) == 0
    finally:
        torch.set_num_threads(threads)
    assert f"resuming {tmp_path} at step 0" in capsys.readouterr().out


def test_hints_name_the_interpreter_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv" / "bin" / "python"))
    assert command_line() == ".venv/bin/python -m examples.pfam"
    monkeypatch.setattr(sys, "executable", "/opt/a b/python")
    assert command_line() == "'/opt/a b/python' -m examples.pfam"


@pytest.mark.parametrize("command", ["train", "eval", "download"])
def test_every_option_says_what_it_is(command: str) -> None:
    subparsers = next(action for action in cli._parser()._actions if isinstance(action.choices, dict))
    for action in subparsers.choices[command]._actions:
        assert action.help and "config.py" not in action.help, action.option_strings
        assert action.nargs == 0 or action.metavar == {int: "N", float: "X"}.get(
            action.type,
            "NAME"
            if action.choices
            else {"url": "URL", "exclude": "PREFIX", "programs": "NAMES"}.get(action.dest, "PATH"),
        )
