"""Other people's Sinkhorn, each given the same scores, masses and T + R iterations, and its plan multiplied with V.

All start from zero potentials and do the column half-step first, the row half-step last, so the plan is the same one,
except where the legend says otherwise. None has a window: a band is a dense mask of -inf.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .cases import Case, band, scores_of
from .functions import Function, Outcome, in_torch

INSTALL = "pip install -r benchmarks/requirements.txt"


def sinkformers(case: Case, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Alternating normalisation of K = exp(scores), kept as a matrix in the log domain (Sander, Ablin, Blondel and
    Peyré, Sinkformers, AISTATS 2022, section 3), here columns first: N_R N_C ... N_R N_C K, so that the plan is the
    other functions' plan."""
    log_plan = scores_of(query, key, case.window)
    for _ in range(case.iterations):
        log_plan = log_plan - log_plan.logsumexp(-2, keepdim=True)
        log_plan = log_plan - log_plan.logsumexp(-1, keepdim=True)
    return log_plan.exp() @ value


def pot(case: Case, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """POT's batched log-domain Sinkhorn. It begins with the first side and ends with the second: keys are first here.
    Every tenth iteration it also computes its marginal error, whatever the tolerance."""
    from ot.batch import bregman_log_projection_batch

    scores = scores_of(query, key, case.window).transpose(-1, -2).flatten(0, 1)
    mass = torch.ones_like(scores[..., 0])
    mode = "autodiff" if torch.is_grad_enabled() else "detach"
    result = bregman_log_projection_batch(scores, mass, mass, max_iter=case.iterations, tol=0.0, grad=mode)
    return result["T"].transpose(-1, -2).unflatten(0, query.shape[:2]) @ value


def geomloss(case: Case, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """GeomLoss on a cost matrix: a start, `max_iter` symmetrised iterations under a falling temperature, and a last
    extrapolation, each two half-steps."""
    from geomloss import ot

    cost = -scores_of(query, key, case.window).flatten(0, 1)
    mass = torch.ones_like(cost[..., 0])
    solution = ot.solve_batch(cost, a=mass, b=mass, reg=1.0, max_iter=max(1, case.iterations - 2))
    return solution.plan.unflatten(0, query.shape[:2]) @ value


def ott(implicit: bool) -> Callable[[Case, bool], Callable[[], Outcome]]:
    """`prepare` for OTT-JAX: dense cost, log domain, one compiled function over all heads; compiling is not timed.

    Through the loop, `min_iterations` stays 0 and few inner iterations lie between two looks at the error: where it
    equals `max_iterations`, the backward of ott 0.6.0 reads the potentials that it kept in the wrong order; in between,
    an error that was not computed ends the loop. Potentials alone are kept, which is also the fastest.
    """

    def prepare(case: Case, backward: bool) -> Callable[[], Outcome]:
        import jax
        import jax.numpy as jnp
        from ott.geometry.geometry import Geometry
        from ott.problems.linear.linear_problem import LinearProblem
        from ott.solvers.linear.implicit_differentiation import ImplicitDiff
        from ott.solvers.linear.sinkhorn import Sinkhorn

        most = case.iterations
        implicit_diff, least, inner = (ImplicitDiff(), most, 1) if implicit else (None, 0, 1 + (most % 2 == 0))
        solver = Sinkhorn(
            lse_mode=True, threshold=0.0, inner_iterations=inner, min_iterations=least, max_iterations=most,
            implicit_diff=implicit_diff,
        )  # fmt: skip

        def head(query: Any, key: Any, value: Any) -> Any:
            cost = -(query @ key.T) / query.shape[-1] ** 0.5
            if case.window is not None:
                cost = jnp.where(band(case.length, case.window).numpy(), cost, jnp.inf)
            mass = jnp.ones(case.length)
            geometry = Geometry(cost_matrix=cost, epsilon=1.0)
            solved = solver(LinearProblem(geometry, a=mass, b=mass))
            return geometry.transport_from_potentials(solved.f, solved.g) @ value

        def attention(*inputs: Any) -> Any:  # head by head: half the time and memory of vmap
            flat = (x.reshape(-1, *x.shape[2:]) for x in inputs)
            return jax.lax.map(lambda x: head(*x), tuple(flat)).reshape(case.shape)

        def training(*inputs: Any) -> Any:
            out, pullback = jax.vjp(attention, *inputs)
            return out, pullback(jnp.cos(out))  # of sum(sin(out))

        inputs = [jnp.asarray(x.detach().numpy()) for x in case.inputs()]
        compiled = jax.jit(training if backward else attention).lower(*inputs).compile()

        def first(x: Any) -> Tensor:
            return torch.from_numpy(np.array(x[:1, :1]))

        def run() -> Outcome:
            result = jax.block_until_ready(compiled(*inputs))
            return (first(result[0]), first(result[1][0])) if backward else (first(result), None)

        return run

    return prepare


def rivals(threads: int) -> tuple[list[Function], list[str]]:
    """The rivals that are installed, and a line for each that is not."""
    os.environ["NPROC"] = str(threads)  # how many threads XLA takes; read when JAX starts
    everyone: dict[str, tuple[str, list[Function]]] = {
        "POT": ("ot", [
            Function("POT", "ot.batch.bregman_log_projection_batch, autograd through its loop", in_torch(pot),
                     "unrolled", keeps=True),
        ]),
        "GeomLoss": ("geomloss", [
            Function("GeomLoss", "geomloss.ot.solve_batch: potentials only, no backward of the plan, no band; as many "
                     "half-steps, but symmetrised under a falling temperature: other iterates", in_torch(geomloss),
                     None, masks=False),
        ]),
        "OTT-JAX": ("ott", [
            Function("OTT-JAX", "ott Sinkhorn, jit, implicit gradient, its default; no band: the solve fails",
                     ott(True), "implicit", masks=False),
            Function("OTT unrolled", "the same, differentiated through the loop (recomputed)", ott(False), "unrolled"),
        ]),
    }  # fmt: skip
    found, missing = [], []
    for name, (module, functions) in everyone.items():
        if importlib.util.find_spec(module):
            found += functions
        else:
            missing.append(f"{name} is not installed and is left out: {INSTALL}")
    written_here = "alternate normalisation in the log domain, autograd through it; written here from the paper"
    found.append(Function("Sinkformers", written_here, in_torch(sinkformers), "unrolled", keeps=True))
    return found, missing
