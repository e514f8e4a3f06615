"""The time of a half-step beside the machine's own matrix-vector product over as many bytes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from torch_sinkhorn_attn.engines import ENGINES

from .cases import Case, attend
from .measure import best_times, print_rows

FEW, MANY = 2, 42  # T of the two calls whose difference is 80 half-steps
IN_A_ROW = 10  # products with one matrix before the next, as a head's half-steps read the same scores
ROUNDS, ENOUGH = 10, 10.0  # a difference of two times needs many rounds, unless they take 10 s
HEAD = ("engine", "case", "us/half-step/head", "us S x", "us S^T y", "over S x", "over S^T y")
WIDTHS = (-8, -20, 17, 9, 9, 9, 10)


@functools.cache
def half_step_seconds(engine: str, case: Case) -> dict[str, float]:
    """Seconds per head of a half-step of the engine (forward alone) and of the two matrix-vector products. A head's
    matrix is float32 and holds the active scores: L x L, or L x (left + right + 1) for a band."""
    inputs = [x.detach() for x in case.inputs()]
    columns = case.length if case.window is None else min(case.length, sum(case.window) + 1)
    matrices = torch.randn(case.batch * case.heads, case.length, columns)
    row, col = torch.randn(case.length), torch.randn(columns)

    def call(base_iters: int) -> Callable[[], Tensor]:
        return lambda: attend(replace(case, base_iters=base_iters), inputs, engine)

    runs: dict[str, Callable[[], object]] = {
        "few": call(FEW),
        "many": call(MANY),
        "product": lambda: [torch.mv(matrix, col) for matrix in matrices for _ in range(IN_A_ROW)],
        "transposed": lambda: [torch.mv(matrix.t(), row) for matrix in matrices for _ in range(IN_A_ROW)],
    }
    with torch.no_grad():
        best_times(runs, 1)
        best = best_times(runs, ROUNDS, ENOUGH)
    seconds = {"half-step": (best["many"] - best["few"]) / (2 * (MANY - FEW))}
    seconds |= {name: best[name] / IN_A_ROW for name in ("product", "transposed")}
    return {name: x / len(matrices) for name, x in seconds.items()}


def half_steps(cases: list[Case]) -> list[dict[str, object]]:
    """Print the table and return its lines."""
    print(
        f"(call at T = {MANY} less one at T = {FEW}) / {2 * (MANY - FEW)}, forward alone, per head. S: a float32 matrix"
    )
    print("of as many entries as the head's active scores, by torch.mv, plain and transposed,")
    print(f"{IN_A_ROW} products with a head's matrix in a row, as its half-steps read the same scores. Below 0: noise.")
    print_rows([HEAD], WIDTHS)
    records: list[dict[str, object]] = []
    for case in cases:
        for engine in ENGINES:
            found = half_step_seconds(engine, case)
            name = f"{case.support}, {case.heads}x{case.length}"
            half, product, transposed = found["half-step"], found["product"], found["transposed"]
            times = [f"{1e6 * x:.0f}" for x in (half, product, transposed)]
            print_rows([[engine, name, *times, f"{half / product:.2f}", f"{half / transposed:.2f}"]], WIDTHS)
            records.append({
                "engine": engine, "support": case.support, "heads": case.heads, "length": case.length,
                "half_step_seconds": half, "product_seconds": product, "transposed_product_seconds": transposed,
                "half_step_over_product": half / product,
            })  # fmt: skip
    return records
