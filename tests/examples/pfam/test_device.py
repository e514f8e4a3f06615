"""Precision, and what a GPU is given, without one; the log for TensorBoard."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from examples.pfam import tensorboard_log
from examples.pfam.cli import main
from examples.pfam.config import Config
from examples.pfam.dataset import load_dataset
from examples.pfam.device import CudaDevice, Device, open_device
from examples.pfam.model import Aligner
from examples.pfam.sampler import Batch, PairSampler
from examples.pfam.tensorboard_log import TensorBoardLog
from examples.pfam.train import Trainer

CONFIG = Config(
    steps=6, batch_size=3, cap=48, eval_pairs=1, eval_cap=95, eval_every=3, dim=24, dropout=0.0, base_iters=4
)  # fmt: skip


@pytest.fixture(scope="module")
def batch() -> Batch:
    families = load_dataset(CONFIG).train
    return PairSampler(families, size=3, cells=2**40, cap=48, mutation_rate=0.1, indels=0.5, seed=0).batch(0)


def gradients(model: Aligner, device: Device, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The losses and the gradient of one step."""
    placed = device.place(batch, 3, 48, learning=True)
    with device.precision():
        output = model(placed.batch)
    output = output._replace(first=output.first.float(), last=output.last.float())
    loss, shown = device.losses(output, placed, 0.15)
    model.zero_grad()
    loss.backward()
    return loss.detach(), shown, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_bfloat16_is_near_float32(batch: Batch) -> None:
    model = Aligner(CONFIG)
    exact, rounded = (gradients(model, open_device("cpu", precision=name), batch) for name in ("float32", "bfloat16"))
    for a, b in zip(exact[:2], rounded[:2], strict=True):
        assert a != b and abs(a - b) < 0.05 * a
    assert torch.cosine_similarity(exact[2], rounded[2], dim=0) > 0.9
    assert open_device("cpu").describe() == "" and Device("bfloat16").describe() == "CPU, bfloat16"


def test_a_run_in_bfloat16_learns_in_float32(tmp_path: Path) -> None:
    trainer = Trainer(CONFIG, tmp_path, device=Device("bfloat16"))
    assert trainer.run(until=2, progress=False)
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())
    assert len(trainer.history.loss) == 2


class WithoutGpu(CudaDevice):
    """The GPU's way of placing and scoring batches, on the CPU."""

    def __init__(self) -> None:
        self.device, self.precision_name = torch.device("cpu"), "float32"

    name = "cpu"


@pytest.mark.slow
def test_a_gpu_computes_the_same_from_tensors(batch: Batch, tmp_path: Path) -> None:
    model, device = Aligner(CONFIG), WithoutGpu()
    placed = device.place(batch, 3, 48, learning=True)
    assert placed.batch.query.shape == placed.batch.key.shape and placed.known is not None
    for found, expected in zip(gradients(model, device, batch), gradients(model, Device(), batch), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    losses = []
    for device in (WithoutGpu(), Device()):
        trainer = Trainer(CONFIG, tmp_path, device=device)
        trainer.run(until=4, progress=False)
        losses.append(torch.tensor(trainer.history.loss))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)


def test_without_a_gpu_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["train", "--device", "cuda", "--out", str(tmp_path / "run")]) == 1
    assert capsys.readouterr().err == "error: --device cuda needs 1 GPU(s) on this machine, PyTorch sees 0\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_resumed_log_has_every_step_once(tmp_path: Path) -> None:
    run = tmp_path / "run"
    trainer = Trainer(CONFIG, run, tensorboard=True)
    trainer.run(until=2, progress=False)
    shutil.copy(run / "checkpoint.pt", tmp_path)
    trainer.run(until=5, progress=False)
    shutil.copy(tmp_path / "checkpoint.pt", run)  # as if it had crashed before its next checkpoint
    resumed = Trainer.resume(run, tensorboard=True)
    assert resumed.step == 2
    resumed.run(progress=False)

    log = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    log.Reload()
    assert [event.step for event in log.Scalars("training/loss")] == list(range(6))
    values = [event.value for event in log.Scalars("training/loss")]
    torch.testing.assert_close(torch.tensor(values), torch.tensor(resumed.history.loss))
    paddings = [event.value for event in log.Scalars("training/padding")]
    torch.testing.assert_close(torch.tensor(paddings), torch.tensor(resumed.history.padding))
    for name in ("objective", "learning rate", "pairs per second", "epoch"):
        assert len(log.Scalars(f"training/{name}")) == 6
    assert [event.step for event in log.Scalars("held out/f1")] == [0, 3, 6]
    pictures = log.Images("plan")
    assert [event.step for event in pictures] == [0, 3, 6]
    assert pictures[0].encoded_image_string.startswith(b"\x89PNG")


def test_nothing_is_logged_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Trainer(dataclasses.replace(CONFIG, steps=1, eval_every=0), tmp_path).run(progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="pip install tensorboard, or --no-tensorboard"):
        TensorBoardLog(tmp_path, 0)
    assert not (tmp_path / tensorboard_log.FOLDER).exists()


def test_a_run_goes_on_in_its_precision(tmp_path: Path) -> None:
    Trainer(Config(dim=24), tmp_path, device=open_device("cpu", precision="bfloat16")).save()
    with pytest.raises(ValueError, match="layers in bfloat16; go on with --precision bfloat16, not float32"):
        Trainer.resume(tmp_path)
    assert Trainer.resume(tmp_path, open_device("cpu", precision="bfloat16")).step == 0
