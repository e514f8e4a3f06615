"""The streaming kernels, each in terms of lines and of what lies across; M(p, q)_ij = exp(S_ij + p_i + q_j)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from torch_sinkhorn_attn.engines.tpu.streaming.cell import Cell, total

UNROLLED_TERMS = 8  # of a field; more are looped over


class LogSumExp:
    """lse_i = LSE_j(S_ij + v_j): a running maximum and sum in each lane, joined after the last tile."""

    def begin(self, cell: Cell) -> None:
        top, sums = cell.sums
        top[...] = jnp.full_like(top, jnp.finfo(cell.dtype).min)  # finite, so that no difference is NaN
        sums[...] = jnp.zeros_like(sums)

    def tile(self, cell: Cell, boundary: bool) -> None:
        top, sums = cell.sums
        scores = cell.scores(boundary, "v") + cell.across("v")
        old = top[...]
        new = jnp.maximum(old, cell.fold(scores, jnp.maximum))
        sums[...] = sums[...] * jnp.exp2(old - new) + cell.fold(jnp.exp2(scores - cell.all_lanes(new)))
        top[...] = new

    def end(self, cell: Cell) -> None:
        top, sums = (x[...].T for x in cell.sums)
        highest = jnp.max(top, axis=0, keepdims=True)
        mass = jnp.sum(sums * jnp.exp2(top - highest), axis=0, keepdims=True)
        cell.refs["lse"][...] = highest * cell.constant(math.log(2)) + jnp.log(mass)


class TimesVector:
    """out = M(p, q) y."""

    def begin(self, cell: Cell) -> None:
        cell.sums[0][...] = jnp.zeros_like(cell.sums[0])

    def tile(self, cell: Cell, boundary: bool) -> None:
        plan = cell.plan(cell.scores(boundary, "q", "p"), cell.line("p"), cell.across("q"))
        cell.sums[0][...] += cell.fold(plan * cell.across("y"))

    def end(self, cell: Cell) -> None:
        cell.refs["out"][...] = total(cell.sums[0][...])


class TimesMatrix:
    """out = M(p, q) W with dropout; with a running sum also the sums of M without it."""

    def begin(self, cell: Cell) -> None:
        cell.refs["out"][...] = jnp.zeros_like(cell.refs["out"])
        for sums in cell.sums:
            sums[...] = jnp.zeros_like(sums)

    def tile(self, cell: Cell, boundary: bool) -> None:
        plan = cell.plan(cell.scores(boundary, "q", "p"), cell.line("p"), cell.across("q"))
        for sums in cell.sums:
            sums[...] += cell.fold(plan)
        factor = cell.matrix("w")
        cell.refs["out"][...] += cell.product(cell.dropped_out(plan).astype(factor.dtype), factor, 0)

    def end(self, cell: Cell) -> None:
        for sums in cell.sums:
            cell.refs["sums"][...] = total(sums[...])


@dataclass(frozen=True)
class ScoreCotangent:
    """out = dS times what lies across, for dS_ij = P_ij D_ij - sum_k x_ki y_kj exp(S_ij + p_ki + q_kj) with
    D_ij = <g_i, h_j> dropped out; with a running sum also the sums of dS. `scaled`: the exponentials of p - u and q - v
    are in x and y already."""

    terms: int
    scaled: bool

    def begin(self, cell: Cell) -> None:
        cell.refs["out"][...] = jnp.zeros_like(cell.refs["out"])
        for sums in cell.sums:
            sums[...] = jnp.zeros_like(sums)

    def tile(self, cell: Cell, boundary: bool) -> None:
        cotangent = score_cotangent(cell, boundary, self.terms, self.scaled)
        for sums in cell.sums:
            sums[...] += cell.fold(cotangent)
        factor = cell.matrix("across")
        cell.refs["out"][...] += cell.product(cotangent.astype(factor.dtype), factor, 0)

    def end(self, cell: Cell) -> None:
        for sums in cell.sums:
            cell.refs["sums"][...] = total(sums[...])


def score_cotangent(cell: Cell, boundary: bool, terms: int, scaled: bool = False) -> Array:
    """dS on the tile."""
    scores = cell.scores(boundary, "v", "u")
    weights = cell.dropped_out(cell.product(cell.refs["g"][...], cell.matrix("h"), 1))
    plan = cell.plan(scores, cell.line("u"), cell.across("v"))

    def subtract(k: Any, found: Array) -> Array:
        weight = cell.line("x", k) * cell.across("y", k)
        return found - (weight if scaled else cell.plan(scores, cell.line("p", k), cell.across("q", k)) * weight)

    found = weights if scaled else plan * weights
    if terms > UNROLLED_TERMS:
        found = lax.fori_loop(0, terms, subtract, found)
    else:
        for k in range(terms):
            found = subtract(k, found)
    return plan * found if scaled else found


@dataclass(frozen=True)
class MaskCotangent:
    """The sum of dS over the heads and batch elements that share a mask, tile by tile."""

    terms: int

    def begin(self, cell: Cell) -> None:
        cell.refs["mask_cotangent"][...] = jnp.zeros_like(cell.refs["mask_cotangent"])

    def tile(self, cell: Cell, boundary: bool) -> None:
        cell.refs["mask_cotangent"][...] += score_cotangent(cell, boundary, self.terms)

    def end(self, cell: Cell) -> None:
        """Nothing is left to do."""
