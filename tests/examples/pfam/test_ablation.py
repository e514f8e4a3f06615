"""Ablations: what is trained, what is read again, the table."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path

import pytest
import torch

from examples.pfam import ablation
from examples.pfam.ablation import VARIANTS, ablate, ablation_table
from examples.pfam.cli import main
from examples.pfam.config import Config
from examples.pfam.train import Trainer

TINY = Config(steps=1, batch_size=2, cap=24, dim=24, eval_pairs=1, eval_cap=95, eval_every=0, base_iters=2)
NAMES = ["Sinkhorn", "softmax"]


@pytest.mark.slow
def test_runs_are_trained_once(tmp_path: Path) -> None:
    found = ablate(TINY, NAMES, seeds=2, folder=tmp_path, jobs=1, progress=False)
    assert list(found) == NAMES and all(len(runs) == 2 for runs in found.values())
    files = sorted(tmp_path.glob("*/result.json"))
    held = [json.loads(file.read_text()) for file in files]
    assert [(h["config"]["attention"], h["config"]["seed"]) for h in held] == [
        ("sinkhorn", 0), ("sinkhorn", 1), ("softmax", 0), ("softmax", 1),
    ]  # fmt: skip
    assert found["softmax"][1] == held[3]["figures"]
    assert all(0 <= run["F1, mutual"] <= 1 and run["pairs/s"] > 0 for runs in found.values() for run in runs)

    held[0]["figures"]["F1, mutual"] = 0.123  # read, not trained again
    files[0].write_text(json.dumps(held[0]))
    held[1]["config"]["steps"] = 2  # of another ablation: trained again
    held[1]["figures"]["F1, mutual"] = 0.456
    files[1].write_text(json.dumps(held[1]))
    again = ablate(TINY, NAMES, seeds=2, folder=tmp_path, jobs=1, progress=False)
    assert again["Sinkhorn"][0]["F1, mutual"] == 0.123
    assert again["Sinkhorn"][1]["F1, mutual"] != 0.456


def test_variants_are_settings() -> None:
    for changes in VARIANTS.values():
        Config(**changes)
    assert VARIANTS["Sinkhorn"] == {}
    with pytest.raises(ValueError, match="no variant is named Sinkhoff; choose from Sinkhorn, softmax"):
        ablate(TINY, ["Sinkhoff"], 1, Path("nowhere"), 1)


def test_table() -> None:
    seeds = [{"F1": 0.80, "pairs/s": 20.0}, {"F1": 0.82, "pairs/s": 22.0}]
    runs = {"Sinkhorn": seeds, "b": [{"F1": 0.5, "pairs/s": 9.0}], "c": [{"F1": 0.5, "pairs/s": 9.0}, {}]}
    rows = [line.split() for line in ablation_table(runs).splitlines()[2:]]
    assert rows[0] == ["Sinkhorn", "0.810", "(0.020)", "21.0", "(2.0)"]
    assert rows[1] == ["b", "0.500", "(0.000)", "9.000", "(0.000)"]
    assert rows[2] == ["c", "diverged", "diverged"]


@pytest.mark.slow
def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = ["--steps", "1", "--batch-size", "2", "--cap", "24", "--dim", "24", "--eval-pairs", "1", "--eval-cap", "95"]
    assert main(["ablate", "--variants", "T = 10", "--seeds", "1", "--out", str(tmp_path), "--quiet", *tiny]) == 0
    assert "T = 10" in capsys.readouterr().out
    assert "T = 10" in (tmp_path / "report.txt").read_text()
    assert main(["ablate", "--seeds", "0", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("error: --seeds must be at least 1 and at most 100, got 0")


def test_a_gradient_that_is_not_finite_ends_the_run_and_the_ablation_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.nn.utils.clip_grad_norm_", lambda parameters, most: torch.tensor(math.nan))
    with pytest.raises(FloatingPointError, match="the gradient's norm is nan at step 0; lower --learning-rate"):
        Trainer(TINY, tmp_path / "alone").run(progress=False)
    assert ablation._run(TINY, tmp_path / "one of many") == {}


def test_half_a_run_has_no_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "run", lambda trainer, progress: False)  # stopped by Ctrl-C
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        ablation._run(TINY, tmp_path)
    assert list(tmp_path.iterdir()) == [] and signal.getsignal(signal.SIGINT) is handler
    (tmp_path / "result.json").write_text("damaged")
    with pytest.raises(KeyboardInterrupt):  # a file that is no record of ours is no reason to stop
        ablation._run(TINY, tmp_path)
