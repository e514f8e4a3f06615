"""The experiment: softmax, swapped, fine-tuned, swapped back; and softmax fine-tuned as long, as the control."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch

from examples.common.tables import table
from torch_sinkhorn_attn import ReplacementReport, replace_attention, restore_attention

from .attention import FloatArray, attention_maps, operators
from .data import TEST_CROPS, Batch, Crop, Split, collate, heldout_crops, training_batches
from .model import FamilyClassifier
from .training import Curve, Score, device_of, evaluate, fit

LEARNING_RATE, WEIGHT_DECAY = 5e-4, 0.05
UNIFORM_EPSILON = 1e6  # softmax of scores / epsilon


class StageError(RuntimeError):
    """A stage did not do what its name says; its numbers would be of something else."""


@dataclass(frozen=True)
class Stage:
    """A row of the table; `trained` are the seconds of the training that led here."""

    name: str
    score: Score
    trained: float | None = None


@dataclass
class Result:
    """What a run found: the stages in order, the two fine-tunings, and maps [layer][n + 1, n + 1] of one test crop."""

    split: Split
    crop: Crop
    stages: list[Stage]
    curves: dict[str, Curve]
    maps: dict[str, list[FloatArray]]

    def table(self) -> str:
        """The table of the stages."""
        rows = [
            [
                stage.name, f"{stage.score.accuracy:.3f}", f"{stage.score.loss:.3f}",
                "" if stage.trained is None else f"{stage.trained:.1f}", f"{stage.score.seconds:.2f}",
            ]
            for stage in self.stages
        ]  # fmt: skip
        return table(["stage", "accuracy", "loss", "training s", "evaluation s"], rows)


def run(
    model: FamilyClassifier,
    split: Split,
    *,
    epochs: int,
    seed: int,
    epsilon: float,
    progress: bool = True,
    crops_per_family: int = TEST_CROPS,
    log: Callable[[str], object] = print,
) -> Result:
    """Run all stages on a trained softmax model, which ends up fine-tuned; `crops_per_family` shrinks the test set.

    Raises:
        StageError: a stage did not run the attention it should have run.
    """
    crops = heldout_crops(split, crops_per_family)
    control, uniform = copy.deepcopy(model), copy.deepcopy(model)
    optimizer = _optimizer(model)  # made before the swap and used after it
    log(f"{split.summary()}; {len(crops)} test crops")
    batch, crop = collate(crops[:8]).to(device_of(model)), _picture_crop(crops)
    result = Result(split, crop, [], {}, {})

    def stage(name: str, curve: Curve | None = None, sinkhorn: bool = False, shown: bool = False) -> None:
        calls, layers = operators(model, batch), len(model.encoder.layers)
        if (calls[0] or calls[1] < layers) if sinkhorn else calls != (layers, 0):
            raise StageError(f"{name}: {layers} layers ran {calls[0]} fused softmax, {calls[1]} Sinkhorn operators")
        score = curve.scores[-1][1] if curve else evaluate(model, crops)
        result.stages.append(Stage(name, score, curve.seconds if curve else None))
        if shown:
            result.maps[name] = attention_maps(model, crop)
        log(f"{name}: accuracy {score.accuracy:.3f}; a batch runs {calls[0]} fused softmax layers, {calls[1]} Sinkhorn")

    def tune(optimizer: torch.optim.Optimizer, before: Stage, text: str) -> Curve:
        steps = epochs * sum(1 for _ in training_batches(split, seed, 0))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        result.curves[text] = fit(
            model, optimizer, split, crops, epochs=epochs, seed=seed, text=text, evaluate_every=2,
            scheduler=scheduler, before=before.score, progress=progress,
        )  # fmt: skip
        return result.curves[text]

    stage("softmax, as trained", shown=True)
    parameters = list(model.parameters())
    log(f"\n{swap(model, epsilon)}\n")
    if any(new is not old for new, old in zip(model.parameters(), parameters, strict=True)):
        raise StageError("the swap replaced a parameter: the optimizer would train the old one")
    stage("Sinkhorn, swapped in", sinkhorn=True, shown=True)
    stage(
        "Sinkhorn, fine-tuned",
        tune(optimizer, result.stages[-1], "fine-tuning with Sinkhorn"),
        sinkhorn=True,
        shown=True,
    )
    log(f"\nrestored {', '.join(restore_attention(model))}")
    check_plain(model, batch)
    stage("softmax again, weights of the line above")
    model = control
    stage(
        "control: softmax, fine-tuned", tune(_optimizer(model), result.stages[0], "fine-tuning with softmax (control)")
    )
    replace_attention(uniform, epsilon=UNIFORM_EPSILON, base_iters=0, tail_iters=0)
    result.stages.append(Stage("for scale: as trained, weights made uniform", evaluate(uniform, crops)))
    return result


def swap(model: FamilyClassifier, epsilon: float) -> ReplacementReport:
    """All attention of the model becomes Sinkhorn attention, in place."""
    return replace_attention(model, epsilon=epsilon)


def check_plain(model: FamilyClassifier, batch: Batch) -> None:
    """After `restore_attention`: the state_dict loads strictly into a new model, which then gives the same logits."""
    fresh = FamilyClassifier(model.head.out_features).to(device_of(model))
    fresh.load_state_dict(model.state_dict(), strict=True)
    with torch.no_grad():
        same = torch.equal(fresh.eval()(*batch[:2]), copy.deepcopy(model).eval()(*batch[:2]))
    if not same:
        raise StageError("the restored model and a new one with its weights differ")


def _optimizer(model: FamilyClassifier) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)


def _picture_crop(crops: list[Crop]) -> Crop:
    """The first of the longest test crops."""
    return max(crops, key=lambda crop: len(crop.residues))
