"""A call of JAX's `sinkhorn_attention` whose tokens lie along an axis of a mesh, as a program of a list of arrays and a
text, like `program`. Arrays are a rank's own: its tokens, its batch elements, its heads. Nothing here imports torch.

The backward is given what the forward saved, so it does not solve again; of what ranks share, each gets its own part of
the gradient.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from torch_sinkhorn_attn.engines.binding.shards import BATCH, HEADS, TOKENS
from torch_sinkhorn_attn.engines.tpu.front.api import given_back, sinkhorn_attention
from torch_sinkhorn_attn.engines.tpu.front.prepare import Dustbin, Prepared, prepare
from torch_sinkhorn_attn.engines.tpu.method import batching
from torch_sinkhorn_attn.engines.tpu.method.lowering import Lowering

DUSTBIN = "dustbin_"  # begins the names of its fields
SAVED = ("saved_output", "saved_rows", "saved_cols")  # of the backward, beside the call's arrays
GRADS = ("grad_output", "grad_row_dustbin", "grad_col_dustbin")
_SCORES = "row_score", "col_score", "corner_score", "value"
MOVING = ("query", "key", "value", "attn_mask", *(DUSTBIN + name for name in _SCORES))
# What the last dimensions of an array lie along, "h" heads, "t" tokens, "." neither; those before are batch dimensions.
_DIMS = {
    **dict.fromkeys(("query", "key", "value", "output", "grad_output", "attn_mask", *SAVED), "ht."),
    **dict.fromkeys(("saved_rows", "saved_cols"), "ht"),
    **dict.fromkeys(("query_segment_ids", "key_segment_ids", "window_centers"), "t"),
    **dict.fromkeys(("row_mass", "col_mass", "initial_row", "initial_col", *GRADS[1:]), "ht"),
    **dict.fromkeys(("row_potential", "col_potential", "row_dustbin", "col_dustbin"), "ht"),
    **dict.fromkeys((DUSTBIN + f"{side}_{x}" for side in ("row", "col") for x in ("score", "capacity")), "ht"),
    **dict.fromkeys(("row_residual", "col_residual", DUSTBIN + "corner_score"), "h"),
    DUSTBIN + "value": "h.", "query_lengths": "", "key_lengths": "",
}  # fmt: skip


@dataclass(frozen=True)
class Call:
    """A call with everything that is compiled in.

    Attributes:
        function: "forward" or "backward".
        names: of the leaves: arguments, fields of the dustbin, and of the backward what is beside them.
        options: the numbers.
        axes: of the mesh, that batch, heads and tokens lie along.
        same: those of "lengths" and "segment_ids" of which keys have the queries' own array.
        moving: of the backward, the names of what gradients are wanted for.
    """

    function: str
    names: tuple[str, ...]
    options: tuple[tuple[str, Any], ...]
    same: tuple[str, ...]
    axes: tuple[str | None, str | None, str]
    lowering: Lowering
    moving: tuple[str, ...] = ()

    def text(self) -> str:
        """For `parse`."""
        return json.dumps(asdict(self), sort_keys=True)

    def __call__(self, arrays: Sequence[Array]) -> dict[str, Array]:
        """The results that are there, by name, in the order of `result_names`."""
        given = dict(zip(self.names, arrays, strict=True))
        found = self._forward(given) if self.function == "forward" else self._backward(given)
        return {name: found[name] for name in self.result_names}

    @property
    def result_names(self) -> tuple[str, ...]:
        if self.function == "backward":
            return self.moving
        names = ("output", "row_potential", "col_potential", "row_residual", "col_residual")
        has_dustbin = DUSTBIN + "row_score" in {*self.names, *dict(self.options)}
        return (*names, *(("row_dustbin", "col_dustbin") if has_dustbin else ()), *SAVED)

    def _prepared(self, arrays: Mapping[str, Any]) -> Prepared:
        given: dict[str, Any] = {**dict(self.options), **arrays}
        bins = {name: given.pop(DUSTBIN + name) for name in Dustbin._fields if DUSTBIN + name in given}
        if bins:
            given["dustbin"] = Dustbin(**bins)
        if "initial_row" in given:
            given["initial_potentials"] = given.pop("initial_row"), given.pop("initial_col")
        for kind in self.same:
            given[f"key_{kind}"] = given[f"query_{kind}"]
        bound = inspect.signature(sinkhorn_attention).bind(**given, sequence_axis=self.axes[2])
        bound.apply_defaults()
        posed = prepare(**{n: x for n, x in bound.arguments.items() if n not in ("lowering", "return_aux")})
        if posed.constants.dropout_seed is None:
            return posed
        return posed._replace(constants=posed.constants._replace(head_index=self._head_index(posed)))

    def _head_index(self, posed: Prepared) -> Array:
        """Numbers of the heads here among those of all ranks."""
        num, heads = posed.constants.log_row_mass.shape[:2]
        (place, _), (own, count) = (
            (0, 1) if axis is None else (jax.lax.axis_index(axis), jax.lax.axis_size(axis)) for axis in self.axes[:2]
        )
        rows, cols = jnp.arange(num, dtype=jnp.int32), jnp.arange(heads, dtype=jnp.int32)
        return (place * num + rows[:, None]) * (count * heads) + own * heads + cols

    def _forward(self, arrays: Mapping[str, Array]) -> dict[str, Any]:
        posed = self._prepared(arrays)
        result = batching.forward(posed.inputs, posed.constants, posed.statics, self.lowering, True)
        output, aux = given_back(posed, result, arrays["value"].dtype)
        saved = result.output, result.row_potentials, result.col_potentials
        return {"output": output, **aux._asdict(), **dict(zip(SAVED, saved, strict=True))}

    def _backward(self, arrays: dict[str, Array]) -> dict[str, Any]:
        rest = {name: x for name, x in arrays.items() if name not in (*SAVED, *GRADS)}
        saved = arrays[SAVED[0]], arrays[SAVED[1]], arrays[SAVED[2]]
        statics: list[Any] = []

        def pose(moving: dict[str, Array]) -> Any:
            """The floating-point inputs; all of them, and the constants."""
            posed = self._prepared({**rest, **moving})
            statics.append((posed.statics, None if posed.scale is None else posed.scale[1:]))
            floats = {n: x for n, x in posed.inputs._asdict().items() if x is not None and x.dtype != jnp.bool_}
            power = None if posed.scale is None else posed.scale.power
            return floats, jax.lax.stop_gradient((posed.inputs, posed.constants, power))

        floats, pull, (inputs, constants, power) = jax.vjp(pose, {n: rest[n] for n in self.moving}, has_aux=True)
        ((how, shares),) = statics
        shape = saved[0].shape
        factor = 1 if power is None or shares is None else jnp.exp2(sum(shares) * power)[..., None]

        def of_bin(name: str) -> Array | None:
            x = arrays.get(name)
            return None if x is None else x.reshape(*shape[:2], x.shape[-1]) * factor

        to_bin, from_bin = (of_bin(name) for name in GRADS[1:])
        if from_bin is not None:  # of the owned, where a plan has the held
            from_bin = how.sequence.held(from_bin)
        grads = arrays[GRADS[0]].reshape(shape), to_bin, from_bin
        found = batching.backward(inputs, constants, how, self.lowering, saved, grads, "attn_mask" in self.moving)
        wanted = {
            name: jnp.zeros_like(x) if (g := getattr(found, name)) is None else g.astype(x.dtype)
            for name, x in floats.items()
        }
        gradients: dict[str, Any] = pull(wanted)[0]
        return gradients


@functools.lru_cache(maxsize=4096)
def parse(text: str) -> Call:
    """The call of `Call.text`."""
    read = json.loads(text)
    options = tuple((name, tuple(x) if isinstance(x, list) else x) for name, x in read["options"])
    lists = {name: tuple(read[name]) for name in ("names", "same", "moving")}
    lists["axes"] = tuple(read["axes"])
    return Call(read["function"], options=options, lowering=Lowering(**read["lowering"]), **lists)


def lies(name: str, ndim: int, batch: int) -> tuple[int | None, ...]:
    """The axis that each dimension of a rank's array lies along: every rank's array is its own, alike or not. `batch`:
    the number of batch dimensions of query, the first of which is sharded."""
    dims = _DIMS.get(name, "")
    last = tuple({"h": HEADS, "t": TOKENS}.get(letter) for letter in dims[max(0, len(dims) - ndim) :])
    count = ndim - len(last)
    stacked = count - 1 if name in SAVED else 0
    has_batch = name in SAVED or (name in _DIMS and count == batch > 0)
    return (*(BATCH if has_batch and i == stacked else None for i in range(count)), *last)


def ndim_of(result: str, batch: int) -> int:
    """Dimensions of a result of the forward."""
    return 4 if result in SAVED else batch + len(_DIMS[result])
