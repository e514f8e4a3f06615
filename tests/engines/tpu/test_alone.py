"""The JAX half by itself: without torch, with torch's arguments, against the dense definition in JAX, under every
transformation."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from marks import slow_after

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
import tpu_dense  # noqa: E402

from torch_sinkhorn_attn.engines import tpu  # noqa: E402
from torch_sinkhorn_attn.engines.tpu.releases import enable_x64  # noqa: E402

ROOT = Path(__file__).parents[3]
L, S, E = 9, 7, 4


def arrays(length: int = L, size: int = S, dtype: Any = jnp.float64) -> list[jax.Array]:
    shapes = ((2, 3, length, E), (2, 3, size, E), (2, 3, size, 5))
    return [jax.random.normal(jax.random.key(i), shape, dtype) for i, shape in enumerate(shapes)]


def cases() -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Options of the function, and the same for the definition."""
    full, lower = jnp.ones((L, S), bool), jnp.tril(jnp.ones((L, S), bool))
    n, m = jnp.array([[9, 8, 9], [6, 9, 5]])[:, 0], jnp.array([7, 4])
    by_length = (jnp.arange(L)[:, None] < n[:, None, None]) & (jnp.arange(S) < m[:, None, None])
    rows, cols = jnp.array([0, 0, 0, -1, 1, 1, 1, 2, 2]), jnp.array([0, 0, 1, 1, -1, 2, 2])
    packed = (rows[:, None] == cols) & (rows >= 0)[:, None]
    bias = jnp.sin(jnp.arange(3.0 * L * S)).reshape(3, L, S)
    a, b = jnp.linspace(1.0, 2.0, L), jnp.linspace(0.5, 1.5, S)
    b = b * a.sum() / b.sum()
    square = jnp.tril(jnp.ones((S, S), bool))
    return {
        "plain": ({}, {"keep": full}),
        "softmax": ({"base_iters": 0, "tail_iters": 0}, {"keep": full, "stopped": 0, "kept": 0}),
        "window": ({"window": (2, 1), "relaxation": 1.0}, {"keep": tpu_dense.band(L, S, (2, 1)), "rho": (0.5, 0.5)}),
        "lengths": ({"query_lengths": n, "key_lengths": m}, {"keep": by_length[:, None]}),
        "segments": ({"query_segment_ids": rows, "key_segment_ids": cols, "relaxation": (2.0, 1.0)},
                     {"keep": packed, "rho": (2 / 3, 0.5), "masses": _packed_masses(rows, cols)}),
        "float mask": ({"attn_mask": bias}, {"keep": full, "bias": bias}),
        "boolean mask": ({"attn_mask": jnp.arange(S) < 5}, {"keep": jnp.broadcast_to(jnp.arange(S) < 5, (L, S))}),
        "masses, epsilon": ({"row_mass": a, "col_mass": b, "epsilon": 0.5},
                            {"keep": full, "masses": (a, b), "epsilon": 0.5}),
        "dustbin": ({"dustbin": tpu.Dustbin(0.2, 0.1, -0.3)}, {"keep": full, "dustbin": (0.2, 0.1, -0.3)}),
        "causal, dustbin": ({"is_causal": True, "dustbin": tpu.Dustbin(0.2, 0.1)},
                            {"keep": lower, "dustbin": (0.2, 0.1, 0.0)}),
        "causal, lengths": ({"is_causal": True, "query_lengths": n, "key_lengths": m, "relaxation": 1.0},
                            {"keep": by_length[:, None] & lower, "rho": (0.5, 0.5)}),
        "causal, square": ({"is_causal": True, "relaxation": 1.0, "size": S}, {"keep": square, "rho": (0.5, 0.5)}),
        "implicit": ({"gradient": "implicit", "base_iters": 150}, {"keep": full, "stopped": 0, "kept": 152}),
        "unrolled": ({"gradient": "unrolled", "base_iters": 3}, {"keep": full, "stopped": 0, "kept": 5}),
    }  # fmt: skip


def _packed_masses(rows: jax.Array, cols: jax.Array) -> tuple[jax.Array, jax.Array]:
    n, m = (jnp.stack([(x == i).sum() for i in range(3)]) for x in (rows, cols))
    return jnp.ones(rows.shape), (n / m)[jnp.maximum(cols, 0)]


def loss(function: Any, *leaves: jax.Array) -> tuple[jax.Array, jax.Array]:
    output = function(*leaves)
    return (output * jnp.sin(jnp.arange(output.size).reshape(output.shape))).sum(), output


ELSEWHERE = {
    "window", "lengths", "segments", "boolean mask", "implicit", "causal, lengths", "causal, square", "unrolled"
}  # fmt: skip


@pytest.mark.parametrize("name", slow_after(0, [
    "softmax", "plain", "window", "lengths", "segments", "float mask", "boolean mask", "masses, epsilon", "dustbin",
    "causal, dustbin", "causal, lengths", "causal, square", "implicit", "unrolled",
], ELSEWHERE))  # fmt: skip
def test_values_and_gradients_are_the_definitions(name: str) -> None:
    with enable_x64():
        options, same = cases()[name]
        size = options.pop("size", None)
        leaves = arrays() if size is None else arrays(size, size)
        found = jax.jit(jax.grad(partial(loss, partial(tpu.sinkhorn_attention, **options)), (0, 1, 2), has_aux=True))
        truth = jax.jit(jax.grad(partial(loss, partial(tpu_dense.attention, **same)), (0, 1, 2), has_aux=True))
        assert tpu_dense.worst(found(*leaves), truth(*leaves)) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("shape", slow_after(0, ["resident", "streaming"], {"streaming"}))
def test_kernels_are_the_definition(shape: str) -> None:
    """Interpreted, in float32."""
    leaves, options = arrays(140, 140, jnp.float32), {"window": (30, 30), "base_iters": 5}
    run = partial(tpu.sinkhorn_attention, lowering=tpu.Lowering(shape, interpret=True), **options)
    dense = partial(tpu_dense.attention, keep=tpu_dense.band(140, 140, (30, 30)), stopped=5)
    found, truth = (
        jax.jit(jax.grad(partial(loss, function), (0, 1, 2), has_aux=True))(*leaves) for function in (run, dense)
    )
    assert tpu_dense.worst(found, truth) < 2e-5


@pytest.mark.slow
def test_vmap_and_checkpoint_keep_values_and_gradients() -> None:
    with enable_x64():
        options, same = {"window": (4, 4), "base_iters": 3}, {"keep": tpu_dense.band(L, L, (4, 4)), "stopped": 3}
        leaves = arrays(L, L)
        run, dense = partial(tpu.sinkhorn_attention, **options), partial(tpu_dense.attention, **same)
        step = partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
        truth = step(partial(loss, dense))(*leaves)
        kept = jax.checkpoint(run)
        for wrapped in (kept, jax.vmap(run), jax.vmap(kept), jax.checkpoint(jax.vmap(run))):
            assert tpu_dense.worst(jax.jit(step(partial(loss, wrapped)))(*leaves), truth) < 1e-10


def of_source(path: str, name: str) -> list[tuple[str, str]]:
    """Arguments of a function and their defaults, read and not imported: torch may be missing."""
    tree = ast.parse((ROOT / path).read_text())
    found = next(x for x in tree.body if isinstance(x, ast.FunctionDef) and x.name == name).args
    plain = [*[None] * (len(found.args) - len(found.defaults)), *found.defaults]
    pairs = [*zip(found.args, plain, strict=True), *zip(found.kwonlyargs, found.kw_defaults, strict=True)]
    return [(x.arg, "" if default is None else ast.unparse(default)) for x, default in pairs]


def test_the_arguments_are_torchs() -> None:
    """The same names in the same order with the same defaults; and all are documented."""
    theirs = of_source("torch_sinkhorn_attn/functional.py", "sinkhorn_attention")
    ours = of_source("torch_sinkhorn_attn/engines/tpu/front/api.py", "sinkhorn_attention")
    of_jax = {"engine": "lowering", "sequence_group": "sequence_axis"}
    expected = [(of_jax.get(name, name), d) for name, d in theirs]
    assert ours == [*expected[:-1], ("dropout_seed", "None"), expected[-1]]
    documented = inspect.getdoc(tpu.sinkhorn_attention) or ""
    missing = [name for name, _ in ours if f"{name}: " not in documented and f"{name}, " not in documented]
    assert not missing


X = jnp.ones((2, 5, 4))
CAUSAL = {
    "is_causal must be True or False, got 1": {"is_causal": 1},
    "attn_mask and is_causal=True exclude each other": {"is_causal": True, "attn_mask": jnp.ones((5, 5), bool)},
    "is_causal=True over 5 queries and 5 keys: the only balanced": {"is_causal": True},
}


@pytest.mark.parametrize("message", CAUSAL)
def test_causal_is_refused_as_by_torch(message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        tpu.sinkhorn_attention(X, X, X, **CAUSAL[message])


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # an import of it fails
from torch_sinkhorn_attn.engines.tpu import Dustbin, Lowering, SinkhornAux, sinkhorn_attention
import jax, jax.numpy as jnp, torch_sinkhorn_attn
import torch_sinkhorn_attn.engines.tpu.method.run, torch_sinkhorn_attn.engines.tpu.method.choice
import torch_sinkhorn_attn.aot.attention, torch_sinkhorn_attn.aot.bundles
x = jnp.ones((2, 4, 4))
assert jnp.allclose(sinkhorn_attention(x, x, x), x, atol=1e-5)
assert torch_sinkhorn_attn.__version__ and "sinkhorn_attention" in dir(torch_sinkhorn_attn)
try:
    torch_sinkhorn_attn.sinkhorn_attention
except ImportError as error:
    assert "torch" in str(error)
else:
    raise AssertionError("torch's half came from nowhere")
"""


@pytest.mark.slow
def test_no_torch_is_needed() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
