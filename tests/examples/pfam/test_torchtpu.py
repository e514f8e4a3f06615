"""The Pfam example as on a TPU of TorchTPU, with the CPU's tensors and the stand-in for torch_tpu's ops."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch.optim.optimizer import _get_capturable_supported_devices

from examples.pfam.cli import main
from examples.pfam.config import Config
from examples.pfam.device import Device, TpuDevice, on_cpu, open_device
from examples.pfam.train import Trainer

pytest.importorskip("jax")

import torchtpu_standin as standin

CONFIG = Config(
    steps=4, batch_size=2, cap=32, eval_cap=95, eval_pairs=1, eval_every=0, dim=24, dropout=0.0, warmup=2,
    base_iters=2, tail_iters=1, rounds=1, train_rounds=1, gradient="tail",
)  # fmt: skip


class WithoutTpu(TpuDevice):
    """A TPU's way of placing, scoring and learning, on the CPU."""

    name = "cpu"

    def __init__(self) -> None:
        Device.__init__(self)
        self.device = torch.device("cpu")


@pytest.mark.slow
def test_a_run_is_that_of_the_cpu_and_is_traced_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = Trainer(CONFIG, tmp_path / "cpu")
    straight.run(progress=False)
    standin.install(monkeypatch)
    supported = _get_capturable_supported_devices()
    adam = sys.modules["torch.optim.adam"]
    monkeypatch.setattr(adam, "_get_capturable_supported_devices", lambda: [*supported, "cpu"])
    trainer = Trainer(CONFIG, tmp_path / "tpu", device=WithoutTpu())
    before = len(standin.TRACED)
    trainer.run(until=1, progress=False)
    first = len(standin.TRACED)
    assert first > before
    trainer.run(until=3, progress=False)
    assert len(standin.TRACED) == first, "a step that varies in lengths and pairs was traced again"
    trainer.run(progress=False)  # with an evaluation at the end
    torch.testing.assert_close(
        torch.tensor(trainer.history.loss), torch.tensor(straight.history.loss), rtol=2e-4, atol=1e-5
    )
    state = on_cpu(trainer.optimizer.state_dict())
    plain = Device().optimizer(trainer.model.parameters(), 1e-3, 0.0)
    Device().load_optimizer(plain, state)
    assert plain.param_groups[0]["lr"] == 1e-3 and not plain.param_groups[0]["capturable"]


def test_without_a_tpu_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch_tpu" else real(name))
    with pytest.raises(ValueError, match=r"--device tpu needs torch_tpu: pip install .*\[torchtpu\]"):
        open_device("tpu")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name == "torch_tpu" else real(name))
    assert main(["train", "--device", "tpu", "--out", str(tmp_path / "run")]) == 1
    assert capsys.readouterr().err == "error: --device tpu needs a TPU, and torch_tpu sees none on this machine\n"
    with pytest.raises(ValueError, match="--fsdp 2 is for --device xla, not tpu"):
        open_device("tpu", fsdp=2)
