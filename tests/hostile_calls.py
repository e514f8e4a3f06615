"""Random calls of the registered ops whose arguments do not fit together, each made from one seed.

`run(start, count)` makes them in child processes and tells how each ends: all must end in an error. From a shell:
`python tests/hostile_calls.py [COUNT [START]]` (default: 2000 from 0) prints those that do not, and a summary.
"""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

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
            options = problem.options if _reads_value(op) else problem.options | {"dropout_p": 0.0}
            given = prepare(
                problem.query.detach(), problem.key.detach(), problem.value.detach() if _reads_value(op) else None,
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
        what = _spoil(r, {**before, **arguments}, given.problem, op)
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
    name, lists, numbers, counts, before = _spoil_lists(r, lists, numbers, counts, before, given.problem, op)
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
    what, lists, numbers, counts, before = _spoil_lists(r, lists, numbers, counts, before, problem, "cpu_rank")

    def call() -> Any:
        vectors = [before.get(name) for name in cpu_ranks.VECTORS]
        op = torch.ops.torch_sinkhorn_attn.cpu_rank
        return op(kernels.state, verb, vectors, [0, 0], False, list(lists.values()), numbers, counts)

    return f"cpu_rank {verb} {what}", call


def _reads_value(op: str) -> bool:
    return not any(name in op for name in ("plan", "matches", "band"))


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


NUMBERS: dict[str, list[Any]] = {
    "epsilon": [0.0, -1.0, math.nan, math.inf],
    "scale": [math.nan, math.inf],
    "rho_row": [0.0, 1.5, math.nan],
    "rho_col": [-1.0, 2.0, math.nan],
    "tolerance": [-1.0, math.nan],
    "over_relaxation": [0.0, 2.0, math.nan, -math.inf],
    "dropout_p": [-0.1, 1.0, math.nan],
    "contraction": [-0.1, 1.0, math.nan],
    "acceleration": ["", "cheb"],
    "base_iters": [-1, 1 << 40, -(1 << 63)],
    "tail_iters": [-1, 1 << 40, (1 << 63) - 1],
    "gradient": ["", "imp"],
    "engine": ["", "reference", "cuda"],
    "window_left": [-2, -(1 << 60)],
}


def _spoil(r: random.Random, arguments: dict[str, Any], problem: Any, op: str) -> tuple[str, dict[str, Any]]:
    if r.random() < 0.2:
        name = r.choice(list(NUMBERS))
        value = r.choice(NUMBERS[name])
        return f"{name}={value!r}", arguments | {name: value}
    return _spoil_tensor(r, arguments, problem, op)


def _spoil_tensor(r: random.Random, arguments: dict[str, Any], problem: Any, op: str) -> tuple[str, dict[str, Any]]:
    import torch

    names = [k for k, x in arguments.items() if isinstance(x, torch.Tensor)]
    if not _reads_value(op) or arguments.get("value") is None:  # which does not read it
        names = [k for k in names if k != "dustbin_value"]
    kind = r.choice(["shape", "shape", "shape", "dtype", "missing", "extra", "contents", "contents"])
    if kind == "missing":
        name = r.choice(names)
        lone = name in ("mask", "value", "dustbin_value", "initial_row", "initial_col") or name.startswith("grad_")
        if lone and not (name == "value" and op in ("forward", "backward", "cpu_backward")):
            return _spoil_tensor(r, arguments, problem, op)
        return f"{name} missing", arguments | {name: None}
    if kind == "extra":
        return _extra(r, arguments, problem)
    if kind == "contents":
        return _contents(r, arguments, problem, op)
    name = r.choice(names)
    x = arguments[name]
    if kind == "dtype":
        floating = x.is_floating_point()
        cotangent = name in ("grad", "grad_to_bin", "grad_from_bin", "output", "row_potentials", "col_potentials")
        if floating and not (cotangent and not op.startswith("cpu_")):
            other = [torch.int64, torch.complex64, torch.float64 if x.dtype != torch.float64 else torch.float32]
            other = other[:2] if name == "mask" else other
        else:
            other = [torch.complex64] if floating or x.dtype == torch.bool else [torch.int32, torch.float32]
        dtype = r.choice(other)
        return f"{name} {dtype}", arguments | {name: x.to(dtype)}
    changed = _reshaped(r, name, x, arguments)
    if changed is None:
        return _spoil_tensor(r, arguments, problem, op)
    return f"{name} {list(x.shape)} -> {list(changed.shape)}", arguments | {name: changed}


def _reshaped(r: random.Random, name: str, x: Any, arguments: dict[str, Any]) -> Any:
    """x in a shape that does not fit, or None."""
    import torch

    if r.random() < 0.2:
        flat = x.unsqueeze(0) if r.random() < 0.5 or x.ndim == 0 else x.flatten()[: r.choice([0, 1, x.numel()])]
        return None if flat.shape == x.shape else flat
    dim = r.randrange(x.ndim)
    free = {"value": (3,), "key": (1,) if arguments.get("value") is None else ()}
    if dim in free.get(name, ()):
        return None
    shape = list(x.shape)
    shape[dim] = r.choice([0, shape[dim] - 1, shape[dim] + 1, 2 * shape[dim] + 3, shape[dim] + 40, 100_000])
    if shape[dim] == x.shape[dim] or shape[dim] < 0 or (name == "mask" and _broadcasts(shape, arguments)):
        return None
    if name == "mask" and shape[dim] == 1:
        return None
    if math.prod(shape) > 1 << 24:
        return x.flatten()[:1].reshape([1] * x.ndim).expand(shape) if x.numel() else None
    return torch.ones(shape, dtype=x.dtype) if shape[dim] > x.shape[dim] else x.narrow(dim, 0, shape[dim]).contiguous()


def _broadcasts(shape: list[int], arguments: dict[str, Any]) -> bool:
    query, key = arguments["query"], arguments["key"]
    wanted = (*query.shape[:3], key.shape[2])
    return len(shape) == 4 and all(n in (1, m) for n, m in zip(shape, wanted, strict=True))


def _extra(r: random.Random, arguments: dict[str, Any], problem: Any) -> tuple[str, dict[str, Any]]:
    """Something that belongs to what is not there."""
    import torch

    (num, heads, length), size = arguments["query"].shape[:3], arguments["key"].shape[2]
    dtype = problem.marginals.log_row_mass.dtype
    made = {
        "row_segment": torch.zeros(num, length, dtype=torch.int64),
        "col_segment": torch.zeros(num, size, dtype=torch.int64),
        "dropout_seed": torch.zeros(2, dtype=torch.int64),
        "row_score": torch.zeros(num, heads, length, dtype=dtype),
        "corner_score": torch.zeros(num, heads, dtype=dtype),
        "dustbin_value": torch.zeros(num, heads, 1, dtype=dtype),
        "log_row_capacity": torch.zeros(num, heads, 1, dtype=dtype),
        "log_col_capacity": torch.zeros(num, heads, 1, dtype=dtype),
    }
    absent = [k for k in made if arguments[k] is None and not (k == "dustbin_value" and problem.has_dustbin)]
    if not absent:
        return "engine=''" if "engine" in arguments else "query", arguments | (
            {"engine": ""} if "engine" in arguments else {"query": None}
        )
    name = r.choice(absent)
    return f"{name} extra", arguments | {name: made[name]}


def _contents(r: random.Random, arguments: dict[str, Any], problem: Any, op: str) -> tuple[str, dict[str, Any]]:
    size = arguments["key"].shape[2]
    values: dict[str, list[Any]] = {
        "row_lo": [-1, -(1 << 63), size + 1, (1 << 63) - 1],
        "row_hi": [-1, -(1 << 63), size + 1, (1 << 63) - 1],
        "row_segment": [-1, -(1 << 63), 1 << 40],
        "col_segment": [-1, -(1 << 63), 1 << 40],
        "dropout_seed": [-1, 1 << 32],
        "log_row_mass": [math.nan, math.inf],
        "log_col_mass": [math.nan, math.inf],
        "log_row_capacity": [math.nan, math.inf],
        "log_col_capacity": [math.nan, math.inf],
    }
    names = [k for k in values if arguments[k] is not None and arguments[k].numel()]
    name = r.choice(names)
    value, changed = r.choice(values[name]), arguments[name].clone(memory_format=_contiguous())
    changed.view(-1)[r.randrange(changed.numel())] = value
    return f"{name} holds {value}", arguments | {name: changed}


def _contiguous() -> Any:
    import torch

    return torch.contiguous_format


def _spoil_lists(
    r: random.Random, lists: dict[str, Any], numbers: list[float], counts: list[int], before: dict[str, Any],
    problem: Any, op: str,
) -> tuple[str, dict[str, Any], list[float], list[int], dict[str, Any]]:  # fmt: skip
    """The same for the lists of the compiled ops."""
    where = r.random()
    if where < 0.1:
        which = r.choice(["tensors", "numbers", "counts"])
        if which == "tensors":
            lists = dict(list(lists.items())[: r.randrange(1, len(lists))])
        return (
            f"{which} short",
            lists,
            numbers[: -(which == "numbers") or None],
            counts[: -(which == "counts") or None],
            before,
        )
    if where < 0.2:
        places = ["scale", "epsilon", "rho_row", "rho_col", "tolerance", "over_relaxation", "dropout_p", "contraction"]
        k = r.randrange(len(places))
        value = r.choice(NUMBERS[places[k]])
        return f"{places[k]}={value}", lists, [*numbers[:k], value, *numbers[k + 1 :]], counts, before
    if where < 0.3:
        k, value = r.choice([(0, -1), (0, 1 << 40), (1, -5), (1, 1 << 62), (2, 7), (3, -1), (4, -(10**12)), (6, 2)])
        return f"counts[{k}]={value}", lists, numbers, [*counts[:k], value, *counts[k + 1 :]], before
    if where < 0.4:
        vectors = [
            k
            for k in lists
            if k not in ("query", "key", "value", "mask") and lists[k] is not None and lists[k].numel() > 1
        ]
        name = r.choice(vectors)
        x = lists[name]
        apart = x.new_zeros(*x.shape, 2)[..., 0]
        return f"{name} not contiguous", lists | {name: apart.copy_(x)}, numbers, counts, before
    what, spoiled = _spoil_tensor(r, {**before, **lists}, problem, op)
    return (
        what, {k: spoiled[k] for k in lists}, numbers, counts, {k: spoiled[k] for k in before},
    )  # fmt: skip


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
