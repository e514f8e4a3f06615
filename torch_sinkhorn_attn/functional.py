"""The public verbs: attention and its plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from torch_sinkhorn_attn.boundary import autograd, direct
from torch_sinkhorn_attn.compat.tracing import one_node
from torch_sinkhorn_attn.distributed import context
from torch_sinkhorn_attn.dustbin import Dustbin
from torch_sinkhorn_attn.engines import REFERENCE, choose, cpu, engine_of
from torch_sinkhorn_attn.engines.tiled.engine import marginal_errors
from torch_sinkhorn_attn.engines.tiled.tiles import Tiles
from torch_sinkhorn_attn.method import reference
from torch_sinkhorn_attn.options import Options, Relaxation, flag
from torch_sinkhorn_attn.problem import remembered, unbalanced
from torch_sinkhorn_attn.problem.arguments import Keywords, Prepared
from torch_sinkhorn_attn.problem.looking import has_data
from torch_sinkhorn_attn.problem.mass_scale import MassScale
from torch_sinkhorn_attn.problem.problem import Potentials, Result, full_precision, without_autocast
from torch_sinkhorn_attn.problem.segments import largest
from torch_sinkhorn_attn.problem.status import SinkhornAux


@one_node
def sinkhorn_attention(
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = Options.dropout_p,
    is_causal: bool = Options.is_causal,
    *,
    scale: float | None = Options.scale,
    epsilon: float = Options.epsilon,
    window: tuple[int, int] | None = Options.window,
    window_centers: Tensor | None = None,
    query_lengths: Tensor | None = None,
    key_lengths: Tensor | None = None,
    query_segment_ids: Tensor | None = None,
    key_segment_ids: Tensor | None = None,
    row_mass: Tensor | None = None,
    col_mass: Tensor | None = None,
    relaxation: Relaxation = Options.relaxation,
    dustbin: Dustbin | None = None,
    base_iters: int = Options.base_iters,
    tail_iters: int = Options.tail_iters,
    tolerance: float | None = Options.tolerance,
    over_relaxation: float = Options.over_relaxation,
    acceleration: str | None = Options.acceleration,
    contraction: float | None = Options.contraction,
    gradient: str = Options.gradient,
    initial_potentials: tuple[Tensor, Tensor] | None = None,
    enable_gqa: bool = Options.enable_gqa,
    mask_floor: float | None = Options.mask_floor,
    engine: str | None = None,
    return_aux: bool = False,
    sequence_group: Any = None,
) -> Tensor | tuple[Tensor, SinkhornAux]:
    r"""Balanced entropic optimal-transport attention: softmax attention whose columns are normalised too.

    With scores S = scale * q.k / epsilon + mask and masses a (rows) and b (columns), T + R Sinkhorn iterations

        v_j = rho_c (log b_j - LSE_i(S_ij + u_i))        u_i = rho_r (log a_i - LSE_j(S_ij + v_j))

    give the plan P_ij = exp(S_ij + u_i + v_j) and the output O_i = (1/a_i) sum_j P_ij V_j. The first T iterations are
    not differentiated, the last R are, exactly (arXiv:2605.08123, with columns first and rows last, so that a balanced
    output row is an exact weighted average).

    The call is that of `torch.nn.functional.scaled_dot_product_attention`, and so are the shapes: `...` are batch
    dimensions, H heads, L queries, S keys, E and Ev features.

    Args:
        query: `(..., H, L, E)`, float16, bfloat16, float32 or float64. Potentials and sums are kept in float32 (float64
            for float64).
        key: `(..., Hk, S, E)`; Hk = H, or a divisor of H with `enable_gqa`. None: `query` holds the scores themselves,
            `(..., H, L, S)` or `(L, S)`, in place of the products q.k (of costs, pass their negative); -inf forbids a
            pair, and `scale` is 1 unless given. `squared_distance_features` gives query and key whose scores are
            negative squared distances.
        value: `(..., Hk, S, Ev)`; `(S, Ev)` beside scores `(L, S)`.
        attn_mask: broadcasting to `(..., H, L, S)`. Bool: True keeps the pair. Float: added to the scores, *not*
            divided by epsilon; -inf, and anything at or below half the dtype's lowest value, forbids the pair. A token
            left without any pair is inactive: output 0, gradient 0, no mass. So is one that the mask pads with a finite
            "minus infinity"; see `mask_floor`. A float mask may require grad. torch's `CausalBias` is understood; a
            tensor of another subclass is refused, and so is flex_attention's `BlockMask`. Beside a window a dense mask
            is read within it only.
        dropout_p: probability of dropping real entries of P/a after the solve, in [0, 1); drawn from torch's generator.
        is_causal: support the pairs j <= i alone, counted from the first active token on both sides (with segment ids:
            of each segment), as `torch.ones(L, S).tril()`; keys beyond the last query are inactive. Not with attn_mask.
            Balanced, L = S tokens have no causal plan but the identity, and it is refused: it needs a dustbin,
            relaxation, or softmax mode. Beside `window`, whose diagonal is another for L != S, both must hold.
        scale: default 1/sqrt(E).
        epsilon: entropic regularisation, positive, in score units; small is sharp and slow to converge. Default 1.
        window: `(left, right)` tokens around the diagonal, -1 for unlimited; the diagonal joins the first with the
            first and the last with the last *active* tokens.
        window_centers: float32, float64 or integer, broadcasting to `(..., L)`: where on the axis of the keys (padding
            and other segments counted) the window of each query lies: query i may attend to the keys
            -left <= j - c_i <= right among those of its lengths or segment. From one active query to the next they do
            not fall. Constants; data, so that other centres compile nothing again. Default: the diagonal of `window`.
            `scout_centers` finds them from a coarse transport plan.
        query_lengths, key_lengths: integer tensors `(...)`: only so many leading tokens are active. With `(..., H)`
            every head has its own, which is how padded batches of points `(B, N, E)` come: H = B. Segment ids and
            centres may have the heads' dimension likewise.
        query_segment_ids, key_segment_ids: integer tensors `(..., L)`, `(..., S)`: packed sequences, contiguous runs in
            the same order; negative is inactive. Packed equals separate, exactly.
        row_mass, col_mass: positive, broadcasting to `(..., H, L)`, `(..., H, S)`. Default: uniform with the other
            side's total; with neither given, a = 1 and b = n/m. Constants. The output of a balanced problem does not
            depend on their unit, however small or large; potentials, plan and residuals are in it.
        relaxation: KL penalty strength tau > 0 for both marginals, or `(row tau, column tau)`, in score units; None
            keeps a side balanced. rho = tau / (tau + epsilon).
        dustbin: `Dustbin` for tokens without a partner.
        base_iters: T, stopped iterations. Default 20.
        tail_iters: R, differentiated iterations. Default 2. T = R = 0 is softmax attention.
        tolerance: 0 or more; None and 0 always run all T. Each problem (batch element, head and, when packed, segment)
            ends its T iterations early, after one or more of them, once the next column half-step would move none of
            its v_j by more: balanced, that is its largest relative column error, |log(column sum / b_j)|; relaxed, its
            distance to the next iterate. The R last always run. On eager CPU tensors this saves the time of what is
            left once all problems have ended; elsewhere they stand still, for nothing may look at them.
        over_relaxation: omega between 0 and 2: each half-step of the T iterations gives (1 - omega) * old + omega * new
            potential, the old ones being 0 (balanced: in the unit of mass that lies amid those given) or the warm start
            at first. Above 1 it speeds up slow problems, long bands
            above all: near the fixed point most at 2 / (1 + sqrt(1 - rate)), with `certify`'s rate of plain iterations.
            Few iterations want less, and one too large may not converge, which the residuals tell: 1.5 is a start.
            Default 1: plain iterations. Source: Thibault et al., arXiv:1711.01851.
        acceleration: "chebyshev" or None: column potentials of the T iterations gather momentum, after the first or the
            first three (see `contraction`), as if several iterations were one; row half-steps stay plain. A long band
            is as near to balance after 10 iterations as after 20 plain ones. On easy problems, where plain ones
            converge in a few, it costs a few digits of what is balanced well by then. Beside `over_relaxation`, which
            also changes the steps, and gradient="unrolled" it is refused. Source: Golub and Varga, Numerische
            Mathematik 3, 1961.
        contraction: between 0 and 1: the largest factor by which a plain iteration shrinks the error, for acceleration,
            which then sets in after one iteration: `certify`'s rate, if it is known. None estimates it in three, for
            each problem (batch element, head and, when packed, segment), and never above 0.9.
        gradient: "tail" differentiates the R last iterations, "unrolled" all T + R, "implicit" the fixed point (exact
            if converged), by conjugate gradients; beside a nearly hard plan its float32 result is mostly rounding.
            "unrolled" stops nothing, so it takes no `tolerance`, no `over_relaxation` and no `acceleration`.
        initial_potentials: warm start `(row, column)` as in `SinkhornAux`. Constants.
        enable_gqa: allow grouped queries: query head h reads key head h // (H / Hk).
        mask_floor: negative, in the units of a float mask. A balanced plan cannot honour a number added to a whole
            column: its potential absorbs it, and a key padded by -1e4 would keep its mass. So a token whose every mask
            entry inside the support lies `-mask_floor` or more below the highest of its problem (batch element, head
            and, when packed, segment) is inactive, as if they were -inf. None keeps every finite entry, however large
            the bias. Softmax mode has no need of it and ignores it. Default -1e3.
        engine: None takes the fastest that can: "cpu", C++ kernels for CPU tensors, where they were built
            (`python -m torch_sinkhorn_attn.engines` tells, and a warning where they are missed), "triton" for CUDA and
            ROCm tensors but float64, "xla" for tensors of torch_xla and "torchtpu" for those of torch_tpu (TPUs), else
            "tiled", plain PyTorch on any device; all O(n + m) memory. "reference" is the dense definition, which ONNX
            gets. Derivatives beyond the first, and forward mode, are taken densely (L x S memory) on every engine; the
            implicit gradient has none, and programs of `torch.export` have no forward mode.
        return_aux: also return `SinkhornAux` (its residuals cost one more pass); its `verdict()` says in words whether
            the plan has converged, or none exists.
        sequence_group: a process group, or a `DeviceMesh` of one dimension: the sequence is sharded over it, rank r
            holds the r-th block of queries and the r-th of keys and values, of any lengths, and gets its block of the
            output. Everything said of tokens comes in the same blocks, and positions are those of the whole sequence;
            a dense attn_mask has local rows and all keys. None: that of `distributed.sequence_parallel`, if any.

    Returns:
        `(..., H, L, Ev)` in the inputs' dtype, or that and a `SinkhornAux`.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an argument with a wrong shape, device or value, or a problem without a plan that is
            positive on its support (unequal masses, a window that leaves keys uncovered, or allows more than the
            identity but forces it; any mask is decided, by a maximum flow, in whatever order its tokens are). The
            message names the argument and a way out. Checks that must look at data follow `set_checks`; where they do
            not run, `SinkhornAux.status` and `certify` tell afterwards.

    Examples:
        >>> import torch
        >>> q, k, v = (torch.randn(2, 4, 10, 8, generator=torch.Generator().manual_seed(s)) for s in range(3))
        >>> sinkhorn_attention(q, k, v).shape
        torch.Size([2, 4, 10, 8])
        >>> out, aux = sinkhorn_attention(q, k, v, window=(3, 3), base_iters=50, return_aux=True)
        >>> bool(aux.col_residual.max() < 1e-2)
        True
        >>> softmax = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        >>> torch.allclose(sinkhorn_attention(q, k, v, base_iters=0, tail_iters=0), softmax, atol=1e-6)
        True
    """
    if value is None:
        raise TypeError("value must be a tensor, got None; for the plan itself there is sinkhorn_plan.")
    group = context.group_of(sequence_group) if type(query) is Tensor else context.group_of(sequence_group, query)
    options: Keywords = dict(
        scale=scale, epsilon=epsilon, window=window, window_centers=window_centers,
        query_lengths=query_lengths, key_lengths=key_lengths,
        query_segment_ids=query_segment_ids, key_segment_ids=key_segment_ids, row_mass=row_mass, col_mass=col_mass,
        relaxation=relaxation, dustbin=dustbin, base_iters=base_iters, tail_iters=tail_iters, tolerance=tolerance,
        over_relaxation=over_relaxation, acceleration=acceleration, contraction=contraction, gradient=gradient,
        initial_potentials=initial_potentials,
        dropout_p=dropout_p, is_causal=is_causal, enable_gqa=enable_gqa, mask_floor=mask_floor, engine=engine,
    )  # fmt: skip
    if group is not None:
        from torch_sinkhorn_attn.distributed import calls

        return calls.sharded_attention(group, query, key, value, attn_mask, options, return_aux)
    if isinstance(query, Tensor) and (shared := engine_of(query.device).over_ranks()) is not None:
        found: Tensor | tuple[Tensor, SinkhornAux] = shared(query, key, value, attn_mask, options, return_aux)
        return found
    prepared = remembered.prepared(query, key, value, attn_mask, **options)
    return given_back(prepared, run(prepared, residuals=return_aux), return_aux)


def given_back(prepared: Prepared, result: Result, with_aux: bool) -> Tensor | tuple[Tensor, SinkhornAux]:
    """What a call returns."""
    output = prepared.returned(result.output)
    return (output, _aux(prepared, result)) if with_aux else output


def run(prepared: Prepared, residuals: bool) -> Result:
    """Compute a prepared problem by the engine it asks for."""
    inputs, problem = prepared.inputs, prepared.problem
    engine = choose(prepared.engine, inputs, problem)
    if engine == REFERENCE:
        with full_precision(inputs.query.device):
            result = reference.forward(inputs, problem)
    elif prepared.constants is not None and engine == cpu.NAME:
        result = direct.attention(inputs, problem, prepared.constants, residuals)
    else:
        results = autograd.attention(inputs, problem, engine, residuals)
        result = Result(results[0], Potentials(*results[1:3]), *results[3:])
    return in_callers_unit(prepared, result, residuals)


def in_callers_unit(
    prepared: Prepared, result: Result, residuals: bool, errors: Callable[[MassScale], list[Tensor]] | None = None
) -> Result:
    """A result in the unit of mass that the call was in. `errors`: the residuals in it, where the tiles of `prepared`
    are not all."""
    inputs, problem, scale = prepared.inputs, prepared.problem, prepared.scale
    unbalanced.warn_once(result.potentials.col, problem.solver)
    if scale is None:
        return result
    row, col = scale.restored(*result.potentials, *problem.marginals.augmented)
    bins = (x if x.numel() == 0 else scale.of_plan(x) for x in (result.row_dustbin, result.col_dustbin))
    found = Result(
        scale.of_output(result.output), Potentials(row, col),
        scale.of_mass(result.row_residual), scale.of_mass(result.col_residual), *bins,
    )  # fmt: skip
    if residuals and not scale.even():
        with torch.no_grad(), full_precision(inputs.query.device):
            if errors is None:
                at = Tiles(inputs, problem).at(*(x[-1].detach() for x in result.potentials))
                row, col = (largest(x) for x in marginal_errors(at, scale))
            else:
                row, col = errors(scale)
        found = found._replace(row_residual=row, col_residual=col)
    return found


def _aux(prepared: Prepared, result: Result) -> SinkhornAux:
    has_dustbin = prepared.problem.has_dustbin
    row, col = result.potentials.row[-1], result.potentials.col[-1]
    detached = (x.detach() for x in (row, col, result.row_residual, result.col_residual))
    bins = (result.row_dustbin, result.col_dustbin) if has_dustbin else (None, None)
    aux = SinkhornAux(
        *(prepared.unflatten(x) for x in detached), *(None if x is None else prepared.unflatten(x) for x in bins)
    )
    if has_data(row):
        aux.existence = remembered.with_own_existence(prepared)
        aux.softmax_mode = prepared.existence is None
    return aux


@one_node
def sinkhorn_plan(
    query: Tensor,
    key: Tensor | None = None,
    attn_mask: Tensor | None = None,
    *,
    log: bool = False,
    sequence_group: Any = None,
    **options: Unpack[Keywords],
) -> Tensor:
    """The transport plan itself, `(..., H, L, S)`, or `(..., H, L+1, S+1)` with a dustbin (its row and column last).
    `sinkhorn_plan(scores)` is that of a score matrix.

    Args:
        query, key, attn_mask, options: as in `sinkhorn_attention`; without a key `query` holds the scores.
        log: give the logarithm of the plan, S + u + v, -inf off the support. It has passed through no exp, so entries
            that are 0 in the plan keep their digits and their gradient: what losses such as SuperGlue's want. In
            float32 for float16 and bfloat16, under autocast too.
        sequence_group: as in `sinkhorn_attention`: the plan has the local rows of all columns, `(..., H, l, S)`; with a
            dustbin `(..., H, l+1, S+1)`, its row the same on every rank. A loss that reads that row on several ranks is
            added up over them, as all gradients are. Without a value, which tells how many of the scores' keys are
            local, it is told by what is given of them (segments, masses), and else they are `S` split as
            `torch.tensor_split` does. It may be differentiated once.

    It is differentiable exactly like the output of `sinkhorn_attention`, whose options it takes (`dropout_p` must stay
    0: the plan is returned before dropout). It materialises L x S, because that is what was asked for. With a dustbin
    and packed segments the last row and column hold each token's mass to and from its own segment's dustbin.

    Raises:
        TypeError, ValueError: as `sinkhorn_attention`.

    >>> import torch
    >>> q = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0))
    >>> plan = sinkhorn_plan(q, q[:, :4], base_iters=100)
    >>> plan.sum(-1)  # rows have mass 1, columns 5/4
    tensor([[1.0000, 1.0000, 1.0000, 1.0000, 1.0000]])
    >>> plan.sum(-2)
    tensor([[1.2500, 1.2500, 1.2500, 1.2500]])
    """
    flag("log", log)
    refuse_unknown("sinkhorn_plan", options)
    refuse_dropout("sinkhorn_plan", options, "the plan has no dropout; use F.dropout on it")
    group = context.group_of(sequence_group) if type(query) is Tensor else context.group_of(sequence_group, query)
    if group is not None:
        from torch_sinkhorn_attn.distributed import calls

        return calls.sharded_plan(group, query, key, attn_mask, options, log)
    with without_autocast(query if log else None):
        prepared = remembered.prepared(query, key, None, attn_mask, **options)
    inputs, problem = prepared.inputs, prepared.problem
    engine = choose(prepared.engine, inputs, problem)
    if engine == REFERENCE:
        with full_precision(inputs.query.device):
            plan, potentials = reference.plan(inputs, problem, log)
    elif prepared.constants is not None and engine == cpu.NAME and not log:
        plan, potentials = direct.plan(inputs, problem, prepared.constants)
    else:
        plan, potentials = autograd.plan(inputs, problem, engine, log)
    unbalanced.warn_once(potentials.col, problem.solver)
    if prepared.scale is not None:
        plan = prepared.scale.of_log_plan(plan) if log else prepared.scale.of_plan(plan)
    return prepared.unflatten(plan) if log else prepared.returned(plan)


def refuse_unknown(function: str, options: Any) -> None:
    """TypeError for an argument that `Keywords` does not have."""
    unknown = sorted(set(options) - set(Keywords.__annotations__))
    if unknown:
        raise TypeError(
            f"{function}() got unknown option {unknown[0]!r}; it takes {', '.join(Keywords.__annotations__)}."
        )


def refuse_dropout(function: str, options: Any, reason: str) -> None:
    """ValueError for a dropout that would be ignored."""
    if options.get("dropout_p", 0.0):
        raise ValueError(f"{function} got dropout_p={options['dropout_p']}: {reason}.")
