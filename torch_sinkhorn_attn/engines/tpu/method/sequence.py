"""A sequence sharded over a named axis of devices, inside `jax.shard_map`, and what devices tell each other.

Device r of P *owns* rows r L/P.. and columns r S/P.. . It *holds* the columns that its rows reach: all S, or, in a
band, its own and halos as wide as the window. Vectors over held columns are the same bits on every device that holds
one.

    device 0   h h o o o h h . . . .
    device 1   . . . h h o o o h h .        o owned, h halo; what lies before the first and after the last is nobody's
    device 2   . . . . . . h h o o o

A column's partial sums are completed by those who hold it: in a band one message to each neighbour, of so many numbers
as their spans share, whatever P is. Without a band it is an all-reduce, done in its halves (all-to-all, all-gather), so
that log-sum-exps take one, too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

import jax.numpy as jnp
from jax import Array, lax
from jax.nn import logsumexp

from torch_sinkhorn_attn.engines.tpu.method.manual import vary_like

_FEW = 1 << 12  # numbers that are gathered in one message rather than reduced in two


@dataclass(frozen=True)
class Sequence:
    """How a problem's tokens lie; part of the compiled program.

    Attributes:
        axis: the mesh axis, of `size` devices.
        rows, cols: tokens of a device, L/P and S/P.
        halo: columns held before and after the owned; None where all S are held.
        joined: every head is known to be one component of its support.
    """

    axis: str
    size: int
    rows: int
    cols: int
    halo: tuple[int, int] | None = None
    joined: bool = False

    @property
    def held_count(self) -> int:
        """Number of held columns.

        >>> Sequence("cp", 4, 8, 8, (2, 3)).held_count, Sequence("cp", 4, 8, 8).held_count
        (13, 32)
        """
        return self.size * self.cols if self.halo is None else self.cols + sum(self.halo)

    @property
    def groups(self) -> int:
        """How many segments there may be."""
        return max(1, self.size * min(self.rows, self.cols))

    @property
    def place(self) -> Array:
        """r, of this device."""
        return lax.axis_index(self.axis)

    @property
    def first_row(self) -> Array:
        """Number of the first row here among all."""
        return self.place * self.rows

    @property
    def first_held(self) -> Array:
        """Number of the first column held among all: negative where the halo reaches before the first."""
        return self.place * self.cols - self.halo[0] if self.halo is not None else jnp.int32(0)

    # Between owned, held and all

    def held(self, own: Array, axis: int = -1, fill: float = 0) -> Array:
        """The held columns, from what each device owns; `fill` for nobody's."""
        if self.halo is None:
            return lax.all_gather(own, self.axis, axis=axis % own.ndim, tiled=True)
        left, right = self.halo
        block, axis = self.cols, axis % own.ndim

        def lines(start: int, stop: int) -> Array:
            return lax.slice_in_dim(own, start, stop, axis=axis)

        before = [self._sent(d, lines(max(d * block - left, 0), block)) for d in _hops(left, block)]
        after = [self._sent(-d, lines(0, min(right - (d - 1) * block, block))) for d in _hops(right, block)]
        found = jnp.concatenate([*reversed(before), own, *after], axis)
        return self._known(found, axis, fill)

    def owned(self, held: Array, axis: int = -1) -> Array:
        """The owned among the held."""
        if self.halo is None:
            return lax.dynamic_slice_in_dim(held, self.place * self.cols, self.cols, axis)
        return lax.slice_in_dim(held, self.halo[0], self.halo[0] + self.cols, axis=axis % held.ndim)

    def held_of_all(self, whole: Array, axis: int = -1, fill: float = 0) -> Array:
        """The held columns of an array that has all of them."""
        if self.halo is None:
            return whole
        axis = axis % whole.ndim
        widths = [(0, 0)] * whole.ndim
        widths[axis] = self.halo
        padded = jnp.pad(whole, widths, constant_values=fill)
        return lax.dynamic_slice_in_dim(padded, self.place * self.cols, self.held_count, axis)

    def all_of_held(self, held: Array, axis: int = -1) -> Array:
        """The transpose: an array with all columns, 0 where none is held."""
        if self.halo is None:
            return held
        axis = axis % held.ndim
        shape = list(held.shape)
        shape[axis] = self.size * self.cols + sum(self.halo)
        whole = lax.dynamic_update_slice_in_dim(jnp.zeros_like(held, shape=shape), held, self.place * self.cols, axis)
        return lax.slice_in_dim(whole, self.halo[0], self.halo[0] + self.size * self.cols, axis=axis)

    def own_rows(self, whole: Array) -> Array:
        """The rows here of `[..., L]`."""
        return lax.dynamic_slice_in_dim(whole, self.first_row, self.rows, -1)

    def gathered(self, own: Array) -> Array:
        """`[..., P n]` of what each device has of it."""
        return lax.all_gather(own, self.axis, axis=own.ndim - 1, tiled=True)

    # Partial vectors over held columns, completed for all that hold them

    def complete_sums(self, partial: Array) -> Array:
        """`[..., held]` summed over the devices that hold a column."""
        if self.halo is None:
            return self.total(partial)
        return self._completed(partial, jnp.add, 0)

    def complete_lse(self, partial: Array) -> Array:
        """Likewise log sum exp, -inf over nothing."""
        if self.halo is None:
            parts = partial.reshape(*partial.shape[:-1], self.size, self.cols)
            axis = parts.ndim - 2
            return self.held(logsumexp(lax.all_to_all(parts, self.axis, axis, axis), axis=axis))
        return self._completed(partial, jnp.logaddexp, -jnp.inf)

    def home(self, partial: Array, axis: int = -2) -> Array:
        """`[..., held, E]` summed at the owners, `[..., S/P, E]`."""
        axis = axis % partial.ndim
        if self.halo is None:
            return lax.psum_scatter(partial, self.axis, scatter_dimension=axis, tiled=True)
        left, right = self.halo
        total = self.owned(partial, axis)
        for d in _hops(left, self.cols):  # what is held of device r - d lies at the end of its block
            start, stop = max(0, left - d * self.cols), left - (d - 1) * self.cols
            part = self._sent(-d, lax.slice_in_dim(partial, start, stop, axis=axis))
            total = total + _padded(part, axis, (self.cols - (stop - start), 0))
        for d in _hops(right, self.cols):
            start = left + d * self.cols
            stop = min(start + self.cols, self.held_count)
            part = self._sent(d, lax.slice_in_dim(partial, start, stop, axis=axis))
            total = total + _padded(part, axis, (0, self.cols - (stop - start)))
        return total

    # Numbers

    def total(self, x: Array) -> Array:
        """Summed over devices."""
        return vary_like(lax.psum(x, self.axis), x)

    def highest(self, x: Array) -> Array:
        return vary_like(lax.pmax(x, self.axis), x)

    def anywhere(self, x: Array) -> Array:
        """Whether it is marked on some device."""
        return self.highest(x.astype(jnp.int32)) > 0

    def lse(self, x: Array) -> Array:
        """Log sum exp over devices, of vectors that all have in full."""
        if x.size * self.size <= _FEW:
            return logsumexp(lax.all_gather(x, self.axis), axis=0)
        top = self.highest(x)
        safe = jnp.where(top == -jnp.inf, 0, top)
        return jnp.log(self.total(jnp.exp(x - safe))) + safe

    def once(self, x: Array) -> Array:
        """x on the first device, 0 on the others: what all have alike, to be summed."""
        return jnp.where(self.place == 0, x, jnp.zeros_like(x))

    # Messages

    def _sent(self, hops: int, x: Array) -> Array:
        """x of the device `hops` before this one; 0 where there is none."""
        pairs = [(r, r + hops) for r in range(self.size) if 0 <= r + hops < self.size]
        return lax.ppermute(x, self.axis, pairs)

    def _known(self, held: Array, axis: int, fill: float) -> Array:
        """With `fill` at what is nobody's, where ppermute leaves 0."""
        if fill == 0:
            return held
        shape = [1] * held.ndim
        shape[axis] = held.shape[axis]
        column = self.first_held + jnp.arange(held.shape[axis], dtype=jnp.int32).reshape(shape)
        return jnp.where((column >= 0) & (column < self.size * self.cols), held, jnp.full_like(held, fill))

    def _completed(self, partial: Array, add: Callable[[Array, Array], Array], nothing: float) -> Array:
        """In the order of devices, so that all get the same bits."""
        most, parts = self.held_count, []
        for d in range(1 - self.size, self.size):
            shared = most - abs(d) * self.cols  # columns that device r + d holds too: for d > 0 r's last, and its first
            if d == 0:
                parts.append(partial)
            elif shared > 0:
                part = self._sent(-d, partial[..., :shared] if d > 0 else partial[..., most - shared :])
                there = (self.place + d >= 0) & (self.place + d < self.size)
                part = jnp.where(there, part, jnp.full_like(part, nothing))
                parts.append(_padded(part, -1, (most - shared, 0) if d > 0 else (0, most - shared), nothing))
        return reduce(add, parts)


def _hops(halo: int, block: int) -> range:
    """Distances of the devices that a halo reaches.

    >>> list(_hops(0, 4)), list(_hops(4, 4)), list(_hops(5, 4))
    ([], [1], [1, 2])
    """
    return range(1, -(-halo // block) + 1)


def _padded(x: Array, axis: int, widths: tuple[int, int], fill: float = 0) -> Array:
    every = [(0, 0)] * x.ndim
    every[axis] = widths
    return jnp.pad(x, every, constant_values=fill)
