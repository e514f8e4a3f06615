"""The wavefront an iteration at a time, where something couples all rows in every iteration: a dustbin, or a tolerance
of packed problems.

A pass of one iteration takes the column and the row half-step of every token, with its scores formed once; between
passes come what the dustbins do and who has converged. The output is one more reading of the scores, by `problem`'s own
passes.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from torch_sinkhorn_attn.engines.tpu.method import sinkhorn
from torch_sinkhorn_attn.engines.tpu.method.lowering import Lowering
from torch_sinkhorn_attn.engines.tpu.method.manual import vary_together
from torch_sinkhorn_attn.engines.tpu.method.problem import Result as Found
from torch_sinkhorn_attn.engines.tpu.resident.launch import resident_or_streamed
from torch_sinkhorn_attn.engines.tpu.wavefront.forward import PassStatics
from torch_sinkhorn_attn.engines.tpu.wavefront.passes import Start, lines_of, mask_floor, passes_of, run_pass
from torch_sinkhorn_attn.engines.tpu.wavefront.path import path_of
from torch_sinkhorn_attn.problem.segments import by_segment, centre_gauge, segment_max, segments


def coupled(problem: sinkhorn.Augmented, lowering: Lowering) -> str | None:
    """What couples all rows in every iteration, if anything does. A tolerance need not: where the base of each head
    ends is seen in one pass of all iterations, and a second one ends there. Of packed problems each ends elsewhere."""
    if problem.dustbin is not None:
        return "a dustbin"
    if not problem.statics.tolerance or not problem.statics.stopped:
        return None
    packed = problem.constants.row_segment is not None
    return "a tolerance" if packed or passes_of(problem, lowering, residuals=True) is None else None


def pass_of(problem: sinkhorn.Augmented) -> PassStatics:
    """A pass of one iteration."""
    path = path_of(problem.length, problem.size, problem.statics)
    return PassStatics(
        path, problem.statics, problem.dtype, 1, 0, (1,), False, False, False, mask_floor(problem),
        dustbin=problem.dustbin is not None,
    )  # fmt: skip


def forward(problem: sinkhorn.Augmented, lowering: Lowering, residuals: bool) -> Found:
    """`sinkhorn.forward` by passes of one iteration, and by `problem`'s own passes where the data want that."""
    potentials, suited = solve(problem, lowering)
    return resident_or_streamed(
        suited,
        lambda: sinkhorn.evaluate(problem, potentials, residuals),
        functools.partial(sinkhorn.forward, problem, residuals),
    )


class State(NamedTuple):
    """Augmented potentials, and whether the data kept to the path and every scaling stayed in range."""

    u: Array
    v: Array
    fine: Array


def solve(problem: sinkhorn.Augmented, lowering: Lowering) -> tuple[tuple[Array, Array], Array]:
    """`sinkhorn.solve`, and whether it was suited."""
    statics, own = problem.statics, segments(problem.constants)
    step = functools.partial(iteration, problem, lowering, pass_of(problem))
    state = State(*vary_together((*problem.initial_potentials(), jnp.bool_(True))))
    if not statics.tolerance:
        state = lax.fori_loop(0, statics.stopped, lambda _, state: step(state), state)
    elif statics.stopped:

        def more(carried: tuple[Any, State, Array]) -> Array:
            t, _, done = carried
            return (t < statics.stopped) & ~jnp.all(done)

        def guarded(carried: tuple[Any, State, Array]) -> tuple[Any, State, Array]:
            t, old, done = carried
            new = step(old)
            change = segment_max(jnp.abs(new.v - old.v), own.col, own.number)
            done = (t > 0) & (done | (change <= statics.tolerance))
            u = jnp.where(by_segment(done, own.row, old.u.shape[-1]), old.u, new.u)
            v = jnp.where(by_segment(done, own.col, old.v.shape[-1]), old.v, new.v)
            return t + 1, State(u, v, new.fine), done

        done = jnp.zeros_like(state.v, bool, (*state.v.shape[:2], own.number))
        state = lax.while_loop(more, guarded, (jnp.int32(0), state, done))[1]
    if statics.balanced and statics.stopped:
        u, v = centre_gauge(state.u, state.v, problem.log_a, problem.log_b, problem.components())
        state = state._replace(u=u, v=v)
    if statics.kept == 0:  # the row half-step from the stopped v: that of the last pass
        return (state.u[None], state.v[None]), state.fine

    def keep(state: State, _: None) -> tuple[State, tuple[Array, Array]]:
        state = step(state)
        return state, (state.u, state.v)

    last, (rows, cols) = lax.scan(keep, state, None, length=statics.kept)
    return (jnp.concatenate([state.u[None], rows]), jnp.concatenate([state.v[None], cols])), last.fine


def iteration(problem: sinkhorn.Augmented, lowering: Lowering, o: PassStatics, state: State) -> State:
    """The column and the row half-step of tokens and dustbins."""
    u, v = problem.real(state.u, state.v)
    bins, rho_row, rho_col = problem.dustbin, problem.statics.rho_row, problem.statics.rho_col
    start = Start(u, v, v)
    if bins is not None:
        none = jnp.full_like(v, -jnp.inf), jnp.full_like(u, -jnp.inf)
        lse = bins.column_lse(none[0], problem.live(state.u, problem.log_b)[0])
        bin_v = sinkhorn.potential(lse, problem.log_b, rho_col, None, 1)[..., problem.size :]
        live_v = jnp.where(problem.log_b[..., problem.size :] == -jnp.inf, -jnp.inf, bin_v)
        start = start._replace(row_bin=bins.row + bins.at_rows(live_v), col_bin=lse[..., : problem.size])
    named, fine = run_pass(problem, lowering, o, start, lines_of(problem), {})
    u, v = named["rows"][0], named["cols"][0]
    if bins is not None:
        v = jnp.concatenate([v, bin_v], -1)
        lse = bins.row_lse(none[1], problem.live(problem.log_a, v)[1])
        bin_u = sinkhorn.potential(lse, problem.log_a, rho_row, None, 1)[..., problem.length :]
        u = jnp.concatenate([u, bin_u], -1)
    return State(u, v, state.fine & fine)
