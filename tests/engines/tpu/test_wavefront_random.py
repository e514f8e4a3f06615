"""Three hundred random problems through the wavefront kernels, interpreted, each against the definition.

Options are compiled in and data are not, so each of twelve draws of the options is compiled once, for a batch of
twenty-five problems that differ in lengths, segments, centres, masses, masks and scores.
"""

from __future__ import annotations

from typing import Any

import pytest
from marks import slow_after

torch, jax = pytest.importorskip("torch"), pytest.importorskip("jax")

import problems  # noqa: E402
import tpu_kernels  # noqa: E402
from conformance import relative_error, results  # noqa: E402
from torch import Tensor  # noqa: E402

from torch_sinkhorn_attn.engines import ENGINES  # noqa: E402
from torch_sinkhorn_attn.engines.tpu.method.lowering import Lowering  # noqa: E402
from torch_sinkhorn_attn.engines.tpu.wavefront import adjoint, passes  # noqa: E402

ENGINE, COUNT, EACH = "jax wavefront", 300, 25
DRAWS = range(COUNT // EACH)
D = torch.float64


def batch_of(seed: int) -> problems.Call:
    """Problems that have a plan: relaxed, or balanced with a window that leaves no token without a pair."""
    g = torch.Generator().manual_seed(1000 + seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=g))

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=D)

    length = draw(129, 300)
    kind = ("whole", "lengths", "segments", "centres")[seed % 4]
    size = length if kind == "segments" or draw(0, 1) else draw(length * 3 // 4, length * 5 // 4)
    groups, heads = (2, 1) if seed % 5 == 0 else (1, 1)
    reach = draw(20, 120)
    options: dict[str, Any] = {
        "window": (reach, reach + draw(0, 30)), "epsilon": (1.0, 0.5, 2.0)[seed % 3], "enable_gqa": groups > 1,
        "base_iters": draw(1, 4), "tail_iters": draw(1, 2),
    }  # fmt: skip
    relaxed = kind == "centres" or seed % 3 == 0
    if relaxed:
        options["relaxation"] = (1.5, (2.0, 0.7), 0.5)[draw(0, 2)]
    if seed % 6 == 1:
        options["over_relaxation"] = 1.3
    elif seed % 3 == 2:
        options |= {"acceleration": "chebyshev", "contraction": None if kind != "segments" and draw(0, 1) else 0.8}
        options["base_iters"] += 1
    if kind == "lengths":
        queries = torch.randint(length // 2, length + 1, (EACH,), generator=g)
        options["query_lengths"] = queries
        options["key_lengths"] = (queries * (0.8 + 0.4 * torch.rand(EACH, generator=g))).long().clamp(1, size)
    elif kind == "segments":
        cuts = torch.randint(1, length, (EACH, 2), generator=g).sort(-1).values
        ids = (torch.arange(length) >= cuts[:, :1]).long() + (torch.arange(length) >= cuts[:, 1:]).long()
        ids = torch.where(torch.rand(EACH, length, generator=g) < 0.1, -1, ids)
        options |= {"query_segment_ids": ids, "key_segment_ids": ids}
    elif kind == "centres":
        bend = 0.8 + 0.4 * torch.rand(EACH, 1, generator=g)
        options["window_centers"] = torch.linspace(0, 1, length) ** bend * (size - 1) + draw(-20, 20)
    if draw(0, 1):
        if relaxed:
            options["col_mass"] = 0.5 + torch.rand(EACH, 1, size, generator=g, dtype=D)
        else:
            options["row_mass"] = 1 + 0.02 * torch.rand(EACH, 1, length, generator=g, dtype=D)
    query, key, value = randn(EACH, heads * groups, length, 3), randn(EACH, heads, size, 3), randn(EACH, heads, size, 2)
    leaves = [x.requires_grad_() for x in (query, key, value)]
    mask = None
    if relaxed and seed % 2:
        mask = torch.rand(EACH, 1, length, size, generator=g) > 0.2
    if seed % 4 == 1:
        options["dropout_p"] = 0.2
    return problems.Call(seed, query, key, value, mask, options, leaves)


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", slow_after(0, DRAWS))
def test_random_problems(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    suited = tpu_kernels.without_streaming(monkeypatch, passes, adjoint)
    lowering = Lowering("wavefront", interpret=True)
    kernels = tpu_kernels.Kernels(lowering, ENGINE, xla_backend_optimization_level=0)
    monkeypatch.setitem(ENGINES, ENGINE, kernels)
    call = batch_of(seed)
    found, expected = (results(call, engine, plan=False) for engine in (ENGINE, "reference"))
    assert suited and all(suited), call
    for name, y in expected.items():
        floor = 1.0 if "residual" in name else 1e-3
        for n, (each, other) in enumerate(zip(found[name], y, strict=True)):
            assert bool(torch.isfinite(other).all()), (name, n, call)
            error = relative_error(each, other, floor)
            assert error < 1e-10, f"{name} of problem {n}: {error:.1e} in {call}"
