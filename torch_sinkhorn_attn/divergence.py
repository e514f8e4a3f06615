"""Transport between point sets: squared distances as products of features, and the Sinkhorn divergence."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_sinkhorn_attn.cost import sinkhorn_cost
from torch_sinkhorn_attn.options import Options, number, positive
from torch_sinkhorn_attn.problem.argument_checks import DTYPES, constant, integers
from torch_sinkhorn_attn.problem.problem import compute_dtype
from torch_sinkhorn_attn.problem.tensor_kinds import check_kind


def squared_distance_features(x: Tensor, y: Tensor, *, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Query and key whose scores are `-scale * |x_i - y_j|^2`, so that no matrix of costs is formed:

        |x - y|^2 = |x|^2 - 2 x.y + |y|^2 = -(2 x, -|x|^2, -1) . (y, 1, |y|^2)

    They are for every function of this package that takes query and key, with its own `scale` left at its default. Both
    sets are moved by the mean of all their points first, which changes no distance and keeps the digits of those that
    lie far from 0; where padding is part of x and y, fill it with zeros or, better, points of the set.

    Args:
        x: points `(..., H, L, E)`, or `(..., L, E)` with any number of leading dimensions (three in all at least).
        y: points `(..., H, S, E)`.
        scale: a number; 0.5 gives half the squared distance. Default 1.

    Returns:
        `(..., H, L, E + 2)` and `(..., H, S, E + 2)`, float32 (float64 for float64): 16-bit squares would have no
        digits left. Differentiable. Attention and plans under autocast would round them: leave it there, as
        `sinkhorn_cost`, `sinkhorn_divergence` and log plans do by themselves.

    Raises:
        TypeError, ValueError: x and y are no floating-point tensors of one dtype, equal in all but their number.

    >>> import torch
    >>> from torch_sinkhorn_attn import sinkhorn_plan
    >>> x, y = torch.randn(1, 5, 3), torch.randn(1, 4, 3)
    >>> by_features = sinkhorn_plan(*squared_distance_features(x, y), epsilon=0.5)
    >>> torch.allclose(by_features, sinkhorn_plan(-torch.cdist(x, y) ** 2, epsilon=0.5), atol=1e-5)
    True
    """
    for name, points in (("x", x), ("y", y)):
        _check_points(name, points)
    if x.dtype != y.dtype or x.device != y.device:
        raise TypeError(f"x is {x.dtype} on {x.device}, y {y.dtype} on {y.device}; give both one dtype and device.")
    if x.shape[:-2] != y.shape[:-2] or x.shape[-1] != y.shape[-1]:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and y {tuple(y.shape)}; all but the number of points must agree."
        )
    factor = number("scale", scale) * math.sqrt(x.shape[-1] + 2)  # beside the default scale of E + 2 features
    x, y = (points.to(compute_dtype(x.dtype)) for points in (x, y))
    if x.shape[-2] + y.shape[-2]:
        centre = torch.cat([x, y], -2).detach().mean(-2, keepdim=True)
        x, y = x - centre, y - centre
    one_x, one_y = torch.ones_like(x[..., :1]), torch.ones_like(y[..., :1])
    query = torch.cat([2 * x, -(x * x).sum(-1, keepdim=True), -one_x], -1) * factor
    return query, torch.cat([y, one_y, (y * y).sum(-1, keepdim=True)], -1)


def _check_points(name: str, points: Any) -> None:
    if not isinstance(points, Tensor):
        raise TypeError(f"{name} must be a tensor of points, got {type(points).__name__}.")
    check_kind(name, points)
    if points.dtype not in DTYPES:
        raise TypeError(f"{name} has dtype {points.dtype}; use float32, float64, bfloat16 or float16.")
    if points.ndim < 2 or points.shape[-1] == 0:
        raise ValueError(f"{name} has shape {tuple(points.shape)}; (..., points, coordinates) is needed.")


def sinkhorn_divergence(
    x: Tensor,
    y: Tensor,
    *,
    scale: float = 1.0,
    epsilon: float = Options.epsilon,
    x_mass: Tensor | None = None,
    y_mass: Tensor | None = None,
    x_lengths: Tensor | None = None,
    y_lengths: Tensor | None = None,
    relaxation: float | None = None,
    base_iters: int = 200,
    tail_iters: int = Options.tail_iters,
    tolerance: float | None = 1e-6,
    over_relaxation: float = Options.over_relaxation,
    engine: str | None = None,
) -> Tensor:
    r"""The debiased transport cost between two weighted point sets, for costs `scale * |x - y|^2`:

        S(x, y) = OT(x, y) - OT(x, x) / 2 - OT(y, y) / 2 + epsilon / 2 (sum a - sum b)^2

    OT being the dual value of `sinkhorn_cost`. It is 0 for equal sets, positive else, and between a multiple of the
    maximum mean discrepancy (large epsilon) and the transport cost itself (small). O(L + S) memory. Its gradient, by
    the envelope theorem, is exact where the three problems have converged: OT(x, x) takes as many iterations as the
    others, and more for a small epsilon.

    Args:
        x, y: points `(..., L, E)` and `(..., S, E)`; leading dimensions are problems of their own.
        scale: positive; 1 for the squared distance, 0.5 for half of it (GeomLoss's).
        epsilon: in the units of the cost; GeomLoss's blur is sqrt(epsilon) beside scale=0.5. Default 1.
        x_mass, y_mass: positive, broadcasting to `(..., L)`, `(..., S)`. Default: 1/L and 1/S, of the active points.
        x_lengths, y_lengths: integers `(...)`: only so many leading points are there.
        relaxation: tau > 0 of the KL penalty on both marginals (GeomLoss's reach squared, for p = 2 and scale=0.5);
            None balances them: both sets then need one mass.
        base_iters, tail_iters, tolerance, over_relaxation, engine: as in `sinkhorn_attention`, but that up to 200
            iterations are made, until the potentials move by less than 1e-6 of epsilon.

    Returns:
        `(...)`, float32 (float64 for float64). It has first derivatives alone.

    Raises:
        TypeError, ValueError: as `squared_distance_features` and `sinkhorn_attention`.

    Source: Feydy et al., Interpolating between Optimal Transport and MMD using Sinkhorn Divergences, AISTATS 2019;
    Sejourne et al., arXiv:1910.12958 (unbalanced, the term of the masses).

    >>> import torch
    >>> x = torch.randn(30, 2, generator=torch.Generator().manual_seed(0))
    >>> bool(sinkhorn_divergence(x, x).abs() < 1e-6), bool((sinkhorn_divergence(x, x + 1.0) - 2.0).abs() < 1e-3)
    (True, True)
    """
    if relaxation is not None:
        positive("relaxation", relaxation)
    positive("scale", scale)
    sides = _Side.of("x", x, x_mass, x_lengths), _Side.of("y", y, y_mass, y_lengths)
    options: dict[str, Any] = {
        "epsilon": epsilon, "relaxation": relaxation, "base_iters": base_iters, "tail_iters": tail_iters,
        "tolerance": tolerance, "over_relaxation": over_relaxation, "engine": engine,
    }  # fmt: skip

    def cost(one: _Side, other: _Side) -> Tensor:
        query, key = squared_distance_features(one.points, other.points, scale=scale)
        found = sinkhorn_cost(
            query, key, row_mass=one.mass, col_mass=other.mass, query_lengths=one.lengths, key_lengths=other.lengths,
            **options,
        )  # fmt: skip
        return found.dual[..., 0]

    found = cost(*sides) - (cost(sides[0], sides[0]) + cost(sides[1], sides[1])) / 2
    if relaxation is not None:
        found = found + epsilon / 2 * (sides[0].total() - sides[1].total()).to(found.dtype) ** 2
    return found.reshape(x.shape[:-2])


class _Side(NamedTuple):
    points: Tensor  # [B, 1, n, E]
    mass: Tensor  # [B, 1, n]
    lengths: Tensor | None  # [B]

    @staticmethod
    def of(name: str, points: Tensor, mass: Tensor | None, lengths: Tensor | None) -> _Side:
        _check_points(name, points)
        batch, (size, width) = points.shape[:-2], points.shape[-2:]
        lengths = integers(f"{name}_lengths", lengths, batch, points.device)
        mass = constant(f"{name}_mass", mass, (*batch, size), points)
        num, dtype = math.prod(batch), compute_dtype(points.dtype)
        if mass is None:
            count = torch.full(batch, size, device=points.device) if lengths is None else lengths
            mass = (1 / count.clamp(min=1).to(dtype))[..., None].expand(*batch, size)
        flat = points.reshape(num, 1, size, width)
        if lengths is not None:  # what padding holds is nobody's: not of the mean of all points either
            lengths = lengths.reshape(num)
            padding = torch.arange(size, device=points.device) >= lengths[:, None]
            some = torch.where((lengths > 0)[:, None, None, None], flat[:, :, :1].detach(), 0.0)
            flat = torch.where(padding[:, None, :, None], some, flat)
        return _Side(flat, mass.reshape(num, 1, size), lengths)

    def total(self) -> Tensor:
        """Mass of the active points, `[B]`."""
        if self.lengths is None:
            return self.mass[:, 0].sum(-1)
        place = torch.arange(self.mass.shape[-1], device=self.mass.device)
        return self.mass[:, 0].masked_fill(place >= self.lengths[:, None], 0.0).sum(-1)
