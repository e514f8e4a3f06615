"""What a plan costs: the regularised transport cost with its gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_sinkhorn_attn._ops import ops as lib
from torch_sinkhorn_attn.boundary import autograd, ops
from torch_sinkhorn_attn.compat.once import first_derivatives_only
from torch_sinkhorn_attn.compat.tracing import one_node
from torch_sinkhorn_attn.engines import REFERENCE, choose
from torch_sinkhorn_attn.functional import refuse_dropout, refuse_unknown, run
from torch_sinkhorn_attn.method import reference
from torch_sinkhorn_attn.method.transport_cost import (
    Duals,
    Sums,
    corner_of,
    duals,
    relative,
    segments_of_tokens,
    slopes,
    values,
)
from torch_sinkhorn_attn.options import GRADIENTS
from torch_sinkhorn_attn.problem.arguments import Prepared, prepare
from torch_sinkhorn_attn.problem.masks.entries import kept
from torch_sinkhorn_attn.problem.problem import (
    Inputs,
    Potentials,
    Problem,
    compute_dtype,
    full_precision,
    without_autocast,
)
from torch_sinkhorn_attn.problem.segments import segment_sum

ENVELOPE = "envelope"
ONCE = (
    "sinkhorn_cost has first derivatives alone, and in reverse mode. For more write the cost with sinkhorn_plan, as "
    "-(plan * scores).sum(), and with sinkhorn_plan(..., log=True) for its entropy."
)


class TransportCost(NamedTuple):
    """The optimal value of one problem per batch element and head, `(..., H)`; packed segments are added up. In score
    units: the cost of a pair is minus its score (and minus epsilon times what a float mask adds)."""

    dual: Tensor  # the dual objective at the potentials found: a lower bound of the value
    primal: Tensor  # the primal one at the plan found, whose balanced marginals may be off by the residuals
    linear: Tensor  # <cost, plan> alone, without entropy and penalties
    row_potential: Tensor  # `(..., H, L)` and `(..., H, S)`, with dustbins as in `SinkhornAux`: `initial_potentials` of
    col_potential: Tensor  # the next call, after a small step of the points; constants


@one_node
def sinkhorn_cost(
    query: Tensor,
    key: Tensor | None = None,
    attn_mask: Tensor | None = None,
    *,
    gradient: str = ENVELOPE,
    **options: Any,
) -> TransportCost:
    r"""The regularised transport cost

        min over P >= 0   <C, P> + epsilon KL(P | a b^T) + tau_r KL(P 1 | a) + tau_c KL(P^T 1 | b)

    of costs C = -scores, for marginals that are fixed (balanced) or relaxed (tau, by `relaxation`), where
    KL(p | q) = sum p log(p / q) - p + q. For queries and keys it takes O(L + S) memory; a score matrix, and a float
    mask of L x S, are weighed by the plan as a matrix.

    Args:
        query, key, attn_mask, options: as in `sinkhorn_attention` (without dropout); `sinkhorn_cost(scores)` takes a
            score matrix. Masses are those of attention unless given: 1 for each query, L/S for each key. For
            probabilities pass `row_mass` and `col_mass` that sum to 1.
        gradient: "envelope", the default, holds the potentials: then the derivative of `dual` and `primal` with respect
            to the scores is minus the plan, as it is at the optimum, and no iteration is differentiated; `linear` has
            no gradient. "tail", "unrolled" and "implicit" differentiate `primal` and `linear` through the iterations,
            as in attention; `dual` keeps the envelope's. Of a value that has converged the envelope's gradient is the
            exact one, and a short tail's is not.

    Returns:
        `TransportCost`, in float32 (float64 for float64), under autocast too, which rounds nothing here. It has first
        derivatives alone: a second one, and forward mode, raise.

    Raises:
        TypeError, ValueError: as `sinkhorn_attention`.

    Source: Peyre and Cuturi, Computational Optimal Transport, 2019, propositions 4.4 and 9.2.

    >>> import torch
    >>> scores, mass = -torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.full((2,), 0.5)
    >>> cost = sinkhorn_cost(scores, epsilon=0.1, row_mass=mass, col_mass=mass)
    >>> bool((cost.dual - cost.primal).abs() < 1e-5), bool(cost.linear < 1e-4)
    (True, True)
    """
    refuse_unknown("sinkhorn_cost", {**options, "gradient": gradient})
    if gradient != ENVELOPE and gradient not in GRADIENTS:
        known = ", ".join(map(repr, (ENVELOPE, *GRADIENTS)))
        raise ValueError(f"gradient={gradient!r} is unknown; choose one of {known}.")
    refuse_dropout("sinkhorn_cost", options, "the plan has none")
    held = gradient == ENVELOPE
    with without_autocast(query):
        given = prepare(query, key, None, attn_mask, **options, gradient="tail" if held else gradient)
    problem, scale = given.problem, given.scale
    if not held and problem.has_dustbin and problem.solver.rho_row < 1:
        raise ValueError(
            f"gradient={gradient!r} is not known for a dustbin beside relaxed rows, for the mass that stays in the "
            "dustbin is no output of attention. Use gradient='envelope', or balanced rows: relaxation=(None, tau)."
        )
    with full_precision(given.inputs.query.device):
        wide = [x.to(_dtype(given)) if x is not None and x.is_floating_point() else x for x in given.inputs]
        inputs = Inputs._make(first_derivatives_only(wide, ONCE))
        with torch.no_grad():
            engine = choose(given.engine, inputs, problem)
            potentials, sums = _solved(_detached(inputs), given, engine)
            found = duals(problem, potentials, sums, scale)
            dual, primal = (x.to(sums.row.dtype) for x in values(found, problem))

        def of(terms: Tensor) -> Tensor:
            return terms if scale is None else scale.of_plan(terms)

        linear = -of(_gain(_detached(inputs), problem, sums, once=True))
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
            moved = _without_value(-of(_gain(inputs, problem, sums)))
            dual, primal = dual + moved, primal + moved
            if not held:
                live, weighed = _through_iterations(given._replace(inputs=inputs, engine=engine), potentials, found)
                primal = primal + _without_value(of(weighed))
                linear = -of(live)
    last = potentials.row[-1], potentials.col[-1]
    ends = last if scale is None else scale.restored(*last, *problem.marginals.augmented)
    return TransportCost(*(given.unflatten(x) for x in (dual, primal, linear, *ends)))


def _dtype(prepared: Prepared) -> torch.dtype:
    return compute_dtype(prepared.inputs.query.dtype)


def _detached(inputs: Inputs) -> Inputs:
    return Inputs._make(None if x is None else x.detach() for x in inputs)


def _without_value(x: Tensor) -> Tensor:
    """0, with the gradient of x."""
    return x - x.detach()


def _real(plan: Tensor, problem: Problem) -> Tensor:
    length, size = problem.sizes[2:]
    return plan[..., :length, :size]


def _weighs_pairs(mask: Tensor | None) -> bool:
    """Whether a mask adds to the scores of pairs, and not of whole rows or columns alone."""
    return mask is not None and mask.dtype != torch.bool and 1 not in mask.shape[-2:]


def _solved(inputs: Inputs, prepared: Prepared, engine: str) -> tuple[Potentials, Sums]:
    """The stacked duals, and two products with the plan: by a forward pass whose values are the keys, and by its
    adjoint, in which the values' cotangents are P^T Q."""
    query, key = inputs.query, reference.per_head(inputs.key, prepared.problem.sizes[1])
    inputs, problem = relative(inputs._replace(key=key), prepared.problem, prepared.scale)
    mass = problem.marginals.log_row_mass.exp()[..., None]
    if engine == REFERENCE:
        dense = reference.dense_problem(inputs, problem)
        plan, potentials = reference.plan_and_potentials(dense, problem)
        plan = reference.fold_dustbins(plan, problem)
        real = _real(plan, problem)
        bins = (plan.new_zeros(0), plan.new_zeros(0))
        if problem.has_dustbin:
            bins = (plan[..., : real.shape[-2], -1], plan[..., -1, : real.shape[-1]])
        products = real @ key, real.mT @ query, real.sum(-1), real.sum(-2)
        return potentials, Sums(*products, bins[0], bins[1], corner_of(inputs, problem, potentials), real)
    value = torch.cat([key, torch.ones_like(key[..., :1])], -1)
    given = inputs._replace(value=value)
    flat = ops.flatten(given, problem, engine)
    output, row, col, _, _, *bins = lib.forward(*ops.with_residuals(flat, False))
    potentials = Potentials(row, col)
    last = replace(problem.solver, base_iters=0, tail_iters=0, gradient="tail", tolerance=0.0, acceleration=None)
    at_end = replace(problem, initial_row=row[-1], initial_col=col[-1], solver=last)
    flat = ops.flatten(given, at_end, engine)
    cotangent = mass * torch.cat([query, torch.ones_like(mass)], -1)
    back = lib.backward(cotangent, None, None, False, output, row[-1:].clone(), col[-1:].clone(), *flat)
    back = back[Inputs._fields.index("value")]
    output = output * mass
    pairs = None
    if _weighs_pairs(inputs.mask):
        pairs = _real(lib.plan(*ops.flatten(given._replace(value=None), at_end, engine))[0], problem)
    corner = corner_of(inputs, problem, potentials)
    products = output[..., :-1], back[..., :-1], output[..., -1], back[..., -1]
    return potentials, Sums(*products, bins[0], bins[1], corner, pairs)


def _gain(inputs: Inputs, problem: Problem, sums: Sums, once: bool = False) -> Tensor:
    """<scores, P> `[N, H]` for a plan that is held. Its value is right with `once`; without, its gradient is: the
    products of queries and keys then stand in it for either."""
    scale, epsilon = problem.solver.scale, problem.solver.epsilon
    total = (inputs.query * sums.times_key).sum((-1, -2)) * scale
    if not once:
        total = total + (reference.per_head(inputs.key, total.shape[1]) * sums.times_query).sum((-1, -2)) * scale
    if inputs.mask is not None and inputs.mask.dtype != torch.bool:
        total = total + epsilon * _added(inputs.mask, sums)
    return total + _of_dustbin(inputs, problem, sums.to_bin, sums.from_bin, sums.corner)


def _added(mask: Tensor, sums: Sums) -> Tensor:
    """sum of P * mask `[N, H]`."""
    if mask.shape[-1] == 1:
        weight, entries = sums.row, mask[..., 0]
    elif mask.shape[-2] == 1:
        weight, entries = sums.col, mask[..., 0, :]
    else:
        assert sums.plan is not None
        weight, entries = sums.plan.flatten(-2), mask.expand(*mask.shape[:2], *sums.plan.shape[-2:]).flatten(-2)
    used = (weight.detach() > 0) & kept(entries.detach(), weight.dtype)
    return (weight * torch.where(used, entries, 0.0)).sum(-1)


def _of_dustbin(inputs: Inputs, problem: Problem, to_bin: Tensor, from_bin: Tensor, corner: Tensor) -> Tensor:
    """The dustbin's part of <scores, P>."""
    if not problem.has_dustbin:
        return inputs.query.new_zeros(())
    assert inputs.row_score is not None and inputs.col_score is not None and inputs.corner_score is not None
    real = (to_bin * inputs.row_score).sum(-1) + (from_bin * inputs.col_score).sum(-1)
    return real + corner.sum(-1) * inputs.corner_score


def _through_iterations(given: Prepared, potentials: Potentials, found: Duals) -> tuple[Tensor, Tensor]:
    """(<scores, P>, sum of P * (x_i + y_j)) `[N, H]`, differentiated through the iterations, with x and y, the primal's
    slopes, held. The stopped ones are not run again."""
    inputs, problem, heads = given.inputs, given.problem, given.problem.sizes[1]
    kind = "implicit" if problem.solver.gradient == "implicit" else "tail"
    tail = replace(
        problem.solver, base_iters=0, tail_iters=problem.solver.kept, gradient=kind, tolerance=0.0, over_relaxation=1.0,
        acceleration=None, contraction=0.0,
    )  # fmt: skip
    again = replace(problem, initial_row=potentials.row[0], initial_col=potentials.col[0], solver=tail)
    dtype, (length, size) = inputs.query.dtype, problem.sizes[2:]
    x, y = (s.to(dtype) for s in slopes(found, problem))
    key = reference.per_head(inputs.key, heads)
    run_on, again = relative(inputs._replace(key=key), again, given.scale)
    columns = [key, torch.ones_like(key[..., :1]), y[..., :size, None]]
    mask = inputs.mask
    of_columns = mask is not None and mask.dtype != torch.bool and mask.shape[-2] == 1 and mask.shape[-1] > 1
    if of_columns:
        assert mask is not None
        added = mask.masked_fill(~kept(mask.detach(), dtype) | (found.col[..., None, :size] == 0), 0.0)
        columns.append(added.mT.expand(*key.shape[:-1], 1))
    values_in = run_on._replace(value=torch.cat(columns, -1), dustbin_value=None)
    result = run(given._replace(inputs=values_in, problem=again, scale=None), residuals=False)
    output = result.output * problem.marginals.log_row_mass.exp()[..., None]
    width = key.shape[-1]
    row, weighed = output[..., width], output[..., width + 1].sum(-1)
    weighed = weighed + (row * x[..., :length]).sum(-1)
    gain = problem.solver.scale * (inputs.query * output[..., :width]).sum((-1, -2))
    if of_columns:
        gain = gain + problem.solver.epsilon * output[..., -1].sum(-1)
    elif mask is not None and mask.dtype != torch.bool:
        plan = None
        if _weighs_pairs(mask):
            pairs = values_in._replace(value=None)
            if given.engine == REFERENCE:
                plan = _real(reference.plan(pairs, again)[0], problem)
            else:
                plan = _real(autograd.plan(pairs, again, str(given.engine))[0], problem)
        none = row.new_zeros(0)
        gain = gain + problem.solver.epsilon * _added(mask, Sums(none, none, row, none, none, none, none, plan))
    if problem.has_dustbin:
        own, (to_bin, from_bin) = segments_of_tokens(problem), (result.row_dustbin, result.col_dustbin)
        capacity = problem.marginals.augmented[0][..., length:].exp()
        corner = capacity - segment_sum(from_bin, own.col, own.number)  # the dustbin's row is balanced
        gain = gain + _of_dustbin(inputs, problem, to_bin, from_bin, corner)
        x_bin, y_bin = x[..., length:], y[..., size:]
        by_row = segment_sum(to_bin, own.row, own.number) * y_bin + corner * (x_bin + y_bin)
        by_col = segment_sum(from_bin, own.col, own.number) * x_bin
        weighed = weighed + (by_row + by_col).sum(-1)
        weighed = weighed + (to_bin * x[..., :length]).sum(-1) + (from_bin * y[..., :size]).sum(-1)
    return gain, weighed
