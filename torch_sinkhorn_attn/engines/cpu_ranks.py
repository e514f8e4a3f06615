"""The rows of a rank of a sharded sequence, by the C++ kernels: csrc/rank.h.

Tiles are kept as K = exp(S + alpha + beta) from one half-step to the next, as in a whole solve, so that a half-step is
a matrix-vector product with x = exp(u - alpha) or y = exp(v - beta). Whether K may still be read each rank can tell by
itself, so that nobody need agree on it: beta is such that the rows *here* sum to 1 in each column, whatever the others
have, and then

    K^T x    is right beside itself while the rows' scalings x stay moderate,
    K y      is right where it is not small itself: y is at most a column's mass over its part here.

Otherwise the half-step is made in the log domain, from the scores, and K again after the next one of columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torch_sinkhorn_attn.distributed.share import Share
from torch_sinkhorn_attn.distributed.tiles import OfRank, SharedPasses, SharedTiles, alike
from torch_sinkhorn_attn.engines import cpu
from torch_sinkhorn_attn.engines.tiled.adjoint import AdjointPasses, OutputCotangent, attention_gradients
from torch_sinkhorn_attn.engines.tiled.engine import gradients as tiled_gradients
from torch_sinkhorn_attn.engines.tiled.tiles import Tiles
from torch_sinkhorn_attn.method.staircase import Factor, Field
from torch_sinkhorn_attn.problem.problem import Inputs, OutputGrads, Potentials, Problem

VECTORS = ("u", "v", "x", "y", "grad", "output", "row_terms", "col_terms")  # places, as in csrc/checks.h
_NOT_OF_PAIRS = ("row_segment", "col_segment", "log_row_capacity", "log_col_capacity", "initial_row", "initial_col")
_OF_SCHEDULE = ("stopped", "kept", "implicit", "accelerated")

# Of the logarithms of scalings, and of the sums of a row: with these, what was flushed to 0 in K is lost in rounding.
_RANGE = {torch.float32: 20.0, torch.float64: 200.0}
_HIGHEST = 10.0
_SMALLEST = {torch.float32: 1e-22, torch.float64: 1e-200}


class Kernels:
    """The kernels of one rank's pairs, and what they remember: packed tokens, and tiles.

    Vectors are of real lines, contiguous; potentials are -inf on inactive ones.
    """

    def __init__(self, inputs: Inputs, problem: Problem, first: tuple[int, int]):
        given = (None if x is None else x.resolve_neg() for x in inputs[:4])  # which torch does not do within lists
        tensors, numbers, counts = cpu.arguments(Inputs(*given), problem)  # type: ignore[arg-type]
        for name in _NOT_OF_PAIRS:
            tensors[len(Inputs._fields) + cpu.TENSORS.index(name)] = None
        counts = [0 if name in _OF_SCHEDULE else x for name, x in zip(cpu.COUNTS, counts, strict=True)]
        self.arguments, self.first = (tensors, numbers, counts), list(first)
        size = torch.ops.torch_sinkhorn_attn.cpu_rank_bytes(*self.arguments)
        self.state = torch.empty(size, dtype=torch.uint8)
        self.size = inputs.key.shape[-2]
        self.scored = False  # the tiles hold scores
        self.absorbed: Absorbed | None = None
        self._call("pack", {})

    def col_lse(self, u: Tensor) -> Tensor:
        """LSE_i(S + u), from the scores."""
        return self._lse("col_lse", {"u": u})

    def row_lse(self, v: Tensor) -> Tensor:
        return self._lse("row_lse", {"v": v})

    def _lse(self, verb: str, vector: dict[str, Tensor]) -> Tensor:
        self.absorbed = None
        found = self._call(verb, vector)[0]
        self.scored = True
        return found

    def absorb(self, alpha: Tensor, beta: Tensor, normalised: bool = False) -> None:
        """The tiles become exp(S + alpha + beta)."""
        scored, self.scored, self.absorbed = self.scored, False, None

        def once() -> None:
            nonlocal scored
            flag, scored = scored, False  # an interrupted call has changed some of them
            self._op("absorb", {"u": alpha, "v": beta}, flag)

        cpu.run(once)
        self.absorbed = Absorbed(alpha, beta, normalised)

    def row_sums(self, y: Tensor) -> Tensor:
        """K y."""
        return self._of_tiles("row_sums", {"y": y})[0]

    def col_sums(self, x: Tensor) -> Tensor:
        """K^T x."""
        return self._of_tiles("col_sums", {"x": x})[0]

    def sweep(self, mass: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """K y, and K^T x with the scalings x = mass / K y that balance the rows, in one reading."""
        rows, cols = self._of_tiles("sweep", {"x": mass, "y": y})
        return rows, cols

    def values(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """diag(x) K diag(y) V with dropout, and its row sums without V."""
        output, sums = self._of_tiles("values", {"x": x, "y": y})
        return output, sums

    def value_gradient(self, u: Tensor, v: Tensor, grad: Tensor, output: Tensor) -> Tensor:
        """P^T dO / a with dropout, of each query head; the tiles become P = exp(S + u + v)."""
        self.scored, self.absorbed = False, None
        found = self._call("value_gradient", {"u": u, "v": v, "grad": grad, "output": output})[0]
        self.absorbed = Absorbed(u, v, False)
        return found

    def score_gradients(self, grad: Tensor, output: Tensor, field: Field, mask: bool) -> list[Tensor]:
        """Cotangents of query, of key by query head, and of the mask, where the tiles are P."""
        given = {"grad": grad, "output": output, "row_terms": field.row_terms[..., : grad.shape[-2], :].contiguous()}
        given["col_terms"] = field.col_terms[..., : self.size, :].contiguous()
        return self._of_tiles("score_gradients", given, mask)

    def _of_tiles(self, verb: str, vectors: dict[str, Tensor], flag: bool = False) -> list[Tensor]:
        assert self.absorbed is not None
        return self._call(verb, {"u": self.absorbed.alpha, "v": self.absorbed.beta, **vectors}, flag)

    def _call(self, verb: str, vectors: dict[str, Tensor], flag: bool = False) -> list[Tensor]:
        return cpu.run(self._op, verb, vectors, flag)

    def _op(self, verb: str, vectors: dict[str, Tensor], flag: bool) -> list[Tensor]:
        given = [vectors.get(name) for name in VECTORS]
        return torch.ops.torch_sinkhorn_attn.cpu_rank(self.state, verb, given, self.first, flag, *self.arguments)


class Absorbed:
    """The potentials that the tiles K = exp(S + alpha + beta) hold."""

    def __init__(self, alpha: Tensor, beta: Tensor, normalised: bool):
        self.alpha, self.beta = alpha, beta
        self.normalised = normalised  # the rows here sum to 1 in each column
        self.alpha_or_zero, self.beta_or_zero = (x.masked_fill(x == -torch.inf, 0.0) for x in (alpha, beta))

    def rows(self, u: Tensor) -> Tensor | None:
        """x, 0 on inactive lines; None where K may not be read with it."""
        moved = u - self.alpha_or_zero
        size = moved.masked_fill(u == -torch.inf, 0.0).abs()
        return moved.exp_() if bool((size <= _RANGE[u.dtype]).all()) else None

    def cols(self, v: Tensor) -> Tensor | None:
        """y likewise; entries that underflow are those of columns with next to nothing here."""
        moved = v - self.beta_or_zero
        return moved.exp_() if bool((moved <= _HIGHEST).all()) else None


class SharedKernels(OfRank):
    """`tiles.SharedTiles` by kernels."""

    def __init__(self, inputs: Inputs, share: Share):
        self.share = share
        super().__init__(inputs, share.problem)
        self.kernels = Kernels(inputs, share.problem, (share.first_row, share.columns.start))
        self.unsupported = self.row_dead[..., : self.length]  # rows without real pairs, as far as it is known
        solver = share.problem.solver
        plain = solver.rho_row == 1 and solver.over_relaxation == 1 and self.dustbin is None
        self._mass = self._rows(self.log_a).exp() if plain else None  # of rows whose half-step a sweep foretells
        self._sweeping = False
        self._swept: Tensor | None = None  # K^T x with the scalings of the row half-step that was made last
        self._ahead: tuple[Tensor, Tensor] | None = None  # the potentials that it gave, and that

    def _rows(self, x: Tensor) -> Tensor:
        return x[..., : self.length].contiguous()

    def _cols(self, x: Tensor) -> Tensor:
        return x[..., : self.size].contiguous()

    def row_half_step(self, v: Tensor, old: Tensor | None = None) -> Tensor:
        """Of a stopped iteration, which has an old u, with the sums of the column half-step that comes next. Kept
        potentials are rounded, and what follows is computed from them as they are."""
        self._swept, self._sweeping = None, old is not None and self._mass is not None
        u = super().row_half_step(v, old)
        self._ahead = None if self._swept is None else (u, self._swept)
        return u

    def column_half_step(self, u: Tensor, old: Tensor | None = None) -> Tensor:
        ahead, self._ahead = self._ahead, None
        self._swept = ahead[1] if ahead is not None and ahead[0] is u else None
        return super().column_half_step(u, old)

    def real_column_lse(self, u: Tensor) -> Tensor:
        u, kernels = self._rows(u), self.kernels
        at = kernels.absorbed
        x = at.rows(u) if at is not None and at.normalised else None
        if at is not None and x is not None:
            sums = kernels.col_sums(x) if self._swept is None else self._swept
            return sums.log_() - at.beta_or_zero
        found = kernels.col_lse(u)
        kernels.absorb(u, (-found).masked_fill_(found == -torch.inf, -torch.inf), normalised=True)
        return found

    def real_row_lse(self, v: Tensor) -> Tensor:
        v, kernels = self._cols(v), self.kernels
        at = kernels.absorbed
        y = None if at is None else at.cols(v)
        if at is not None and y is not None:
            if self._sweeping and at.normalised and self._mass is not None:
                sums, self._swept = kernels.sweep(self._mass, y)
            else:
                sums = kernels.row_sums(y)
            if bool(((sums > _SMALLEST[v.dtype]) | self.unsupported).all()):
                return sums.log_() - at.alpha_or_zero
        found, self._swept = kernels.row_lse(v), None
        self.unsupported = found == -torch.inf
        return found

    def _scalings(self) -> tuple[Tensor, Tensor]:
        """x and y with which the tiles are the plan."""
        u, v = self._rows(self._u), self._cols(self._v)
        at = self.kernels.absorbed
        x, y = (None, None) if at is None else (at.rows(u), at.cols(v))
        if x is None or y is None:
            self.kernels.absorb(u, v)
            x, y = ((z > -torch.inf).to(z.dtype) for z in (u, v))
        return x, y

    def real_row_pass(self, y: Tensor, factor: Factor | None = None) -> Tensor:
        if factor is not None:
            return self.tiles.real_row_pass(y, factor)
        outside, inside = self._scalings()
        return outside * self.kernels.row_sums(inside * self._cols(y))

    def real_column_pass(self, x: Tensor, factor: Factor | None = None) -> Tensor:
        if factor is not None:
            return self.tiles.real_column_pass(x, factor)
        inside, outside = self._scalings()
        return outside * self.kernels.col_sums(inside * self._rows(x))

    def value_pass(self) -> tuple[Tensor, Tensor]:
        return self.kernels.values(*self._scalings())

    @property
    def tiles(self) -> Tiles:
        """Of the same plan, for factors that are not made of it: beside them it underflows."""
        return SharedTiles(self.inputs, self.share).at(self.u, self.v)


class SharedKernelPasses(AdjointPasses):
    """The passes of the adjoint, of factors that are scaled."""

    plan: SharedKernels
    grad_value: Tensor | None = None  # per query head, [N, H, S, Ev]

    def __init__(self, plan: SharedKernels, cotangent: OutputCotangent, output: Tensor, mask: bool):
        super().__init__(plan)
        self.row_sums, self.bins = cotangent.row_sums, cotangent.bins
        self.grad, self.output, self.mask = cotangent.output.contiguous(), output.contiguous(), mask
        self.found: list[Tensor] = []

    def column(self, x: Tensor, factor: Factor, field: Field | None = None, deferred: Factor | None = None) -> Tensor:
        plan = self.plan
        if self.grad_value is None:
            u, v = plan._rows(plan._u), plan._cols(plan._v)
            self.grad_value = plan.kernels.value_gradient(u, v, self.grad, self.output)
        return plan.column_pass(x, factor)

    def row(self, y: Tensor, factor: Factor, field: Field | None = None) -> Tensor:
        if field is not None:
            self.found = self.plan.kernels.score_gradients(self.grad, self.output, field, self.mask)
        return self.plan.row_pass(y, factor)

    def real_column_sums(self) -> Tensor:
        plan, value = self.plan, self.plan.inputs.value
        assert self.grad_value is not None and value is not None
        return (plan.by_group(self.grad_value) * plan.per_head(value)).sum(-1).flatten(1, 2)

    def gathered(self, field: Field) -> Inputs:
        assert self.grad_value is not None
        query, key, mask = self.found
        groups = self.plan.groups
        key, value = (cpu.by_key_head(x, groups) for x in (key, self.grad_value))
        return Inputs(query, key, value, mask if self.mask and self.plan.inputs.mask is not None else None)


def gradients(plan: SharedKernels, output: Tensor, potentials: Potentials, grads: OutputGrads) -> Inputs:
    """The adjoint of attention; by tiles where duals differ so much that factors are not made of the plan."""
    if not alike(plan, potentials):
        return tiled_gradients(SharedPasses(plan.tiles, output, grads, potentials, may_scale=False), potentials).inputs
    cotangent = OutputCotangent(plan, output, grads)
    passes = SharedKernelPasses(plan, cotangent, output, grads.mask)
    return attention_gradients(passes, cotangent, potentials).inputs
