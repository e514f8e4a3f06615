"""What the registered ops are called with fits together: anyone can call them, and so do programs exported long ago.

Shapes, dtypes, devices and numbers are checked for every engine, in microseconds and without a look at data. What data
must hold (intervals, segment indices) is checked where it may be looked at: by csrc/checks.cpp for engine "cpu", here
for other CPU tensors. Tensors made by `arguments.prepare` always pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from torch_sinkhorn_attn.engines import ENGINES, cpu
from torch_sinkhorn_attn.options import ACCELERATIONS, GRADIENTS
from torch_sinkhorn_attn.problem.fits import FLOATS, check_mask, check_present, described, refuse
from torch_sinkhorn_attn.problem.problem import LEAF, LEAVES, Inputs, Potentials, Problem, compute_dtype
from torch_sinkhorn_attn.problem.support import window_ranks

MOST_ITERATIONS = 1 << 24  # as kMostIterations in csrc/checks.cpp
_PRESENT = tuple(name for _, name, kind in LEAVES if kind == "Tensor")
_DUSTBIN = ("row_score", "col_score", "corner_score")


def check_problem(inputs: Inputs, problem: Problem, engine: str) -> None:
    """ValueError or TypeError naming the first thing that does not fit, its value and what is needed."""
    if engine not in ENGINES:
        raise ValueError(f"engine={engine!r} is not behind this op; choose one of {', '.join(map(repr, ENGINES))}.")
    _check_tensors(inputs, problem)
    _check_numbers(problem)
    if engine != cpu.NAME and inputs.query.device.type == "cpu":
        _check_data(problem, inputs.query.shape[2], inputs.key.shape[2])


def _check_tensors(inputs: Inputs, problem: Problem) -> None:
    query, key, value = inputs.query, inputs.key, inputs.value
    check_present(query=query, key=key, **{name: LEAF[name](problem) for name in _PRESENT})
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x is not None and x.ndim != 4:
            raise ValueError(f"{name} is {described(x)}; four dimensions are needed: batch, heads, tokens, features.")
    if query.dtype not in FLOATS:
        raise TypeError(f"query is {described(query)}; float32, float64, float16 or bfloat16 is needed.")
    num, heads, length, features = query.shape
    key_heads, size = key.shape[1:3]
    if heads == 0 or features == 0:
        raise ValueError(f"query is {described(query)}; at least one head and one feature are needed.")
    if key_heads == 0 or heads % key_heads:
        raise ValueError(f"key is {described(key)}; its heads must divide the {heads} of query.")
    dtype, integer, device = compute_dtype(query.dtype), torch.int64, query.device
    width = 0 if value is None else value.shape[3]
    bins = _dustbins(inputs, problem)
    rows, cols, by_row, by_col = (num, length), (num, size), (num, heads, length), (num, heads, size)
    expected: list[tuple[str, Tensor | None, torch.dtype, tuple[int, ...]]] = [
        ("key", key, query.dtype, (num, key_heads, size, features)),
        ("value", value, query.dtype, (num, key_heads, size, width)),
    ]
    leaves: list[tuple[str, torch.dtype, tuple[int, ...]]] = [
        ("row_lo", integer, rows),
        ("row_hi", integer, rows),
        ("col_lo", integer, cols),
        ("col_hi", integer, cols),
        ("log_row_mass", dtype, by_row),
        ("log_col_mass", dtype, by_col),
        ("row_segment", integer, rows),
        ("col_segment", integer, cols),
        ("initial_row", dtype, (num, heads, length + bins)),
        ("initial_col", dtype, (num, heads, size + bins)),
        ("dropout_seed", integer, (2,)),
    ]
    if bins:
        stored = inputs.dustbin_value
        if stored is not None and value is None and stored.ndim == 3:
            width = stored.shape[2]  # the plan does not read it
        expected += [
            ("row_score", inputs.row_score, dtype, by_row),
            ("col_score", inputs.col_score, dtype, by_col),
            ("corner_score", inputs.corner_score, dtype, (num, heads)),
            ("dustbin_value", stored, dtype, (num, heads, width)),
        ]
        leaves += [(f"log_{side}_capacity", dtype, (num, heads, bins)) for side in ("row", "col")]
    expected[2:2] = [(name, LEAF[name](problem), kind, shape) for name, kind, shape in leaves]
    for name, x, kind, shape in expected:
        if x is not None and (x.shape != shape or x.dtype != kind or x.device != device):
            refuse(name, x, kind, shape, device)
    if (problem.support.row_segment is None) != (problem.support.col_segment is None):
        raise ValueError("row_segment and col_segment belong together.")
    if problem.support.row_segment is not None and not problem.outline.banded:
        raise ValueError("row_segment is given, so banded must be true.")
    if (problem.dropout_seed is None) != (problem.solver.dropout_p == 0):
        raise ValueError(
            f"dropout_seed is {'missing' if problem.dropout_seed is None else 'given'} beside dropout_p="
            f"{problem.solver.dropout_p}."
        )
    check_mask(inputs.mask, (num, heads, length, size), device)


def _dustbins(inputs: Inputs, problem: Problem) -> int:
    """G, or 0 without a dustbin, of which everything or nothing is there."""
    capacity = problem.marginals.log_row_capacity
    present = capacity is not None
    for name in (*_DUSTBIN, "log_col_capacity"):
        found = LEAF[name](problem) if name == "log_col_capacity" else getattr(inputs, name)
        if (found is not None) != present:
            state = "missing beside a" if present else "given beside no"
            raise ValueError(f"{name} is {state} log_row_capacity; a dustbin has all of them.")
    if capacity is None:
        if inputs.dustbin_value is not None:
            raise ValueError("dustbin_value is given without a dustbin.")
        return 0
    bins = capacity.shape[2] if capacity.ndim == 3 else 0
    if bins == 0 or (bins > 1 and problem.support.row_segment is None):
        raise ValueError(
            f"log_row_capacity is {described(capacity)}; batch by heads by the number of dustbins is needed, one "
            "without segments."
        )
    return bins


def _check_numbers(problem: Problem) -> None:
    p, outline = problem.solver, problem.outline
    fits = {
        "epsilon": 0 < p.epsilon < math.inf,
        "scale": abs(p.scale) < math.inf,
        "rho_row": 0 < p.rho_row <= 1,
        "rho_col": 0 < p.rho_col <= 1,
        "base_iters": 0 <= p.base_iters <= MOST_ITERATIONS,
        "tail_iters": 0 <= p.tail_iters <= MOST_ITERATIONS,
        "tolerance": 0 <= p.tolerance < math.inf,
        "over_relaxation": 0 < p.over_relaxation < 2,
        "acceleration": p.acceleration is None or (p.acceleration in ACCELERATIONS and p.over_relaxation == 1),
        "contraction": 0 <= p.contraction < 1 and (p.contraction == 0 or p.acceleration is not None),
        "gradient": p.gradient in GRADIENTS,
        "dropout_p": 0 <= p.dropout_p < 1,
        "window_left": outline.window_left >= -1,
        "window_right": outline.window_right >= -1,
    }
    for name, good in fits.items():
        if not good:
            raise ValueError(f"{name}={LEAF[name](problem)!r} is out of range.")


def _check_data(problem: Problem, length: int, size: int) -> None:
    lo, hi = problem.support.row_lo, problem.support.row_hi
    if lo.numel() and not bool(((lo >= 0) & (lo <= hi) & (hi <= size)).all()):
        n, i = ((lo < 0) | (lo > hi) | (hi > size)).nonzero()[0].tolist()
        raise ValueError(
            f"row_lo and row_hi hold [{lo[n, i]}, {hi[n, i]}) at batch {n}, row {i}; 0 <= row_lo <= row_hi <= {size} "
            "is needed."
        )
    most = problem.num_dustbins or max(1, min(length, size))
    for name in ("row_segment", "col_segment"):
        index = LEAF[name](problem)
        if index is None or index.numel() == 0:
            continue
        if bool((index[:, 1:] < index[:, :-1]).any()) or int(index.min()) < 0 or int(index.max()) >= most:
            raise ValueError(f"{name} must hold indices that do not fall, from 0 to {most - 1}.")
    if problem.dropout_seed is not None and not bool(((problem.dropout_seed >> 32) == 0).all()):
        raise ValueError(f"dropout_seed holds {problem.dropout_seed.tolist()}; two 32-bit words are needed.")
    for name in ("log_row_mass", "log_col_mass", "log_row_capacity", "log_col_capacity"):
        mass = LEAF[name](problem)
        if mass is not None and not bool((mass < torch.inf).all()):
            raise ValueError(f"{name} holds NaN or infinity; logarithms of finite masses are needed, -inf for none.")
    if not problem.outline.banded and size:
        some = (problem.marginals.log_col_mass > -torch.inf).any(1)
        first, end = some.to(torch.uint8).argmax(-1), size - some.flip(-1).to(torch.uint8).argmax(-1)
        whole_row = (lo <= first[:, None]) & (hi >= end[:, None]) | ~some.any(-1, keepdim=True)
        if bool((~whole_row & (problem.marginals.log_row_mass > -torch.inf).any(1)).any()):
            raise ValueError("row_lo and row_hi leave columns out; banded must be true then.")
    whole = (problem.outline.window_left, problem.outline.window_right) if problem.outline.banded else (-1, -1)
    if problem.outline.uniform and lo.numel() and problem.support.row_segment is None:
        n, m = (torch.tensor(x, device="cpu") for x in (length, size))
        first, end = window_ranks(torch.arange(length, device="cpu"), n, m, *whole)
        if bool(((lo < hi) & ((lo != first) | (hi != end))).any()):
            raise ValueError("row_lo and row_hi are not those of the window, of which uniform=True speaks.")


def check_cotangents(
    inputs: Inputs,
    problem: Problem,
    potentials: Potentials,
    grad: Tensor,
    output: Tensor | None = None,
    bins: Sequence[Tensor | None] = (None, None),
    width: int | None = None,
) -> None:
    """The rest of a backward call, of attention where there is an output, of a band of the plan where its width is
    given, with its values for output, else of the plan."""
    check_present(grad=grad, row_potentials=potentials.row, col_potentials=potentials.col)
    (num, heads, length, _), size = inputs.query.shape, inputs.key.shape[2]
    dtype, device, extra = compute_dtype(inputs.query.dtype), inputs.query.device, problem.num_dustbins
    duals = problem.solver.kept + 1
    expected = [
        ("row_potentials", potentials.row, (duals, num, heads, length + extra)),
        ("col_potentials", potentials.col, (duals, num, heads, size + extra)),
    ]
    if width is not None and output is not None:
        shape = (num, heads, length, width)
        expected += [("values", output, shape), ("grad_values", grad, shape)]
    elif output is None:
        corner = int(problem.has_dustbin)
        expected.append(("grad_plan", grad, (num, heads, length + corner, size + corner)))
    else:
        if inputs.value is None:
            raise ValueError("value is missing; the output's cotangent cannot do without it.")
        shape = (num, heads, length, inputs.value.shape[3])
        expected += [("output", output, shape), ("grad_output", grad, shape)]
    for name, x, shape in expected:
        if x.shape != shape or not x.is_floating_point() or x.device != device:
            refuse(name, x, dtype, shape, device)
    for name, mass, tokens in (("grad_to_bin", bins[0], length), ("grad_from_bin", bins[1], size)):
        if mass is None:
            continue
        if not problem.has_dustbin:
            raise ValueError(f"{name} is given, but there is no dustbin.")
        if mass.shape != (num, heads, tokens) or not mass.is_floating_point() or mass.device != device:
            refuse(name, mass, dtype, (num, heads, tokens), device)
