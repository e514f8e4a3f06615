"""The opaque ops; `autograd.py` differentiates them.

Seven ops, each defined, implemented for every device and given a fake: `forward` and `backward` of attention, `plan`
and `plan_backward` of the plan itself, `log_plan` and `log_plan_backward` of its logarithm, and `matches`, which has no
derivative. Their arguments are the fields of `Inputs` and `Problem`, flat and in order, and the name of the engine that
computes them. What a problem did not have at first comes last, with a default, so that programs exported before go on
as they are; torch leaves trailing defaults out of calls and of what it exports. Under vmap the mapped dimension is
folded into N.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from typing import Any

import torch
from torch import Tensor

from torch_sinkhorn_attn._ops import add_op_namespace_prefix, ops as lib
from torch_sinkhorn_attn.boundary.op_checks import check_cotangents, check_problem
from torch_sinkhorn_attn.compat.tracing import refuse_onnx
from torch_sinkhorn_attn.engines import ENGINES, engine_of
from torch_sinkhorn_attn.method.higher_order import PlanName
from torch_sinkhorn_attn.options import Solver
from torch_sinkhorn_attn.problem.fits import check_present
from torch_sinkhorn_attn.problem.problem import (
    LEAVES,
    Inputs,
    Outline,
    OutputGrads,
    Potentials,
    Problem,
    compute_dtype,
    from_leaves,
    full_precision,
    leaves,
)

NUM_INPUTS = len(Inputs._fields)
_LATER = {x.name: x.default for part in (Solver, Outline) for x in fields(part) if x.default is not MISSING}
PROBLEM_FIELDS = tuple(name for _, name, _ in LEAVES if name not in _LATER)
NAMES = (*Inputs._fields, *PROBLEM_FIELDS, "engine", *_LATER)  # of a flat problem
_ENGINE = NAMES.index("engine")
_RESIDUALS = _ENGINE + 1  # where forward takes them: before what came later
_ORDER = [name for _, name, _ in LEAVES]
_FLAT = [_ORDER.index(name) for name in (*PROBLEM_FIELDS, *_LATER)]  # of the leaves, in the order of a flat problem
_BACK = [[*PROBLEM_FIELDS, *_LATER].index(name) for name in _ORDER]
_REQUIRED = {"query", "key"}  # of the inputs; a problem says it by its types


def _schema_arguments() -> tuple[str, str]:
    kinds = {name: f"{kind.replace(' | None', '?')} {name}" for _, name, kind in LEAVES}
    inputs = [f"Tensor{'' if name in _REQUIRED else '?'} {name}" for name in Inputs._fields]
    first = [*inputs, *(kinds[name] for name in PROBLEM_FIELDS), "str engine"]
    return ", ".join(first), ", ".join(f"{kinds[name]}={default}" for name, default in _LATER.items())


def flatten(inputs: Inputs, problem: Problem, engine: str) -> list[Any]:
    """A flat problem: one value for each of `NAMES`."""
    found = leaves(problem)
    flat = [*inputs, *[found[i] for i in _FLAT]]
    flat.insert(_ENGINE, engine)
    return flat


def unflatten(flat: Sequence[Any]) -> tuple[Inputs, Problem, str]:
    """Its inverse; what is missing at the end has its default."""
    missing = len(NAMES) - len(flat)
    last = [*_LATER.values()][len(_LATER) - missing :]
    found = [*flat[NUM_INPUTS:_ENGINE], *flat[_ENGINE + 1 :], *last]
    return Inputs(*flat[:NUM_INPUTS]), from_leaves([found[i] for i in _BACK]), flat[_ENGINE]


def with_residuals(flat: Sequence[Any], *own: Any) -> list[Any]:
    """The arguments of forward, from a flat problem; or of another op that has its own in the same place."""
    return [*flat[:_RESIDUALS], *own, *flat[_RESIDUALS:]]


def without_residuals(arguments: Sequence[Any], own: int = 1) -> list[Any]:
    """A flat problem, from such arguments, of which so many are the op's own."""
    return [*arguments[:_RESIDUALS], *arguments[_RESIDUALS + own :]]


def own(arguments: Sequence[Any], count: int) -> Sequence[Any]:
    """The arguments that such an op has of its own."""
    return arguments[_RESIDUALS : _RESIDUALS + count]


FIRST, LAST = _schema_arguments()
_ARGUMENTS = f"{FIRST}, {LAST}"
torch.library.define(
    add_op_namespace_prefix("forward"), f"({FIRST}, bool residuals, {LAST}) -> ({', '.join(['Tensor'] * 7)})"
)
torch.library.define(
    add_op_namespace_prefix("backward"),
    f"(Tensor grad_output, Tensor? grad_to_bin, Tensor? grad_from_bin, bool mask_grad, Tensor output, "
    f"Tensor row_potentials, Tensor col_potentials, {_ARGUMENTS}) -> ({', '.join(['Tensor'] * NUM_INPUTS)})",
)
PLANS: dict[PlanName, bool] = {
    "plan": False,
    "log_plan": True,
}  # the op, beside `<op>_backward`, and whether it gives log P
for _name in PLANS:
    torch.library.define(add_op_namespace_prefix(_name), f"({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)")
    torch.library.define(
        add_op_namespace_prefix(f"{_name}_backward"),
        f"(Tensor grad_plan, Tensor row_potentials, Tensor col_potentials, bool mask_grad, {_ARGUMENTS}) "
        f"-> ({', '.join(['Tensor'] * NUM_INPUTS)})",
    )

torch.library.define(
    add_op_namespace_prefix("matches"), f"({FIRST}, SymInt k, {LAST}) -> ({', '.join(['Tensor'] * 6)})"
)


def _in_full_precision(function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """Keep the caller's autocast out of an op: its dtypes are chosen by its inputs alone."""

    @functools.wraps(function)
    def wrapped(*args: Any) -> tuple[Tensor, ...]:
        check_present(query_or_cotangent=args[0])
        with full_precision(args[0].device):
            return engine_of(args[0].device).call(function, args)

    return wrapped


def _fresh(tensors: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """Contiguous tensors that share no memory; an absent one is empty."""
    return tuple(
        like.new_empty(0) if x is None or (x.numel() == 0 and x.ndim == 1) else x.contiguous() for x in tensors
    )


@torch.library.impl(add_op_namespace_prefix("forward"), "default")
@_in_full_precision
def _forward(*args: Any) -> tuple[Tensor, ...]:
    inputs, problem, engine = unflatten(without_residuals(args))
    check_problem(inputs, problem, engine)
    check_present(value=inputs.value)
    result = ENGINES[engine].forward(inputs, problem, residuals=args[_RESIDUALS])
    return _fresh((result.output, *result.potentials, *result[2:]), result.output)


@torch.library.register_fake(add_op_namespace_prefix("forward"))
def _forward_fake(*args: Any) -> tuple[Tensor, ...]:
    refuse_onnx()
    inputs, problem, _ = unflatten(without_residuals(args))
    assert inputs.value is not None
    num, heads, length, size = problem.sizes
    like = inputs.query.new_empty(0, dtype=compute_dtype(inputs.query.dtype))
    row_potentials, col_potentials = _fake_potentials(problem, like)
    return (
        like.new_empty(num, heads, length, inputs.value.shape[-1]),
        row_potentials,
        col_potentials,
        like.new_empty(num, heads),
        like.new_empty(num, heads),
        like.new_empty(*((num, heads, length) if problem.has_dustbin else (0,))),
        like.new_empty(*((num, heads, size) if problem.has_dustbin else (0,))),
    )


def _fake_potentials(problem: Problem, like: Tensor) -> tuple[Tensor, Tensor]:
    num, heads, length, size = problem.sizes
    kept, bins = problem.solver.kept + 1, problem.num_dustbins
    return like.new_empty(kept, num, heads, length + bins), like.new_empty(kept, num, heads, size + bins)


@torch.library.impl(add_op_namespace_prefix("backward"), "default")
@_in_full_precision
def _backward(
    grad_output: Tensor,
    grad_to_bin: Tensor | None,
    grad_from_bin: Tensor | None,
    mask_grad: bool,
    output: Tensor,
    row_potentials: Tensor,
    col_potentials: Tensor,
    *args: Any,
) -> tuple[Tensor, ...]:
    inputs, problem, engine = unflatten(args)
    potentials = Potentials(row_potentials, col_potentials)
    grads = OutputGrads(grad_output, grad_to_bin, grad_from_bin, mask_grad)
    check_problem(inputs, problem, engine)
    check_present(output=output)
    check_cotangents(inputs, problem, potentials, grad_output, output, (grad_to_bin, grad_from_bin))
    result = ENGINES[engine].backward(inputs, problem, output, potentials, grads)
    return _fresh(result.inputs, output)


@torch.library.register_fake(add_op_namespace_prefix("backward"))
def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    mask_grad, output = args[3:5]
    return _fake_gradients(unflatten(args[7:])[0], mask_grad, output)


def _fake_gradients(inputs: Inputs, mask_grad: bool, like: Tensor) -> tuple[Tensor, ...]:
    absent = [x is None or (name == "mask" and not mask_grad) for name, x in zip(Inputs._fields, inputs, strict=True)]
    return tuple(like.new_empty(0 if no or x is None else x.shape) for no, x in zip(absent, inputs, strict=True))


def _plan(log: bool, *args: Any) -> tuple[Tensor, ...]:
    inputs, problem, engine = unflatten(args)
    check_problem(inputs, problem, engine)
    plan, potentials = ENGINES[engine].plan(inputs, problem, log)
    return _fresh((plan, *potentials), plan)


def _plan_fake(*args: Any) -> tuple[Tensor, ...]:
    refuse_onnx()
    inputs, problem, _ = unflatten(args)
    num, heads, length, size = problem.sizes
    extra = int(problem.has_dustbin)
    like = inputs.query.new_empty(0, dtype=compute_dtype(inputs.query.dtype))
    plan = like.new_empty(num, heads, length + extra, size + extra)
    return plan, *_fake_potentials(problem, like)


def _plan_backward(
    log: bool, grad_plan: Tensor, row_potentials: Tensor, col_potentials: Tensor, mask_grad: bool, *args: Any
) -> tuple[Tensor, ...]:
    inputs, problem, engine = unflatten(args)
    potentials = Potentials(row_potentials, col_potentials)
    check_problem(inputs, problem, engine)
    if log:  # which no kernel of csrc checks
        check_problem(inputs, problem, "tiled")
    check_cotangents(inputs, problem, potentials, grad_plan)
    result = ENGINES[engine].plan_backward(inputs, problem, potentials, grad_plan, mask_grad, log)
    return _fresh(result.inputs, grad_plan)


def _plan_backward_fake(*args: Any) -> tuple[Tensor, ...]:
    grad_plan, mask_grad = args[0], args[3]
    return _fake_gradients(unflatten(args[4:])[0]._replace(value=None, dustbin_value=None), mask_grad, grad_plan)


@torch.library.impl(add_op_namespace_prefix("matches"), "default")
@_in_full_precision
def _matches(*args: Any) -> tuple[Tensor, ...]:
    inputs, problem, engine = unflatten(without_residuals(args))
    check_problem(inputs, problem, engine)
    k = args[_RESIDUALS]
    if k < 1:
        raise ValueError(f"k={k} must be 1 or more.")
    found = ENGINES[engine].matches(inputs, problem, k)
    return _fresh(found, found.row_plan)


@torch.library.register_fake(add_op_namespace_prefix("matches"))
def _matches_fake(*args: Any) -> tuple[Tensor, ...]:
    refuse_onnx()
    inputs, problem, _ = unflatten(without_residuals(args))
    num, heads, length, size = problem.sizes
    mass = inputs.query.new_empty(0, dtype=compute_dtype(inputs.query.dtype))
    index = inputs.query.new_empty(0, dtype=torch.int64)
    shapes = [(num, heads, n, args[_RESIDUALS]) for n in (length, size)]
    bins = [(num, heads, n) if problem.has_dustbin else (0,) for n in (length, size)]
    return (
        *(like.new_empty(*shape) for shape in shapes for like in (index, mass)),
        *(mass.new_empty(*shape) for shape in bins),
    )


def _fold(info: Any, in_dims: Sequence[int | None], args: Sequence[Any], position: int = 0) -> list[Any]:
    """Arguments of a vmapped call with the mapped dimension folded into dimension `position` of each: N, which every
    tensor of a problem but the dropout seed has there (a mask may have 1, and is expanded)."""
    folded = []
    for x, dim in zip(args, in_dims, strict=True):
        if isinstance(x, Tensor):
            x = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            x = x.movedim(0, position).flatten(position, position + 1)
        folded.append(x)
    return folded


def _fold_problem(info: Any, in_dims: Sequence[int | None], flat: Sequence[Any]) -> list[Any]:
    """`_fold` for the arguments of a problem."""
    seed, mask = NUM_INPUTS + PROBLEM_FIELDS.index("dropout_seed"), Inputs._fields.index("mask")
    if isinstance(flat[seed], Tensor) and in_dims[seed] is not None:
        raise NotImplementedError("vmap over attention with dropout needs randomness='same'.")
    folded = _fold(info, in_dims, flat)
    folded[seed] = flat[seed]
    num = folded[0].shape[0]
    if isinstance(flat[mask], Tensor) and folded[mask].shape[0] != num:
        per_call = folded[mask].unflatten(0, (info.batch_size, 1))
        folded[mask] = per_call.expand(-1, num // info.batch_size, *per_call.shape[2:]).flatten(0, 1)
    return folded


def _unfold(info: Any, results: Sequence[Tensor], positions: Sequence[int]) -> tuple[tuple[Tensor, ...], Any]:
    """Results with the mapped dimension back in front of N, and where it is; empty ones are not mapped."""
    pairs = [
        (x, None) if x.ndim == 1 else (x.unflatten(dim, (info.batch_size, x.shape[dim] // info.batch_size)), dim)
        for x, dim in zip(results, positions, strict=True)
    ]
    return tuple(x for x, _ in pairs), tuple(dim for _, dim in pairs)


def _unfold_gradients(info: Any, results: Sequence[Tensor], mask: Tensor | None, dim: int | None) -> Any:
    """`_unfold` for the cotangents of the inputs; that of a mask shared by all of N is summed over them."""
    tensors, dims = _unfold(info, results, [0] * len(results))
    where = Inputs._fields.index("mask")
    if mask is None or dims[where] is None:
        return tensors, dims
    leading = mask.shape[1 if dim == 0 else 0]  # N or 1
    found = tensors[where].sum(1, keepdim=True) if leading == 1 else tensors[where]
    return (*tensors[:where], found, *tensors[where + 1 :]), dims


@torch.library.register_vmap(add_op_namespace_prefix("forward"))
def _forward_vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
    flat = _fold_problem(info, without_residuals(in_dims), without_residuals(args))
    results = lib.forward(*with_residuals(flat, args[_RESIDUALS]))
    return _unfold(info, results, (0, 1, 1, 0, 0, 0, 0))


@torch.library.register_vmap(add_op_namespace_prefix("backward"))
def _backward_vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
    grads = _fold(info, in_dims[:5], args[:5])
    duals = _fold(info, in_dims[5:7], args[5:7], position=1)
    flat = _fold_problem(info, in_dims[7:], args[7:])
    results = lib.backward(*grads, *duals, *flat)
    mask = 7 + Inputs._fields.index("mask")
    return _unfold_gradients(info, results, args[mask], in_dims[mask])


def _plan_vmap(op: Callable[..., Any], info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
    results = op(*_fold_problem(info, in_dims, args))
    return _unfold(info, results, (0, 1, 1))


def _plan_backward_vmap(op: Callable[..., Any], info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
    (grad_plan,) = _fold(info, in_dims[:1], args[:1])
    duals = _fold(info, in_dims[1:3], args[1:3], position=1)
    flat = _fold_problem(info, in_dims[4:], args[4:])
    results = op(grad_plan, *duals, args[3], *flat)
    mask = 4 + Inputs._fields.index("mask")
    return _unfold_gradients(info, results, args[mask], in_dims[mask])


@torch.library.register_vmap(add_op_namespace_prefix("matches"))
def _matches_vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
    flat = _fold_problem(info, without_residuals(in_dims), without_residuals(args))
    results = lib.matches(*with_residuals(flat, args[_RESIDUALS]))
    return _unfold(info, results, [0] * len(results))


def _register_plan(name: str, log: bool) -> None:
    """The op that gives the plan or its logarithm, and its adjoint."""
    for op, run, fake, fold in (
        (name, _plan, _plan_fake, _plan_vmap),
        (f"{name}_backward", _plan_backward, _plan_backward_fake, _plan_backward_vmap),
    ):
        computed = _in_full_precision(functools.partial(run, log))
        torch.library.impl(add_op_namespace_prefix(op), "default", computed)
        torch.library.register_fake(add_op_namespace_prefix(op), fake)
        torch.library.register_vmap(add_op_namespace_prefix(op), functools.partial(fold, getattr(lib, op)))


for _name, _log in PLANS.items():
    _register_plan(_name, _log)
