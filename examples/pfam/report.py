"""What a run ends with: tables, certificates of its attention, pictures."""

from __future__ import annotations

from pathlib import Path

import torch
from tqdm import tqdm

from torch_sinkhorn_attn import certify, sinkhorn_attention

from .checkpoint import REPORT
from .evaluate import align_pairs, score_baselines
from .model import Aligner, AttentionProblem
from .pairs import Pair
from .plots import plot_learning, plot_plan, plot_residuals
from .sampler import collate
from .tables import alignment_table, family_table, plan_table
from .train import Trainer

LEGEND = """certificates of the attention that aligns
col residual: the largest absolute column error, dustbin included (its mass is about the length)
not certified: the active block has zeros or kappa rounds to 1, so no Birkhoff bound exists"""


def write_tables(trainer: Trainer) -> str:
    """The tables of the latest evaluation, also written to ``report.txt``. Costs no forward pass."""
    history = trainer.history
    if not history.evaluations:
        return "no evaluation was finished yet"
    baselines = score_baselines(trainer.dataset.heldout.pairs)
    (_, first), (step, last) = history.evaluations[0], history.evaluations[-1]
    speed = f"{trainer.examples_per_second:.1f} training pairs per second" if history.seconds else "not trained yet"
    text = "\n\n".join(
        [
            f"trained {trainer.step} of {trainer.config.steps} steps ({speed}); evaluated at step {step}",
            alignment_table(baselines, last),
            family_table(baselines, last),
            plan_table(first, last),
        ]
    )
    trainer.folder.mkdir(parents=True, exist_ok=True)
    (trainer.folder / REPORT).write_text(text + "\n")
    return text


def write_pictures(trainer: Trainer, progress: bool = True) -> list[Path]:
    """A plan for each of the first held-out families, the learning curves, the residuals."""
    folder, threshold, model = trainer.folder, trainer.config.decode_threshold, trainer.model_on_cpu
    paths = []
    examples = representative_pairs(trainer.dataset.heldout.pairs)[:3]
    plans = align_pairs(model, examples, batch_size=1)
    for pair, plan in tqdm(plans, "drawing plans", len(examples), leave=False, disable=not progress):
        path = folder / f"plan_{pair.family.split(' ')[0]}.png"
        plot_plan(pair, plan, threshold, path)
        paths.append(path)
    paths += [folder / "learning.png", folder / "residuals.png"]
    plot_learning(trainer.history, score_baselines(trainer.dataset.heldout.pairs), paths[-2])
    iterations = trainer.config.base_iters + trainer.config.tail_iters
    curves = residual_curves(model, examples[0], 3 * iterations, progress)
    plot_residuals(curves, iterations, paths[-1])
    return paths


def write_certificates(trainer: Trainer, progress: bool = True) -> str:
    """``certify`` on the last attention of one pair per held-out family."""
    parts, model = [LEGEND], trainer.model_on_cpu
    pairs = representative_pairs(trainer.dataset.heldout.pairs)[:3]
    for pair in tqdm(pairs, "certifying", leave=False, disable=not progress):
        problem = attention_problems(model, pair)["last attention"]
        certificate = certify(problem.query, problem.key, problem.attn_mask, **problem.options)
        parts.append(f"{pair.family}: {pair.names[0]} x {pair.names[1]}\n{certificate}")
    text = "\n\n".join(parts)
    with open(trainer.folder / REPORT, "a") as file:
        file.write(f"\n{text}\n")
    return text


def representative_pairs(pairs: tuple[Pair, ...]) -> list[Pair]:
    """The first drawn pair of every family."""
    first: dict[str, Pair] = {}
    for pair in pairs:
        first.setdefault(pair.family, pair)
    return list(first.values())


def attention_problems(model: Aligner, pair: Pair) -> dict[str, AttentionProblem]:
    """The first and the last attention of a pair, as the trained model solves them in evaluation."""
    training = model.training
    model.eval()
    with torch.no_grad():
        solved = model.solve(collate([pair]))
    model.train(training)
    return {"first attention": solved[0][0], "last attention": solved[-1][0]}


def residual_curves(
    model: Aligner, pair: Pair, iterations: int, progress: bool = True
) -> dict[str, list[tuple[int, float]]]:
    """Largest column-marginal error after 1, 2, ... iterations: (iterations, error) for each attention."""
    counts = sorted({*range(1, 10), *range(10, iterations + 1, 4)})
    return {
        name: [
            (count, _column_residual(problem, count))
            for count in tqdm(counts, f"residuals of the {name}", leave=False, disable=not progress)
        ]
        for name, problem in attention_problems(model, pair).items()
    }


def _column_residual(problem: AttentionProblem, iterations: int) -> float:
    options = {**problem.options, "base_iters": iterations - 1, "tail_iters": 1}
    value = torch.zeros_like(problem.key[..., :1])
    _, aux = sinkhorn_attention(problem.query, problem.key, value, problem.attn_mask, return_aux=True, **options)
    return float(aux.col_residual.max())
