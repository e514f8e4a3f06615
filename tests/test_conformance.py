"""Every engine against the reference: hundreds of random problems over all options together, then the corners."""

from __future__ import annotations

import problems
import pytest
import torch
from conformance import ENGINES, assert_agrees, relative_error, results
from marks import slow_after

from torch_sinkhorn_attn import Dustbin, sinkhorn_attention
from torch_sinkhorn_attn.engines.tiled import tiles

engines = pytest.mark.parametrize("engine", ENGINES)
CHUNK = 40


@engines
@pytest.mark.parametrize("start", slow_after(1, range(0, 400, CHUNK), range(200, 400)))
def test_random_problems(engine: str, start: int) -> None:
    refused = 0
    for seed in range(start, start + CHUNK):
        call = problems.make(seed)
        try:
            assert_agrees(call, engine)
        except ValueError:  # a drawn window may leave no pair at all
            refused += 1
    assert refused <= 2


@engines
@pytest.mark.parametrize("start", slow_after(0, range(1000, 1400, CHUNK), range(1200, 1400)))
def test_random_problems_over_many_tiles(engine: str, start: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "block_size", lambda heads, reach=None: 4)
    test_random_problems(engine, start)


def call_of(seed: int, *shape: int, **options) -> problems.Call:
    """Self-attention-like problem `(N, H, L, S, E)` in float64."""
    g = torch.Generator().manual_seed(seed)
    num, heads, length, size, width = shape
    tensors = [
        torch.randn(num, heads, n, width, generator=g, dtype=torch.float64).requires_grad_()
        for n in (length, size, size)
    ]
    return problems.Call(seed, *tensors, options=options, leaves=list(tensors))


CORNERS = {
    "one token": call_of(0, 1, 1, 1, 1, 3),
    "one query": call_of(1, 2, 1, 1, 7, 3),
    "one key": call_of(2, 1, 2, 7, 1, 3),
    "primes": call_of(3, 1, 3, 17, 23, 5, window=(12, 12)),
    "identity": call_of(4, 1, 1, 9, 9, 4, window=(0, 0)),
    "blocks": call_of(5, 1, 1, 6, 12, 4, window=(1, 1)),
    "no queries": call_of(6, 1, 1, 0, 4, 3),
    "no keys": call_of(7, 1, 2, 4, 0, 3),
    "no batch": call_of(8, 0, 2, 4, 5, 3),
    "no keys, dustbin": call_of(9, 1, 2, 4, 0, 3, dustbin=Dustbin(1.0, 1.0)),
    "huge epsilon": call_of(10, 1, 2, 8, 9, 4, epsilon=1e3),
    "tiny epsilon": call_of(11, 1, 2, 8, 9, 4, epsilon=1e-3, base_iters=50),
    "zero lengths": call_of(12, 2, 1, 5, 5, 3, query_lengths=torch.tensor([0, 3]), key_lengths=torch.tensor([2, 4])),
    "strong relaxation": call_of(13, 1, 1, 6, 5, 3, relaxation=1e-6),
    "window without pairs": call_of(14, 1, 1, 8, 2, 3, window=(0, 0), relaxation=1.0),
    "softmax window": call_of(15, 1, 1, 8, 2, 3, window=(0, 0), base_iters=0, tail_iters=0),
}


@engines
@pytest.mark.parametrize("name", CORNERS)
def test_corners(engine: str, name: str) -> None:
    assert_agrees(CORNERS[name], engine)


@engines
def test_non_contiguous_and_broadcast_inputs(engine: str) -> None:
    g = torch.Generator().manual_seed(0)
    base = torch.randn(6, 2, 3, 8, generator=g, dtype=torch.float64).requires_grad_()
    query = base.transpose(0, 2)[..., ::2]  # (3, 2, 6, 4)
    key = torch.randn(1, 1, 5, 4, generator=g, dtype=torch.float64).requires_grad_().expand(3, 2, 5, 4)
    value = torch.randn(3, 5, 2, 4, generator=g, dtype=torch.float64).requires_grad_().transpose(1, 2)
    mask = torch.randn(5, generator=g, dtype=torch.float64).expand(3, 1, 6, 5)
    assert_agrees(problems.Call(0, query, key, value, mask, {}, [query, key, value]), engine)


@engines
@pytest.mark.parametrize("seed", range(12))
def test_float32_is_as_exact_as_plain_float32_pytorch(engine: str, seed: int) -> None:
    """Within 2x (values) and 3x (gradients) of the reference's own float32 error, plus two roundings."""
    truth = results(problems.make(seed, dropout=False, base_options=False), "reference", plan=False)
    single = problems.make(seed, torch.float32, dropout=False, base_options=False)
    plain, found = results(single, "reference", plan=False), results(single, engine, plan=False)
    for name, y in truth.items():
        if "residual" in name:
            continue
        allowed = (3 if "gradient" in name else 2) * relative_error(plain[name].double(), y) + 2e-6
        assert relative_error(found[name].double(), y) <= allowed, (name, single)


@engines
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_compute_in_float32(engine: str, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    half = [torch.randn(2, 2, 40, 16, generator=g).to(dtype).requires_grad_() for _ in range(3)]
    wide = [x.detach().double().requires_grad_() for x in half]
    out, aux = sinkhorn_attention(*half, window=(9, 9), engine=engine, return_aux=True)
    truth = sinkhorn_attention(*wide, window=(9, 9), engine="reference")
    assert out.dtype == dtype and aux.row_potential.dtype == torch.float32
    assert aux.row_residual.max() < 1e-4  # float32 inside: half would leave 1e-2
    rounding = 1e-2 if dtype == torch.bfloat16 else 2e-3
    assert relative_error(out.double(), truth) < rounding
    for x, y in zip(torch.autograd.grad(out.sum(), half), torch.autograd.grad(truth.sum(), wide), strict=True):
        assert x.dtype == dtype
        assert relative_error(x.double(), y) < 2 * rounding


@engines
@pytest.mark.parametrize("window", [None, (3, 3)])
def test_scores_of_ten_thousand_stay_finite(engine: str, window) -> None:
    g = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 2, 12, 4, generator=g).mul(70).requires_grad_() for _ in range(2))
    value = torch.randn(1, 2, 12, 4, generator=g).requires_grad_()
    for epsilon in (1e-3, 1.0, 1e3):
        out, aux = sinkhorn_attention(query, key, value, window=window, epsilon=epsilon, engine=engine, return_aux=True)
        gradients = torch.autograd.grad(out.square().sum(), (query, key, value))
        assert all(torch.isfinite(x).all() for x in (out, *aux[:4], *gradients))


@engines
def test_reruns_are_bitwise_equal(engine: str) -> None:
    for seed in (3, 5, 8, 13):
        call = problems.make(seed, torch.float32)
        first, second = results(call, engine), results(call, engine)
        assert all(torch.equal(first[k], second[k]) for k in first)


@engines
def test_no_uninitialised_memory_is_read(engine: str) -> None:
    """In deterministic mode torch fills every torch.empty with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        for seed in range(30):
            assert all(torch.isfinite(x).all() for x in results(problems.make(seed), engine).values())
    finally:
        torch.use_deterministic_algorithms(False)


@engines
def test_inactive_tokens_get_exact_zeros(engine: str) -> None:
    call = call_of(0, 2, 2, 6, 7, 4, query_lengths=torch.tensor([4, 6]), key_lengths=torch.tensor([7, 3]))
    mask = torch.ones(6, 7, dtype=torch.bool)
    mask[1] = False
    mask[:, 2] = False
    call.mask = mask
    out = sinkhorn_attention(call.query, call.key, call.value, mask, engine=engine, **call.options)
    grads = torch.autograd.grad(out.square().sum(), call.leaves)
    assert (out[0, :, 4:] == 0).all() and (out[:, :, 1] == 0).all() and (out[0, :, 0] != 0).all()
    assert (grads[0][0, :, 4:] == 0).all() and (grads[0][:, :, 1] == 0).all()
    for g in grads[1:]:
        assert (g[:, :, 2] == 0).all() and (g[1, :, 3:] == 0).all() and (g[0, :, 3] != 0).all()


def test_an_unknown_engine_is_refused() -> None:
    x = torch.randn(1, 3, 2)
    known = "'cpu', 'triton', 'xla', 'torchtpu', 'tiled', 'reference'"
    with pytest.raises(ValueError, match=f"engine='cuda9' is unknown; choose one of {known}"):
        sinkhorn_attention(x, x, x, engine="cuda9")
