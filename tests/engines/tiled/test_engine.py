"""The tiled engine's own promises: linear memory, only the band's tiles, results that do not depend on the tiling."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from memory import PeakMemory
from torch import Tensor

from torch_sinkhorn_attn import Dustbin, certify, sinkhorn_attention
from torch_sinkhorn_attn.engines.tiled import tiles
from torch_sinkhorn_attn.engines.tiled.engine import ENGINE as tiled
from torch_sinkhorn_attn.problem.arguments import prepare
from torch_sinkhorn_attn.problem.problem import OutputGrads

WIDTH, WINDOW = 16, (128, 128)


def inputs(n: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(1, n, WIDTH, generator=g).requires_grad_() for _ in range(3)]


def step(n: int) -> Callable[[], None]:
    prepared = prepare(*inputs(n), window=WINDOW, base_iters=1, tail_iters=2)
    detached = type(prepared.inputs)(*(None if x is None else x.detach() for x in prepared.inputs))

    def run() -> None:
        result = tiled.forward(detached, prepared.problem)
        tiled.backward(detached, prepared.problem, result.output, result.potentials, OutputGrads(result.output))

    return run


def peak(n: int) -> PeakMemory:
    run = step(n)
    with PeakMemory() as memory:
        run()
    return memory


@pytest.mark.slow
def test_peak_memory_is_linear_and_no_square_tensor_exists() -> None:
    small, large = peak(16384), peak(32768)
    assert large.largest <= 4 * max(tiles.LARGEST_BLOCK**2, 32768 * WIDTH)  # nothing beyond a tile or an input
    growth = large.peak - small.peak
    inputs_growth = 4 * 16384 * WIDTH
    assert growth < 16 * inputs_growth  # output, gradients, accumulators, duals; a plan would add 3 GiB
    assert large.peak < 2.05 * small.peak


@pytest.mark.slow
@pytest.mark.exhaustive
def test_certificates_take_linear_memory() -> None:
    peaks = []
    for n in (4096, 8192):
        q, k, _ = (x.detach() for x in inputs(n))
        with PeakMemory() as memory:
            certificate = certify(q, k, window=(64, 64), base_iters=1, relaxation=1.0)  # relaxed: few CG iterations
        assert 0 < certificate.rate.item() < 1
        peaks.append(memory.peak)
    assert peaks[1] < 2.05 * peaks[0] and peaks[1] < 8192**2  # bytes: a quarter of a float32 plan


def test_the_meter_would_see_a_plan() -> None:
    with PeakMemory() as memory:
        x = torch.zeros(1024, 1024)
        (x + 1).sum()
    assert memory.peak == 8 * 1024**2 + 4 and memory.largest == 4 * 1024**2


@contextmanager
def saved_bytes() -> Iterator[list[int]]:
    seen: dict[int, int] = {}
    total = [0]

    def pack(x: Tensor) -> Tensor:
        seen[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        total[0] = sum(seen.values())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield total


@pytest.mark.slow
def test_saved_tensors_are_linear() -> None:
    totals = []
    for n in (16384, 32768):
        q, k, v = inputs(n)
        with saved_bytes() as total:
            out = sinkhorn_attention(q, k, v, window=WINDOW, base_iters=1, tail_iters=2, engine="tiled")
        assert out.requires_grad
        totals.append(total[0])
    n, floats = 16384, 4
    numbers = 4 * WIDTH + 6 + 2  # q, k, v, output; three duals a side; log masses
    assert totals[0] <= n * (numbers * floats + 4 * 8) * 1.1  # and four int64 interval ends
    assert totals[1] <= 2 * totals[0] * 1.01


def test_only_the_tiles_of_the_band_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "block_size", lambda heads, reach=None: 32)
    seen: set[tuple[int, int]] = set()
    original = tiles.Tiles.scores

    def scores(self, i: int, j: int) -> Tensor:
        seen.add((i, j))
        return original(self, i, j)

    monkeypatch.setattr(tiles.Tiles, "scores", scores)
    q, k, v = inputs(1024)
    sinkhorn_attention(q, k, v, window=(40, 40), engine="tiled").sum().backward()
    assert seen == {(i, j) for i in range(32) for j in range(32) if abs(i - j) <= 2}


def test_static_bounds_without_looking_at_data_cover_the_same_band(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an accelerator uses: spans from the window alone."""
    x = torch.randn(1, 300, 4)
    problem = prepare(x, x, x, window=(20, 7)).problem
    made = tiles.Tiles(prepare(x, x, x, window=(20, 7)).inputs, problem)
    truth = made._spans
    elsewhere = problem.support.row_lo.to("meta")
    other = tiles.Tiles(made.inputs, problem)
    other.problem = replace(problem, support=replace(problem.support, row_lo=elsewhere))
    assert other._spans == truth


@pytest.mark.parametrize("block", [1, 3, 8, 64])
def test_results_do_not_depend_on_the_tiling(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, n, 4, generator=g, dtype=torch.float64).requires_grad_() for n in (13, 17, 17))
    options = {"window": (9, 9), "dustbin": Dustbin(0.2, 0.1), "dropout_p": 0.2, "engine": "tiled"}

    def run() -> list[Tensor]:
        torch.manual_seed(0)
        out = sinkhorn_attention(q, k, v, **options)
        return [out, *torch.autograd.grad(out.sin().sum(), (q, k, v))]

    whole = run()
    monkeypatch.setattr(tiles, "block_size", lambda heads, reach=None: block)
    for x, y in zip(run(), whole, strict=True):
        assert torch.allclose(x, y, atol=1e-13)
