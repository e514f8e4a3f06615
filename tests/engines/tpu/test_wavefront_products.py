"""Products of a band with vectors along the path of the wavefront, interpreted, against dense matrices."""

from __future__ import annotations

from typing import Any

import pytest
from marks import slow_after

torch, jax = pytest.importorskip("torch"), pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import tpu_kernels  # noqa: E402
from tpu_interpreter import RACING, watch_races  # noqa: E402

from torch_sinkhorn_attn.engines.tpu.method.blockwise import BlockwisePasses  # noqa: E402
from torch_sinkhorn_attn.engines.tpu.method.lowering import Lowering  # noqa: E402
from torch_sinkhorn_attn.engines.tpu.method.sinkhorn import Augmented  # noqa: E402
from torch_sinkhorn_attn.engines.tpu.releases import enable_x64  # noqa: E402
from torch_sinkhorn_attn.engines.tpu.wavefront.products import BandPasses  # noqa: E402
from torch_sinkhorn_attn.problem.arguments import prepare  # noqa: E402

D = torch.float64
IDS = torch.tensor([[0] * 60 + [-1] * 10 + [3] * 90, [1] * 50 + [2] * 110])
CASES: dict[str, tuple[tuple[int, int], dict[str, Any]]] = {
    "plain": ((300, 260), {"window": (50, 40)}),
    "lengths": (
        (200, 200),
        {"window": (30, 30), "query_lengths": torch.tensor([200, 131]), "key_lengths": torch.tensor([170, 140])},
    ),
    "packed": ((160, 160), {"window": (30, 30), "query_segment_ids": IDS, "key_segment_ids": IDS}),
    "mask": ((150, 200), {"window": (60, 60), "mask": "float"}),
    "centres": ((200, 300), {"window": (20, 30), "window_centers": torch.arange(200).mul(1.4).clamp(max=200)}),
    "one token": ((1, 1), {"window": (0, 0)}),
}


@pytest.mark.parametrize("name", slow_after(0, CASES, {"lengths", "packed", "centres", "one token", "mask"}))
def test_products_are_those_of_the_matrix(name: str) -> None:
    (length, size), options = CASES[name]
    g = torch.Generator().manual_seed(1)
    q, k = (torch.randn(2, 2, n, 3, generator=g, dtype=D) for n in (length, size))
    options = dict(options)
    mask = None
    if options.pop("mask", None):
        mask = torch.randn(2, 1, length, size, generator=g, dtype=D)
        mask = mask.masked_fill(torch.rand(length, size, generator=g) < 0.3, -torch.inf)
    prepared = prepare(q, k, k, mask, relaxation=1.0, **options)
    p, x, weight, more = (torch.randn(2, 2, length, generator=g, dtype=D) for _ in range(4))
    qs, y = (torch.randn(2, 2, size, generator=g, dtype=D) for _ in range(2))
    with enable_x64():
        inputs = tpu_kernels.inputs_of(prepared.inputs)
        constants, statics = tpu_kernels.constants_of(prepared.problem), tpu_kernels.statics_of(prepared.problem)
        plain = BlockwisePasses(inputs, constants, statics)
        band = BandPasses(Augmented(inputs, constants, statics, plain), Lowering("wavefront", interpret=True))
        p, x, weight, more, qs, y = (jnp.asarray(t.numpy()) for t in (p, x, weight, more, qs, y))
        live = constants.log_row_mass > -jnp.inf
        more = jnp.where(live & (constants.row_lo < constants.row_hi)[:, None], more, 0)
        found = [band.rows(p, qs, y), band.columns(p, qs, x), *band.both(p, qs, y, weight, more)]
        expected = [plain.rows(p, qs, y), plain.columns(p, qs, x), *plain.both(p, qs, y, weight, more)]
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)
        assert name == "one token" or np.abs(b).max() > 1e-3


@pytest.mark.slow
def test_no_races(monkeypatch: pytest.MonkeyPatch) -> None:
    """JAX's interpreter of TPU kernels, on two cores."""
    race_states = watch_races(monkeypatch)
    x = torch.randn(2, 1, 140, 3, generator=torch.Generator().manual_seed(1))
    prepared = prepare(x, x, x, window=(8, 8))
    inputs = tpu_kernels.inputs_of(prepared.inputs)
    constants, statics = tpu_kernels.constants_of(prepared.problem), tpu_kernels.statics_of(prepared.problem)
    plain = BlockwisePasses(inputs, constants, statics)
    band = BandPasses(Augmented(inputs, constants, statics, plain), Lowering("wavefront", RACING))
    vectors = jnp.asarray(torch.randn(5, 2, 1, 140).numpy())
    found, expected = (jax.jit(passes.both)(*vectors) for passes in (band, plain))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    assert race_states and not any(state.races_found for state in race_states)
