"""Matches against the dense plan, on every engine."""

from __future__ import annotations

from typing import Any

import problems
import pytest
import torch
from conformance import ENGINES
from marks import slow_after
from torch import Tensor

from torch_sinkhorn_attn import Dustbin, Matches, set_checks, sinkhorn_matches, sinkhorn_plan
from torch_sinkhorn_attn.boundary import ops
from torch_sinkhorn_attn.engines import cpu
from torch_sinkhorn_attn.engines.tiled import tiles
from torch_sinkhorn_attn.method.partners import CHUNK, SORTED_FROM, Best, leading, merged
from torch_sinkhorn_attn.problem.arguments import prepare

D = torch.float64
everywhere = pytest.mark.parametrize("engine", [*ENGINES, "reference"])


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = D) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def sorted_by_stable_sort(plan: Tensor, k: int, dim: int) -> Best:
    mass, index = plan.transpose(dim, -1).sort(dim=-1, descending=True, stable=True)
    missing = max(0, k - mass.shape[-1])
    mass, index = (torch.nn.functional.pad(x[..., :k], (0, missing)) for x in (mass, index))
    return Best(mass, torch.where(mass == 0, -1, index))


def check(found: Matches, plan: Tensor, dustbin: bool, k: int, told: object, tolerance: float = 1e-11) -> None:
    """Those of the dense plan; where entries are equal but for rounding, which one is first is its affair."""
    real = plan[..., : found.row_index.shape[-2], : found.col_index.shape[-2]]
    for index, mass, dim in ((found.row_index, found.row_plan, -1), (found.col_index, found.col_plan, -2)):
        expected = sorted_by_stable_sort(real, k, dim)
        assert index.shape == expected.place.shape and index.dtype == torch.int64, told
        torch.testing.assert_close(mass, expected.mass, rtol=tolerance, atol=tolerance, msg=str(told))
        assert torch.equal(index < 0, mass == 0), told
        if real.numel():
            there = real.transpose(dim, -1).gather(-1, index.clamp(min=0)).masked_fill(index < 0, 0.0)
            torch.testing.assert_close(there, mass, rtol=tolerance, atol=tolerance, msg=str(told))
        clear = (expected.mass[..., :-1] - expected.mass[..., 1:]).abs() > 10 * tolerance
        clear = torch.nn.functional.pad(clear, (1, 0), value=True) & torch.nn.functional.pad(clear, (0, 1))
        assert torch.equal(index[clear], expected.place[clear]), told
        taken = torch.where(index < 0, -1 - torch.arange(k), index).sort(-1).values
        assert (taken[..., 1:] != taken[..., :-1]).all(), told
    for mine, theirs, partner in (
        (found.row_match, found.col_index[..., 0], found.row_index[..., 0]),
        (found.col_match, found.row_index[..., 0], found.col_index[..., 0]),
    ):
        for where in (mine >= 0).nonzero().tolist():
            assert theirs[(*where[:-1], int(mine[tuple(where)]))] == where[-1], told
        if theirs.shape[-1]:
            back = theirs.gather(-1, partner.clamp(min=0)) == torch.arange(partner.shape[-1])
            assert torch.equal(mine, torch.where(back & (partner >= 0), partner, -1)), told
    if dustbin:
        assert found.row_dustbin is not None and found.col_dustbin is not None
        torch.testing.assert_close(found.row_dustbin, plan[..., :-1, -1], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(found.col_dustbin, plan[..., -1, :-1], rtol=tolerance, atol=tolerance)
    else:
        assert found.row_dustbin is None and found.col_dustbin is None


def agrees(call: problems.Call, engine: str, k: int) -> None:
    """With the plan of the definition, and a wide margin for problems whose potentials are large."""
    options = {name: x for name, x in call.options.items() if name != "dropout_p"}
    plan = sinkhorn_plan(call.query, call.key, call.mask, engine="reference", **options).detach()
    found = sinkhorn_matches(call.query, call.key, call.mask, k=k, engine=engine, **options)
    assert not any(x is not None and x.requires_grad for x in found)
    check(found, plan, "dustbin" in options, k, call)


@everywhere
@pytest.mark.parametrize("start", slow_after(1, range(0, 1000, 50), range(300, 1000)))
def test_a_thousand_random_problems(engine: str, start: int) -> None:
    refused = 0
    for seed in range(start, start + 50):
        call = problems.make(seed, dropout=False)
        try:
            agrees(call, engine, k=1 + seed % 4)
        except ValueError as error:  # a drawn window may leave no pair at all
            assert "window" in str(error), call
            refused += 1
    assert refused <= 2


@pytest.mark.slow
@everywhere
@pytest.mark.parametrize("start", slow_after(1, range(2000, 2200, 50)))
def test_over_many_tiles(engine: str, start: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "block_size", lambda heads, reach=None: 4)
    test_a_thousand_random_problems(engine, start)


SIZES = {
    "several tiles": (1, 2, 150, 90),
    "one query": (2, 1, 1, 7),
    "one key": (1, 2, 7, 1),
    "no queries": (1, 1, 0, 4),
    "no keys": (1, 2, 4, 0),
    "no batch": (0, 2, 4, 5),
}


@everywhere
@pytest.mark.parametrize("k", [1, 3, 40])
@pytest.mark.parametrize("name", SIZES)
def test_sizes(name: str, k: int, engine: str) -> None:
    num, heads, length, size = SIZES[name]
    for dustbin in (None, Dustbin(0.5, randn(heads, 1))):
        call = problems.Call(0, randn(num, heads, length, 8), randn(num, heads, size, 8, seed=1), randn(0))
        call.options = {"epsilon": 0.3} if dustbin is None else {"epsilon": 0.3, "dustbin": dustbin}
        agrees(call, engine, k)


@everywhere
def test_ties_go_to_the_lowest_index(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "block_size", lambda heads, reach=None: 4)
    query = torch.zeros(1, 10, 3)
    for k in (1, 3):
        found = sinkhorn_matches(query, query, k=k, engine=engine)
        assert (found.row_index == torch.arange(k)).all() and (found.col_index == torch.arange(k)).all()
        assert found.row_match.tolist() == [[0, *[-1] * 9]]


@everywhere
@pytest.mark.parametrize("unit", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("relaxation", [None, 2.0, (1.5, None)])
def test_masses_are_in_the_callers_unit(unit: float, relaxation: Any, engine: str) -> None:
    """The probability, a share of the query, knows no unit where balanced."""
    query, key = randn(2, 6, 4), randn(2, 5, 4, seed=1)
    options = {"row_mass": unit * (1 + torch.rand(6, dtype=D)), "relaxation": relaxation, "base_iters": 200}
    plan = sinkhorn_plan(query, key, engine="reference", **options)
    found = sinkhorn_matches(query, key, k=2, engine=engine, **options)
    torch.testing.assert_close(found.row_plan, plan.topk(2).values, rtol=1e-9, atol=0.0)
    share = (plan / options["row_mass"][:, None]).max(-1).values
    matched = found.row_match >= 0
    torch.testing.assert_close(found.probability[matched], share[matched], rtol=1e-9, atol=0.0)
    assert (found.probability[~matched] == 0).all()


@everywhere
def test_a_nan_shows_in_its_own_head(engine: str) -> None:
    """On the engine whose segments are problems of their own, also in its own segment alone."""
    query, key = randn(2, 2, 20, 4, dtype=torch.float32), randn(2, 2, 20, 4, seed=1, dtype=torch.float32)
    key[0, 1, 3, 2] = torch.nan
    ids = (torch.arange(20) >= 8).long().expand(2, -1)
    packed = {"query_segment_ids": ids, "key_segment_ids": ids}
    for options in ({}, packed, {"dustbin": Dustbin(0.1, 0.2)}):
        found = sinkhorn_matches(query, key, k=2, engine=engine, **options)
        of_segment = 8 if options is packed else 20
        hit = of_segment if engine == "cpu" else 20
        for index, mass in ((found.row_index, found.row_plan), (found.col_index, found.col_plan)):
            assert mass[0, 1, :hit].isnan().all()
            assert not mass[1].isnan().any() and not mass[0, 0].isnan().any() and not mass[0, 1, hit:].isnan().any()
            assert (index[0, 1, :of_segment] < of_segment).all() and (index[0, 1, of_segment:] >= of_segment).all()
        assert found.probability[0, 1, :hit].isnan().all() and found.mutual(0.5)[1].isnan().any()


@pytest.mark.parametrize("capability", cpu.capabilities())
def test_the_kernels_name_nobody_off_the_support(capability: str) -> None:
    """Not for a NaN either, whatever the place of it and the padding beside it."""
    before = cpu.capability()
    cpu.set_capability(capability)
    try:
        for size in (3, 8, 17, 33, 70):
            ids = torch.zeros(size, dtype=torch.int64)
            ids[size // 2] = -1
            gap = {"query_segment_ids": ids, "key_segment_ids": ids}
            band = {"window": (2, 2), "relaxation": 1.0}
            hole = torch.ones(size, size, dtype=torch.bool)
            hole[size // 3, : size // 2] = False
            for options, mask in ((gap, None), (band, None), ({}, hole), (gap | band, hole)):
                for dtype, k in ((torch.float32, 1), (torch.float64, 3)):
                    query, key = randn(2, size, 4, dtype=dtype), randn(2, size, 4, seed=1, dtype=dtype)
                    support = sinkhorn_plan(query, key, mask, engine="cpu", **options) > 0
                    key[0, size - 1, 1] = torch.nan
                    found = sinkhorn_matches(query, key, mask, k=k, engine="cpu", **options)
                    for x, there in ((found.row_index, support), (found.col_index, support.transpose(-1, -2))):
                        inside = there.gather(-1, x.clamp(min=0)) | (x < 0)
                        assert inside.all() and (x < size).all(), (size, options)
                    assert found.row_plan[0].isnan().any() and not found.row_plan[1].isnan().any()
    finally:
        cpu.set_capability(before)


def test_threads_and_budgets_change_no_bit() -> None:
    query, key = randn(2, 700, 16, dtype=torch.float32), randn(2, 600, 16, seed=1, dtype=torch.float32)
    budget, threads, found = cpu.workspace_budget(), torch.get_num_threads(), []
    try:
        for count, num_bytes in ((1, budget), (2, budget), (3, 0), (1, 1 << 18)):
            torch.set_num_threads(count)
            cpu.set_workspace_budget(num_bytes)
            found.append(sinkhorn_matches(query, key, k=3, engine="cpu", dustbin=Dustbin(0.5, 0.5)))
    finally:
        torch.set_num_threads(threads)
        cpu.set_workspace_budget(budget)
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


@everywhere
def test_inactive_tokens_have_no_partner(engine: str) -> None:
    lengths = torch.tensor([3, 0])
    found = sinkhorn_matches(randn(2, 1, 5, 4), randn(2, 1, 6, 4), k=2, query_lengths=lengths, engine=engine)
    assert (found.row_index[0, 0, 3:] == -1).all() and (found.row_plan[0, 0, 3:] == 0).all()
    assert (found.row_index[1] == -1).all() and (found.col_index[1] == -1).all() and (found.col_match[1] == -1).all()
    assert (found.row_index[0, 0, :3] >= 0).all() and (found.col_index[0] < 3).all()


def test_mutual_matches_are_superglues() -> None:
    """As transformers' SuperGlue and LightGlue take them from the scores."""
    query, key = randn(3, 1, 40, 16), randn(3, 1, 30, 16, seed=1)
    options = {"dustbin": Dustbin(1.0, 1.0), "epsilon": 0.2}
    scores = sinkhorn_plan(query, key, **options)[..., :-1, :-1]
    found = sinkhorn_matches(query, key, **options)
    (max0, index0), (_, index1) = scores.max(-1), scores.max(-2)
    mutual = index1.gather(-1, index0) == torch.arange(40)
    assert torch.equal(found.row_match, torch.where(mutual, index0, -1))
    torch.testing.assert_close(found.probability, torch.where(mutual, max0, 0.0))
    for threshold in (0.0, 0.2):
        pairs, probability = found.mutual(threshold)
        kept = mutual & (max0 > threshold)
        assert torch.equal(pairs[:, :-1], kept.nonzero()) and torch.equal(pairs[:, -1], index0[kept])
        assert len(pairs) > 0 and torch.equal(probability, found.probability[kept])
    assert found.mutual(0.2)[0].shape[0] < found.mutual()[0].shape[0]
    b, h, i, j = found.mutual()[0].T
    assert torch.equal(found.col_match[b, h, j], i) and (found.col_match >= 0).sum() == len(b)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_give_float32(dtype: torch.dtype, engine: str) -> None:
    query, key = randn(2, 30, 8).to(dtype), randn(2, 30, 8, seed=1).to(dtype)
    found = sinkhorn_matches(query, key, k=2, engine=engine)
    assert found.row_plan.dtype == found.probability.dtype == torch.float32
    check(found, sinkhorn_plan(query.float(), key.float(), engine="reference"), False, 2, dtype, tolerance=1e-5)


@everywhere
def test_of_scores(engine: str) -> None:
    scores = randn(2, 3, 20, 15)
    for x, options in ((scores, {}), (scores[0, 0], {"dustbin": Dustbin(1.0, 1.0)}), (scores, {"scale": 3.0})):
        plan = sinkhorn_plan(x, engine="reference", **options)
        check(sinkhorn_matches(x, k=2, engine=engine, **options), plan, "dustbin" in options, 2, options)
    found = sinkhorn_matches(scores[0], key_lengths=torch.tensor([15, 4, 0]), engine=engine)  # of each head
    assert found.row_index.shape == (3, 20, 1) and (found.row_index[1] < 4).all() and (found.row_index[2] == -1).all()


def test_what_is_wrong_is_refused() -> None:
    x = randn(1, 4, 2)
    for k, error in ((0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError), ("2", TypeError)):
        with pytest.raises(error, match="k"):
            sinkhorn_matches(x, x, k=k)
    with pytest.raises(ValueError, match="sinkhorn_matches got dropout_p"):
        sinkhorn_matches(x, x, dropout_p=0.1)
    with pytest.raises(TypeError, match=r"sinkhorn_matches\(\) got unknown option"):
        sinkhorn_matches(x, x, heads=2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("engine", slow_after(1, ENGINES))
def test_compiled_traced_and_mapped(engine: str) -> None:
    query, key = randn(3, 2, 20, 4), randn(3, 2, 15, 4, seed=1)

    def of(query: Tensor, key: Tensor) -> Matches:
        return sinkhorn_matches(query, key, k=2, engine=engine, dustbin=Dustbin(0.0, 0.3))

    set_checks("never")
    expected = of(query, key)
    for found in (
        torch.compile(of, backend="aot_eager", fullgraph=True)(query, key),
        torch.func.vmap(of)(query, key),
        torch.func.vmap(of, in_dims=(0, None))(query, key[0]),
    ):
        pairs = list(zip(found, expected, strict=True))
        assert all(torch.equal(x[:1], y[:1]) for x, y in pairs)
    traced = torch.jit.trace(lambda q, k: tuple(of(q, k)), (query, key), check_trace=False)
    again = of(query.flip(-2), key)
    assert all(torch.equal(x, y) for x, y in zip(traced(query.flip(-2), key), again, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("seed", [0, 5, 8, 11])
def test_opcheck(seed: int, engine: str) -> None:
    call = problems.make(seed, dropout=False)
    prepared = prepare(call.query.detach(), call.key.detach(), None, call.mask, **call.options)
    flat = ops.flatten(prepared.inputs, prepared.problem, engine)
    flat = [x.detach() if isinstance(x, Tensor) else x for x in flat]
    torch.library.opcheck(torch.ops.torch_sinkhorn_attn.matches.default, tuple(ops.with_residuals(flat, 2)))


@pytest.mark.parametrize("k", [1, 2, 7, SORTED_FROM + 1])
@pytest.mark.parametrize("size", [1, 5, CHUNK, CHUNK + 1, 3 * CHUNK, 100])
def test_leading_is_a_stable_sort(size: int, k: int) -> None:
    for seed in range(4):
        plan = torch.rand(2, 9, size, generator=torch.Generator().manual_seed(seed)).mul(6).floor() / 6
        plan[0, 1, size // 2] = torch.nan
        for x, dim in ((plan, -1), (plan.transpose(-1, -2), -2)):
            before, found, expected = x.clone(), leading(x, k, dim), sorted_by_stable_sort(x, k, dim)
            torch.testing.assert_close(found.mass, expected.mass, rtol=0, atol=0, equal_nan=True)
            assert torch.equal(found.place, expected.place)
            assert torch.equal(x.nan_to_num(-1), before.nan_to_num(-1))  # it is left as it was
        half = size // 2
        second = leading(plan[..., half:], k)
        second = Best(second.mass, torch.where(second.place < 0, -1, second.place + half))
        both, whole = merged(leading(plan[..., :half], k), second), leading(plan, k)
        torch.testing.assert_close(both.mass, whole.mass, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(both.place, whole.place)
