"""A word, once, where a call's plan is not balanced in any useful sense."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from torch_sinkhorn_attn.compat.callers import users_level
from torch_sinkhorn_attn.compat.tracing import recording
from torch_sinkhorn_attn.options import Solver
from torch_sinkhorn_attn.problem.looking import data_checks_enabled

# A factor of 2, which two queries that compete for one key leave where epsilon is tiny. Gaussian q and k leave at most
# 0.13 at epsilon = 0.25 after 20 iterations, in narrow windows too; at 0.1 up to 0.67, without windows 0.12.
FAR = 0.69
FEWEST = 5  # iterations below which nobody expects balance

_said = False


class UnbalancedPlanWarning(UserWarning):
    """A plan whose columns are far from their masses."""


def warn_once(col_potentials: Tensor, solver: Solver) -> None:
    """Warn, once in a process, if the last kept iteration moved some v_j by more than `FAR`: balanced, that is
    |log(column sum / b_j)| of the iterate before the last. Of v^0..v^R `[R+1, N, H, S(+G)]`; without a tail (R = 0)
    there is nothing to tell by. Ten microseconds, where data may be looked at at all (see `set_checks`)."""
    global _said
    if recording() or _said:  # in this order: compiled code would be compiled again once it is said
        return
    iterations = solver.stopped + solver.kept
    if solver.kept == 0 or iterations < FEWEST or not col_potentials.numel() or not data_checks_enabled(col_potentials):
        return
    *_, before, last = col_potentials.unbind()
    moved = torch.linalg.vector_norm(last - before, math.inf).item()  # a third of the time of torch.dist
    if not moved > FAR:
        return
    _said = True
    off = "the iterates are still far from their limit"
    if solver.rho_col == 1:
        off = f"a column sum was off by a factor of {math.exp(min(moved, 700)):.3g} one iteration before the last"
    warnings.warn(
        f"The transport plan is not balanced after base_iters={solver.base_iters} and tail_iters={solver.tail_iters}: "
        f"{off}. Raise base_iters, or epsilon (now {solver.epsilon:g}; small is slow), or try over_relaxation=1.5; "
        "certify(...).advice says what reaches balance, as measured. This is said once; set_checks('never') does not "
        "look.",
        UnbalancedPlanWarning,
        stacklevel=users_level("torch", "transformers"),
    )
