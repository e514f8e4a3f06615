"""Run by test_sequence.py with four devices: the functions that are registered where tokens lie along an axis of the
mesh, on arrays laid out as ranks have them, against JAX's function on one device; float64, 1e-10."""

from __future__ import annotations

import sys
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from torch_sinkhorn_attn.engines.torchtpu import mesh, sequence
from torch_sinkhorn_attn.engines.torchtpu.sequence_program import GRADS, SAVED, Call
from torch_sinkhorn_attn.engines.tpu import Dustbin, Lowering, sinkhorn_attention
from torch_sinkhorn_attn.engines.tpu.releases import enable_x64

N, H, HK, L, E = 2, 4, 2, 24, 4
RANDOM = np.random.default_rng(0)


def normal(*shape: int) -> Any:
    return RANDOM.normal(size=shape)


LENGTHS = np.array([24, 15], np.int32)
SEED = np.array([7, 9], np.uint32)
PLAIN = Lowering("blockwise")
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # options, and arrays beside query, key and value
    "band, dustbin, dropout": (
        {"window": (3, 2), "dropout_p": 0.3, "base_iters": 4},
        {"query_lengths": LENGTHS, "dustbin_row_score": normal(N, H, L), "dustbin_col_score": normal(H, 1),
         "dustbin_corner_score": normal(H), "dropout_seed": SEED},
    ),
    "full, mask, masses": (
        {"base_iters": 3, "gradient": "implicit"},
        {"attn_mask": normal(N, 1, L, L), "row_mass": np.exp(normal(N, H, L))},
    ),
}  # fmt: skip


def on_one(options: dict[str, Any], arrays: dict[str, Any], weights: list[Any]) -> Any:
    """Results and gradients by JAX's own function."""
    given = dict(arrays)
    given |= {"key_lengths": given["query_lengths"]} if "query_lengths" in given else {}

    def loss(moving: dict[str, Any]) -> Any:
        named = {**given, **moving}
        bins = {name: named.pop("dustbin_" + name) for name in Dustbin._fields if "dustbin_" + name in named}
        dustbin = Dustbin(**bins) if bins else None
        found, aux = sinkhorn_attention(
            **named, **options, dustbin=dustbin, enable_gqa=True, return_aux=True, lowering=PLAIN
        )
        terms = [x for x in (found, aux.row_dustbin, aux.col_dustbin) if x is not None]
        return sum((x * w).sum() for x, w in zip(terms, weights)), (found, aux)

    moving = {n: x for n, x in given.items() if x.dtype == np.float64 and n != "row_mass"}
    gradients, found = jax.jit(jax.grad(loss, has_aux=True))(moving)
    return *found, gradients


def run(call: Call, arrays: dict[str, Any]) -> dict[str, Any]:
    """What the registered function computes, from whole arrays; what is of size 1 every rank has."""
    place = mesh.placement()
    assert place is not None
    made, sizes = sequence.sharded(call, {n: x.ndim for n, x in arrays.items()}, 1), dict(place.mesh.shape)
    given, parts = [], []
    for x, spec in zip(arrays.values(), made.specs, strict=True):
        shards = [sizes.get(axis, 1) for axis in (*spec, *[None] * x.ndim)][: x.ndim]
        copies = np.tile(x, [k if n == 1 else 1 for n, k in zip(x.shape, shards, strict=True)])
        given.append(jax.device_put(copies, NamedSharding(place.mesh, spec)))
        local = tuple(n // k for n, k in zip(copies.shape, shards, strict=True))
        parts.append(jax.ShapeDtypeStruct(local, x.dtype))
    groups = made.grouped(given)
    found = jax.jit(made.function(), static_argnums=len(groups))(*groups, call.text())
    for x, (shape, dtype) in zip(found, made.result_types(parts, call.text()), strict=True):
        assert x.addressable_shards[0].data.shape == shape and str(x.dtype) == dtype
    return dict(zip(call.result_names, found, strict=True))


def summed(x: jax.Array, shape: tuple[int, ...]) -> Any:
    """The ranks' parts of an array that is of this shape, and 1 where all have it, added where they belong."""
    found = np.zeros(shape)
    for shard in x.addressable_shards:
        at = tuple(slice(None) if n == 1 else s for n, s in zip(shape, shard.index, strict=True))
        found[at] += np.asarray(shard.data)
    return found


def close(where: str, x: Any, y: Any) -> None:
    x, y = np.asarray(x), np.asarray(y)
    assert x.shape == y.shape, (where, x.shape, y.shape)
    error = np.abs(x - y).max() / max(1.0, np.abs(y).max())
    assert error < 1e-10, (where, error)


def check(name: str) -> None:
    options, more = CASES[name]
    arrays = {"query": normal(N, H, L, E), "key": normal(N, HK, L, E), "value": normal(N, HK, L, E), **more}
    weights = [normal(N, H, L, E), normal(N, H, L), normal(N, H, L)]
    output, aux, truth = on_one(options, arrays, weights)
    same = ("lengths",) if "query_lengths" in arrays else ()
    numbers = tuple({**options, "enable_gqa": True}.items())
    call = Call("forward", tuple(arrays), numbers, same, ("data", None, "cp"), PLAIN)
    found = run(call, arrays)
    close(f"{name}: output", found["output"], output)
    for field in ("row_residual", "col_residual", "row_dustbin", "col_dustbin"):
        if getattr(aux, field) is not None:
            close(f"{name}: {field}", found[field], getattr(aux, field))
    given = {**arrays, **{key: found[key] for key in SAVED}, "grad_output": weights[0]}
    given |= dict(zip(GRADS[1:], weights[1:], strict=True)) if "row_dustbin" in found else {}
    moving = tuple(truth)
    back = Call("backward", tuple(given), numbers, same, call.axes, call.lowering, moving)
    gradients = run(back, given)
    for key, y in truth.items():
        close(f"{name}: gradient of {key}", summed(gradients[key], y.shape), y)


def main() -> None:
    place = mesh.Place(Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "cp")), "data", None, "cp")
    mesh._place = place
    with enable_x64(True):
        for name in sys.argv[1:] or CASES:
            check(name)
    print("agrees on", place.mesh.size, "devices")


if __name__ == "__main__":
    main()
