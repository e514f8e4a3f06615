"""The binding's computations with the tokens of a problem on several devices of a `Placement`: same arguments, same
results as of `sharded`.

The JAX program brings its own manual sharding (`engines.binding.sequence`), so whole tensors are handed to it. Blocks
are even: tokens and batch elements are filled up with inactive ones, and key heads that are fewer than the shards are
repeated.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch_xla import _XLAC  # type: ignore[attr-defined]

from torch_sinkhorn_attn.engines.binding import sequence
from torch_sinkhorn_attn.engines.binding.library import Tensors
from torch_sinkhorn_attn.engines.binding.shards import BATCH, BINS, COLS, EMPTY, HEADS, TOKENS, axes_with_tokens
from torch_sinkhorn_attn.engines.tpu.method.sequence import Sequence
from torch_sinkhorn_attn.engines.xla import binding, spmd
from torch_sinkhorn_attn.engines.xla.spmd import Placement

_AXES = {BATCH: "batch", HEADS: "heads", TOKENS: "tokens", 3: "copies"}


def run(function: str, place: Placement, trees: tuple[Tensors, ...], statics: dict[str, Any]) -> Tensors:
    """One of `functions`, by name, on the trees.

    Raises:
        ValueError: heads that the shards do not divide, or devices in an order that JAX's mesh has not.
    """
    inputs, constants = trees[:2]
    query, key = inputs["query"], inputs["key"]
    assert query is not None and key is not None
    heads, groups = query.shape[1], key.shape[1]
    if heads % place.heads:
        raise ValueError(
            f"query has {heads} heads, which {place.heads} shards do not divide; shard them by a divisor, or others."
        )
    counts = {"batch": query.shape[0], "rows": query.shape[2], "cols": key.shape[2]}
    capacity = constants["log_row_capacity"]
    given = dict(statics)
    asked = given.pop("statics")
    of_columns = sequence.dropped_is_of_columns(asked)
    layout = _Layout(place, counts, 0 if capacity is None else capacity.shape[-1], of_columns)
    rows, cols = (layout.even[side] // place.tokens for side in ("rows", "cols"))
    lying = sequence.statics_of(
        asked,
        Sequence(sequence.NAMES[TOKENS], place.tokens, rows, cols),
        even=rows * counts["cols"] == cols * counts["rows"],
        masked=inputs["mask"] is not None,
        packed=constants["row_segment"] is not None,
    )
    mesh = tuple((_AXES[axis], size) for axis, size in spmd.axes_in_order(place))
    whole = [layout.parts(tree) for tree in trees]
    found = binding.call(getattr(sequence, function), *whole, statics=lying, mesh=mesh, **given)
    joined = layout.joined(found)
    for name in ("key", "value"):
        x = joined.get(name)
        if x is not None and x.shape[1] != groups:
            joined[name] = x.unflatten(1, (groups, x.shape[1] // groups)).sum(2)
    return joined


class _Layout:
    """How tensors are filled up, and cut again."""

    def __init__(self, place: Placement, counts: dict[str, int], bins: int, dropped_of_columns: bool):
        self.place, self.counts, self.bins = place, counts, bins
        self.columns = COLS | {"dropped"} if dropped_of_columns else COLS
        shards = {"batch": place.batch, "rows": place.tokens, "cols": place.tokens}
        self.even = {side: max(1, -(-n // shards[side])) * shards[side] for side, n in counts.items()}

    def parts(self, tree: Tensors) -> Tensors:
        """The tensors as the program takes them; those of intervals of columns it takes none of."""
        found: Tensors = {}
        for name, x in tree.items():
            if x is None or name in ("col_lo", "col_hi"):
                found[name] = None
                continue
            bins = self.bins if name in _WITH_BINS else 0
            if bins:
                found[name + BINS] = self._filled(name + BINS, x[..., x.shape[-1] - bins :])
                x = x[..., : x.shape[-1] - bins]
            found[name] = self._filled(name, x)
        return found

    def joined(self, found: Tensors) -> Tensors:
        """The program's results, of the problem's own sizes, and lying as `place` says."""
        names = [name for name, x in found.items() if x is not None and not name.endswith(BINS)]
        return {name: self._own(name, found) for name in names}

    def _filled(self, name: str, x: Tensor) -> Tensor:
        if name in ("key", "value") and x.shape[1] % self.place.heads:
            times = self.place.heads // math.gcd(x.shape[1], self.place.heads)
            x = x[:, :, None].expand(-1, -1, times, -1, -1).flatten(1, 2)
        for dim, side in self._sides(name, x):
            missing = self.even[side] - x.shape[dim]
            if missing and not (name == "mask" and x.shape[dim] == 1):
                x = torch.cat([x, self._filling(name, x, dim, missing)], dim)
        return x

    def _filling(self, name: str, x: Tensor, dim: int, count: int) -> Tensor:
        """What stands for inactive tokens and empty problems; segments stay in order."""
        shape = list(x.shape)
        shape[dim] = count
        if name in ("row_segment", "col_segment") and x.shape[dim]:
            return x.narrow(dim, x.shape[dim] - 1, 1).expand(shape)
        return x.new_full(shape, -torch.inf if name in EMPTY else 0)

    def _own(self, name: str, found: Tensors) -> Tensor:
        x = found[name]
        assert x is not None
        for dim, side in self._sides(name, x):
            if x.shape[dim] > self.counts[side] and not (name == "mask" and x.shape[dim] == 1):
                x = x.narrow(dim, 0, self.counts[side])
        bins = found.get(name + BINS)
        if bins is not None:
            return torch.cat([x, bins.narrow(x.ndim - 3, 0, self.counts["batch"])], -1)
        lies = tuple(None if n == 1 else axis for n, axis in zip(x.shape, axes_with_tokens(name, x.ndim), strict=True))
        if any(axis is not None for axis in lies):
            x = x.clone()
            _XLAC._xla_annotate_custom_sharding(x, self.place.sharding(lies))
        return x

    def _sides(self, name: str, x: Tensor) -> list[tuple[int, str]]:
        """The dimensions that are filled up, and by how many of what."""
        tokens = "cols" if name in self.columns else "rows"
        by_axis = {BATCH: "batch", TOKENS: tokens}
        found = [(dim, by_axis[axis]) for dim, axis in enumerate(axes_with_tokens(name, x.ndim)) if axis in by_axis]
        return [*found, (3, "cols")] if name == "mask" else found


_WITH_BINS = {"initial_row", "initial_col", "row_potentials", "col_potentials"}
