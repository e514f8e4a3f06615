"""Random calls of the registered ops whose arguments do not fit together, each made from one seed.

`run(start, count)` makes them in child processes and tells how each ends: all must end in an error. From a shell:
`python tests/hostile_calls.py [COUNT [START]]` (default: 2000 from 0) prints those that do not, and a summary.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from hostile_arguments import reads_value, spoil, spoil_lists

ROOT = Path(__file__).parent
SECONDS = 60  # without news from a child: it hangs
ERRORS = ("ValueError", "TypeError", "RuntimeError", "NotImplementedError")


class Outcome(NamedTuple):
    seed: int
    kind: str  # "error", "answer", "crash" or "hang"
    text: str


def run(start: int, count: int) -> list[Outcome]:
    """Outcomes of the calls of seeds [start, start + count)."""
    found: list[Outcome] = []
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    while len(found) < count:
        first = start + len(found)
        command = [sys.executable, __file__, "--child", str(start + count - first), str(first)]
        try:
            child = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=SECONDS + count, check=False
            )
            lines, code, said = child.stdout.splitlines(), child.returncode, child.stderr
        except subprocess.TimeoutExpired as late:
            lines, code, said = (late.stdout or b"").decode().splitlines(), None, ""
        reports = [line.split("\t", 3)[1:] for line in lines if line.startswith("call\t")]
        found += [Outcome(int(seed), kind, text) for seed, kind, text in reports if kind != "begins"]
        if code == 0:
            break
        if not reports or reports[-1][1] != "begins":
            raise RuntimeError(f"the child did not get to its calls: {said[-2000:]}")
        seed, _, text = reports[-1]
        found.append(Outcome(int(seed), "hang" if code is None else "crash", f"{text} ({code}) {said[-3000:]}"))
    return found


def wrong(outcomes: list[Outcome]) -> list[Outcome]:
    return [x for x in outcomes if x.kind != "error"]


# In the child


def _make_calls(start: int, count: int) -> None:
    import torch

    torch.set_num_threads(1)
    for seed in range(start, start + count):
        what, call = make(seed)
        print("call", seed, "begins", what, sep="\t", flush=True)
        try:
            call()
            kind, text = "answer", what
        except Exception as error:
            name = next((e for e in ERRORS if e in {x.__name__ for x in type(error).__mro__}), None)
            said = (str(error).splitlines() or [""])[0][:150]
            kind, text = "answer" if name is None else "error", f"{what}: {type(error).__name__} {said}"
        print("call", seed, kind, text, sep="\t", flush=True)


def make(seed: int) -> tuple[str, Callable[[], Any]]:
    """A call with one thing in it that does not fit, and what that is."""
    import problems
    import torch

    from torch_sinkhorn_attn.boundary import ops
    from torch_sinkhorn_attn.engines import cpu
    from torch_sinkhorn_attn.problem.arguments import prepare

    r = random.Random(seed)
    while True:  # a drawn window may leave no pair at all
        try:
            problem = problems.make(r.randrange(1 << 30), r.choice([torch.float32, torch.float64]))
            op = r.choice(list(_OPS))
            options = problem.options if reads_value(op) else problem.options | {"dropout_p": 0.0}
            given = prepare(
                problem.query.detach(), problem.key.detach(), problem.value.detach() if reads_value(op) else None,
                None if problem.mask is None else problem.mask.detach(), **options,
            )  # fmt: skip
        except ValueError:
            continue
        if given.inputs.query.numel() and given.inputs.key.numel():
            break
    if given.problem.initial_row is None and r.random() < 0.3:
        like = given.problem.solver.kept * 0 + 1  # a warm start of zeros, to be spoiled
        given = _with_start(given, like)
    engine = "cpu" if op.startswith("cpu_") else r.choice(["cpu", "tiled"])
    flat = ops.flatten(_detached(given.inputs), given.problem, engine)
    arguments = dict(zip(ops.NAMES, flat, strict=True))
    function = getattr(torch.ops.torch_sinkhorn_attn, op)
    before: dict[str, Any] = {}
    if "backward" in op:
        before = _cotangents(arguments, ops, "plan" in op or (op == "cpu_backward" and given.inputs.value is None))
    if not op.startswith("cpu_"):
        what = spoil(r, {**before, **arguments}, given.problem, op)
        spoiled = what[1]
        values = [spoiled[k] for k in (*before, *arguments)]
        own = {"forward": [False], "matches": [r.choice([2, 1, 0, -3])]}
        own["band"] = [given.problem.support.row_lo, r.choice([3, 0, -1]), r.random() < 0.5]
        values = ops.with_residuals(values, *own.get(op, ()))
        return f"{op} {engine} {what[0]}", lambda: function(*values)
    if op == "cpu_rank":
        return _of_rank(r, given)
    tensors, numbers, counts = cpu.arguments(given.inputs, given.problem)
    place = (*ops.Inputs._fields, *cpu.TENSORS)
    lists = dict(zip(place, (None if x is None else x.detach() for x in tensors), strict=True))
    name, lists, numbers, counts, before = spoil_lists(r, lists, numbers, counts, before, given.problem, op)
    if op == "cpu_backward":
        wants = before.pop("mask_grad")
        order = [before.get(k) for k in ("grad", "grad_to_bin", "grad_from_bin", "output")]
        order += [before[k] for k in ("row_potentials", "col_potentials")]
        return f"{op} {name}", lambda: function(*order, list(lists.values()), numbers, counts, wants)
    extra = {"cpu_forward": [False], "cpu_matches": [r.choice([2, 1, 0, -3, 1 << 40])]}.get(op, [])
    return f"{op} {name}", lambda: function(list(lists.values()), numbers, counts, *extra)


_OPS = (
    "forward",
    "backward",
    "plan",
    "plan_backward",
    "log_plan",
    "log_plan_backward",
    "matches",
    "band",
    "cpu_forward",
    "cpu_plan",
    "cpu_matches",
    "cpu_backward",
    "cpu_rank",
)


def _of_rank(r: random.Random, given: Any) -> tuple[str, Callable[[], Any]]:
    """A half-step or pass of a rank."""
    import torch

    from torch_sinkhorn_attn.engines import cpu, cpu_ranks

    inputs, problem = _detached(given.inputs), given.problem
    kernels = cpu_ranks.Kernels(inputs, problem, (0, 0))
    tensors, numbers, counts = kernels.arguments
    lists = dict(zip((*inputs._fields, *cpu.TENSORS), tensors, strict=True))
    rows, cols = (x.new_zeros(x.shape) for x in (problem.marginals.log_row_mass, problem.marginals.log_col_mass))
    dtype, features = rows.dtype, inputs.value.shape[-1]
    wide = torch.zeros(*rows.shape, features, dtype=dtype)
    verbs = {
        "values": {"u": rows, "v": cols, "x": rows, "y": cols},
        "sweep": {"u": rows, "v": cols, "x": rows, "y": cols},
        "value_gradient": {"u": rows, "v": cols, "grad": wide, "output": wide},
        "score_gradients": {
            "u": rows, "v": cols, "grad": wide, "output": wide,
            "row_terms": rows[..., None], "col_terms": cols[..., None],
        },
    }  # fmt: skip
    verb = r.choice(list(verbs))
    before = {name: x.to(dtype).contiguous() for name, x in verbs[verb].items()}
    what, lists, numbers, counts, before = spoil_lists(r, lists, numbers, counts, before, problem, "cpu_rank")

    def call() -> Any:
        vectors = [before.get(name) for name in cpu_ranks.VECTORS]
        op = torch.ops.torch_sinkhorn_attn.cpu_rank
        return op(kernels.state, verb, vectors, [0, 0], False, list(lists.values()), numbers, counts)

    return f"cpu_rank {verb} {what}", call


def _detached(inputs: Any) -> Any:
    return type(inputs)(*(None if x is None else x.detach() for x in inputs))


def _with_start(given: Any, fill: int) -> Any:
    from dataclasses import replace

    p = given.problem
    bins = p.num_dustbins
    masses = p.marginals.log_row_mass, p.marginals.log_col_mass
    row, col = (x.new_zeros(*x.shape[:2], x.shape[2] + bins) for x in masses)
    return given._replace(problem=replace(p, initial_row=row + fill, initial_col=col))


def _cotangents(arguments: dict[str, Any], ops: Any, plan: bool) -> dict[str, Any]:
    """What comes before the problem in a backward call, as it should be."""
    import torch

    flat = list(arguments.values())
    if plan:
        found, row, col = torch.ops.torch_sinkhorn_attn.plan(*flat)
        return {"grad": torch.ones_like(found), "row_potentials": row, "col_potentials": col, "mask_grad": False}
    called = torch.ops.torch_sinkhorn_attn.forward(*ops.with_residuals(flat, False))
    output, row, col, _, _, to_bin, from_bin = called
    pair = [x if x.ndim > 1 else None for x in (to_bin, from_bin)]
    return {
        "grad": torch.ones_like(output), "grad_to_bin": pair[0], "grad_from_bin": pair[1], "mask_grad": False,
        "output": output, "row_potentials": row, "col_potentials": col,
    }  # fmt: skip


if __name__ == "__main__":
    child = "--child" in sys.argv
    given = [int(x) for x in sys.argv[1:] if x != "--child"]
    count, start = (given + [2000, 0][len(given) :])[:2]
    if child:
        _make_calls(start, count)
        sys.exit(0)
    outcomes = run(start, count)
    for outcome in wrong(outcomes):
        print(*outcome)
    print(dict(Counter(x.kind for x in outcomes)), f"of {count} calls")
    sys.exit(bool(wrong(outcomes)))
