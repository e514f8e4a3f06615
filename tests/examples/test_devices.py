"""`--device cuda` of the small examples, without a GPU: the error where there is none, and that all a step needs is
moved, which tensors on "meta" show, since they mix with no others."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from examples.common.devices import open_device
from examples.digits_vit import cli as digits
from examples.digits_vit.data import load_split
from examples.digits_vit.measure import attention_weights
from examples.digits_vit.model import attentions, build
from examples.digits_vit.settings import Settings
from examples.digits_vit.train import Learner
from examples.replace_in_encoder import cli as encoder
from examples.replace_in_encoder.data import collate, heldout_crops, load_split as load_families
from examples.replace_in_encoder.model import CHECKPOINT, load_model
from examples.replace_in_encoder.stages import swap
from examples.replace_in_encoder.training import device_of

META = torch.device("meta")


@pytest.mark.parametrize("example", [digits, encoder])
def test_without_a_gpu_it_says_so(example, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert example.main(["--device", "cuda", "--out", str(tmp_path / "run")]) == 1
    assert "error: --device cuda needs a GPU, and PyTorch sees none" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert open_device("cpu") == torch.device("cpu")


def test_the_digits_are_moved(monkeypatch) -> None:
    monkeypatch.setattr(torch.Tensor, "item", lambda self: 1.0)  # of the loss, which "meta" does not hold
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: self)
    split = load_split()
    for attention in attentions(Settings(dustbin=True)).values():
        learner = Learner(build(attention, 0), META)
        learner.step(split.train.images[:6], split.train.labels[:6], 1e-3)
        assert learner.history.loss == [1.0]
        assert all(p.device == META for p in learner.model.parameters())
        assert attention_weights(learner, split.test.images[:3]).shape == (2, 3, 4, 17, 17)


def test_the_encoder_is_moved() -> None:
    families = load_families()
    model = load_model(CHECKPOINT, len(families.names)).to(META)
    batch = collate(heldout_crops(families, 1)).to(device_of(model))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The PyTorch API of nested tensors")
        for _ in ("softmax", "Sinkhorn"):
            loss = F.cross_entropy(model.train()(batch.tokens, batch.padding), batch.families)
            loss.backward()
            assert loss.device == META and all(p.grad.device == META for p in model.parameters())
            swap(model, 1.0)
