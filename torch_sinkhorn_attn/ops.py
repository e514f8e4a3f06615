"""The opaque ops and the autograd.Functions around them.

Four ops, each defined, implemented for every device and given a fake: `forward` and `backward` of attention, `plan` and
`plan_backward` of the plan itself. Their arguments are the fields of `Inputs` and `Problem`, flat and in order, and the
name of the engine that computes them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from torch_sinkhorn_attn import reference, staircase
from torch_sinkhorn_attn.engines import ENGINES
from torch_sinkhorn_attn.once import differentiable_once
from torch_sinkhorn_attn.problem import (
    Inputs,
    OutputGrads,
    Potentials,
    Problem,
    Result,
    compute_dtype,
    full_precision,
)

NAMESPACE = "torch_sinkhorn_attn"
_NUM_INPUTS = len(Inputs._fields)
_PROBLEM_FIELDS = tuple(field.name for field in fields(Problem))
_REQUIRED = {"query", "key", "row_lo", "row_hi", "col_lo", "col_hi", "log_row_mass", "log_col_mass"}


def _schema_arguments() -> str:
    inputs = [f"Tensor{'' if name in _REQUIRED else '?'} {name}" for name in Inputs._fields]
    problem = []
    for field in fields(Problem):
        kind = str(field.type).split(" | ")[0]
        optional = "?" if kind == "Tensor" and field.name not in _REQUIRED else ""
        problem.append(f"{kind}{optional} {field.name}")
    return ", ".join([*inputs, *problem, "str engine"])


def flatten(inputs: Inputs, problem: Problem, engine: str) -> list[Any]:
    return [*inputs, *(getattr(problem, name) for name in _PROBLEM_FIELDS), engine]


def unflatten(flat: Sequence[Any]) -> tuple[Inputs, Problem, str]:
    return Inputs(*flat[:_NUM_INPUTS]), Problem(*flat[_NUM_INPUTS:-1]), flat[-1]


_ARGUMENTS = _schema_arguments()
torch.library.define(f"{NAMESPACE}::forward", f"({_ARGUMENTS}, bool residuals) -> ({', '.join(['Tensor'] * 7)})")
torch.library.define(
    f"{NAMESPACE}::backward",
    f"(Tensor grad_output, Tensor? grad_to_bin, Tensor? grad_from_bin, bool mask_grad, Tensor output, "
    f"Tensor row_potentials, Tensor col_potentials, {_ARGUMENTS}) -> ({', '.join(['Tensor'] * _NUM_INPUTS)})",
)
torch.library.define(f"{NAMESPACE}::plan", f"({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)")
torch.library.define(
    f"{NAMESPACE}::plan_backward",
    f"(Tensor grad_plan, Tensor row_potentials, Tensor col_potentials, bool mask_grad, {_ARGUMENTS}) "
    f"-> ({', '.join(['Tensor'] * _NUM_INPUTS)})",
)


def _in_full_precision(function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """Keep the caller's autocast out of an op: its dtypes are chosen by its inputs alone."""

    @functools.wraps(function)
    def wrapped(*args: Any) -> tuple[Tensor, ...]:
        with full_precision(args[0].device):
            return function(*args)

    return wrapped


def _fresh(tensors: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """Contiguous tensors that share no memory; an absent one is empty."""
    return tuple(
        like.new_empty(0) if x is None or (x.numel() == 0 and x.ndim == 1) else x.contiguous() for x in tensors
    )


@torch.library.impl(f"{NAMESPACE}::forward", "default")
@_in_full_precision
def _forward(*args: Any) -> tuple[Tensor, ...]:
    inputs, problem, engine = unflatten(args[:-1])
    result: Result = ENGINES[engine].forward(inputs, problem, residuals=args[-1])
    return _fresh((result.output, *result.potentials, *result[2:]), result.output)


@torch.library.register_fake(f"{NAMESPACE}::forward")
def _forward_fake(*args: Any) -> tuple[Tensor, ...]:
    inputs, problem, _ = unflatten(args[:-1])
    assert inputs.value is not None
    num, heads, length = problem.log_row_mass.shape
    size = problem.log_col_mass.shape[-1]
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
    num, heads, length = problem.log_row_mass.shape
    kept, bins = problem.schedule[1] + 1, problem.num_dustbins
    return (
        like.new_empty(kept, num, heads, length + bins),
        like.new_empty(kept, num, heads, problem.log_col_mass.shape[-1] + bins),
    )


@torch.library.impl(f"{NAMESPACE}::backward", "default")
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
    result = ENGINES[engine].backward(inputs, problem, output, potentials, grads)
    return _fresh(result.inputs, output)


@torch.library.register_fake(f"{NAMESPACE}::backward")
def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    mask_grad, output = args[3:5]
    return _fake_gradients(unflatten(args[7:])[0], mask_grad, output)


def _fake_gradients(inputs: Inputs, mask_grad: bool, like: Tensor) -> tuple[Tensor, ...]:
    absent = [x is None or (name == "mask" and not mask_grad) for name, x in zip(Inputs._fields, inputs, strict=True)]
    return tuple(like.new_empty(0 if no or x is None else x.shape) for no, x in zip(absent, inputs, strict=True))


@torch.library.impl(f"{NAMESPACE}::plan", "default")
@_in_full_precision
def _plan(*args: Any) -> tuple[Tensor, ...]:
    inputs, problem, engine = unflatten(args)
    potentials = ENGINES[engine].solve(inputs, problem)
    full = reference.plan_of(reference.dense_problem(inputs, problem), potentials.row[-1], potentials.col[-1])
    return _fresh((reference.fold_dustbins(full, problem), *potentials), full)


@torch.library.register_fake(f"{NAMESPACE}::plan")
def _plan_fake(*args: Any) -> tuple[Tensor, ...]:
    inputs, problem, _ = unflatten(args)
    num, heads, length = problem.log_row_mass.shape
    extra = int(problem.has_dustbin)
    like = inputs.query.new_empty(0, dtype=compute_dtype(inputs.query.dtype))
    plan = like.new_empty(num, heads, length + extra, problem.log_col_mass.shape[-1] + extra)
    return plan, *_fake_potentials(problem, like)


@torch.library.impl(f"{NAMESPACE}::plan_backward", "default")
@_in_full_precision
def _plan_backward(
    grad_plan: Tensor, row_potentials: Tensor, col_potentials: Tensor, mask_grad: bool, *args: Any
) -> tuple[Tensor, ...]:
    inputs, problem, _ = unflatten(args)
    dense = reference.dense_problem(inputs, problem)
    grad_full = reference.unfold_dustbins(grad_plan, problem)
    cotangent = staircase.backward(dense, grad_full, Potentials(row_potentials, col_potentials), problem).scores
    return _fresh(staircase.score_gradients(cotangent, inputs, problem, mask_grad), grad_plan)


@torch.library.register_fake(f"{NAMESPACE}::plan_backward")
def _plan_backward_fake(*args: Any) -> tuple[Tensor, ...]:
    grad_plan, mask_grad = args[0], args[3]
    return _fake_gradients(unflatten(args[4:])[0]._replace(value=None, dustbin_value=None), mask_grad, grad_plan)


def _input_grads(ctx: Any, op: Any, leading: tuple[Any, ...], flat: list[Any]) -> list[Tensor | None]:
    """Run a backward op and hand its results to the inputs that want them, in their dtypes."""
    mask = flat[3]
    mask_grad = mask is not None and mask.dtype != torch.bool and ctx.needs_input_grad[3]
    with torch.no_grad():
        grads = op(*[mask_grad if x is Ellipsis else x for x in leading], *flat)
    result: list[Tensor | None] = []
    for i, (x, grad) in enumerate(zip(flat[:_NUM_INPUTS], grads, strict=True)):
        result.append(grad.to(x.dtype) if x is not None and ctx.needs_input_grad[i] else None)
    sources = [x for x in (*leading, *flat) if isinstance(x, Tensor)]
    result = differentiable_once(
        result,
        sources,
        f"engine={flat[-1]!r} has no double backward (its backward is derived by hand); for second derivatives use "
        "engine='reference', which autograd differentiates any number of times.",
    )
    return result + [None] * (len(flat) - _NUM_INPUTS)


def _save(ctx: Any, flat: Sequence[Any], extra: Sequence[Tensor]) -> None:
    ctx.save_for_backward(*extra, *(x for x in flat if isinstance(x, Tensor)))
    ctx.num_extra = len(extra)
    ctx.template = [Ellipsis if isinstance(x, Tensor) else x for x in flat]


def _load(ctx: Any) -> tuple[list[Tensor], list[Any]]:
    saved = ctx.saved_tensors
    rest = iter(saved[ctx.num_extra :])
    return list(saved[: ctx.num_extra]), [next(rest) if x is Ellipsis else x for x in ctx.template]


def _folded(info: Any, in_dims: tuple[Any, ...], args: Sequence[Any]) -> list[Any]:
    """Arguments of a vmapped call with the mapped dimension folded into N, which every tensor but the seed starts with
    (a mask may have 1 there, and is expanded)."""
    seed = _NUM_INPUTS + _PROBLEM_FIELDS.index("dropout_seed")
    mask = Inputs._fields.index("mask")
    folded: list[Any] = []
    for k, (x, dim) in enumerate(zip(args, in_dims, strict=True)):
        if not isinstance(x, Tensor) or (k == seed and dim is None):
            folded.append(x)
            continue
        if k == seed:
            raise NotImplementedError("vmap over attention with dropout needs randomness='same'.")
        x = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
        if k == mask:
            x = x.expand(-1, folded[0].shape[0] // info.batch_size, -1, -1, -1)
        folded.append(x.flatten(0, 1))
    return folded


def _unfolded(info: Any, x: Tensor, dim: int) -> Tensor:
    """The mapped dimension back in front of N, which is dimension `dim` of x."""
    return x.unflatten(dim, (info.batch_size, -1)) if x.ndim > 1 else x


def _spelled_out(*extra: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a `forward(*args)` the signature of the op's arguments: torch.compile tells by their number that it takes no
    ctx."""
    names = [*Inputs._fields, *_PROBLEM_FIELDS, "engine", *extra]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        function.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])  # type: ignore[attr-defined]
        return function

    return decorate


class SinkhornAttention(torch.autograd.Function):
    """`apply(*flat, residuals)` -> the seven results of the forward op."""

    @staticmethod
    @_spelled_out("residuals")
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return torch.ops.torch_sinkhorn_attn.forward(*args)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
        results = SinkhornAttention.apply(*_folded(info, in_dims, args))
        dims = [0, 1, 1, 0, 0, *(0 if x.ndim > 1 else None for x in results[5:])]
        found = tuple(x if d is None else _unfolded(info, x, d) for x, d in zip(results, dims, strict=True))
        return found, tuple(dims)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _save(ctx, inputs[:-1], output[:3])
        ctx.mark_non_differentiable(*output[1:5])
        ctx.has_dustbin = output[5].ndim > 1
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        grad_output, _, _, _, _, grad_to_bin, grad_from_bin = grads
        (output, row, col), flat = _load(ctx)
        if not ctx.has_dustbin:
            grad_to_bin = grad_from_bin = None
        if grad_output is None:
            grad_output = torch.zeros_like(output)
        leading = (grad_output, grad_to_bin, grad_from_bin, Ellipsis, output, row, col)
        return *_input_grads(ctx, torch.ops.torch_sinkhorn_attn.backward, leading, flat), None


class SinkhornPlan(torch.autograd.Function):
    """`apply(*flat)` -> (plan, row potentials, column potentials)."""

    @staticmethod
    @_spelled_out()
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return torch.ops.torch_sinkhorn_attn.plan(*args)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
        plan, row, col = SinkhornPlan.apply(*_folded(info, in_dims, args))
        return tuple(_unfolded(info, x, d) for x, d in ((plan, 0), (row, 1), (col, 1))), (0, 1, 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _save(ctx, inputs, output[1:])
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx: Any, grad_plan: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        (row, col), flat = _load(ctx)
        leading = (grad_plan, row, col, Ellipsis)
        return tuple(_input_grads(ctx, torch.ops.torch_sinkhorn_attn.plan_backward, leading, flat))
