"""Released aligners: written whole, read back exactly, refused by name when they are something else."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from examples.common import files
from examples.pfam import release
from examples.pfam.checkpoint import load_checkpoint, save_checkpoint
from examples.pfam.cli import main
from examples.pfam.config import HELDOUT_SAMPLE, Config
from examples.pfam.dataset import identities
from examples.pfam.evaluate import align_pairs, score_model
from examples.pfam.model import Aligner
from examples.pfam.pairs import Family, Pair, encode, load_families
from examples.pfam.profiles import shipped as shipped_profiles
from examples.pfam.release import SHIPPED, TrainedAligner, load_aligner, load_release, save_release
from examples.pfam.report import write_tables
from examples.pfam.stockholm import read_stockholm
from examples.pfam.train import Trainer
from examples.pfam.verdict import UNFITTED

TRAINED_ON = (("PF00069", "Pkinase"), ("PF00042", "other_PF00042"), ("full_GATA",))
PROFILED_ON = (("AAA", "PF00004"), ("fn3", "PF00041"))
CONFIG = Config(dim=24, base_iters=7, data="/some/folder/train.sto", eval_data="/some/folder/eval.sto")
PAIR = Pair("F", ("a", "b"), encode("MKVLAWWGHPDE"), encode("MKVLAGHPDE"), np.zeros((0, 2), dtype=np.int64))


@pytest.fixture(scope="module")
def model() -> Aligner:
    torch.manual_seed(0)
    return Aligner(CONFIG)


@pytest.mark.parametrize("name", ["x" * 5000, "x" * 5000 + ".safetensors", "a\0b", "a\0b.safetensors"])
def test_names_that_no_file_has(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"no (checkpoint|released aligner) at"):
        load_aligner(name)


def test_a_release_without_a_verdict_says_so(model: Aligner, tmp_path: Path) -> None:
    path = save_release(model, CONFIG, tmp_path / "a.safetensors")
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    save_file(load_file(path), path, {name: x for name, x in header.items() if name != "verdict"})
    with pytest.warns(UserWarning, match=r"a.safetensors holds no verdict.*release it again with --calibrate"):
        assert load_release(path).verdict == UNFITTED


def test_a_release_gives_the_same_plans(model: Aligner, tmp_path: Path) -> None:
    path = save_release(model, CONFIG, tmp_path / "new" / "aligner.safetensors", TRAINED_ON, profiled_on=PROFILED_ON)
    aligner = load_release(path)
    again, config = aligner.model, aligner.config
    assert aligner.trained_on == TRAINED_ON and aligner.profiled_on == PROFILED_ON
    assert not again.training
    defaults = Config()
    assert config == dataclasses.replace(CONFIG, data=defaults.data, eval_data=defaults.eval_data)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    ((_, expected),), ((_, found),) = (list(align_pairs(m, [PAIR], 1)) for m in (model, again))
    np.testing.assert_array_equal(found, expected)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert b"/some/folder" not in path.read_bytes()


def test_a_release_needs_no_other_file(model: Aligner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_release(model, CONFIG, tmp_path / "a.safetensors")
    monkeypatch.setattr("examples.pfam.profiles.SHIPPED", tmp_path / "absent")
    shipped_profiles.cache_clear()
    opened = release.with_hmms(load_release(path), "fitted", "wide")
    assert torch.equal(opened.model.encoder.profile.window, model.encoder.profile.window)
    with pytest.raises(FileNotFoundError, match="the shipped context profiles, is missing"):
        Aligner(CONFIG)


def test_every_kind_of_checkpoint_opens(model: Aligner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"config": CONFIG.to_dict(), "model": model.state_dict(), "optimizer": {}, "step": 1, "history": {}}
    folder = tmp_path / "run.safetensors"  # a folder may be called anything
    checkpoint = save_checkpoint(folder, state)
    shipped = save_release(model, CONFIG, tmp_path / "shipped.safetensors")
    monkeypatch.setattr(release, "SHIPPED", shipped)
    for path in (folder, str(checkpoint), shipped, None):
        opened = load_aligner(path)
        assert not opened.model.training and opened.config.base_iters == 7
        assert torch.equal(opened.model.encoder.embedding.weight, model.encoder.embedding.weight)
        assert opened.trained_on == opened.profiled_on == ()  # not recorded in such files
    shipped.unlink()
    with pytest.raises(FileNotFoundError, match="the shipped aligner, is missing; give another with --checkpoint"):
        load_aligner()
    with pytest.raises(FileNotFoundError, match="no released aligner at"):
        load_aligner(shipped)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_aligner(tmp_path / "absent")


def test_what_is_not_a_release_is_refused(model: Aligner, tmp_path: Path) -> None:
    path = save_release(model, CONFIG, tmp_path / "a.safetensors")
    whole, weights = path.read_bytes(), load_file(path)
    settings = json.dumps(Config(dim=24).to_dict())

    def changed(dim: int) -> str:
        return json.dumps({**Config().to_dict(), "dim": dim})

    for damaged in (b"", b"something else", whole[:1000], whole[:-1]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{path} is not a readable safetensors file; it is damaged, or not one"):
            load_release(path)
    for header, message in (
        (None, "is not a release of this version of the aligner: 'no format'"),
        ({"format": "pt"}, "is not a release of this version of the aligner: 'pt'"),
        ({"format": release._FORMAT}, "is damaged: its settings or its training families are not JSON"),
        ({"format": release._FORMAT, "config": settings, "trained_on": "["}, "its training families are not JSON"),
        ({"format": release._FORMAT, "config": settings, "trained_on": "7"}, "families are not lists of names"),
        ({"format": release._FORMAT, "config": settings, "trained_on": '["fn3"]'}, "families are not lists of names"),
        ({"format": release._FORMAT, "config": "[]"}, "another version"),
        ({"format": release._FORMAT, "config": '{"wings": 2}'}, r"another version .* \(unknown settings .* wings"),
        ({"format": release._FORMAT, "config": '{"dim": "a"}'}, "another version"),
        (
            {"format": release._FORMAT, "config": changed(3)},
            r"another version .*\(--dim must be at least 21 and at most 1024, got 3",
        ),
        ({"format": release._FORMAT, "config": changed(25)}, "do not fit the model of its settings .*size mismatch"),
    ):
        save_file(weights, path, header)
        with pytest.raises(ValueError, match=message):
            load_release(path)
    save_file({"x": torch.zeros(2)}, path, {"format": release._FORMAT, "config": settings})
    with pytest.raises(ValueError, match="do not fit the model of its settings"):
        load_release(path)
    with pytest.raises(ValueError, match="is not a readable checkpoint"):
        load_aligner(path.rename(tmp_path / "checkpoint.pt"))


ABSURD = {
    "dim": [10**9, 10**400, 24.0, True, None, [24], "24", float("nan"), float("inf"), -1],
    "hidden": [10**9],
    "heads": [10**9, 0],
    "base_iters": [10**9, -1, 1e3],
    "tail_iters": [10**9],
    "rounds": [10**9, 0],
    "train_rounds": [10**9],
    "window": [10**12, -1],
    "dropout": [float("nan"), 2, "0"],
    "relaxation": [float("inf"), "much"],
    "attention": ["\x1b[31mhard", None, ["sinkhorn"]],
    "gradient": [7],
}


@pytest.mark.parametrize("name", ABSURD)
def test_absurd_settings_are_refused_before_anything_is_built(
    name: str, model: Aligner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, weights = tmp_path / "a.safetensors", dict(model.state_dict())
    monkeypatch.setattr(release, "Aligner", None)  # calling it would be a TypeError
    for value in ABSURD[name]:
        settings = json.dumps({**CONFIG.to_dict(), name: value})
        save_file(weights, path, {"format": release._FORMAT, "config": settings})
        with pytest.raises(ValueError, match="was written by another version of this example"):
            load_release(path)
        assert main(["align", "MKV", "MRV", "--checkpoint", str(path), "--out", str(tmp_path / "out")]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and "\x1b" not in error and len(error) < 500


@pytest.mark.parametrize("settings", ["null", "5", "[]", '"x"'])
def test_settings_that_are_no_settings_are_told_so(settings: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.zeros(2)}, path, {"format": release._FORMAT, "config": settings})
    with pytest.raises(ValueError, match="settings must be values by their names"):
        load_release(path)


def test_weights_are_those_of_the_settings_and_finite(model: Aligner, tmp_path: Path) -> None:
    path, settings = tmp_path / "a.safetensors", json.dumps(CONFIG.to_dict())
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = next(iter(weights))

    def refused(changed: dict[str, torch.Tensor], message: str, **header: str) -> None:
        save_file(changed, path, {"format": release._FORMAT, "config": settings, **header})
        with pytest.raises(ValueError, match=message):
            load_release(path)

    refused({name: tensor for name, tensor in weights.items() if name != first}, f"{first} is missing")
    refused({**weights, "more\x1b": torch.zeros(1)}, r"unknown weight more\\x1b")
    refused({**weights, first: weights[first][:-1].contiguous()}, f"size mismatch of {first}")
    for dtype in (torch.float64, torch.bfloat16, torch.int8, torch.bool):
        refused({**weights, first: weights[first].to(dtype)}, f"type mismatch of {first}")
    for value in (math.nan, math.inf):
        broken = weights[first].clone()
        broken.view(-1)[3] = value
        refused({**weights, first: broken}, f"are not finite, as of a run that diverged: {first}")
    refused(weights, "training families are not lists of names", trained_on="[[1]]")
    refused(weights, "training families are not JSON", trained_on="[" * 100_000)
    refused(weights, "training families are not lists of names", profiled_on='[["AAA"], 4]')
    save_file(weights, path, {"format": "\x1b" * 500})
    with pytest.raises(
        ValueError, match=r"is not a release of this version of the aligner: '(\\x1b)+\.\.\.' is not"
    ) as error:
        load_release(path)
    assert len(str(error.value)) < 500
    path.write_bytes((2**62).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match="is not a readable safetensors file"):
        load_release(path)


def test_a_release_names_no_file_to_read(model: Aligner, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    settings = json.dumps({**CONFIG.to_dict(), "data": "/dev/zero", "eval_data": "/dev/zero"})
    save_file(dict(model.state_dict()), path, {"format": release._FORMAT, "config": settings})
    config = load_release(path).config
    assert (config.data, config.eval_data) == (Config().data, Config().eval_data)


def test_weights_that_make_no_plan_are_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for attention in ("sinkhorn", "softmax"):
        config = dataclasses.replace(CONFIG, attention=attention)
        huge = Aligner(config)
        with torch.no_grad():
            for weight in huge.parameters():
                weight.fill_(3e38)
        path = save_release(huge, config, tmp_path / "a.safetensors")
        assert main(["align", "MKVLA", "MRVLA", "--checkpoint", str(path), "--out", str(tmp_path / "out")]) == 1
        assert capsys.readouterr().err == (
            "error: the aligner's plan of sequence_1 and sequence_2 is not finite: its weights are those of a run that "
            "diverged\n"
        )


@pytest.mark.parametrize(
    "change",
    [
        {"config": []},
        {"config": {"dim": 24}},
        {"model": {}},
        {"model": 7},
        {"history": {}},
        {"optimizer": {}},
        {"rng": 1},
    ],
)
def test_a_damaged_checkpoint_is_refused_in_a_sentence(
    change: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Config(dim=24, eval_pairs=1, eval_cap=95)
    Trainer(config, tmp_path).save()
    state = {**load_checkpoint(tmp_path), **change}
    torch.save(state, tmp_path / "checkpoint.pt")
    assert main(["train", "--resume", str(tmp_path), "--quiet"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: the checkpoint in {tmp_path} is damaged, or of another version (")
    assert error.count("\n") == 1
    if not {"config", "model"} & set(change):
        return
    assert main(["release", str(tmp_path), "--out", str(tmp_path / "a.safetensors")]) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_what_cannot_be_released(model: Aligner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"is known by its suffix \.safetensors; .*a\.pt has another"):
        save_release(model, CONFIG, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="do not fit the model of its settings"):
        save_release(model, Config(dim=32), tmp_path / "a.safetensors")
    broken = Aligner(CONFIG)
    torch.nn.init.constant_(broken.encoder.embedding.weight, float("nan"))
    with pytest.raises(ValueError, match=r"not finite cannot be released: encoder\.embedding\.weight"):
        save_release(broken, CONFIG, tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []

    path = save_release(model, CONFIG, tmp_path / "a.safetensors")
    before = path.read_bytes()

    def fail(source: object, target: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_release(Aligner(CONFIG), CONFIG, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_the_command_keeps_what_exists(model: Aligner, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = {"config": CONFIG.to_dict(), "model": model.state_dict(), "optimizer": {}, "step": 1, "history": {}}
    taught = {"trained_on": TRAINED_ON, "profiled_on": PROFILED_ON}
    save_checkpoint(tmp_path, {**state, **{name: [list(family) for family in known] for name, known in taught.items()}})
    out = tmp_path / "a.safetensors"
    assert main(["release", str(tmp_path), "--out", str(out)]) == 0
    assert capsys.readouterr().out.startswith(f"wrote {out}, 0.")
    assert load_aligner(out).trained_on == TRAINED_ON and load_aligner(out).profiled_on == PROFILED_ON
    assert main(["release", str(tmp_path), "--out", str(out)]) == 1
    assert capsys.readouterr().err == f"error: --out {out} exists; remove it first, or choose another name\n"
    assert main(["release", str(tmp_path), "--out", str(tmp_path / "a")]) == 1
    assert "is known by its suffix" in capsys.readouterr().err


def test_a_family_is_known_by_its_name_and_its_accession_wherever_that_stands(model: Aligner) -> None:
    assert identities(Family("fn3", "PF00041.20", ())) == {"fn3", "pf00041"}
    assert identities(Family("other_PF00041", "", ())) == {"other_pf00041", "pf00041"}
    assert identities(Family("PF00041_full.2", "TIGR00001.3", ())) == {"pf00041_full.2", "pf00041", "tigr00001"}
    for name in ("XPF00041", "PF000411", "PF0004"):
        assert identities(Family(name, "", ())) == {name.lower()}
    families = [Family(*names, ()) for names in (("fn3", "PF00041.1"), ("Globin", "PF00042.9"), ("full_GATA", ""))]
    assert TrainedAligner(model, CONFIG, TRAINED_ON).seen(families) == ["Globin (PF00042.9)", "full_GATA"]
    assert TrainedAligner(model, CONFIG).seen(families) == []


def test_a_checkpoint_records_what_it_was_trained_on(tmp_path: Path) -> None:
    trainer = Trainer(Config(dim=24), tmp_path)
    trainer.save()
    trained_on = load_aligner(tmp_path).trained_on
    assert len(trained_on) == len(trainer.dataset.train)
    assert ("pf00069", "pkinase") in trained_on and trained_on == tuple(sorted(trained_on))
    assert load_aligner(tmp_path).profiled_on == shipped_profiles().families


@pytest.fixture
def finished(tmp_path: Path) -> Trainer:
    """A run on the shipped sample at its last step, evaluated on one pair of each of two families."""
    config = Config(steps=1, batch_size=2, cap=32, eval_cap=95, eval_pairs=1, eval_every=0, dim=24)
    trainer = Trainer(config, tmp_path / "run")
    trainer.run(progress=False)
    return trainer


def test_a_finished_run_is_shown_beside_the_shipped_aligner(
    model: Aligner, finished: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(release, "SHIPPED", tmp_path / "shipped.safetensors")
    row = "shipped aligner (3 families)"
    assert "shipped" not in write_tables(finished, progress=False)
    save_release(model, CONFIG, release.SHIPPED, TRAINED_ON)
    text = write_tables(finished, progress=False)
    headline, families, *_ = text.split("\n\n")[1:]
    assert headline.splitlines()[-1].startswith(row) and "shipped" not in families
    expected = score_model(model, finished.dataset.heldout.pairs, progress=False).macro["barycentre"]
    assert headline.endswith(f" {expected:.3f}")
    assert row in (finished.folder / "report.txt").read_text()

    settings = finished.config
    for other in ({"data": str(HELDOUT_SAMPLE)}, {"eval_data": None}, {"steps": 2}):
        finished.config = dataclasses.replace(settings, **other)
        assert "shipped" not in write_tables(finished, progress=False), other
    finished.config = settings
    for trained_on in ((), (*TRAINED_ON, ("PF02790", "anything"))):
        save_release(model, CONFIG, release.SHIPPED, trained_on)
        assert "shipped" not in write_tables(finished, progress=False), trained_on
    save_release(model, CONFIG, release.SHIPPED, TRAINED_ON, profiled_on=[("PF02790", "anything")])
    assert "shipped" not in write_tables(finished, progress=False)


def test_the_shipped_aligner_is_small_and_has_not_seen_the_shipped_held_out_families() -> None:
    assert SHIPPED.stat().st_size < 5e6
    shipped = load_aligner()
    assert all(torch.isfinite(tensor).all() for tensor in shipped.model.state_dict().values())
    ((_, plan),) = align_pairs(shipped.model, [PAIR], 1)
    np.testing.assert_allclose(plan[:-1].sum(axis=1), 1.0, atol=1e-3)
    heldout = load_families(read_stockholm(HELDOUT_SAMPLE))
    assert {family.accession.split(".")[0] for family in heldout} == {"PF00041", "PF02790", "PF03773"}
    assert shipped.trained_on and shipped.seen(heldout) == []
    assert len(shipped.profiled_on) > 2000 and shipped.profiled(heldout) == []
