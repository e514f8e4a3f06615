"""examples/tpu_vm on eight virtual devices: it trains, profiles, stops, goes on, and is read by the CPU."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from marks import FAST

torch = pytest.importorskip("torch")

from examples.pfam.checkpoint import load_checkpoint  # noqa: E402
from examples.pfam.train import Trainer  # noqa: E402
from examples.tpu_vm.cli import main  # noqa: E402

ROOT = Path(__file__).parents[2]
SMALL = "--steps 4 --pairs 1 --length 96 --window 24 --base-iters 2 --tail-iters 1 --dim 24 --eval-every 100 "
SMALL += "--eval-pairs 1 --eval-cap 95 --rounds 1 --quiet"
needs_xla = pytest.mark.skipif(importlib.util.find_spec("torch_xla") is None, reason="needs torch_xla")


def run(folder: Path, *arguments: str) -> str:
    """The output of the script on eight virtual devices; their programs are compiled fast rather than well."""
    environment = {
        **os.environ, "PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "8", "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "2",
        "XLA_FLAGS": FAST,
    }  # fmt: skip
    command = [sys.executable, "-m", "examples.tpu_vm", *SMALL.split(), "--out", str(folder), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.exhaustive
@needs_xla
def test_it_trains_and_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = run(folder, "--until", "2", "--cache", str(tmp_path / "compiled"))
    assert "8 XLA devices (CPU), a mesh of 8 (data) x 1 (fsdp), float32" in first
    assert "steps 0 to 2 in" in first and "Needleman-Wunsch" in first
    assert any((tmp_path / "compiled").iterdir())
    state = load_checkpoint(folder)
    assert state["step"] == len(state["history"]["loss"]) == 2 and "device_rng" in state
    assert all(x.device.type == "cpu" for x in state["model"].values())

    second = run(folder, "--fsdp", "2")
    assert f"resuming {folder} at step 2" in second and "a mesh of 4 (data) x 2 (fsdp)" in second
    assert "steps 2 to 4 in" in second and "trained 4 of 4 steps" in second

    resumed = Trainer.resume(folder)  # by the CPU
    assert resumed.step == 4 and all(math.isfinite(loss) for loss in resumed.history.loss)
    assert all(torch.isfinite(x).all() for x in resumed.model.state_dict().values())


def test_plain_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["--pairs", "0", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "error: --pairs must be at least 1, got 0\n"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["--out", str(tmp_path)]) == 1
    assert "pip install 'torch_sinkhorn_attn[tpu]'" in capsys.readouterr().err
