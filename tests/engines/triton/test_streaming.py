"""The streaming kernels against the definition, interpreted on CPU tensors: in float64 to 1e-10."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import problems
import pytest
import torch
from conformance import assert_agrees, relative_error, results
from marks import slow_after

pytest.importorskip("triton")
import triton_interpreter

from torch_sinkhorn_attn import Dustbin, sinkhorn_attention, sinkhorn_plan
from torch_sinkhorn_attn.engines import triton as engine
from torch_sinkhorn_attn.engines.base import Engine
from torch_sinkhorn_attn.engines.tiled import engine as tiled
from torch_sinkhorn_attn.engines.triton import choice, layout
from torch_sinkhorn_attn.engines.triton.streaming import blocks, run

pytestmark = pytest.mark.skipif(not engine.interpreted(), reason="the kernels run on the device here")
triton_interpreter.quicken()
CHUNK = 3
LARGEST = 24  # programs of a problem, roughly: what the interpreter does in a quarter of a second


@pytest.fixture(autouse=True)
def streaming_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and plan by the streaming kernels, whatever else would be chosen; backward, which is another file's, by
    the tiled engine and the dense definition."""
    both = SimpleNamespace(solve=run.solve, forward=run.forward, backward=tiled.ENGINE.backward)
    monkeypatch.setattr(choice, "kernels", lambda *args, **options: both)
    monkeypatch.setattr(engine.TritonEngine, "plan_backward", Engine.plan_backward)


def cheap(start: int, count: int) -> Iterator[problems.Call]:
    """`count` problems of few heads, their bases cut short, from the first seed `start * 1000` on."""
    seed = start * 1000
    while count:
        call = problems.make(seed)
        o = call.options
        o["base_iters"] = min(o["base_iters"], 2 if o.get("tolerance") or o.get("acceleration") else 1)
        heads = call.query.shape[:-2].numel()
        if heads * (4 * (o["base_iters"] + o["tail_iters"]) + 4) <= LARGEST:
            count -= 1
            yield call
        seed += 1


def small_tiles(monkeypatch: pytest.MonkeyPatch, outer: int, inner: int) -> None:
    monkeypatch.setattr(blocks, "OVERRIDE", blocks.Blocks(outer, inner, 4, 1))


@pytest.mark.parametrize("chunk", slow_after(1, range(100), exhaustive=range(4, 100)))
def test_random_problems(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of few lines in every other chunk, so that several are walked."""
    if chunk % 2 == 0:
        small_tiles(monkeypatch, 4, 4 if chunk % 4 else 2)
    refused = 0
    for call in cheap(chunk, CHUNK):
        try:
            assert_agrees(call, "triton")
        except ValueError:  # a drawn window may leave no pair at all
            refused += 1
    assert refused <= 1


def call_of(
    seed: int, *shape: int, dtype: torch.dtype = torch.float64, heads: int = 1, **options: Any
) -> problems.Call:
    """A problem `(L, S, E)` of one batch element."""
    g = torch.Generator().manual_seed(seed)
    length, size, width = shape
    tensors = [torch.randn(1, heads, n, width, generator=g, dtype=torch.float64) for n in (length, size, size)]
    leaves = [x.to(dtype).requires_grad_() for x in tensors]
    options = {"base_iters": 1, "tail_iters": 1, **options}
    return problems.Call(seed, *leaves, options=options, leaves=list(leaves))


CORNERS: dict[str, problems.Call] = {
    "one token": call_of(0, 1, 1, 1),
    "one query": call_of(1, 1, 9, 3),
    "one key": call_of(2, 9, 1, 3),
    "softmax": call_of(3, 5, 7, 3, base_iters=0, tail_iters=0),
    "blocks filled": call_of(4, 4, 8, 3),
    "one beyond": call_of(5, 5, 9, 3),
    "one short": call_of(6, 3, 7, 3),
    "many features": call_of(7, 5, 6, 130),
    "odd features": call_of(8, 5, 6, 17),
    "window": call_of(9, 14, 14, 2, window=(2, 2)),
    "wide window": call_of(10, 14, 14, 2, window=(7, 7)),
    "window without pairs": call_of(11, 8, 2, 3, window=(0, 0), relaxation=1.0),
    "softmax window": call_of(12, 8, 2, 3, window=(0, 0), base_iters=0, tail_iters=0),
    "causal": call_of(13, 9, 9, 3, is_causal=True, relaxation=1.0),
    "tiny epsilon": call_of(14, 5, 6, 3, epsilon=1e-3),
    "over-relaxed": call_of(15, 5, 6, 3, base_iters=3, over_relaxation=1.5),
    "dustbin": call_of(16, 9, 7, 3, dustbin=Dustbin(0.3, -0.2, 0.1), base_iters=2),
    "segments": call_of(
        17,
        10,
        9,
        3,
        query_segment_ids=torch.tensor([0, 0, 0, 1, 1, -1, 1, 2, 2, 2]),
        key_segment_ids=torch.tensor([0, 0, 1, -1, 1, 1, 2, 2, 3]),
    ),
    "no base": call_of(18, 5, 7, 3, base_iters=0, tail_iters=2),
    "implicit": call_of(19, 4, 3, 2, gradient="implicit"),
}
FIRST = ("blocks filled", "window", "dustbin")  # the rest is slow


@pytest.mark.parametrize("name", slow_after(len(FIRST), [*FIRST, *(x for x in CORNERS if x not in FIRST)]))
def test_corners(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch, 4, 4)
    assert_agrees(CORNERS[name], "triton")


@pytest.mark.slow
def test_strides_and_broadcast_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch, 4, 4)
    g = torch.Generator().manual_seed(0)
    base = torch.randn(6, 2, 1, 8, generator=g, dtype=torch.float64).requires_grad_()
    query = base.transpose(0, 2)[..., ::2]  # (1, 2, 6, 4)
    key = torch.randn(1, 1, 5, 4, generator=g, dtype=torch.float64).requires_grad_().expand(1, 2, 5, 4)
    value = torch.randn(1, 5, 2, 4, generator=g, dtype=torch.float64).requires_grad_().transpose(1, 2)
    masks = [
        torch.randn(5, generator=g, dtype=torch.float64).expand(1, 1, 6, 5),
        torch.randn(2, 6, 1, generator=g, dtype=torch.float64),
        torch.randn(5, 6, generator=g, dtype=torch.float64).T,
        (torch.arange(6)[:, None] + torch.arange(5)) % 7 > 0,
    ]
    for mask in masks:
        options = {"base_iters": 1, "tail_iters": 1}
        assert_agrees(problems.Call(0, query, key, value, mask, options, [query, key, value]), "triton")


@pytest.mark.slow
def test_dropout_keeps_the_same_entries_as_every_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one-hot values the output is the plan after dropout: its zeros are the same ones."""
    small_tiles(monkeypatch, 8, 4)
    call = call_of(0, 9, 11, 3, heads=2, base_iters=0)
    value = torch.eye(11, dtype=torch.float64).expand(1, 2, 11, 11)
    found = []
    for name in ("triton", "tiled"):
        torch.manual_seed(3)
        o = {**call.options, "dropout_p": 0.4}
        found.append(sinkhorn_attention(call.query, call.key, value, engine=name, **o).detach())
    assert torch.equal(found[0] == 0, found[1] == 0) and 0.2 < (found[0] == 0).double().mean() < 0.6
    assert relative_error(*found) < 1e-12


@pytest.mark.parametrize("seed", slow_after(1, range(6)))
def test_float32_is_as_exact_as_plain_float32_pytorch(seed: int) -> None:
    """Within 2x (values) and 3x (gradients) of the reference's own float32 error, plus two roundings."""

    def telling(at: int) -> bool:
        """Few heads, and lines enough that no gradient is 0 but for rounding."""
        shape = problems.make(at).query.shape
        return shape[:-2].numel() <= 3 and min(shape[-2], problems.make(at).key.shape[-2]) >= 3

    seeds = (x for x in range(seed * 100, 10000) if telling(x))
    options = {"dropout": False, "base_options": False}
    at = next(seeds)
    truth_call, single = problems.make(at, **options), problems.make(at, torch.float32, **options)
    for call in (truth_call, single):
        call.options["base_iters"] = min(2, call.options["base_iters"])
    truth = results(truth_call, "reference", plan=False)
    plain, found = results(single, "reference", plan=False), results(single, "triton", plan=False)
    for name, y in truth.items():
        if "residual" in name:
            continue
        floor = 1.0 if "potential" in name else 1e-3  # an exponent, whose error is that of the plan
        allowed = (3 if "gradient" in name else 2) * relative_error(plain[name].double(), y, floor) + 2e-6
        assert relative_error(found[name].double(), y, floor) <= allowed, (name, single)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_compute_in_float32(dtype: torch.dtype) -> None:
    call = call_of(0, 40, 40, 16, dtype=dtype, window=(9, 9))
    wide = [x.detach().double() for x in call.leaves]
    out, aux = sinkhorn_attention(*call.leaves, engine="triton", return_aux=True, **call.options)
    truth = sinkhorn_attention(*wide, engine="reference", **call.options)
    assert out.dtype == dtype and aux.row_potential.dtype == torch.float32
    assert relative_error(out.double(), truth) < (1e-2 if dtype == torch.bfloat16 else 2e-3)


@pytest.mark.parametrize("window", slow_after(1, [None, (3, 3)]))
def test_scores_of_ten_thousand_stay_finite(window: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guess of a block's maximum is wrong by thousands: every block is taken again."""
    small_tiles(monkeypatch, 4, 4)
    call = call_of(0, 6, 6, 4, dtype=torch.float32)
    query, key, value = (x.detach() for x in call.leaves)
    for epsilon in (1e-3, 1.0):
        o = {**call.options, "window": window, "epsilon": epsilon}
        single = 70 * query, 70 * key, value
        out, aux = sinkhorn_attention(*single, engine="triton", return_aux=True, **o)
        plain = sinkhorn_attention(*single, engine="reference", **o)
        truth = sinkhorn_attention(*(x.double() for x in single), engine="reference", **o)
        assert all(torch.isfinite(x).all() for x in (out, *aux[:4]))
        assert relative_error(out.double(), truth) < 3 * relative_error(plain.double(), truth) + 1e-3


def test_the_plan_and_its_logarithm() -> None:
    options: dict[str, Any] = {"base_iters": 0, "tail_iters": 1, "dustbin": Dustbin(0.3, -0.2), "window": (2, 2)}
    call = call_of(0, 6, 5, 3)
    for log in (False, True):
        found, truth = (
            sinkhorn_plan(call.query, call.key, engine=name, log=log, **options).detach()
            for name in ("triton", "reference")
        )
        assert torch.equal(found.isfinite(), truth.isfinite())
        keep = truth.isfinite()
        assert relative_error(found[keep], truth[keep]) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_nan_is_seen(place: int) -> None:
    call = call_of(0, 5, 6, 3, dtype=torch.float32)
    tensors = [x.detach().clone() for x in call.leaves]
    tensors[place][0, 0, 2, 1] = torch.nan
    out, truth = (sinkhorn_attention(*tensors, engine=name, **call.options) for name in ("triton", "reference"))
    assert not (out.isfinite() & ~truth.isfinite()).any()


@pytest.mark.slow
def test_reruns_are_bitwise_equal() -> None:
    call = call_of(0, 20, 30, 5, dtype=torch.float32, window=(9, 9))
    first, second = (sinkhorn_attention(*call.leaves, engine="triton", **call.options) for _ in range(2))
    assert torch.equal(first, second)


def test_columns_are_safe_only_where_their_interval_counts_no_stranger() -> None:
    """Rows 0 and 2 reach column 0, row 1 does not: it must be asked for its interval, unless it is dead."""
    for dead, safe in ((False, False), (True, True)):
        mass = torch.zeros(1, 2, 3).index_fill(-1, torch.tensor([1]), -torch.inf if dead else 0.0)
        rows = torch.tensor([[0, 1, 0]]), torch.tensor([[1, 2, 1]])
        cols = torch.tensor([[0, 1]]), torch.tensor([[3, 2]])
        support, outline = SimpleNamespace(), SimpleNamespace(banded=True)
        support.row_lo, support.row_hi, support.col_lo, support.col_hi = *rows, *cols
        problem = SimpleNamespace(
            support=support,
            outline=outline,
            marginals=SimpleNamespace(log_row_mass=mass),
            sizes=(1, 2, 3, 2),
        )
        _, (_, _, safe_lo, safe_hi) = layout.sides(problem)
        assert bool(safe_lo[0, 0] < safe_hi[0, 0]) == safe
        assert safe_lo[0, 1] < safe_hi[0, 1] or dead
