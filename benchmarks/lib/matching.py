"""SuperGlue's optimal transport by everyone who has it, each in a process of its own that `benchmarks/matching.py` asks
for one call after the other: a line of JSON in, a line out.

    python -m benchmarks.lib.matching FUNCTION CLOCK ITERATIONS THREADS
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .memory import grown
from .superglue import log_optimal_transport

SAMPLE = 64  # entries of the first row that are compared with float64
WARM_UP = 64  # keypoints of the call before the one that is measured


class Given(NamedTuple):
    """Scores `[1, N, N]` of as many keypoints in either image, the bin score, and the partners of the first half; the
    others have none."""

    scores: Tensor
    bin_score: Tensor
    iterations: int

    @property
    def partners(self) -> tuple[Tensor, Tensor]:
        n = self.scores.shape[-1]
        first, rest = torch.arange(n // 2), torch.arange(n // 2, n)
        return torch.cat([first, rest]), torch.cat([first, torch.full_like(rest, n)])


def given(keypoints: int, iterations: int, dtype: torch.dtype, deviation: float = 2.0) -> Given:
    g = torch.Generator().manual_seed(0)
    scores = deviation * torch.randn(1, keypoints, keypoints, generator=g)
    half = torch.arange(keypoints // 2)
    scores[0, half, half] += 4 * deviation
    return Given(scores.to(dtype), torch.tensor(1.0, dtype=dtype), iterations)


Outcome = tuple[list[float], list[float] | None]  # of the first row: the log plan, and the gradient of the loss
Prepare = Callable[[Given, bool], Callable[[], Outcome]]


def loss(log_plan: Tensor, at: Given) -> Tensor:
    """SuperGlue's: minus the log plan at the partners, the dustbin for who has none, on average."""
    rows, cols = at.partners
    return -log_plan[0, rows, cols].mean()


def in_torch(log_plan_of: Callable[[Tensor, Tensor, int], Tensor]) -> Prepare:
    def prepare(at: Given, backward: bool) -> Callable[[], Outcome]:
        def run() -> Outcome:
            leaves = [x.detach().requires_grad_(backward) for x in (at.scores, at.bin_score)]
            with torch.set_grad_enabled(backward):
                log_plan = log_plan_of(*leaves, at.iterations)
                grad = torch.autograd.grad(loss(log_plan, at), leaves)[0][0, 0, :SAMPLE].tolist() if backward else None
            return log_plan[0, 0, :SAMPLE].tolist(), grad

        return run

    return prepare


def ours(scores: Tensor, bin_score: Tensor, iterations: int, **options: Any) -> Tensor:
    """What `replace_superglue` puts in place of the loop."""
    from torch_sinkhorn_attn.integrations.superglue import SuperGlueLoop

    chosen = tuple(sorted(({"gradient": "unrolled"} | options).items()))
    return SuperGlueLoop(chosen, ("scores", "bin_score", "iterations"))(scores, bin_score, iterations)


def transformers(at: Given, backward: bool) -> Callable[[], Outcome]:
    from transformers.models.superglue import modeling_superglue

    return in_torch(modeling_superglue.log_optimal_transport)(at, backward)


def matches(at: Given, backward: bool) -> Callable[[], Outcome]:
    """The partners alone, without the plan."""
    from torch_sinkhorn_attn import Dustbin, sinkhorn_matches  # type: ignore[attr-defined, unused-ignore]

    def run() -> Outcome:
        found = sinkhorn_matches(
            at.scores, dustbin=Dustbin.superglue(at.bin_score), base_iters=at.iterations - 2, tail_iters=2
        )
        assert found is not None
        return [], None

    return run


def bordered(at: Given) -> tuple[Tensor, Tensor, Tensor]:
    """Scores with their dustbins `[N + 1, N + 1]`, and the masses."""
    n = at.scores.shape[-1]
    scores = at.bin_score.expand(n + 1, n + 1).clone()
    scores[:n, :n] = at.scores[0]
    mass = torch.ones(n + 1, dtype=scores.dtype)
    mass[n] = n
    return scores, mass, mass.clone()


def pot(scores: Tensor, bin_score: Tensor, iterations: int) -> Tensor:
    """The logarithm of the plan, for POT's batched solver gives the plan."""
    from ot.batch import bregman_log_projection_batch

    n = scores.shape[-1]
    bins = bin_score.expand(1, n, 1), bin_score.expand(1, 1, n + 1)
    whole = torch.cat([torch.cat([scores, bins[0]], 2), bins[1]], 1)
    mass = torch.ones_like(whole[..., 0])
    mass[..., n] = n
    mode = "autodiff" if torch.is_grad_enabled() else "detach"
    result = bregman_log_projection_batch(whole, mass, mass, max_iter=iterations, tol=0.0, grad=mode)
    log_plan: Tensor = result["T"].log()
    return log_plan


def ott(at: Given, backward: bool, implicit: bool) -> Callable[[], Outcome]:
    """Compiled, which is not timed. It ends on its rows, so it gets the transpose. The settings are those of
    `rivals.ott`, for the same reasons."""
    import jax
    import jax.numpy as jnp
    from ott.geometry.geometry import Geometry
    from ott.problems.linear.linear_problem import LinearProblem
    from ott.solvers.linear.implicit_differentiation import ImplicitDiff
    from ott.solvers.linear.sinkhorn import Sinkhorn

    n, most = at.scores.shape[-1], at.iterations
    implicit_diff, least, inner = (ImplicitDiff(), most, 1) if implicit else (None, 0, 1 + (most % 2 == 0))
    solver = Sinkhorn(
        lse_mode=True, threshold=0.0, inner_iterations=inner, min_iterations=least, max_iterations=most,
        implicit_diff=implicit_diff,
    )  # fmt: skip
    rows, cols = (np.asarray(x) for x in at.partners)
    mass = jnp.ones(n + 1).at[n].set(n)

    def log_plan_of(scores: Any, bin_score: Any) -> Any:
        whole = jnp.pad(scores, ((0, 1), (0, 1)), constant_values=0.0)
        whole = whole.at[n, :].set(bin_score).at[:, n].set(bin_score)
        solved = solver(LinearProblem(Geometry(cost_matrix=-whole.T, epsilon=1.0), a=mass, b=mass))
        return whole + solved.g[:, None] + solved.f[None]

    def training(scores: Any, bin_score: Any) -> Any:
        def total(scores: Any, bin_score: Any) -> Any:
            log_plan = log_plan_of(scores, bin_score)
            return -log_plan[rows, cols].mean(), log_plan

        (_, log_plan), grads = jax.value_and_grad(total, (0, 1), has_aux=True)(scores, bin_score)
        return log_plan, grads[0]

    inputs = jnp.asarray(at.scores[0].numpy()), jnp.asarray(at.bin_score.numpy())
    compiled = jax.jit(training if backward else log_plan_of).lower(*inputs).compile()

    def run() -> Outcome:
        found = jax.block_until_ready(compiled(*inputs))
        log_plan, grad = found if backward else (found, None)
        first = [None if x is None else np.asarray(x[0, :SAMPLE]).tolist() for x in (log_plan, grad)]
        return first[0] or [], first[1]

    return run


class Function(NamedTuple):
    prepare: Prepare
    module: str  # that it needs
    gives: str
    keeps: bool = False  # whether its backward keeps matrices of every iteration
    backward: bool = True


FUNCTIONS = {
    "ours": Function(in_torch(ours), "torch_sinkhorn_attn",
                     "what replace_superglue puts in: every iteration differentiated, as by the loop"),
    "ours, tail": Function(in_torch(partial(ours, gradient="tail")), "torch_sinkhorn_attn",
                           "the last two iterations differentiated, the default of sinkhorn_plan"),
    "ours, implicit": Function(in_torch(partial(ours, gradient="implicit")), "torch_sinkhorn_attn",
                               "the fixed point differentiated"),
    "matches": Function(matches, "torch_sinkhorn_attn.matches", "partners alone, no plan", backward=False),
    "loop": Function(in_torch(log_optimal_transport), "torch", "the loop of the paper, by autograd", keeps=True),
    "transformers": Function(transformers, "transformers", "modeling_superglue.log_optimal_transport", keeps=True),
    "POT": Function(in_torch(pot), "ot", "ot.batch.bregman_log_projection_batch on the bordered scores, and log",
                    keeps=True),
    "OTT-JAX": Function(partial(ott, implicit=True), "ott", "Sinkhorn on the bordered costs, jit, implicit gradient"),
    "OTT unrolled": Function(partial(ott, implicit=False), "ott", "the same, differentiated through the loop"),
}  # fmt: skip


def installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(FUNCTIONS[name].module) is not None
    except ModuleNotFoundError:
        return False


CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


def serve(name: str, clock: str, iterations: int, threads: int) -> None:
    """Each line read names a problem, `{"keypoints", "backward", "dtype"}`, and what its first call took and found is
    the answer; an empty object times the problem before once more."""
    if not installed(name):
        print(json.dumps({"missing": FUNCTIONS[name].module}), flush=True)
        return
    os.environ["NPROC"] = str(threads)
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore")
    prepare, now = FUNCTIONS[name].prepare, CLOCKS[clock]
    run: Callable[[], Outcome] | None = None
    for line in sys.stdin:
        asked, answer = json.loads(line), {}
        if asked:
            run, kind, backward = None, getattr(torch, asked["dtype"]), asked["backward"]
            prepare(given(WARM_UP, min(iterations, 4), kind), backward)()
            run = prepare(given(asked["keypoints"], iterations, kind), backward)
            start = now()
            (log_plan, grad), peak = grown(run)
            answer = {"peak": peak, "log_plan": log_plan, "grad": grad}
        else:
            assert run is not None
            start = now()
            run()
        print(json.dumps({"seconds": now() - start, **answer}), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
