"""A plan whose passes are launches of the streaming kernels."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from torch_sinkhorn_attn.engines.tiled.augmented import AugmentedPlan
from torch_sinkhorn_attn.engines.triton.launch import launch
from torch_sinkhorn_attn.engines.triton.layout import Layout, Number, power_of_two
from torch_sinkhorn_attn.engines.triton.streaming import blocks, passes
from torch_sinkhorn_attn.engines.triton.streaming.half_step import half_step
from torch_sinkhorn_attn.method.staircase import Factor
from torch_sinkhorn_attn.problem.problem import Inputs, Problem

LARGEST_VALUE_CHUNK = 128


class StreamedPlan(AugmentedPlan):
    """What `engine.iterate`, `attention_output`, `marginal_errors` and `method.implicit` ask of a plan, one launch for
    each half-step and pass (`column_half_step`, `row_half_step`; after `at(u, v)` `row_pass`, `column_pass`, which take
    a `Factor`, `value_pass` and `dense`).

    For further kernels: `layout` (pointers and strides, `layout.direction`), `live_u` and `live_v` (the potentials as
    the kernels take them, `[N*H, width]`), and `live_factor(factor)` (with what a factor adds to them).
    """

    _of_potentials = ("live_u", "live_v")

    def __init__(self, inputs: Inputs, problem: Problem):
        super().__init__(inputs, problem)
        self.layout = Layout.of(inputs, problem)
        self._held: dict[bool, tuple[Tensor, Tensor]] = {}  # by `column`: the last potential and its live vector
        self._last_lse: dict[bool, Tensor] = {}

    @cached_property
    def _log_masses(self) -> tuple[Tensor, Tensor]:
        """To base 2, as live vectors: of rows, of columns."""
        return self._lives(self.log_a, False), self._lives(self.log_b, True)

    def _lives(self, potential: Tensor, column: bool) -> Tensor:
        return self.layout.live(potential, self.col_dead if column else self.row_dead, column)

    # The potentials of `at`, as kernels take them

    @cached_property
    def live_u(self) -> Tensor:
        return self._lives(self._u, False)

    @cached_property
    def live_v(self) -> Tensor:
        return self._lives(self._v, True)

    def live_factor(self, factor: Factor | None) -> tuple[Tensor, Tensor]:
        """u and v with a factor's exponents added: its entries are exp2(S + them)."""
        if factor is None:
            return self.live_u, self.live_v
        return self._lives(self.u + factor.row, False), self._lives(self.v + factor.col, True)

    # Half-steps

    def column_half_step(self, u: Tensor, old: Tensor | None = None) -> Tensor:
        if self.dustbin is not None:
            return super().column_half_step(u, old)
        return self._half_step(u, old, self.problem.solver.rho_col, column=True)

    def row_half_step(self, v: Tensor, old: Tensor | None = None) -> Tensor:
        if self.dustbin is not None:
            return super().row_half_step(v, old)
        return self._half_step(v, old, self.problem.solver.rho_row, column=False)

    def real_column_lse(self, u: Tensor) -> Tensor:
        return self._lse(u, column=True)

    def real_row_lse(self, v: Tensor) -> Tensor:
        return self._lse(v, column=False)

    def _held_live(self, potential: Tensor, column: bool) -> Tensor:
        """Its live vector; that which a half-step left, where it is that one's."""
        last = self._held.get(column)
        return last[1] if last is not None and last[0] is potential else self._lives(potential, column)

    def _half_step(self, other: Tensor, old: Tensor | None, rho: float, column: bool) -> Tensor:
        """The new potential of one side; its live vector is made over into the new one."""
        omega = self.problem.solver.over_relaxation
        relax = old is not None and omega != 1
        log_mass = self.log_b if column else self.log_a
        found = (log_mass.new_zeros if 0 in other.shape else log_mass.new_empty)(log_mass.shape)  # contiguous
        last = self._held.get(column)
        if relax and old is not None:
            own = self._held_live(old, column)
        else:
            own = self._lives(torch.zeros_like(log_mass) if old is None else old, column) if last is None else last[1]
        self._launch(other, own, self._log_masses[column], found, (Number.of(rho), Number.of(omega)), relax, column)
        self._held[column] = found, own
        return found

    def _lse(self, other: Tensor, column: bool) -> Tensor:
        """LSE of the real pairs `[N, H, lines]`; its last value is the guess for the next."""
        count = self.size if column else self.length
        found = other.new_full((self.num, self.heads, count), -torch.inf)
        last = self._held.get(column)
        guess = self._lives(
            torch.zeros_like(self.log_b if column else self.log_a) if last is None else -last[0], column
        )
        one = Number.of(1.0)
        self._launch(other, guess, guess, found, (one, one), None, column)
        self._held[column] = found, guess
        return found

    def _launch(
        self,
        other: Tensor,
        own: Tensor,
        log_mass: Tensor,
        found: Tensor,
        numbers: tuple[Number, Number],
        relax: bool | None,
        column: bool,
    ) -> None:
        outer, inner = (self.size, self.length) if column else (self.length, self.size)
        table = blocks.half_step_blocks(outer, self.layout.static)
        *sides, static = self.layout.direction(column, table.outer, table.inner)
        grid = self.layout.programs(column, table.outer)
        if not grid or not inner:
            return
        live = self._held_live(other, not column)
        launch(
            half_step,
            (grid,),
            *sides,
            live,
            own,
            log_mass,
            found,
            *numbers,
            found.shape[-1],
            FINISH=relax is not None,
            RELAX=bool(relax),
            S=static,
            num_warps=table.warps,
            num_stages=table.stages,
        )

    # Passes

    def real_row_pass(self, y: Tensor, factor: Factor | None = None) -> Tensor:
        live_u, live_v = self.live_factor(factor)
        return self._weighted(y, live_v, live_u, column=False)

    def real_column_pass(self, x: Tensor, factor: Factor | None = None) -> Tensor:
        live_u, live_v = self.live_factor(factor)
        return self._weighted(x, live_u, live_v, column=True)

    def _weighted(self, weights: Tensor, live: Tensor, own: Tensor, column: bool) -> Tensor:
        outer, inner = (self.size, self.length) if column else (self.length, self.size)
        found = weights.new_zeros(self.num, self.heads, outer)
        table = blocks.half_step_blocks(outer, self.layout.static)
        *sides, static = self.layout.direction(column, table.outer, table.inner)
        grid = self.layout.programs(column, table.outer)
        if grid and inner:
            launch(
                passes.weighted_pass,
                (grid,),
                *sides,
                live,
                own,
                self.layout.padded(weights, not column),
                found,
                outer,
                S=static,
                num_warps=table.warps,
                num_stages=table.stages,
            )
        return found

    def value_pass(self) -> tuple[Tensor, Tensor]:
        values, seed = self.layout.values, self.problem.dropout_seed
        assert values is not None
        width = values.data.shape[-1]
        out = self._u.new_zeros(self.num, self.heads, self.length, width)
        sums = self._u.new_zeros(self.num, self.heads, self.length)
        table = blocks.value_blocks(self.length, self.layout.static, width)
        *sides, static = self.layout.direction(False, table.outer, table.inner)
        chunk = min(64 if static.exact else LARGEST_VALUE_CHUNK, power_of_two(width))
        grid = self.layout.programs(False, table.outer), max(1, -(-width // chunk))
        if grid[0] and self.size:
            p = self.problem.solver.dropout_p
            launch(
                passes.value_pass,
                grid,
                *sides,
                values,
                self.live_v,
                self.live_u,
                self.live_u if seed is None else seed,
                int(p * 2**32),
                out,
                sums,
                FEATURES=width,
                CHUNK=chunk,
                DROPOUT=seed is not None,
                S=static,
                num_warps=table.warps,
                num_stages=table.stages,
            )
            if seed is not None:
                out = out / (1 - p)
        return out, sums

    def dense(self, found: Tensor, log: bool = False) -> None:
        """Write the plan of real pairs, or its logarithm, into `found [N, H, L, S]`, a view whose last stride is 1 and
        whose first two dimensions are one."""
        table = blocks.half_step_blocks(self.length, self.layout.static)
        *sides, static = self.layout.direction(False, table.outer, table.inner)
        grid = self.layout.programs(False, table.outer)
        if grid and self.size:
            launch(
                passes.write_plan,
                (grid,),
                *sides,
                self.live_v,
                self.live_u,
                found,
                found.stride(1),
                found.stride(2),
                LOG=log,
                S=static,
                num_warps=table.warps,
                num_stages=1,
            )
