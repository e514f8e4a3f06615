"""The solve and its adjoint where a problem's tokens lie on several devices: the passes of the rows here over the
columns held, and their vectors of columns completed (`sequence`). Nothing else of the schedule differs.

`Constants` are of the rows here and the columns held, `Inputs` of the tokens here, and `Result` is of rows here and
columns held. What all devices have alike (corner, the dustbin's value, a mask's cotangent along broadcast rows) gets
its cotangent in parts, one on each device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import jax.numpy as jnp
from jax import Array

from torch_sinkhorn_attn.engines.tpu.method import sinkhorn, staircase
from torch_sinkhorn_attn.engines.tpu.method.blockwise import BlockwisePasses
from torch_sinkhorn_attn.engines.tpu.method.dustbin import DustbinMatrix
from torch_sinkhorn_attn.engines.tpu.method.lowering import Lowering
from torch_sinkhorn_attn.engines.tpu.method.problem import Constants, Field, Inputs, Passes, Result, Statics
from torch_sinkhorn_attn.engines.tpu.method.sequence import Sequence
from torch_sinkhorn_attn.engines.tpu.method.sinkhorn import Augmented
from torch_sinkhorn_attn.problem.segments import (
    Components,
    components,
    largest,
    segment_logsumexp,
    segment_max,
    segment_sum,
)


class SharedPasses(Passes):
    """Passes over the rows here; sums over rows are completed, but for those of matrices, which go `Sequence.home`."""

    def __init__(self, local: Passes, sequence: Sequence):
        self.local, self.sequence = local, sequence

    def row_lse(self, v: Array) -> Array:
        return self.local.row_lse(v)

    def column_lse(self, u: Array) -> Array:
        return self.sequence.complete_lse(self.local.column_lse(u))

    def rows(self, p: Array, q: Array, y: Array) -> Array:
        return self.local.rows(p, q, y)

    def columns(self, p: Array, q: Array, x: Array) -> Array:
        return self.sequence.complete_sums(self.local.columns(p, q, x))

    def both(self, p: Array, q: Array, y: Array, weight: Array, more: Array) -> tuple[Array, Array]:
        rows, cols = self.local.both(p, q, y, weight, more)
        return rows, self.sequence.complete_sums(cols)

    def values(self, u: Array, v: Array) -> tuple[Array, Array]:
        return self.local.values(u, v)

    def value_cotangent(self, u: Array, v: Array, grad: Array) -> Array:
        """Of the rows here."""
        return self.local.value_cotangent(u, v, grad)

    def query_cotangent(
        self, u: Array, v: Array, grad: Array, field: Field, mask_grad: bool
    ) -> tuple[Array, Array | None]:
        return self.local.query_cotangent(u, v, grad, field, mask_grad)

    def key_cotangent(self, u: Array, v: Array, grad: Array, field: Field) -> Array:
        """Of the rows here."""
        return self.local.key_cotangent(u, v, grad, field)


class SharedLines(Components):
    """A partition of the lines of all devices, by the labels of those here: each counts its rows and the columns it
    owns, and the first device the dustbins, whose numbers all have."""

    sequence: Sequence

    @classmethod
    def of(cls, parts: Components, sequence: Sequence) -> SharedLines:
        found = cls(*parts)
        found.sequence = sequence
        return found

    def row_sum(self, x: Array) -> Array:
        real = self.sequence.rows
        counted = jnp.concatenate([x[..., :real], self.sequence.once(x[..., real:])], -1)
        return self.sequence.total(segment_sum(counted, self.row, self.number))

    def col_sum(self, x: Array) -> Array:
        own, bins, label = self._columns(x)
        counted = jnp.concatenate([own, self.sequence.once(bins)], -1)
        return self.sequence.total(segment_sum(counted, label, self.number))

    def col_max(self, x: Array) -> Array:
        own, bins, label = self._columns(x)
        return self.sequence.highest(segment_max(jnp.concatenate([own, bins], -1), label, self.number))

    def col_logsumexp(self, x: Array) -> Array:
        own, bins, label = self._columns(x)
        counted = jnp.concatenate([own, jnp.where(self.sequence.place == 0, bins, -jnp.inf)], -1)
        return self.sequence.lse(segment_logsumexp(counted, label, self.number))

    def _columns(self, x: Array) -> tuple[Array, Array, Array | None]:
        """The owned ones, the dustbins, and the labels of both."""
        return *_split(self.sequence, x), None if self.col is None else owned(self.sequence, self.col)


class SharedDustbin(DustbinMatrix):
    """The dustbins of a problem whose lines lie on several devices; vectors of columns are of the held."""

    sequence: Sequence

    def sum_rows(self, x: Array) -> Array:
        return self.sequence.total(super().sum_rows(x))

    def sum_cols(self, x: Array) -> Array:
        return self.sequence.total(segment_sum(self.sequence.owned(x), self._owned_index, self.count))

    def lse_rows(self, x: Array) -> Array:
        return self.sequence.lse(super().lse_rows(x))

    def lse_cols(self, x: Array) -> Array:
        return self.sequence.lse(segment_logsumexp(self.sequence.owned(x), self._owned_index, self.count))

    @property
    def _owned_index(self) -> Array | None:
        return None if self.col_index is None else self.sequence.owned(self.col_index)


class SharedAugmented(Augmented):
    """A problem of which the rows here, and the columns held, are worked on here."""

    def __init__(self, inputs: Inputs, constants: Constants, statics: Statics, local: Passes, sequence: Sequence):
        self.sequence = sequence
        passes = SharedPasses(local, sequence)
        super().__init__(inputs, constants, statics, passes, connected=sequence.joined)

    def _dustbin(self) -> DustbinMatrix:
        found = SharedDustbin(self.inputs, self.constants, self.statics.epsilon, self.dtype)
        found.sequence = self.sequence
        return found

    def own(self) -> Components:
        own, sequence = super().own(), self.sequence
        if own.row is not None:
            own = own._replace(number=sequence.groups)
        return SharedLines.of(own, sequence)

    def components(self) -> Components:
        if self.connected:
            return SharedLines.of(Components(None, None, 1), self.sequence)
        bins = self.constants.num_dustbins
        if bins and self.constants.row_segment is not None:
            return SharedLines.of(self.own()._replace(number=bins), self.sequence)
        if bins or not self.statics.banded:
            return SharedLines.of(Components(None, None, 1), self.sequence)
        found, sequence = components(self._whole_support(), self.statics), self.sequence
        row, col = found.row, found.col
        if row is not None and col is not None:
            row, col = sequence.own_rows(row), sequence.held_of_all(col)
        return SharedLines.of(Components(row, col, found.number), sequence)

    def _whole_support(self) -> Constants:
        """The intervals of all rows, and who is active, on every device: 8 bytes a token, and 8 for each head."""
        c, sequence = self.constants, self.sequence
        lo, hi = (jnp.where(c.row_lo < c.row_hi, x + sequence.first_held, 0) for x in (c.row_lo, c.row_hi))
        return c._replace(
            row_lo=sequence.gathered(lo),
            row_hi=sequence.gathered(hi),
            log_row_mass=sequence.gathered(c.log_row_mass),
            log_col_mass=sequence.gathered(sequence.owned(c.log_col_mass)),
        )

    def complete_sums(self, partial: Array) -> Array:
        return self.sequence.complete_sums(partial)

    def largest(self, error: Array) -> Array:
        return self.sequence.highest(largest(error))

    def anywhere(self, marked: Array) -> Array:
        return self.sequence.anywhere(jnp.any(marked))


def owned(sequence: Sequence, held: Array) -> Array:
    """The owned part of augmented column vectors `[..., held(+G)]`, and the dustbins."""
    return jnp.concatenate(_split(sequence, held), -1)


def _split(sequence: Sequence, x: Array) -> tuple[Array, Array]:
    count = sequence.held_count
    return sequence.owned(x[..., :count]), x[..., count:]


def problem(
    inputs: Inputs, constants: Constants, statics: Statics, lowering: Lowering, adjoint: bool, mask_grad: bool = False
) -> tuple[SharedAugmented, Lowering]:
    """The problem over the keys and values of the held columns, which the other devices send, and the lowering, its
    shape "blockwise", "streaming" or "resident".

    Raises:
        ValueError: kernels were asked for by name that cannot take the problem.
    """
    sequence = statics.sequence
    assert sequence is not None
    inputs = inputs._replace(
        key=sequence.held(inputs.key, -2),
        value=None if inputs.value is None else sequence.held(inputs.value, -2),
        mask=_of_columns(inputs.mask, sequence.held_of_all),
        col_score=None if inputs.col_score is None else sequence.held(inputs.col_score),
    )
    asked = lowering.shape
    if statics.dropout_p and asked == "auto":
        asked = "blockwise"
    if asked == "blockwise":
        plain = BlockwisePasses(inputs, constants, statics)
        return SharedAugmented(inputs, constants, statics, plain, sequence), replace(lowering, shape=asked)
    if statics.dropout_p or asked == "wavefront":
        raise ValueError(
            f"shape={asked!r} cannot take this problem: {_REASONS[asked == 'wavefront']}. Use shape='auto'."
        )
    from torch_sinkhorn_attn.engines.tpu.method import choice
    from torch_sinkhorn_attn.engines.tpu.streaming.passes import StreamingPasses

    if not mask_grad:
        inputs = choice.without_redundant_mask(inputs)
    passes = StreamingPasses(inputs, constants, statics, lowering)
    posed = SharedAugmented(inputs, constants, statics, passes, sequence)
    lowering = choice.base_of(inputs, statics, lowering)
    reason = None if asked == "streaming" else choice.refusal(posed, lowering, adjoint)
    apart = adjoint and (statics.implicit or mask_grad)  # which the resident kernel has not
    if asked == "resident" and reason is not None and not apart:
        raise ValueError(f"shape='resident' cannot take this problem: {reason}. Use shape='auto' or 'streaming'.")
    shape = "resident" if asked != "streaming" and reason is None and not apart else "streaming"
    return posed, replace(lowering, shape=shape)


_REASONS = (
    "with sequence_axis, dropout is counted in places of the whole sequence, which no kernel knows",
    "it takes all iterations of a row block before the next block, and with sequence_axis neighbours wait for each",
)


def _of_columns(mask: Array | None, change: Callable[[Array], Array]) -> Array | None:
    """A mask's columns changed, unless it is the same for all."""
    return mask if mask is None or mask.shape[-1] == 1 else change(mask)


def forward(inputs: Inputs, constants: Constants, statics: Statics, lowering: Lowering, residuals: bool) -> Result:
    """`run.forward`."""
    posed, used = problem(inputs, constants, statics, lowering, adjoint=False)
    if used.shape != "resident":
        return sinkhorn.forward(posed, residuals)
    from torch_sinkhorn_attn.engines.tpu.resident import passes as resident

    return resident.forward(posed, used, residuals)


def backward(
    inputs: Inputs,
    constants: Constants,
    statics: Statics,
    lowering: Lowering,
    output: Array,
    potentials: tuple[Array, Array],
    grad_output: Array,
    grad_bins: tuple[Array | None, Array | None],
    mask_grad: bool,
) -> tuple[Inputs, Array]:
    """`run.backward`: the cotangents of the tokens here."""
    posed, used = problem(inputs, constants, statics, lowering, True, mask_grad)
    sequence, (to_bin, from_bin) = posed.sequence, grad_bins
    if from_bin is not None:  # where a column is held, but not owned, nobody has asked for its mass
        from_bin = sequence.held(sequence.owned(from_bin))
    bins = to_bin, from_bin
    if used.shape == "resident":
        from torch_sinkhorn_attn.engines.tpu.resident import adjoint as resident

        found, dropped = resident.backward(posed, used, output, potentials, grad_output, bins)
    else:
        found, dropped = staircase.backward(posed, output, potentials, grad_output, bins, mask_grad)
    assert found.value is not None
    return found._replace(
        key=sequence.home(found.key),
        value=sequence.home(found.value),
        mask=_of_columns(found.mask, sequence.all_of_held),
        col_score=None if found.col_score is None else sequence.owned(found.col_score),
        corner_score=None if found.corner_score is None else sequence.once(found.corner_score),
    ), dropped
