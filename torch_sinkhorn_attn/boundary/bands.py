"""The ops behind `sinkhorn_plan_band`, `band` and `band_backward`: any engine solves, and tiles are read and written in
plain PyTorch. Differentiable once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_sinkhorn_attn._ops import add_op_namespace_prefix, ops as lib
from torch_sinkhorn_attn.boundary import autograd, ops
from torch_sinkhorn_attn.boundary.op_checks import check_cotangents, check_problem
from torch_sinkhorn_attn.compat.once import differentiable_once
from torch_sinkhorn_attn.compat.tracing import recording, refuse_onnx
from torch_sinkhorn_attn.engines import ENGINES, cpu
from torch_sinkhorn_attn.engines.tiled import band as tiled
from torch_sinkhorn_attn.engines.tiled.tiles import Tiles
from torch_sinkhorn_attn.problem.fits import check_present, refuse
from torch_sinkhorn_attn.problem.problem import Inputs, Potentials, Problem, compute_dtype

ONCE = "A band of the plan has no derivative beyond the first, nor forward mode: take sinkhorn_plan, which has both."
_OWN = 3  # arguments of its own: first_column, width and log
_BEFORE = 7  # and those of the adjoint before them
_MASK = Inputs._fields.index("mask")

_ARGUMENTS = f"{ops.FIRST}, Tensor first_column, SymInt width, bool log, {ops.LAST}"
torch.library.define(add_op_namespace_prefix("band"), f"({_ARGUMENTS}) -> ({', '.join(['Tensor'] * 5)})")
torch.library.define(
    add_op_namespace_prefix("band_backward"),
    f"(Tensor grad_values, Tensor? grad_to_bin, Tensor? grad_from_bin, bool mask_grad, Tensor values, "
    f"Tensor row_potentials, Tensor col_potentials, {_ARGUMENTS}) -> ({', '.join(['Tensor'] * ops.NUM_INPUTS)})",
)


def plan_band(
    inputs: Inputs, problem: Problem, engine: str, first: Tensor, width: int, log: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The values and the dustbin's vectors, as `engines.tiled.band` gives them."""
    function, flat = lib.band if recording() else _Band.apply, ops.flatten(inputs, problem, engine)
    values, to_bin, from_bin, _, _ = function(*ops.with_residuals(flat, first, width, log))
    return values, to_bin, from_bin


def _taken(args: Any) -> tuple[Inputs, Problem, str, Tensor, int, bool]:
    """A checked call."""
    inputs, problem, engine = ops.unflatten(ops.without_residuals(args, _OWN))
    first, width, log = ops.own(args, _OWN)
    check_problem(inputs, problem, engine)
    if engine == cpu.NAME:  # whose own checks only its kernels make
        check_problem(inputs, problem, "tiled")
    check_present(first_column=first)
    shape, device = (problem.sizes[0], problem.sizes[2]), inputs.query.device
    if first.shape != shape or first.dtype != torch.int64 or first.device != device:
        refuse("first_column", first, torch.int64, shape, device)
    if width < 0:
        raise ValueError(f"width={width} must be 0 or more.")
    return inputs._replace(value=None), problem, engine, first, width, log


@torch.library.impl(add_op_namespace_prefix("band"), "default")
@ops._in_full_precision
def _band(*args: Any) -> tuple[Tensor, ...]:
    inputs, problem, engine, first, width, log = _taken(args)
    potentials = ENGINES[engine].solve(inputs, problem)
    tiles = Tiles(inputs, problem).at(potentials.row[-1], potentials.col[-1])
    values, to_bin, from_bin = tiled.band(tiles, first, width, log)
    return ops._fresh((values, to_bin, from_bin, *potentials), values)


@torch.library.register_fake(add_op_namespace_prefix("band"))
def _band_fake(*args: Any) -> tuple[Tensor, ...]:
    refuse_onnx()
    inputs, problem, _ = ops.unflatten(ops.without_residuals(args, _OWN))
    num, heads, length, size = problem.sizes
    like = inputs.query.new_empty(0, dtype=compute_dtype(inputs.query.dtype))
    bins = [(num, heads, n) if problem.has_dustbin else (0,) for n in (length, size)]
    values = like.new_empty(num, heads, length, ops.own(args, _OWN)[1])
    return values, *(like.new_empty(*shape) for shape in bins), *ops._fake_potentials(problem, like)


@torch.library.impl(add_op_namespace_prefix("band_backward"), "default")
@ops._in_full_precision
def _band_backward(
    grad: Tensor,
    grad_to_bin: Tensor | None,
    grad_from_bin: Tensor | None,
    mask_grad: bool,
    values: Tensor,
    row_potentials: Tensor,
    col_potentials: Tensor,
    *args: Any,
) -> tuple[Tensor, ...]:
    inputs, problem, _, first, width, log = _taken(args)
    potentials, grads = Potentials(row_potentials, col_potentials), (grad, grad_to_bin, grad_from_bin)
    check_present(values=values)
    check_cotangents(inputs, problem, potentials, grad, values, grads[1:], width)
    tiles = Tiles(inputs, problem).at(potentials.row[-1], potentials.col[-1])
    found = tiled.band_gradients(tiles, potentials, first, values, grads, mask_grad, log)
    return ops._fresh(found, values)


@torch.library.register_fake(add_op_namespace_prefix("band_backward"))
def _band_backward_fake(*args: Any) -> tuple[Tensor, ...]:
    mask_grad, values = args[3:5]
    inputs, _, _ = ops.unflatten(ops.without_residuals(args[_BEFORE:], _OWN))
    return ops._fake_gradients(inputs._replace(value=None, dustbin_value=None), mask_grad, values)


class _Band(torch.autograd.Function):
    """The op, for eager mode and torch.func."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return lib.band(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        autograd._save(ctx, output[0], *output[3:], *inputs)
        ctx.has_dustbin = output[1].ndim > 1

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        values, row, col, *args = autograd._load(ctx)
        grad = torch.zeros_like(values) if grads[0] is None else grads[0]
        bins = grads[1:3] if ctx.has_dustbin else (None, None)
        found = lib.band_backward(grad, *bins, autograd._wants_mask(ctx, args[_MASK]), values, row, col, *args)
        flat = ops.without_residuals(args, _OWN)
        tied = differentiable_once(found, [*flat[: ops.NUM_INPUTS], *grads[:3]], ONCE)
        return autograd._to_inputs(ctx, flat, tied, padding=_OWN)  # type: ignore[arg-type]

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        raise RuntimeError(ONCE)


torch.library.register_autograd(add_op_namespace_prefix("band"), _Band.backward, setup_context=_Band.setup_context)


def _fold(info: Any, in_dims: Any, args: Any) -> list[Any]:
    flat, dims = (ops.without_residuals(x, _OWN) for x in (args, in_dims))
    (first,) = ops._fold(info, ops.own(in_dims, 1), ops.own(args, 1))
    return ops.with_residuals(ops._fold_problem(info, dims, flat), first, *ops.own(args, _OWN)[1:])


@torch.library.register_vmap(add_op_namespace_prefix("band"))
def _band_vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
    return ops._unfold(info, lib.band(*_fold(info, in_dims, args)), (0, 0, 0, 1, 1))


@torch.library.register_vmap(add_op_namespace_prefix("band_backward"))
def _band_backward_vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
    grads = ops._fold(info, in_dims[:5], args[:5])
    duals = ops._fold(info, in_dims[5:_BEFORE], args[5:_BEFORE], position=1)
    results = lib.band_backward(*grads, *duals, *_fold(info, in_dims[_BEFORE:], args[_BEFORE:]))
    mask = _BEFORE + _MASK
    return ops._unfold_gradients(info, results, args[mask], in_dims[mask])
