"""Arguments of the registered ops, one of which does not fit: what `hostile_calls` passes."""

from __future__ import annotations

import math
import random
from typing import Any


def reads_value(op: str) -> bool:
    return not any(name in op for name in ("plan", "matches", "band"))


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


def spoil(r: random.Random, arguments: dict[str, Any], problem: Any, op: str) -> tuple[str, dict[str, Any]]:
    if r.random() < 0.2:
        name = r.choice(list(NUMBERS))
        value = r.choice(NUMBERS[name])
        return f"{name}={value!r}", arguments | {name: value}
    return _spoil_tensor(r, arguments, problem, op)


def _spoil_tensor(r: random.Random, arguments: dict[str, Any], problem: Any, op: str) -> tuple[str, dict[str, Any]]:
    import torch

    names = [k for k, x in arguments.items() if isinstance(x, torch.Tensor)]
    if not reads_value(op) or arguments.get("value") is None:  # which does not read it
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


def spoil_lists(
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
