"""Acceleration in the JAX half: by plain XLA, by the streaming kernels, and called from JAX."""

from __future__ import annotations

from typing import Any

import pytest
from marks import slow_after

torch, jax = pytest.importorskip("torch"), pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
from conformance import assert_agrees  # noqa: E402
from test_conformance import call_of  # noqa: E402
from tpu_kernels import Kernels  # noqa: E402

from torch_sinkhorn_attn import Dustbin, engines, sinkhorn_attention  # noqa: E402
from torch_sinkhorn_attn.engines import tpu  # noqa: E402
from torch_sinkhorn_attn.engines.tpu.method.lowering import Lowering  # noqa: E402

FAST: dict[str, Any] = {"acceleration": "chebyshev", "base_iters": 6}
IDS = torch.arange(20)[None].expand(2, -1) // 7
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "segments, dustbin, early": {
        "query_segment_ids": IDS, "key_segment_ids": IDS, "dustbin": Dustbin(0.1, 0.2), "tolerance": 1e-2,
    },
    "given": {"contraction": 0.8},
    "early": {"tolerance": 1e-1, "base_iters": 30},
    "relaxed band": {"window": (3, 3), "relaxation": (1.0, 2.0)},
    "dustbin": {"dustbin": Dustbin(0.1, 0.2)},
    "implicit": {"gradient": "implicit", "base_iters": 40},
}  # fmt: skip


CASES = [*(f"blockwise: {name}" for name in OPTIONS), "streaming: plain", "streaming: segments, dustbin, early"]


@pytest.mark.slow
@pytest.mark.parametrize("case", slow_after(1, CASES, CASES[1:-1]))
def test_it_is_that_of_the_definition(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled without optimisation, which is most of the time of a small problem."""
    shape, name = case.split(": ")
    engine = Kernels(Lowering(shape, interpret=shape != "blockwise"), xla_backend_optimization_level=0)
    monkeypatch.setitem(engines.ENGINES, "jax", engine)
    call = call_of(0, 2, 2, 20, 20, 3, **{**FAST, **OPTIONS[name]})
    assert_agrees(call, "jax", plan=False, tolerance=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("more", [{"contraction": 0.9}, {"window": (3, 3), "tolerance": 1e-2}])
def test_from_jax(more: dict[str, Any]) -> None:
    q, k, v = (3 * jax.random.normal(jax.random.key(i), (2, 30, 8)) for i in range(3))
    found = jax.jit(lambda q: tpu.sinkhorn_attention(q, k, v, **FAST, **more))(q)
    tensors = (torch.tensor(jax.device_get(x)) for x in (q, k, v))
    truth = jnp.asarray(sinkhorn_attention(*tensors, engine="reference", **FAST, **more).numpy())
    assert jnp.abs(found - truth).max() < 1e-4
    assert jnp.abs(found - tpu.sinkhorn_attention(q, k, v, base_iters=6)).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("keys", [0, 4])
def test_nothing_to_accelerate(keys: int) -> None:
    """No keys, or no queries."""
    q, k = jnp.ones((1, 4 - keys, 3)), jnp.ones((1, keys, 3))
    for contraction in (None, 0.9):
        out = tpu.sinkhorn_attention(q, k, k, **FAST, contraction=contraction)
        assert out.shape == q.shape and (out == 0).all()
