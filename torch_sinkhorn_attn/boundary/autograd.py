"""The derivatives of the ops: the first by the engine's backward, all others by `higher_order`.

In eager mode autograd.Functions stand around the ops. torch.compile, torch.export and torch.jit.trace see the ops
themselves, with the same backward registered for them: they take no Function with a jvp, save none, and export none
over dynamic shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_sinkhorn_attn._ops import add_op_namespace_prefix, ops as lib
from torch_sinkhorn_attn.boundary import ops
from torch_sinkhorn_attn.compat.tracing import recording
from torch_sinkhorn_attn.method.higher_order import PlanName, Surrogate, What, or_zeros, pullback, pushforward
from torch_sinkhorn_attn.problem.problem import Inputs, Potentials, Problem

_MASK = Inputs._fields.index("mask")


def attention(inputs: Inputs, problem: Problem, engine: str, residuals: bool) -> tuple[Tensor, ...]:
    """The seven results of the forward op, differentiable."""
    function = lib.forward if recording() else _Attention.apply
    flat = ops.flatten(inputs, problem, engine)
    output, *constants, to_bin, from_bin = function(*ops.with_residuals(flat, residuals))
    return output, *(x.detach() for x in constants), to_bin, from_bin


def plan(inputs: Inputs, problem: Problem, engine: str, log: bool = False) -> tuple[Tensor, Potentials]:
    """The plan or its logarithm, differentiable, and the stacked duals."""
    name: PlanName = "log_plan" if log else "plan"
    function = getattr(lib, name) if recording() else _PLANS[name].apply
    found, row, col = function(*ops.flatten(inputs, problem, engine))
    return found, Potentials(row.detach(), col.detach())


def attention_gradients(*arguments: Any) -> tuple[Tensor, ...]:
    """The results of the backward op, differentiable under `create_graph=True`."""
    return _AttentionGradients.apply(*arguments) if torch.is_grad_enabled() else lib.backward(*arguments)


def plan_gradients(name: PlanName, *arguments: Any) -> tuple[Tensor, ...]:
    """Likewise, of op `name`, "plan" or "log_plan"."""
    if torch.is_grad_enabled():
        return _PLAN_GRADIENTS[name].apply(*arguments)
    found: tuple[Tensor, ...] = getattr(lib, f"{name}_backward")(*arguments)
    return found


def _save(ctx: Any, *arguments: Any) -> None:
    tensors = [x for x in arguments if isinstance(x, Tensor)]
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)
    ctx.template = [Ellipsis if isinstance(x, Tensor) else x for x in arguments]
    ctx.set_materialize_grads(False)


def _load(ctx: Any) -> list[Any]:
    saved = iter(ctx.saved_tensors)
    return [next(saved) if x is Ellipsis else x for x in ctx.template]


def _wants_mask(ctx: Any, mask: Tensor | None) -> bool:
    return mask is not None and mask.dtype != torch.bool and bool(ctx.needs_input_grad[_MASK])


def _to_inputs(ctx: Any, flat: Sequence[Any], grads: Sequence[Tensor], padding: int = 0) -> tuple[Tensor | None, ...]:
    """Cotangents of the flat arguments: those wanted, in the dtypes of their inputs."""
    found = [
        grad.to(x.dtype) if x is not None and ctx.needs_input_grad[i] else None
        for i, (x, grad) in enumerate(zip(flat[: ops.NUM_INPUTS], grads, strict=True))
    ]
    return (*found, *[None] * (len(flat) - ops.NUM_INPUTS + padding))


class _Attention(torch.autograd.Function):
    """The forward op. Its duals and residuals are constants, but not marked so: torch.func loses the mark under vmap,
    and then wants tangents for them."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return lib.forward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _save(ctx, *output[:3], *ops.without_residuals(inputs))
        ctx.has_dustbin = output[5].ndim > 1

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        output, row, col, *flat = _load(ctx)
        grad_output = torch.zeros_like(output) if grads[0] is None else grads[0]
        bins = grads[5:] if ctx.has_dustbin else (None, None)
        arguments = (grad_output, *bins, _wants_mask(ctx, flat[_MASK]), output, row, col, *flat)
        return _to_inputs(ctx, flat, attention_gradients(*arguments), padding=1)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        _, row, col, *flat = _load(ctx)
        output, *bins = _pushed(flat, Potentials(row, col), tangents, "attention")
        residual, absent = row.new_zeros(row.shape[1:3]), row.new_zeros(0)
        duals = torch.zeros_like(row), torch.zeros_like(col)
        return (output, *duals, residual, residual.clone(), *(bins or (absent, absent.clone())))


def _plan_function(name: PlanName) -> type[torch.autograd.Function]:
    """The Function around op `name`, "plan" or "log_plan"."""
    op = getattr(lib, name)

    class _Plan(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*args: Any) -> tuple[Tensor, ...]:
            return op(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            _save(ctx, *output[1:], *inputs)

        @staticmethod
        def backward(ctx: Any, grad_plan: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
            row, col, *flat = _load(ctx)
            if grad_plan is None:
                return tuple([None] * len(flat))
            arguments = (grad_plan, row, col, _wants_mask(ctx, flat[_MASK]), *flat)
            return _to_inputs(ctx, flat, plan_gradients(name, *arguments))

        @staticmethod
        def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
            row, col, *flat = _load(ctx)
            (found,) = _pushed(flat, Potentials(row, col), tangents, name)
            return found, torch.zeros_like(row), torch.zeros_like(col)

    return _Plan


def _pushed(
    flat: Sequence[Any], potentials: Potentials, tangents: Sequence[Tensor | None], what: What
) -> tuple[Tensor, ...]:
    inputs, problem, _ = ops.unflatten(flat)
    surrogate = Surrogate(inputs, problem, potentials, what)
    given = dict(zip(Inputs._fields, tangents, strict=False))
    moved = or_zeros([given[name] for name in surrogate.names], surrogate.primals)
    return pushforward(surrogate, surrogate.primals, moved)


torch.library.register_autograd(
    add_op_namespace_prefix("forward"), _Attention.backward, setup_context=_Attention.setup_context
)


class _AttentionGradients(torch.autograd.Function):
    """The backward op as a function of the cotangents and the inputs, to be differentiated again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return lib.backward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _save(ctx, *inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        output, to_bin, from_bin, wants_mask, _, row, col, *flat = _load(ctx)
        again = _Gradients(flat, Potentials(row, col), [output, to_bin, from_bin], wants_mask, "attention")
        given, inputs = again.pulled(grads)
        return (*given, None, None, None, None, *inputs)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        output, to_bin, from_bin, wants_mask, _, row, col, *flat = _load(ctx)
        again = _Gradients(flat, Potentials(row, col), [output, to_bin, from_bin], wants_mask, "attention")
        return again.pushed(tangents[:3], tangents[7:])


def _plan_gradients(name: PlanName) -> type[torch.autograd.Function]:
    """The Function around op `<name>_backward`."""
    adjoint = getattr(lib, f"{name}_backward")

    class _PlanGradients(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*args: Any) -> tuple[Tensor, ...]:
            return adjoint(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            _save(ctx, *inputs)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            cotangent, row, col, wants_mask, *flat = _load(ctx)
            given, inputs = _Gradients(flat, Potentials(row, col), [cotangent], wants_mask, name).pulled(grads)
            return (*given, None, None, None, *inputs)

        @staticmethod
        def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
            cotangent, row, col, wants_mask, *flat = _load(ctx)
            again = _Gradients(flat, Potentials(row, col), [cotangent], wants_mask, name)
            return again.pushed(tangents[:1], tangents[4:])

    return _PlanGradients


class _Gradients:
    """What a backward op computes, as a function of the cotangents it is given and the inputs."""

    def __init__(
        self,
        flat: Sequence[Any],
        potentials: Potentials,
        cotangents: Sequence[Tensor | None],
        wants_mask: bool,
        what: What,
    ):
        inputs, problem, _ = ops.unflatten(flat)
        self.flat = flat
        self.surrogate = Surrogate(inputs, problem, potentials, what, wants_mask)
        self.present = self.surrogate.cotangents(cotangents)
        self.given = [x is not None for x in cotangents]
        self.primals = (*self.surrogate.primals, *self.present)

    def _by_name(self, tensors: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        given = dict(zip(Inputs._fields, tensors, strict=False))
        return or_zeros([given[name] for name in self.surrogate.names], self.surrogate.primals)

    def pulled(self, grads: Sequence[Tensor | None]) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Cotangents of the given cotangents, and of the flat arguments."""
        found = pullback(self.surrogate.gradients, self.primals, self._by_name(grads))
        count = len(self.surrogate.names)
        inputs: list[Tensor | None] = [None] * len(self.flat)
        for name, grad in zip(self.surrogate.names, found[:count], strict=True):
            place = Inputs._fields.index(name)
            inputs[place] = grad.to(self.flat[place].dtype)
        cotangents: list[Tensor | None] = [*found[count:], *[None] * (len(self.given) - len(self.present))]
        return [x if given else None for x, given in zip(cotangents, self.given, strict=True)], inputs

    def pushed(self, cotangents: Sequence[Tensor | None], inputs: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """Tangents of the eight results."""
        tangents = (*self._by_name(inputs), *or_zeros(cotangents[: len(self.present)], self.present))
        found = pushforward(self.surrogate.gradients, self.primals, tangents)
        by_name = dict(zip(self.surrogate.names, found, strict=True))
        return tuple(by_name.get(name, found[0].new_zeros(0)) for name in Inputs._fields)


_PLAN_GRADIENTS = {name: _plan_gradients(name) for name in ops.PLANS}
_PLANS = {name: _plan_function(name) for name in ops.PLANS}
for _name, _function in _PLANS.items():
    torch.library.register_autograd(
        add_op_namespace_prefix(_name), _function.backward, setup_context=_function.setup_context
    )
