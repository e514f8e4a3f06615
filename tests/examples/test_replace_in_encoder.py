"""The example that swaps attention inside a trained nn.TransformerEncoder: its data, its checkpoint, a whole run."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from examples.common.start import INTERRUPTED
from examples.replace_in_encoder import cli, data, pretrain, stages
from examples.replace_in_encoder.attention import attention_maps, operators
from examples.replace_in_encoder.data import Split, collate, heldout_crops, load_split, training_batches
from examples.replace_in_encoder.model import CHECKPOINT, LAYERS, FamilyClassifier, load_model
from examples.replace_in_encoder.training import Score, evaluate
from torch_sinkhorn_attn import SinkhornMultiheadAttention, replace_attention, restore_attention

README = Path(cli.__file__).with_name("README.md")
SHORT = ["--epochs=1", "--test-crops=1", "--threads=1", "--quiet"]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The PyTorch API of nested tensors")
        yield


@pytest.fixture(scope="module")
def split() -> Split:
    return load_split()


@pytest.fixture
def model(split: Split) -> FamilyClassifier:
    return load_model(CHECKPOINT, len(split.names)).eval()


def test_no_protein_is_on_both_sides(split: Split) -> None:
    for train, test in zip(split.train, split.test, strict=True):
        assert len(train) >= 2 and len(test) >= 2
        assert not {c.name.split("/")[0] for c in train} & {c.name.split("/")[0] for c in test}
    trained = {bytes(c.residues) for family in split.train for c in family}
    assert not trained & {bytes(c.residues) for family in split.test for c in family}


def test_crops_are_balanced_ragged_and_the_same_every_time(split: Split) -> None:
    crops = heldout_crops(split, 5)
    assert [crop.family for crop in crops] == [f for f in range(len(split.names)) for _ in range(5)]
    for crop in crops:
        assert data.SHORTEST <= len(crop.residues) <= data.LONGEST
        assert any(c.name == crop.name and _inside(crop, c) for c in split.test[crop.family])
    again = heldout_crops(load_split(), 5)
    assert all(a.name == b.name and (a.residues == b.residues).all() for a, b in zip(crops, again, strict=True))
    first, same, other = (next(training_batches(split, 0, epoch)).tokens for epoch in (3, 3, 4))
    assert torch.equal(first, same) and not (first.shape == other.shape and torch.equal(first, other))


def _inside(crop: data.Crop, chain: data.Chain) -> bool:
    return bytes(crop.residues.astype("int8")) in bytes(chain.residues)


def test_padding_is_on_the_right_and_marked(split: Split) -> None:
    crops = heldout_crops(split, 2)
    batch = collate(crops)
    lengths = torch.tensor([1 + len(crop.residues) for crop in crops])
    assert lengths.min() < lengths.max() == batch.tokens.shape[1]
    assert torch.equal(batch.padding, torch.arange(batch.tokens.shape[1]) >= lengths[:, None])
    assert (batch.tokens[:, 0] == data.START).all() and (batch.tokens[batch.padding] == data.PADDING).all()


def test_the_checkpoint_reaches_what_the_readme_says(split: Split, model: FamilyClassifier) -> None:
    assert CHECKPOINT.stat().st_size < 300_000
    assert type(model.encoder) is torch.nn.TransformerEncoder
    said = re.search(r"\| softmax, as trained \| ([\d.]+)[^|]*\| ([\d.]+)", README.read_text())
    assert said is not None
    score = evaluate(model, heldout_crops(split))
    assert score.accuracy == pytest.approx(float(said[1]), abs=0.01)
    assert score.loss == pytest.approx(float(said[2]), abs=0.03)


def test_sinkhorn_runs_in_evaluation_and_softmax_after_restoring(split: Split, model: FamilyClassifier) -> None:
    batch = collate(heldout_crops(split, 1))
    crop = heldout_crops(split, 1)[0]
    assert operators(model, batch) == (LAYERS, 0)
    softmax = attention_maps(model, crop)
    parameters = list(model.parameters())
    stages.swap(model, epsilon=0.5)
    assert all(new is old for new, old in zip(model.parameters(), parameters, strict=True))
    fused, sinkhorn = operators(model, batch)
    assert fused == 0 and sinkhorn >= LAYERS
    modules = [m for m in model.modules() if isinstance(m, SinkhornMultiheadAttention)]
    assert len(modules) == LAYERS and {m.epsilon for m in modules} == {0.5}
    balanced = attention_maps(model, crop)
    n = 1 + len(crop.residues)
    for before, after in zip(softmax, balanced, strict=True):
        assert before.shape == after.shape == (n, n)
        assert before.sum(1) == pytest.approx(1, abs=1e-5)
        assert abs(before.sum(0) - 1).max() > 0.1  # softmax floods some residues
        assert abs(after.sum(0) - 1).max() < 0.02
    restore_attention(model)
    assert operators(model, batch) == (LAYERS, 0)


def test_a_restored_model_is_a_plain_one(split: Split, model: FamilyClassifier) -> None:
    batch = collate(heldout_crops(split, 1))
    untouched = copy.deepcopy(model)
    stages.swap(model, epsilon=1.0)
    with pytest.raises(stages.StageError, match="differ"):
        stages.check_plain(model, batch)
    restore_attention(model)
    stages.check_plain(model, batch)
    with torch.no_grad():
        assert torch.equal(model(*batch[:2]), untouched(*batch[:2]))
    assert model.state_dict().keys() == untouched.state_dict().keys()


@pytest.mark.slow
def test_a_whole_run(
    split: Split, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Score] = []
    states = []

    def watched(model: FamilyClassifier, batch: data.Batch) -> None:
        states.append(copy.deepcopy(model.state_dict()))

    monkeypatch.setattr(data, "EPOCH_CROPS", 16)
    monkeypatch.setattr(stages, "check_plain", watched)
    monkeypatch.setattr(stages, "evaluate", lambda *a: seen.append(evaluate(*a)) or seen[-1])  # type: ignore[func-returns-value]
    out = tmp_path / "run"
    assert cli.main([*SHORT, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    report = (out / "report.txt").read_text()
    assert report.strip().splitlines()[-1] in text
    for name in (
        "softmax, as trained", "Sinkhorn, swapped in", "Sinkhorn, fine-tuned", "softmax again", "control: softmax",
        "for scale",
    ):  # fmt: skip
        assert re.search(rf"^{name}.* 0\.\d{{3}} +\d\.\d{{3}} ", report, re.M), name
    assert "encoder.layers.1.self_attn  replaced" in text and "0 fused softmax layers" in text
    pictures = ["fine_tuning.png", *(f"attention_layer{layer + 1}.png" for layer in range(LAYERS))]
    assert sorted(path.name for path in out.iterdir()) == sorted([*pictures, "report.txt"])
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    assert len({round(score.loss, 4) for score in seen}) == len(seen) == 4  # trained, swapped, restored, uniform
    shipped = torch.load(CHECKPOINT, weights_only=True)
    moved = [not torch.equal(states[0][name], weight) for name, weight in shipped.items()]
    assert all(moved)  # the optimizer of before the swap trained every parameter

    (out / "mine.txt").write_text("kept")
    monkeypatch.setattr(cli, "run", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    assert cli.main([*SHORT, "--out", str(out)]) == INTERRUPTED
    assert (tmp_path / "run-1" / "mine.txt").exists()
    assert capsys.readouterr().err == "stopped\n"


def test_a_swap_that_does_not_happen_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "swap", lambda model, epsilon: "nothing done")
    assert cli.main([*SHORT, "--out", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert err == "error: Sinkhorn, swapped in: 3 layers ran 3 fused softmax, 0 Sinkhorn operators\n"


@pytest.mark.parametrize("checked, message", [(True, "differ"), (False, "3 layers ran 0 fused softmax, 3 Sinkhorn")])
def test_a_restoring_that_does_not_happen_is_an_error(
    checked: bool, message: str, split: Split, model: FamilyClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "EPOCH_CROPS", 1)
    monkeypatch.setattr(stages, "restore_attention", lambda model: ())
    if not checked:
        monkeypatch.setattr(stages, "check_plain", lambda model, batch: None)
    with pytest.raises(stages.StageError, match=message):
        stages.run(model, split, epochs=1, seed=0, epsilon=1.0, progress=False, crops_per_family=1, log=lambda _: None)


def test_weights_made_uniform_are_uniform(split: Split, model: FamilyClassifier) -> None:
    replace_attention(model, epsilon=stages.UNIFORM_EPSILON, base_iters=0, tail_iters=0)
    maps = attention_maps(model, heldout_crops(split, 1)[0])
    assert all(abs(weights * len(weights) - 1).max() < 1e-3 for weights in maps)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--epochs=0"], "--epochs must be at least 1, got 0"),
        (["--seed=-1"], "--seed must be"),
        (["--epsilon=0"], "--epsilon must be above 0"),
        (["--epsilon=nan"], "--epsilon must be above 0"),
        (["--threads=0"], "--threads must be"),
        (["--test-crops=0"], "--test-crops must be"),
        (["--checkpoint=nowhere.pt"], "no checkpoint at nowhere.pt"),
        (["--checkpoint={tmp}/broken.pt"], "damaged"),
        (["--checkpoint={tmp}/other.pt"], "does not hold the weights"),
        (["--checkpoint={tmp}/list.pt"], "does not hold the weights"),
        (["--out={tmp}/broken.pt/x"], "choose another folder"),
    ],
)
def test_what_cannot_work_is_refused_in_a_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.pt").write_bytes(CHECKPOINT.read_bytes()[:5000])
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pt")
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    out = tmp_path / "out"
    given = [argument.format(tmp=tmp_path) for argument in arguments]
    assert cli.main(["--out", str(out), *given]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1
    assert not out.exists()


@pytest.mark.slow
def test_pretraining_writes_what_the_command_reads(
    split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(data, "EPOCH_CROPS", 4)
    path = tmp_path / "new.pt"
    arguments = ["--epochs=1", "--threads=1", "--quiet", "--out", str(path)]
    assert pretrain.main(arguments) == 0
    first = path.read_bytes()
    assert load_model(path, len(split.names)).head.out_features == len(split.names)
    assert pretrain.main(arguments) == 0 and path.read_bytes() == first
    capsys.readouterr()
    monkeypatch.setattr(pretrain, "fit", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    assert pretrain.main(arguments) == 130 and path.read_bytes() == first
    assert pretrain.main([*arguments, "--epochs=0"]) == 1
    assert capsys.readouterr().err == "stopped; nothing was written\nerror: --epochs must be at least 1, got 0\n"
