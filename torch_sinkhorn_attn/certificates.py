"""Certificates at run time: how balanced the plan is, how fast the iteration contracts, how far the surrogate's
gradient is from the implicit one, and what would bring the plan into balance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

from torch_sinkhorn_attn.compat.tracing import one_node
from torch_sinkhorn_attn.distributed import context
from torch_sinkhorn_attn.engines import engine_of
from torch_sinkhorn_attn.engines.tiled.tiles import Tiles
from torch_sinkhorn_attn.functional import refuse_unknown
from torch_sinkhorn_attn.options import CONVERGED_WITHIN
from torch_sinkhorn_attn.problem.arguments import Keywords, Prepared, prepare
from torch_sinkhorn_attn.problem.problem import Potentials, without_autocast
from torch_sinkhorn_attn.problem.status import judge
from torch_sinkhorn_attn.problem.tensor_kinds import check_kind
from torch_sinkhorn_attn.thermometer import exact, quick
from torch_sinkhorn_attn.thermometer.advice import advice
from torch_sinkhorn_attn.thermometer.passes import Passes, solved
from torch_sinkhorn_attn.thermometer.probes import probe
from torch_sinkhorn_attn.thermometer.table import table

MODES = ("exact", "quick")
RATE = 7  # its place among the numbers found
PROBE_WIDTH = 16


@dataclass(frozen=True)
class Certificate:
    """What `certify` found, per batch element, head and (when packed) segment: tensors `(..., H)` or `(..., H, G)`.

    Attributes:
        row_residual_l1, row_residual_max: L1 and L-infinity norm of P 1 - a at the returned duals.
        col_residual_l1, col_residual_max: of P^T 1 - b. On a relaxed side the marginal is penalised, not enforced.
        positive: whether every pair of active tokens (the dustbin's included) is in the support.
        diameter: upper bound of the projective diameter Delta of exp(S) (Delta itself with `exact_diameter`); inf where
            not positive.
        contraction: Birkhoff-Hopf factor kappa = tanh(Delta/4) of one half-step in Hilbert's metric, at any iterate;
            1 = not certified.
        rate: a-posteriori rate per plain iteration near the fixed point: second singular value squared of
            diag(P1)^(-1/2) P diag(P^T 1)^(-1/2) (relaxed: rho_r rho_c times the first), by power iteration, which
            approaches it from below.
        dropped: L1 norm of the cotangent the surrogate drops, for the probe's or your cotangent.
        bias_bound: certified bound of ||dS_unrolled - dS_tail||_1, unrolled through the iterations that were taken, at
            most T; inf = not certified (a zero in the block, kappa = 1, a relaxed side, or an over-relaxed or
            accelerated base, whose half-steps kappa does not bound).
        implicit_bias_bound: the same against the implicit gradient, whatever the base; holds at converged duals.
        measured_bias: ||dS_tail - dS_implicit||_1, both evaluated at the returned plan, with your options' gradient in
            place of the tail.
        implicit_norm: ||dS_implicit||_1, what to divide `measured_bias` by.
        status: int8, a `Status`: converged, not converged, or no plan. Without a plan there are no potentials to
            converge to, and the numbers above are those of an iterate on its way to nowhere.
        reasons: in words, why problems without a plan have none.
        advice: in words, for what is not balanced: settings that would be, as measured, or why none can be; "" if all
            is balanced, or nothing was asked (`advise=False`).
        mode: "exact" or "quick". Quick, what is not of the residuals, the rate and the status is not computed: NaN, or
            None for `positive`, and "-" in print.
    """

    row_residual_l1: Tensor
    row_residual_max: Tensor
    col_residual_l1: Tensor
    col_residual_max: Tensor
    positive: Tensor | None
    diameter: Tensor
    contraction: Tensor
    rate: Tensor
    dropped: Tensor
    bias_bound: Tensor
    implicit_bias_bound: Tensor
    measured_bias: Tensor
    implicit_norm: Tensor
    status: Tensor
    reasons = ()  # no fields: all of these are tensors
    advice = ""
    mode = "exact"

    @property
    def relative_bias(self) -> Tensor:
        """measured_bias / implicit_norm, 0 where both vanish."""
        return torch.where(self.implicit_norm == 0, 0.0, self.measured_bias / self.implicit_norm)

    def __str__(self) -> str:
        return table(self)

    __repr__ = __str__


@one_node
def certify(
    query: Tensor,
    key: Tensor | None = None,
    attn_mask: Tensor | None = None,
    *,
    value: Tensor | None = None,
    grad_output: Tensor | None = None,
    exact_diameter: bool = False,
    mode: str = "exact",
    advise: bool = True,
    sequence_group: Any = None,
    **options: Unpack[Keywords],
) -> Certificate:
    """Certificates of the plan that `sinkhorn_attention` computes with the same options (dropout aside).

    The bias of a gradient depends on the cotangent it is given. Pass your `value` and `grad_output` for the exact case;
    by default a Gaussian probe drawn from a fixed seed stands in for what is missing.

    Where the plan is not balanced, the engine is run on the slowest of the problems (one batch element and head) with
    other settings: more iterations, over-relaxed and accelerated ones, until some bring its column sums within 1 %.
    What was measured is the certificate's `advice`.

    Args:
        query, key, attn_mask, options: as `sinkhorn_attention`.
        value: `(..., Hk, S, Ev)`.
        grad_output: `(..., H, L, Ev)`, dL/dO; needs `value`.
        exact_diameter: compute Delta itself in O(n^2 m) instead of its one-pass bound 2 (max log P - min log P).
        mode: "exact" (default): everything, in tiles of plain PyTorch, in 20 to 130 times the time of the call.
            "quick": residuals and the rate, by passes of the engine, in two to three times its time. The rate is a
            lower bound, as the other mode's is; 1 - rate is mostly less than a tenth too large, in windows of sharp
            scores up to twice, in sharp problems that are far from balance up to 15 times. Beyond 0.9999 or so it tells
            that plain iterations are hopeless, not how much. Relaxed, it is exact.
        advise: look for settings where the plan is not balanced. Takes up to 12 (T + R) iterations of one head in some
            20 calls, which is the time of 25 calls at most.
        sequence_group: as in `sinkhorn_attention`: the certificate is that of the whole problem, the same on every
            rank. `value` and `grad_output` are local; what stands in for them is drawn whole on every rank for a
            moment. `exact_diameter` gathers the scores of all pairs.

    Returns:
        A frozen `Certificate`; print it for a table. Of XLA tensors it is on the CPU: only the plan is computed there.

    Raises:
        TypeError, ValueError: as `sinkhorn_attention`, or for `grad_output` without `value` or of the wrong shape, an
            unknown mode, and what mode="quick" does not read: `value`, `grad_output` and `exact_diameter`.

    >>> import torch
    >>> q, k = (torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in (0, 1))
    >>> certificate = certify(q, k, base_iters=50)
    >>> bool(certificate.positive.all()), bool((certificate.contraction < 1).all())
    (True, True)
    >>> bool((certificate.measured_bias <= certificate.implicit_bias_bound).all())
    True
    >>> certify(q, k, window=(2, 2)).contraction  # a band has zeros: not certified
    tensor([1.], dtype=torch.float64)
    >>> print(certify(q, k, epsilon=0.2, mode="quick").advice)
    A column sum of the problem is off by 2.03 %: base_iters=35, or over_relaxation=1.52 with base_iters=20, or ...
    """
    refuse_unknown("certify", options)
    _check(mode, value, grad_output, exact_diameter)
    for name, x in (("query", query), ("key", key), ("value", value), ("grad_output", grad_output)):
        if x is None and name != "query":
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}.")
        check_kind(name, x)
    keywords: Keywords = {**options, "dropout_p": 0.0}
    group = context.group_of(sequence_group, query)
    with torch.no_grad(), without_autocast(query):
        query, key, value = query.detach(), *(None if x is None else x.detach() for x in (key, value))
        asked = Asked(query, key, value, attn_mask, grad_output, exact_diameter, mode)
        if group is not None:
            from torch_sinkhorn_attn.distributed import certificates

            measured = certificates.measured(group, asked, keywords)
        else:
            measured = _measured(asked, keywords)
        return _certificate(measured, mode, advise)


class Asked(NamedTuple):
    """What is to be certified; `grad_output` as it was given."""

    query: Tensor
    key: Tensor | None
    value: Tensor | None
    mask: Tensor | None
    grad_output: Tensor | None
    exact_diameter: bool
    mode: str


class Measured(NamedTuple):
    """The numbers of a certificate up to its status, `[N, H, G]` each, and what advice needs."""

    numbers: tuple[Any, ...]
    passes: Passes
    at: quick.Returned
    prepared: Prepared


def _measured(asked: Asked, keywords: Keywords) -> Measured:
    """On one device."""
    query, key, value = asked[:3]
    if asked.mode == "exact" and value is None:
        value = probe(value_shape(query, key), query, seed=0)
    prepared = prepare(query, key, value, asked.mask, **keywords)
    if asked.mode == "quick":
        passes, at = quick.returned(prepared)
        return Measured(quick.numbers(passes, at, prepared.scale), passes, at, prepared)
    assert value is not None
    cotangent = cotangent_of(asked.grad_output, (*query.shape[:-1], value.shape[-1]), query)
    passes, inputs, potentials = solved(prepared)
    last = Potentials(potentials.row[-1], potentials.col[-1])
    (cotangent,) = engine_of(query.device).fetched((cotangent,))
    cotangent = cotangent.reshape(*inputs.query.shape[:3], cotangent.shape[-1])
    solution = exact.solved(Tiles(inputs, passes.problem).at(*last), potentials, cotangent)
    numbers = exact.exact_numbers(solution, asked.exact_diameter, prepared.scale)
    return Measured(numbers, passes, quick.following(passes, last), prepared)


def _certificate(measured: Measured, mode: str, advise: bool) -> Certificate:
    found, passes, at, prepared = measured
    packed = passes.problem.support.row_segment is not None
    residuals = tuple(found[k].cpu().double() for k in (1, 3))
    status, reasons = judge(residuals, CONVERGED_WITHIN, prepared.existence, by_segment=packed)
    said = advice(passes, at, found[RATE].cpu(), status, reasons, prepared) if advise else ""
    fields = (x if packed or x is None else x[..., 0] for x in (*found, status.to(found[RATE].device)))
    certificate = Certificate(*(None if x is None else prepared.unflatten(x) for x in fields))  # type: ignore[arg-type]
    for name, words in (("reasons", tuple(reasons)), ("advice", said), ("mode", mode)):
        object.__setattr__(certificate, name, words)
    return certificate


def _check(mode: str, value: Tensor | None, grad_output: Tensor | None, exact_diameter: bool) -> None:
    if mode not in MODES:
        raise ValueError(f"certify got mode={mode!r}; choose one of {', '.join(map(repr, MODES))}.")
    if grad_output is not None and value is None:
        raise ValueError("certify got grad_output without value; pass both, or neither for the probe.")
    given = {"value": value is not None, "grad_output": grad_output is not None, "exact_diameter": exact_diameter}
    unread = [name for name, there in given.items() if there]
    if mode == "quick" and unread:
        raise ValueError(
            f"certify got {unread[0]} with mode='quick', which computes nothing that depends on it: leave it out, or "
            "use mode='exact'."
        )


def value_shape(query: Tensor, key: Tensor | None) -> tuple[int, ...]:
    """Of a probe of values: of the keys' width, or of `PROBE_WIDTH` beside scores that are given."""
    return (*query.shape[:-2], query.shape[-1], PROBE_WIDTH) if key is None else tuple(key.shape)


def cotangent_of(grad_output: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """The cotangent of the output, which has that shape: the caller's, or a probe."""
    if grad_output is None:
        return probe(shape, like, seed=1)
    if grad_output.shape != shape:
        raise ValueError(f"grad_output has shape {tuple(grad_output.shape)}; the output's, {shape}, is needed.")
    return grad_output
