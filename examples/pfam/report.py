"""What a run ends with: tables, certificates of its attention, pictures."""

from __future__ import annotations

from pathlib import Path

import torch
from tqdm import tqdm

from examples.common.files import REPORT, replace_text
from examples.common.text import file_stems
from torch_sinkhorn_attn import certify, sinkhorn_attention

from .attentions import AttentionProblem
from .calibration import solved_attentions
from .config import Config
from .evaluate import Scores, align_pairs, score_baselines, score_model
from .model import Aligner
from .pairs import Pair
from .plots import plot_learning, plot_plan, plot_residuals
from .release import load_aligner
from .tables import aligner_name, alignment_table, family_table, plan_table
from .train import Trainer

LEGEND = """certificates of the attention that aligns
col residual: the largest absolute column error, dustbin included (its mass is about the length)
not certified: the active block has zeros or kappa rounds to 1, so no Birkhoff bound exists"""


def write_tables(trainer: Trainer, progress: bool = True) -> str:
    """The tables of the latest evaluation, also written to ``report.txt``.

    Only the shipped aligner, which a finished run on the shipped sample is shown beside, costs forward passes.
    """
    history = trainer.history
    if not history.evaluations:
        return "no evaluation was finished yet"
    baselines = score_baselines(trainer.dataset.heldout.pairs)
    (start, first), (step, last) = history.evaluations[0], history.evaluations[-1]
    scores = {**baselines, aligner_name(trainer.config): last}
    speed = f"{trainer.examples_per_second:.1f} training pairs per second" if history.seconds else "not trained yet"
    text = "\n\n".join(
        [
            f"trained {trainer.step} of {trainer.config.steps} steps ({speed}); evaluated at step {step}",
            alignment_table({**scores, **_shipped_scores(trainer, progress)}),
            family_table(scores),
            plan_table(first, last, start),
        ]
    )
    replace_text(trainer.folder / REPORT, text + "\n")
    return text


def _shipped_scores(trainer: Trainer, progress: bool) -> dict[str, Scores]:
    """The shipped aligner on the run's held-out pairs; nothing where it is missing or was, or may be, trained on them.

    Nothing either for a run on other data, or one that is not finished.
    """
    config, sample = trainer.config, Config()
    if trainer.step < config.steps or (config.data, config.eval_data) != (sample.data, sample.eval_data):
        return {}
    try:
        shipped = load_aligner()
    except FileNotFoundError:
        return {}
    families = trainer.dataset.heldout_families
    if not shipped.trained_on or shipped.seen(families) or shipped.profiled(families):
        return {}
    name = f"shipped aligner ({len(shipped.trained_on)} families)"
    return {name: score_model(shipped.model, trainer.dataset.heldout.pairs, progress=progress)}


def write_pictures(trainer: Trainer, progress: bool = True) -> list[Path]:
    """A plan for each of the first held-out families, the learning curves, the residuals of transport plans."""
    folder, model = trainer.folder, trainer.model_on_cpu
    paths = []
    examples = representative_pairs(trainer.dataset.heldout.pairs)[:3]
    plans = align_pairs(model, examples, batch_size=1)
    stems = dict(zip((pair.family for pair in examples), _plan_stems(examples), strict=True))
    for pair, plan in tqdm(plans, "drawing plans", len(examples), leave=False, disable=not progress):
        path = folder / f"plan_{stems[pair.family]}.png"
        plot_plan(pair, plan, path)
        paths.append(path)
    paths.append(folder / "learning.png")
    plot_learning(trainer.history, score_baselines(trainer.dataset.heldout.pairs), paths[-1])
    if trainer.config.attention != "sinkhorn":
        return paths
    paths.append(folder / "residuals.png")
    iterations = trainer.config.base_iters + trainer.config.tail_iters
    curves = residual_curves(model, examples[0], 3 * iterations, progress)
    plot_residuals(curves, iterations, paths[-1])
    return paths


def write_certificates(trainer: Trainer, progress: bool = True) -> str:
    """``certify`` on the last attention of one pair per held-out family; only transport plans have certificates."""
    if trainer.config.attention != "sinkhorn":
        return f"no certificates: {trainer.config.attention} attention makes no transport plan"
    parts, model = [LEGEND], trainer.model_on_cpu
    pairs = representative_pairs(trainer.dataset.heldout.pairs)[:3]
    for pair in tqdm(pairs, "certifying", leave=False, disable=not progress):
        problem = attention_problems(model, pair)["last attention"]
        certificate = certify(problem.query, problem.key, problem.attn_mask, **problem.options)
        parts.append(f"{pair.family}: {pair.names[0]} x {pair.names[1]}\n{certificate}")
    text = "\n\n".join(parts)
    with open(trainer.folder / REPORT, "a", encoding="utf-8") as file:
        file.write(f"\n{text}\n")
    return text


def _plan_stems(pairs: list[Pair]) -> list[str]:
    """Of the pictures' names: the family without its accession, unless two are called so."""
    short = [pair.family.split(" ")[0] for pair in pairs]
    return file_stems(short if len(set(short)) == len(short) else [pair.family for pair in pairs])


def representative_pairs(pairs: tuple[Pair, ...]) -> list[Pair]:
    """The first drawn pair of every family."""
    first: dict[str, Pair] = {}
    for pair in pairs:
        first.setdefault(pair.family, pair)
    return list(first.values())


def attention_problems(model: Aligner, pair: Pair) -> dict[str, AttentionProblem]:
    """The first and the last attention of a pair, as the trained model solves them in evaluation."""
    solved = solved_attentions(model, [pair])
    return {"first attention": solved[0], "last attention": solved[-1]}


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
