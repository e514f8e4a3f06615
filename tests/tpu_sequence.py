"""Cases of it are run by test_sequence.py with virtual devices: `sinkhorn_attention(sequence_axis=...)` inside
`jax.shard_map`, against one device with all tokens: output, aux and the gradients of every array."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec as P

from torch_sinkhorn_attn.engines.tpu import Dustbin, SinkhornAux, sinkhorn_attention
from torch_sinkhorn_attn.engines.tpu.releases import enable_x64

AXIS = "cp"
Arrays = dict[str, jax.Array]


class Case:
    """A call: its options, and its arrays beside query, key and value, by name, with where they lie."""

    def __init__(
        self, lengths: tuple[int, int] = (24, 24), heads: int = 2, key_heads: int = 0, seed: int = 0, **options: Any
    ):
        self.length, self.size = lengths
        self.heads, self.key_heads, self.options = heads, key_heads or heads, options
        self.arrays: dict[str, tuple[Any, P]] = {}
        self.random = np.random.default_rng(seed)  # numpy's: nothing is compiled for it
        for name, head, n in (
            ("query", heads, self.length),
            ("key", self.key_heads, self.size),
            ("value", self.key_heads, self.size),
        ):
            self.add(name, self.normal(2, head, n, 4), 2)

    def normal(self, *shape: int) -> Any:
        return self.random.normal(size=shape)

    def add(self, name: str, x: Any, dim: int | None = None) -> Case:
        """An array whose dimension `dim` lies along the sequence; None: all have it."""
        self.arrays[name] = x, P(*[AXIS if i == dim else None for i in range(x.ndim)])
        return self

    def masses(self, rows: bool = True, cols: bool = True) -> Case:
        a, b = np.exp(self.normal(2, self.heads, self.length) / 2), np.exp(self.normal(2, self.heads, self.size) / 2)
        if rows:
            self.add("row_mass", a, 2)
        if cols:
            self.add("col_mass", b * a.sum(-1, keepdims=True) / b.sum(-1, keepdims=True) if rows else b, 2)
        return self

    def segments(self, ids: list[int], others: list[int] | None = None) -> Case:
        """The first batch element in these runs, the second in those backwards; keys have the same array, or others."""

        def both(x: list[int]) -> Any:
            top = max(x)
            return np.array([x, [i if i < 0 else top - i for i in reversed(x)]])

        self.add("query_segment_ids", both(ids), 1)
        return self if others is None else self.add("key_segment_ids", both(others), 1)

    def dustbin(self, scalar: bool = False) -> Case:
        self.add("corner_score", self.normal(self.heads))
        if scalar:
            return self.add("row_score", np.array(self.normal(1)[0])).add("col_score", self.normal(self.heads, 1))
        self.add("row_score", self.normal(2, self.heads, self.length), 2).add(
            "value_of_bin", self.normal(2, self.heads, 4)
        )
        return self.add("col_score", self.normal(2, self.heads, self.size), 2)

    def start(self, bins: int = 0) -> Case:
        """A warm start; dustbins' potentials are everyone's."""
        self.add("row_start", self.normal(2, self.heads, self.length), 2).add(
            "col_start", self.normal(2, self.heads, self.size), 2
        )
        return self.add("row_start_bins", self.normal(2, self.heads, bins)).add(
            "col_start_bins", self.normal(2, self.heads, bins)
        )

    def call(self, arrays: Arrays, axis: str | None) -> Any:
        given, options = dict(arrays), dict(self.options)
        if "row_score" in given:
            scores = given.pop("row_score"), given.pop("col_score"), given.pop("corner_score")
            options["dustbin"] = Dustbin(
                *scores, *options.pop("capacities", (None, None)), given.pop("value_of_bin", None)
            )
        if "row_start" in given:
            row, col = (
                jnp.concatenate([given.pop(f"{side}_start"), given.pop(f"{side}_start_bins")], -1)
                for side in ("row", "col")
            )
            options["initial_potentials"] = row, col
        for name in ("lengths", "segment_ids"):
            if f"query_{name}" in given and f"key_{name}" not in given:
                given[f"key_{name}"] = given[f"query_{name}"]
        if options.get("dropout_p"):
            options["dropout_seed"] = jnp.array([3, 7], jnp.uint32)
        enable = self.heads != self.key_heads
        return sinkhorn_attention(**given, **options, enable_gqa=enable, return_aux=True, sequence_axis=axis)


def band(window: tuple[int, int] = (3, 3), **options: Any) -> Case:
    return Case(window=window, base_iters=4, **options)


def masked(case: Case, kind: str = "float", rows: int = 0, heads: int = 1) -> Case:
    x = case.normal(2, heads, rows or case.length, case.size)
    x = x > -1 if kind == "bool" else np.where(x < -1, -np.inf, x)
    if rows != 1:
        x[..., 5, :] = False if kind == "bool" else -np.inf
    x[..., 9] = False if kind == "bool" else -1e5
    return case.add("attn_mask", x, None if rows == 1 else 2)


IDS = [0] * 7 + [1] * 6 + [-1] * 2 + [2] * 9
CASES: dict[str, Callable[[], Case]] = {
    "band": band,
    "full": lambda: Case(base_iters=3),
    "band, dustbin, dropout": lambda: band(dropout_p=0.3, tail_iters=3).dustbin(),
    "full, masses, dropout": lambda: Case((24, 48), base_iters=3, dropout_p=0.3, gradient="unrolled").masses(),
    "band, lengths": lambda: band((5, 2)).add("query_lengths", np.array([24, 17])),
    "band, relaxed": lambda: band((2, 4), relaxation=(0.7, None), over_relaxation=1.2).masses(cols=False),
    "band, tolerance": lambda: band(tolerance=0.3).dustbin(scalar=True),
    "band, accelerated": lambda: band(acceleration="chebyshev", tail_iters=1, key_heads=1),
    "band, implicit": lambda: band(gradient="implicit"),
    "band, rectangular": lambda: Case((24, 48), window=(4, 5), base_iters=3, tail_iters=0),
    "band, warm": lambda: band(tolerance=1e-3).start(),
    "wide band": lambda: band((5, 7)),
    "band of one": lambda: band((0, 0), relaxation=1.0),
    "band, float mask": lambda: masked(band((6, 6))),
    "full, bool mask": lambda: masked(Case(base_iters=3), "bool", heads=2),
    "full, padding": lambda: masked(Case(base_iters=3), rows=1),
    "band, segments": lambda: band(acceleration="chebyshev").segments(IDS),
    "segments": lambda: Case(base_iters=3, tolerance=0.2).segments(IDS, [0] * 5 + [1] * 9 + [2] * 10),
    "segments, dustbin": lambda: Case(base_iters=3, gradient="implicit").segments(IDS).dustbin(),
    "band, segments, dustbin": lambda: band().segments(IDS).dustbin(),
    "lengths": lambda: (
        Case((24, 48), window=(9, 9), base_iters=3)
        .add("query_lengths", np.array([24, 17]))
        .add("key_lengths", np.array([30, 48]))
    ),
    "causal, dustbin": lambda: Case(is_causal=True, base_iters=3).dustbin(scalar=True),
    "centres": lambda: Case(window=(6, 7), base_iters=3, relaxation=1.0).add(
        "window_centers", np.arange(24.0) * 0.9, 0
    ),
    "softmax": lambda: Case(base_iters=0, tail_iters=0),
    "apart": lambda: band((0, 1), key_heads=1),
}  # fmt: skip


def a_row_each(devices: int) -> Case:
    """Whose mask has one row on every device, which is no row for all."""
    case = Case((devices, 2 * devices), base_iters=3, relaxation=2.0)
    mask = case.normal(2, 1, case.length, case.size)
    mask[..., 1:] = np.where(mask[..., 1:] < 0, -np.inf, mask[..., 1:])
    return case.add("attn_mask", mask, 2)


def outcome(case: Case, call: Callable[[Arrays], Any]) -> Any:
    """Output, aux, and the gradients of all float arrays, of a loss that weighs every entry."""
    arrays = {name: x for name, (x, _) in case.arrays.items()}
    constant = ("row_mass", "col_mass", "window_centers", "_start")
    moving = {
        n: x
        for n, x in arrays.items()
        if jnp.issubdtype(x.dtype, jnp.floating) and not n.endswith(constant) and "start" not in n
    }

    def loss(moving: Arrays) -> Any:
        output, aux = call({**arrays, **moving})
        found = [x for x in (output, aux.row_dustbin, aux.col_dustbin) if x is not None]
        return sum((jnp.sin(jnp.arange(x.size)).reshape(x.shape) * x).sum() for x in found), (output, aux)

    gradients, found = jax.jit(jax.grad(loss, has_aux=True))(moving)
    return *found, gradients


def on_devices(case: Case, devices: int) -> Any:
    """`outcome` with the tokens on so many devices."""
    mesh = jax.make_mesh((devices,), (AXIS,), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    specs = {name: spec for name, (_, spec) in case.arrays.items()}
    tokens, everywhere = P(None, None, AXIS), P()

    def local(arrays: Arrays) -> Any:
        output, aux = case.call(arrays, AXIS)
        n, m = arrays["query"].shape[-2], arrays["key"].shape[-2]
        cut = aux._replace(row_potential=aux.row_potential[..., :n], col_potential=aux.col_potential[..., :m])
        bins = aux.row_potential[..., n:], aux.col_potential[..., m:]
        same = jax.tree.map(lambda x: jax.lax.pmax(x, AXIS), (aux.row_residual, aux.col_residual, *bins))
        return output, cut._replace(row_residual=same[0], col_residual=same[1]), same[2:]

    def sharded(arrays: Arrays) -> Any:
        bins = tokens if "row_score" in arrays else None
        aux = SinkhornAux(tokens, tokens, everywhere, everywhere, bins, bins)
        run = jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=(tokens, aux, (everywhere, everywhere)))
        output, aux, (row, col) = run(arrays)
        row, col = jnp.concatenate([aux.row_potential, row], -1), jnp.concatenate([aux.col_potential, col], -1)
        return output, aux._replace(row_potential=row, col_potential=col)

    return outcome(case, sharded)


def on_one(case: Case) -> Any:
    """`outcome` with all tokens on one device."""
    return outcome(case, lambda arrays: case.call(arrays, None))


def compare(told: str, expected: Any, found: Any) -> float:
    """The largest error, relative to entries above 1.

    Raises:
        AssertionError: one of 1e-10 or more, other shapes, or a number that is not finite.
    """
    largest, there = 0.0, dict(jax.tree_util.tree_leaves_with_path(found))
    for path, array in jax.tree_util.tree_leaves_with_path(expected):
        x, y, where = np.asarray(array), np.asarray(there[path]), f"{told}: {jax.tree_util.keystr(path)}"
        assert x.shape == y.shape, (where, x.shape, y.shape)
        assert np.isfinite(x).all(), where
        error = float(np.abs(x - y).max() / max(1.0, np.abs(x).max())) if x.size else 0.0
        assert error < 1e-10, (where, error)
        largest = max(largest, error)
    return largest


def check(name: str, devices: int) -> None:
    case = a_row_each(devices) if name == "a row each" else CASES[name]()
    compare(f"{name} on {devices}", on_one(case), on_devices(case, devices))


if __name__ == "__main__":
    with enable_x64(True):
        for devices in map(int, sys.argv[1].split(",")):
            for name in sys.argv[2:] or CASES:
                check(name, devices)
