"""`jax.vmap` of the entry points: the new axis is folded into N, so that kernels and loops run as for one larger batch
instead of being batched themselves."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_batching import custom_vmap

from torch_sinkhorn_attn.engines.tpu.method import run
from torch_sinkhorn_attn.engines.tpu.method.lowering import Lowering
from torch_sinkhorn_attn.engines.tpu.method.problem import Constants, Inputs, Result, Statics

_RESULT = Result._make((0, 1, 1, 0, 0, 0, 0))  # where N is in each array


def forward(inputs: Inputs, constants: Constants, statics: Statics, lowering: Lowering, residuals: bool) -> Result:
    """`run.forward`."""
    function = partial(run.forward, statics=statics, lowering=lowering, residuals=residuals)
    return _foldable(function, (0, 0), _RESULT, mask_grad=False)(inputs, constants)


def backward(
    inputs: Inputs,
    constants: Constants,
    statics: Statics,
    lowering: Lowering,
    saved: tuple[Array, Array, Array],
    grads: tuple[Array, Array | None, Array | None],
    mask_grad: bool,
) -> Inputs:
    """The cotangents of `run.backward`; `saved` holds the output and the duals."""

    def function(inputs: Inputs, constants: Constants, *arguments: Any) -> Inputs:
        compute = partial(run.backward, inputs, constants, statics, lowering, mask_grad=mask_grad)
        return compute(*arguments)[0]

    return _foldable(function, (0, 0, 0, 1, 1, 0, 0, 0), 0, mask_grad)(inputs, constants, *saved, *grads)


def _foldable(function: Callable[..., Any], axes: Any, out_axes: Any, mask_grad: bool) -> Callable[..., Any]:
    @custom_vmap
    def call(*arguments: Any) -> Any:
        return function(*arguments)

    @call.def_vmap
    def rule(size: int, batched: Any, *arguments: Any) -> tuple[Any, Any]:
        batched, (inputs, constants) = tuple(batched), arguments[:2]
        if batched[1].dropout_seed:  # a problem has one seed
            out = _mapped(call, batched, arguments)
            return out, jax.tree.map(lambda _: True, out)
        num, heads = constants.log_row_mass.shape[-3:-1]
        seed, mask, mine = constants.dropout_seed, inputs.mask, False
        if seed is not None and constants.head_index is None:  # every example drops what it would drop alone
            head = jnp.arange(num * heads, dtype=jnp.int32).reshape(num, heads)
            constants = constants._replace(head_index=head)
            batched = (batched[0], batched[1]._replace(head_index=False), *batched[2:])
        if mask is not None:
            mine = batched[0].mask or mask.shape[0] != 1 or mask_grad  # one mask for all stays one
            full = (*mask.shape[:-4], num, *mask.shape[-3:])
            inputs = inputs._replace(mask=jnp.broadcast_to(mask, full) if mine else None)
            batched = (batched[0]._replace(mask=batched[0].mask if mine else None), *batched[1:])
        arguments = (inputs, constants._replace(dropout_seed=None), *arguments[2:])
        batched = (batched[0], batched[1]._replace(dropout_seed=None), *batched[2:])
        folded = jax.tree.map(partial(_fold, size), _filled(axes, arguments), batched, arguments)
        inputs = folded[0] if mine or mask is None else folded[0]._replace(mask=mask)
        out = call(inputs, folded[1]._replace(dropout_seed=seed), *folded[2:])
        out = jax.tree.map(partial(_unfold, size), _filled(out_axes, out), out)
        if mask_grad and mask.shape[-4] != num:
            out = out._replace(mask=out.mask.sum(1, keepdims=True))
        return out, jax.tree.map(lambda _: True, out)

    return call


def _mapped(call: Callable[..., Any], batched: Any, arguments: Any) -> Any:
    leaves, structure = jax.tree.flatten(arguments)
    marks = jax.tree.leaves(batched)

    def one(moving: list[Array]) -> Any:
        moving_leaves = iter(moving)
        mixed = [next(moving_leaves) if mark else x for x, mark in zip(leaves, marks, strict=True)]
        return call(*jax.tree.unflatten(structure, mixed))

    return lax.map(one, [x for x, mark in zip(leaves, marks, strict=True) if mark])


def _filled(axes: Any, tree: Any) -> Any:
    """One axis for each leaf of a tree, from a prefix of it."""
    return jax.tree.map(lambda axis, part: jax.tree.map(lambda _: axis, part), axes, tree)


def _fold(size: int, axis: int, batched: bool, x: Array) -> Array:
    """A batched axis (in front, or none yet) and the axis of N made one."""
    if batched:
        x = jnp.moveaxis(x, 0, axis)
    else:
        x = jnp.broadcast_to(jnp.expand_dims(x, axis), (*x.shape[:axis], size, *x.shape[axis:]))
    return x.reshape(*x.shape[:axis], size * x.shape[axis + 1], *x.shape[axis + 2 :])


def _unfold(size: int, axis: int, x: Array) -> Array:
    x = x.reshape(*x.shape[:axis], size, x.shape[axis] // size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)
