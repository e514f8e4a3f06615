"""`sinkhorn_attention` where each rank has its own tokens: one program over the mesh of `mesh.set_sharding`, by ops of
torch_tpu, with their derivative.

The arguments are the ranks' own shards, as the JAX function takes them inside `jax.shard_map`; that function checks and
canonicalises them, for what is canonical depends on the tokens of all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_sinkhorn_attn.dustbin import Dustbin
from torch_sinkhorn_attn.engines.torchtpu import binding, mesh
from torch_sinkhorn_attn.engines.torchtpu.sequence_program import (
    DUSTBIN,
    GRADS,
    MOVING,
    SAVED,
    Call,
    lies,
    ndim_of,
    parse,
)
from torch_sinkhorn_attn.problem import arguments
from torch_sinkhorn_attn.problem.problem import compute_dtype
from torch_sinkhorn_attn.problem.status import SinkhornAux

_NAME = "torchtpu"


def attention(
    query: Tensor, key: Tensor | None, value: Tensor, attn_mask: Tensor | None, options: Any, return_aux: bool
) -> Tensor | tuple[Tensor, SinkhornAux]:
    """`sinkhorn_attention` of the tokens of all ranks along `mesh.Place.sequence`.

    Raises:
        TypeError, ValueError: as the JAX function; scores without a key, or another engine.
    """
    place = mesh.placement()
    assert place is not None and place.sequence is not None
    engine = options.get("engine")
    if engine not in (None, _NAME):
        raise ValueError(f"engine={engine!r} does not know the other ranks' tokens; leave engine out.")
    if key is None:
        raise ValueError(
            "key=None is not taken with a sharded sequence: scores of local queries and all keys go as a float "
            "attn_mask, beside a query and a key of zeros."
        )
    arrays, numbers, same = _arguments(query, key, value, attn_mask, options)
    names = tuple(arrays)
    axes = place.batch, place.heads, place.sequence
    call = Call("forward", names, numbers, same, axes, binding.lowering())
    found = dict(zip(call.result_names, _Attention.apply(call, query.ndim - 3, *arrays.values()), strict=True))
    if not return_aux:
        output: Tensor = found["output"]
        return output
    row, col, row_residual, col_residual = (found[name].detach() for name in call.result_names[1:5])
    bins = found.get("row_dustbin"), found.get("col_dustbin")
    return found["output"], SinkhornAux(row, col, row_residual, col_residual, *bins)


def _arguments(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, options: Any
) -> tuple[dict[str, Tensor], tuple[tuple[str, Any], ...], tuple[str, ...]]:
    """Tensors by name, numbers, and what queries and keys have in common."""
    given = {"query": query, "key": key, "value": value, "attn_mask": attn_mask, **options}
    given.pop("engine", None)
    dustbin, start = given.pop("dustbin", None), given.pop("initial_potentials", None)
    if dustbin is not None:
        if not isinstance(dustbin, Dustbin):
            raise TypeError(f"dustbin must be a Dustbin or None, got {dustbin!r}; pass Dustbin(row_score, col_score).")
        given |= {DUSTBIN + name: x for name, x in vars(dustbin).items()}
    if start is not None:
        given["initial_row"], given["initial_col"] = start
    seed = arguments.dropout_seed(given.get("dropout_p", 0.0), query.device)
    if seed is not None:
        given["dropout_seed"] = seed.to(torch.uint32)
    pairs = {kind: (f"query_{kind}", f"key_{kind}") for kind in ("lengths", "segment_ids")}
    same = tuple(
        k for k, (one, other) in pairs.items() if given.get(one) is not None and given[one] is given.get(other)
    )
    for kind in same:
        given.pop(f"key_{kind}")
    arrays = {name: _array(x) for name, x in given.items() if isinstance(x, Tensor)}
    numbers = tuple((name, x) for name, x in given.items() if x is not None and not isinstance(x, Tensor))
    constants = [n for n, x in given.items() if isinstance(x, Tensor) and x.requires_grad and n not in MOVING]
    if constants:
        raise ValueError(f"{constants[0]} requires grad, but it is a constant of the problem; detach it.")
    return arrays, numbers, same


def _array(x: Tensor) -> Tensor:
    """Integers in 32 bits, which a TPU has."""
    return x.to(torch.int32) if x.dtype in (torch.int64, torch.int16, torch.int8, torch.uint8) else x


class _Attention(torch.autograd.Function):
    """The two ops. Potentials, residuals and what is saved are constants."""

    @staticmethod
    def forward(ctx: Any, call: Call, batch: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        found = run(call, batch, list(tensors))
        ctx.call, ctx.batch = call, batch
        ctx.save_for_backward(*tensors, *found[-len(SAVED) :])
        ctx.mark_non_differentiable(*found[1:5], *found[-len(SAVED) :])
        ctx.set_materialize_grads(False)
        return tuple(found)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        call, tensors = ctx.call, ctx.saved_tensors
        given = dict(zip((*call.names, *SAVED), tensors, strict=True))
        by_result = dict(zip(call.result_names, grads, strict=True))
        output, dtype = by_result["output"], compute_dtype(given["query"].dtype)
        given["grad_output"] = torch.zeros_like(given[SAVED[0]]) if output is None else output.to(dtype)
        given |= {name: g for name in GRADS[1:] if (g := by_result.get(name.removeprefix("grad_"))) is not None}
        wanted = zip(call.names, ctx.needs_input_grad[2:], strict=True)
        moving = tuple(name for name, needed in wanted if needed and name in MOVING)
        pulled = Call("backward", tuple(given), call.options, call.same, call.axes, call.lowering, moving)
        found = dict(zip(moving, run(pulled, ctx.batch, list(given.values())), strict=True))
        return None, None, *(found.get(name) for name in call.names)


def run(call: Call, batch: int, leaves: list[Tensor]) -> list[Tensor]:
    """The results of a call on this rank's tensors."""
    made = sharded(call, {name: x.ndim for name, x in zip(call.names, leaves, strict=True)}, batch)
    found: list[Tensor] = binding.sharded_op(made)(*made.grouped(leaves), call.text())
    return found


def sharded(call: Call, ndims: dict[str, int], batch: int) -> mesh.Sharded:
    """How the arrays of a call with leaves of so many dimensions lie."""
    place = mesh.placement()
    assert place is not None
    names = call.result_names
    results = tuple((x, place.spec(lies(x, ndims.get(x) or ndim_of(x, batch), batch))) for x in names)
    specs = tuple(place.spec(lies(name, ndims[name], batch)) for name in call.names)
    return mesh.Sharded(place, f"sequence_{call.function}", specs, results, parse)
