"""`sinkhorn_attention` for JAX users under JAX's transformations; `test_alone.py` has its values, and
`test_torch.py` those of torch."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from marks import FAST, slow_after

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
import tpu_shards  # noqa: E402
from jax.test_util import check_grads  # noqa: E402

from torch_sinkhorn_attn.engines import tpu  # noqa: E402
from torch_sinkhorn_attn.engines.tpu.releases import enable_x64  # noqa: E402


def wave(x: jax.Array) -> jax.Array:
    """As `conformance.weights`."""
    return jnp.sin(jnp.linspace(-1, 2, x.size, dtype=x.dtype)).reshape(x.shape)


def qkv(*batch: int, length: int = 20, dtype: Any = jnp.float32) -> list[jax.Array]:
    return [jax.random.normal(jax.random.key(i), (*batch, length, 8), dtype) for i in range(3)]


@pytest.mark.parametrize("tail_iters", slow_after(0, [0, 1, 3], {1, 3}))
def test_the_tail_without_a_base_is_differentiated_exactly(tail_iters: int) -> None:
    with enable_x64(True):
        run = partial(tpu.sinkhorn_attention, base_iters=0, tail_iters=tail_iters, window=(6, 6))
        check_grads(jax.jit(run), qkv(2, length=9, dtype=jnp.float64), order=1, modes=["rev"], rtol=1e-6)


@pytest.mark.slow
def test_lengths_and_segments_are_data() -> None:
    """One compilation for every length and every packing."""
    q, k, v = qkv(2, 2)
    by_length = jax.jit(lambda n, m: tpu.sinkhorn_attention(q, k, v, window=(20, 20), query_lengths=n, key_lengths=m))
    packed = jax.jit(lambda ids: tpu.sinkhorn_attention(q, k, v, query_segment_ids=ids, key_segment_ids=ids))
    for i in range(3):
        out = by_length(jnp.array([20, 13 - i]), jnp.array([19 - i, 17]))
        assert (out[1, :, 13 - i :] == 0).all() and (out[1, :, 12 - i] != 0).all()
        packed(jnp.broadcast_to(jnp.arange(20) // (4 + i), (2, 20)))
    assert by_length._cache_size() == packed._cache_size() == 1


def worst(found: Any, expected: Any) -> float:
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return max(float(jnp.abs(x - y).max()) for x, y in pairs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mask", "dropout_p"),
    [
        pytest.param("none", 0.3, marks=pytest.mark.exhaustive),
        pytest.param("shared", 0.0, marks=pytest.mark.exhaustive),
        ("own", 0.3),
        pytest.param("own for each head", 0, marks=pytest.mark.exhaustive),
    ],
)
def test_vmap_is_a_loop(mask: str, dropout_p: float) -> None:
    with enable_x64():  # in float32 the two are added up in another order, as releases and batch sizes have it
        size, (q, k, v) = 3, qkv(3, 2, 2, dtype=jnp.float64)
        shapes = {"none": None, "shared": (2, 20, 20), "own": (size, 20, 20), "own for each head": (size, 2, 1, 20, 20)}
        given = None if shapes[mask] is None else jax.random.normal(jax.random.key(7), shapes[mask], jnp.float64)
        lengths = jnp.array([[20, 18], [17, 15], [12, 20]])
        axis = 0 if mask.startswith("own") else None

        def loss(q: jax.Array, given: jax.Array | None, lengths: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            out = tpu.sinkhorn_attention(
                q, k, v, given, key_lengths=lengths, base_iters=3, dropout_p=dropout_p, dropout_seed=jax.random.key(5)
            )
            return (out * wave(out)).sum()

        step = jax.value_and_grad(loss, argnums=(0,) if given is None else (0, 1))
        found = jax.jit(jax.vmap(step, in_axes=(0, axis, 0, 0, None)))(q, given, lengths, k, v[0])
        one = jax.jit(step)
        each = [one(q[i], given if axis is None else given[i], lengths[i], k[i], v[0]) for i in range(size)]
        assert worst(found, jax.tree.map(lambda *x: jnp.stack(x), *each)) < 1e-12


@pytest.mark.parametrize("name", slow_after(0, tpu_shards.CASES, set(tpu_shards.CASES) - {"band"}))
def test_shard_map_over_batch_and_heads(name: str) -> None:
    """In a process with four devices: values, gradients (of shared arrays too) and the output's sharding."""
    script = Path(tpu_shards.__file__)
    flags = f"--xla_force_host_platform_device_count=4 {FAST}"
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(script.parents[1])}
    command = [sys.executable, str(script), name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_finite_minus_infinity_over_a_key_is_infinite() -> None:
    q, k, v = (jax.random.normal(jax.random.key(i), (1, 5, 2)) for i in range(3))
    padding = jnp.array([0.0, 0.0, -1e4, 0.0, 0.0])

    def run(mask: jax.Array, **options) -> jax.Array:
        return tpu.sinkhorn_attention(q, k, v, mask, **options)

    np.testing.assert_allclose(run(padding), run(jnp.where(padding < 0, -jnp.inf, 0)), rtol=1e-5, atol=1e-6)
    assert jnp.abs(run(padding, mask_floor=None) - run(padding)).max() > 1e-2
    with pytest.raises(ValueError, match=r"mask_floor=1\.0 must be negative"):
        run(padding, mask_floor=1.0)


@pytest.mark.slow
def test_no_gradient_is_taken_of_a_mask_that_wants_none() -> None:
    q, k, v = qkv(2)
    mask = jnp.zeros((20, 20))

    def size(argnums: tuple[int, ...]) -> int:
        run = partial(tpu.sinkhorn_attention, lowering=tpu.Lowering("blockwise"))  # whose computation is traced at once
        grad = jax.grad(lambda q, mask: run(q, k, v, mask).sum(), argnums=argnums)
        return len(str(jax.make_jaxpr(grad)(q, mask)))

    assert size((0,)) < size((0, 1)) - 500


@pytest.mark.slow
def test_second_derivatives_and_forward_mode_are_refused() -> None:
    q, k, v = qkv(1, length=5)

    def f(q: jax.Array) -> jax.Array:
        return tpu.sinkhorn_attention(q, k, v, base_iters=1).sum()

    with pytest.raises(NotImplementedError, match="no second derivative in JAX"):
        jax.grad(lambda q: jax.grad(f)(q).sum())(q)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(f, (q,), (q,))


X = jnp.ones((2, 5, 4))
BAD = {
    "query must be an array, got list": {"query": [1.0]},
    "query has dtype int32": {"query": jnp.ones((2, 5, 4), jnp.int32)},
    "key has dtype bfloat16 but query has float32": {"key": X.astype(jnp.bfloat16)},
    r"query has shape \(5, 4\).*query\[None\]": {"query": X[0]},
    "key has 3 features but query has 4": {"key": X[..., :3]},
    "query has 2 heads but key has 1; pass enable_gqa=True": {"key": X[:1], "value": X[:1]},
    "epsilon=0.0 must be positive": {"epsilon": 0.0},
    "window must be a pair": {"window": 3},
    r"window=\(-2, 0\) must have sides": {"window": (-2, 0)},
    "base_iters=-1 must be 0 or more": {"base_iters": -1},
    "gradient='exact' is unknown": {"gradient": "exact"},
    "tolerance=0.1 needs a stopped base": {"tolerance": 0.1, "gradient": "unrolled"},
    r"over_relaxation=2.0 must lie between": {"over_relaxation": 2.0},
    "acceleration='cheb' is unknown; choose 'chebyshev', or None": {"acceleration": "cheb"},
    "contraction=0.5 is read by acceleration alone": {"contraction": 0.5},
    "both change the steps": {"acceleration": "chebyshev", "over_relaxation": 1.5},
    r"attn_mask has shape \(3,\), which does not broadcast": {"attn_mask": jnp.ones(3)},
    "attn_mask has dtype int32": {"attn_mask": jnp.ones(5, jnp.int32)},
    "query_lengths must be an array of integer": {"query_lengths": jnp.ones(())},
    "belong together": {"query_segment_ids": jnp.zeros(5, jnp.int32)},
    "row_mass must be an array of floating-point": {"row_mass": 1.0},
    "dustbin must be a Dustbin": {"dustbin": 1.0},
    "Dustbin row_capacity=-1.0 must be positive": {"dustbin": tpu.Dustbin(0.0, 0.0, row_capacity=-1.0)},
    r"Dustbin row_score has shape \(2,\)": {"dustbin": tpu.Dustbin(jnp.ones(2), 0.0)},
    "dropout_p=1.0 must lie in": {"dropout_p": 1.0},
    "dropout_p=0.5 needs dropout_seed": {"dropout_p": 0.5},
    r"dropout_seed is int32\[2\]": {"dropout_p": 0.5, "dropout_seed": jnp.ones(2, jnp.int32)},
    "lowering must be a Lowering": {"lowering": "blockwise"},
    "initial_potentials must be a pair": {"initial_potentials": X},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        tpu.sinkhorn_attention(**{"query": X, "key": X, "value": X} | BAD[message])


def test_a_traced_number_is_refused_with_the_way_out() -> None:
    with pytest.raises(TypeError, match="epsilon is traced, but it is compiled in"):
        jax.jit(lambda e: tpu.sinkhorn_attention(X, X, X, epsilon=e))(1.0)


MODES: list[dict[str, Any]] = [{}, {"base_iters": 0, "tail_iters": 0}, {"over_relaxation": 1.3, "base_iters": 2}]


@pytest.mark.slow
@pytest.mark.parametrize("options", slow_after(1, MODES, MODES[1:]))
@pytest.mark.parametrize("dustbin", slow_after(0, [False, True], {False}))
def test_a_balanced_problem_does_not_depend_on_the_unit_of_mass(options: dict[str, Any], dustbin: bool) -> None:
    """Nor do gradients; potentials, residuals and masses come back in the caller's."""
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 6, 4)) for i in range(3))
    mass = jnp.linspace(1.0, 2.0, 6)

    def attention(q: jax.Array, unit: float) -> tuple[jax.Array, tpu.SinkhornAux]:
        bin_ = tpu.Dustbin(0.2, 0.1, row_capacity=4 * unit, col_capacity=4 * unit) if dustbin else None
        return tpu.sinkhorn_attention(
            q, k, v, row_mass=mass * unit, col_mass=mass[::-1] * unit, dustbin=bin_, return_aux=True, **options
        )

    def loss(q: jax.Array, unit: float) -> jax.Array:
        out, aux = attention(q, unit)
        return (out * jnp.arange(out.size).reshape(out.shape)).sum() + (aux.row_dustbin.sum() / unit if dustbin else 0)

    attend, derive = jax.jit(attention), jax.jit(jax.grad(loss))
    (truth, aux), slope = attend(q, 1.0), derive(q, 1.0)
    for unit in (2.0**-100, 2.0**-60, 2.0**100):
        out, found = attend(q, unit)
        assert jnp.allclose(out, truth, atol=1e-5)
        assert jnp.allclose(derive(q, unit), slope, rtol=1e-3, atol=1e-3)
        totals = [x.row_potential.mean() + x.col_potential.mean() for x in (found, aux)]
        assert abs(totals[0] - totals[1] - jnp.log(unit)) < 1e-3
        for x, y in zip((found.col_residual, found.row_dustbin), (aux.col_residual, aux.row_dustbin), strict=True):
            assert y is None or jnp.allclose(x / unit, y, atol=1e-5)
