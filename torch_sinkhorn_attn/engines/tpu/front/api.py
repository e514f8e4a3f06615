"""Sinkhorn attention for JAX users, with its hand-derived gradient as a `jax.custom_vjp`."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from torch_sinkhorn_attn.engines.tpu.front import explicit, status
from torch_sinkhorn_attn.engines.tpu.front.prepare import Dustbin, Prepared, prepare
from torch_sinkhorn_attn.engines.tpu.method import batching
from torch_sinkhorn_attn.engines.tpu.method.lowering import Lowering
from torch_sinkhorn_attn.engines.tpu.method.manual import vary_together
from torch_sinkhorn_attn.engines.tpu.method.problem import Constants, Inputs, Result, Statics
from torch_sinkhorn_attn.engines.tpu.method.shared import owned
from torch_sinkhorn_attn.options import CONVERGED_WITHIN, Options, Relaxation
from torch_sinkhorn_attn.problem.segments import with_dustbin


class SinkhornAux(NamedTuple):
    """What `sinkhorn_attention(..., return_aux=True)` returns beside the output; in float32 (float64 for float64).

    row_potential, col_potential: `(..., H, L)`, `(..., H, S)` final potentials in the log domain, not differentiable; 0
        for inactive tokens. With a dustbin one trailing entry (packed: one per segment, `min(L, S)` entries).
    row_residual, col_residual: `(..., H)` largest absolute marginal error, not differentiable.
    row_dustbin, col_dustbin: `(..., H, L)`, `(..., H, S)` mass sent to and got from the dustbin, differentiable; None
        without one.
    """

    row_potential: Array
    col_potential: Array
    row_residual: Array
    col_residual: Array
    row_dustbin: Array | None
    col_dustbin: Array | None

    def status(
        self,
        within: float = CONVERGED_WITHIN,
        attn_mask: Any = None,
        row_mass: Any = None,
        col_mass: Any = None,
    ) -> np.ndarray:
        """`(..., H)` int8, places in `status.WORDS`: 0 converged (no marginal is off by more than `within` times the
        mean mass of an active token), 1 not converged, 2 no plan: the order of the potentials shows queries that hold
        as much as all the keys they reach, or more. Outside of jit, for balanced calls without window, lengths or
        segments (or with these written into the mask); repeat the call's mask and masses. 0 and 1 are no proof that a
        plan exists: the torch function proves it, before the call.
        """
        return status.judged(self, within, attn_mask, row_mass, col_mass)

    def verdict(self, *args: Any, **kwargs: Any) -> str:
        """`status` in words, with the number of problems of each."""
        found = self.status(*args, **kwargs)
        counts = [(word, int((found == code).sum())) for code, word in enumerate(status.WORDS)]
        return ", ".join(f"{word}: {count} of {found.size}" for word, count in counts if count)


def sinkhorn_attention(
    query: Array,
    key: Array | None,
    value: Array,
    attn_mask: Array | None = None,
    dropout_p: float = Options.dropout_p,
    is_causal: bool = Options.is_causal,
    *,
    scale: float | None = Options.scale,
    epsilon: float = Options.epsilon,
    window: tuple[int, int] | None = Options.window,
    window_centers: Array | None = None,
    query_lengths: Array | None = None,
    key_lengths: Array | None = None,
    query_segment_ids: Array | None = None,
    key_segment_ids: Array | None = None,
    row_mass: Array | None = None,
    col_mass: Array | None = None,
    relaxation: Relaxation = Options.relaxation,
    dustbin: Dustbin | None = None,
    base_iters: int = Options.base_iters,
    tail_iters: int = Options.tail_iters,
    tolerance: float | None = Options.tolerance,
    over_relaxation: float = Options.over_relaxation,
    acceleration: str | None = Options.acceleration,
    contraction: float | None = Options.contraction,
    gradient: str = Options.gradient,
    initial_potentials: tuple[Array, Array] | None = None,
    enable_gqa: bool = Options.enable_gqa,
    mask_floor: float | None = Options.mask_floor,
    lowering: Lowering | None = None,
    return_aux: bool = False,
    dropout_seed: Array | None = None,
    sequence_axis: str | None = None,
) -> Array | tuple[Array, SinkhornAux]:
    r"""Balanced entropic optimal-transport attention: softmax attention whose columns are normalised too.

    With scores S = scale * q.k / epsilon + mask and masses a (rows) and b (columns), T + R Sinkhorn iterations

        v_j = rho_c (log b_j - LSE_i(S_ij + u_i))        u_i = rho_r (log a_i - LSE_j(S_ij + v_j))

    give the plan P_ij = exp(S_ij + u_i + v_j) and the output O_i = (1/a_i) sum_j P_ij V_j. The first T iterations are
    not differentiated, the last R are, exactly (arXiv:2605.08123, with columns first and rows last).

    The arguments are those of `torch_sinkhorn_attn.sinkhorn_attention`, in the same order and with the same defaults
    and refusals, but for `lowering` in place of `engine`, and `dropout_seed`. It works under jit, vmap, checkpoint,
    grad (reverse mode, once) and shard_map. Arrays are data and recompile nothing; numbers, `window`, `gradient` and
    `is_causal` are compiled in.

    Only types, dtypes and shapes are checked: arrays may be traced, so nothing looks into them. The caller sees to it
    that lengths lie in [0, L] and [0, S]; that segment ids are contiguous runs in the same order on both sides; that
    masses are positive and their totals equal where balanced; that a mask holds neither NaN (it shows in the output)
    nor +inf; and that the support admits a plan, which `aux.status` tells afterwards. The torch function checks all of
    these on CPU tensors.

    Args:
        query: `(..., H, L, E)`, float16, bfloat16, float32 or float64; `...` are batch dimensions, H heads, L queries,
            E features. Potentials and sums are kept in float32 (float64 for float64).
        key: `(..., Hk, S, E)`; Hk = H, or a divisor of H with `enable_gqa`. S keys. None: `query` holds the scores
            themselves, `(..., H, L, S)`, in place of the products q.k (of costs, pass their negative); -inf forbids a
            pair, and `scale` is 1 unless given.
        value: `(..., Hk, S, Ev)`.
        attn_mask: broadcasting to `(..., H, L, S)`. Bool: True keeps the pair. Float: added to the scores, *not*
            divided by epsilon; -inf, and anything at or below half the dtype's lowest value, forbids the pair. A token
            left without any pair is inactive: output 0, gradient 0, no mass. So is one that the mask pads with a finite
            "minus infinity"; see `mask_floor`. Gradients flow to a float mask.
        dropout_p: probability of dropping real entries of P/a after the solve, in [0, 1).
        is_causal: support the pairs j <= i alone, counted from the first active token on both sides (with segment ids:
            of each segment); keys beyond the last query are inactive. Not with attn_mask. Balanced, L = S tokens have
            no causal plan but the identity, and it is refused: it needs a dustbin, relaxation, or softmax mode. Beside
            `window`, whose diagonal is another for L != S, both must hold.
        scale: default 1/sqrt(E).
        epsilon: entropic regularisation, positive, in score units; small is sharp and slow to converge. Default 1.
        window: `(left, right)` tokens around the diagonal, -1 for unlimited; the diagonal joins the first with the
            first and the last with the last *active* tokens.
        window_centers: float32, float64 or integer, broadcasting to `(..., L)`: where on the axis of the keys (padding
            and other segments counted) the window of each query lies: query i may attend to the keys
            -left <= j - c_i <= right among those of its lengths or segment. From one active query to the next they must
            not fall. Constants. Default: the diagonal of `window`.
        query_lengths, key_lengths: integers `(...)`: only so many leading tokens are active.
        query_segment_ids, key_segment_ids: integers `(..., L)`, `(..., S)`: packed sequences, contiguous runs in the
            same order; negative is inactive. Packed equals separate.
        row_mass, col_mass: positive, broadcasting to `(..., H, L)`, `(..., H, S)`. Default: uniform with the other
            side's total; with neither given, a = 1 and b = n/m. Constants. The output of a balanced problem does not
            depend on their unit.
        relaxation: KL penalty strength tau > 0 for both marginals, or `(row tau, column tau)`, in score units; None
            keeps a side balanced. rho = tau / (tau + epsilon).
        dustbin: `Dustbin` (of this module) for tokens without a partner.
        base_iters: T, stopped iterations. Default 20.
        tail_iters: R, differentiated iterations. Default 2. T = R = 0 is softmax attention.
        tolerance: 0 or more; None and 0 always run all T. Each problem (batch element, head and, when packed, segment)
            ends its T iterations early, after one or more of them, once the next column half-step would move none of
            its v_j by more; the R last always run.
        over_relaxation: omega between 0 and 2: each half-step of the T iterations gives (1 - omega) * old + omega * new
            potential. Above 1 it speeds up slow problems; one too large may not converge, which the residuals tell.
        acceleration: "chebyshev" or None: column potentials of the T iterations gather momentum, after the first or the
            first three (see `contraction`). A long band is as near to balance after 10 iterations as after 20 plain
            ones. Not beside `over_relaxation`.
        contraction: between 0 and 1: the largest factor by which a plain iteration shrinks the error, for acceleration,
            which then sets in after one iteration. None estimates it in three, and never above 0.9.
        gradient: "tail" differentiates the R last iterations, "unrolled" all T + R, "implicit" the fixed point (exact
            if converged), by conjugate gradients. "unrolled" takes no `tolerance`, no
            `over_relaxation` and no `acceleration`.
        initial_potentials: warm start `(row, column)` as in `SinkhornAux`. Constants.
        enable_gqa: allow grouped queries: query head h reads key head h // (H / Hk).
        mask_floor: negative, in the units of a float mask: a token whose every mask entry inside the support lies
            `-mask_floor` or more below the highest of its problem is inactive, as if they were -inf. None keeps every
            finite entry. Softmax mode ignores it. Default -1e3.
        lowering: how it is computed; None is `Lowering()`: by Pallas kernels where the program is lowered for a TPU,
            by plain XLA elsewhere. `Lowering("blockwise")` is plain XLA everywhere.
        return_aux: also return `SinkhornAux` (its residuals cost one more pass).
        dropout_seed: a `jax.random.key`, or `[2]` uint32; needed with `dropout_p`. Entries are dropped by seed, head,
            row and column: give each step its own, and inside shard_map each shard (`jax.random.fold_in`) but those
            along `sequence_axis`.
        sequence_axis: inside `jax.shard_map`, the mesh axis that the tokens lie along: query, key and value, ids,
            centres, masses, scores of a dustbin and warm starts are those of this device's tokens, in even blocks.
            Lengths count the tokens of all devices; attn_mask has local queries and all keys. The numbers are those of
            one device with all tokens, and `aux` is of the tokens here. A band sends halos to its neighbours, anything
            else gathers keys and values: see docs/jax.md. Plain XLA.

    Returns:
        `(..., H, L, Ev)` in the inputs' dtype, or that and a `SinkhornAux`.

    Raises:
        TypeError, ValueError: an argument of a wrong type, dtype, shape or number, with its name and a way out.

    >>> q, k, v = (jax.random.normal(jax.random.key(i), (4, 10, 8)) for i in range(3))
    >>> sinkhorn_attention(q, k, v, window=(3, 3)).shape
    (4, 10, 8)
    """
    arguments = dict(locals())
    if lowering is not None and not isinstance(lowering, Lowering):
        raise TypeError(f"lowering must be a Lowering or None, got {lowering!r}; pass Lowering(shape=...).")
    if (place := explicit.placement(arguments)) is not None:
        n = query.ndim
        mass = None if dustbin is None else n - 1
        dimensions = (n, SinkhornAux(n - 1, n - 1, n - 2, n - 2, mass, mass)) if return_aux else n  # type: ignore[arg-type]
        found: Array | tuple[Array, SinkhornAux] = explicit.with_automatic_axes(
            sinkhorn_attention, place, arguments, dimensions
        )
        return found
    prepared = prepare(**{name: x for name, x in arguments.items() if name not in ("lowering", "return_aux")})
    how = _How(prepared.statics, Lowering() if lowering is None else lowering, return_aux)
    result = _attention(how, *vary_together((prepared.inputs, prepared.constants)))
    output, aux = given_back(prepared, result, value.dtype)
    return (output, aux) if return_aux else output


def given_back(prepared: Prepared, result: Result, dtype: Any) -> tuple[Array, SinkhornAux]:
    """What a call returns, and its aux."""
    _, constants, statics, batch, unit = prepared

    def shaped(x: Array) -> Array:
        return x.reshape(*batch, *x.shape[1:])

    assert result.output is not None
    fixed = (result.row_potentials[-1], result.col_potentials[-1], result.row_residual, result.col_residual)
    masses = (result.row_dustbin, result.col_dustbin)
    if unit is not None:
        log_a = with_dustbin(constants.log_row_mass, constants.log_row_capacity)
        log_b = with_dustbin(constants.log_col_mass, constants.log_col_capacity)
        fixed = (*unit.restored(*fixed[:2], log_a, log_b), unit.of_mass(fixed[2]), unit.of_mass(fixed[3]))
        row, col = (None if x is None else unit.of_plan(x) for x in masses)
        masses = row, col
    if statics.sequence is not None:  # columns held, but not owned, are another's
        col, col_mass = owned(statics.sequence, fixed[1]), masses[1]
        fixed = (fixed[0], col, *fixed[2:])
        masses = masses[0], None if col_mass is None else statics.sequence.owned(col_mass)
    bins = (None if x is None else shaped(x) for x in masses)
    aux = SinkhornAux(*(shaped(lax.stop_gradient(x)) for x in fixed), *bins)
    return shaped(result.output).astype(dtype), aux


class _How(NamedTuple):
    """What is compiled in."""

    statics: Statics
    lowering: Lowering
    residuals: bool


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(how: _How, inputs: Inputs, constants: Constants) -> Result:
    return batching.forward(inputs, constants, how.statics, how.lowering, how.residuals)


def _attention_fwd(how: _How, inputs: Any, constants: Any) -> tuple[Result, tuple[Any, ...]]:
    mask = inputs.mask
    wants_mask = mask is not None and mask.perturbed and jnp.issubdtype(mask.value.dtype, jnp.floating)
    inputs, constants = jax.tree.map(lambda x: x.value, (inputs, constants))
    result = _attention(how, inputs, constants)  # not its body: a second derivative is to find `_refuse`
    marker = () if wants_mask else None  # a residual's structure is static, its leaves are not
    return result, (inputs, constants, (result.output, result.row_potentials, result.col_potentials), marker)


def _attention_bwd(how: _How, kept: tuple[Any, ...], grad: Result) -> tuple[Inputs, None]:
    inputs, constants, saved, marker = kept
    given = [
        None if x is None or isinstance(x, jax.custom_derivatives.SymbolicZero) else x
        for x in (grad.output, grad.row_dustbin, grad.col_dustbin)
    ]
    grads = (jnp.zeros_like(saved[0]) if given[0] is None else given[0], given[1], given[2])
    found = _gradients(how, inputs, constants, saved, grads, marker)
    cast = (None if g is None else g.astype(x.dtype) for x, g in zip(inputs, found, strict=True))
    return Inputs._make(cast), None


_attention.defvjp(_attention_fwd, _attention_bwd, symbolic_zeros=True)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gradients(
    how: _How, inputs: Inputs, constants: Constants, saved: tuple[Any, ...], grads: tuple[Any, ...], marker: Any
) -> Inputs:
    return batching.backward(inputs, constants, how.statics, how.lowering, saved, grads, mask_grad=marker is not None)


def _refuse(*_: Any) -> Any:
    raise NotImplementedError(
        "sinkhorn_attention has no second derivative in JAX: its gradient is a kernel. Stop it with lax.stop_gradient, "
        "or differentiate the torch function, whose higher derivatives are dense."
    )


_gradients.defvjp(_refuse, _refuse)
