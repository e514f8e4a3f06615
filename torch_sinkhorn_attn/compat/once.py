"""Gradients that may be taken once: taking them again raises with the reason instead of being silently wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_sinkhorn_attn.compat.releases import forward_level


def differentiable_once(
    grads: Sequence[Tensor | None], sources: Sequence[Tensor | None], reason: str
) -> list[Tensor | None]:
    """`grads`, tied to the tensors they came from; a backward through the tie raises RuntimeError(reason).

    Only needed (and only done) under `create_graph=True`.
    """
    if not torch.is_grad_enabled():
        return list(grads)
    tracked = [x for x in sources if x is not None and x.requires_grad]
    present = [g.detach() for g in grads if g is not None]
    tied = iter(_Once.apply(reason, len(present), *present, *tracked))
    return [None if g is None else next(tied) for g in grads]


def first_derivatives_only(tensors: Sequence[Tensor | None], reason: str) -> list[Tensor | None]:
    """The same tensors; what is computed from them has gradients that may be taken once. Programs that are compiled
    have no others."""
    if torch.compiler.is_compiling():
        return list(tensors)
    forward, reverse = forward_level() >= 0, torch.is_grad_enabled()  # in forward mode tangents do not show
    tracked = [
        i
        for i, x in enumerate(tensors)
        if x is not None and x.is_floating_point() and (forward or (reverse and x.requires_grad))
    ]
    if not tracked:
        return list(tensors)
    marked = iter(_FirstOnly.apply(reason, *(tensors[i] for i in tracked)))
    return [next(marked) if i in tracked else x for i, x in enumerate(tensors)]


class _FirstOnly(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(reason: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.clone() for x in tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.reason = inputs[0]
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        raise RuntimeError(ctx.reason)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, *differentiable_once(grads, [*ctx.saved_tensors, *grads], ctx.reason)


class _Once(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(reason: str, num: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.clone() for x in tensors[:num])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.reason = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(ctx.reason)
