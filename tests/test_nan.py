"""Nothing that is NaN is hidden: one NaN or infinity anywhere shows wherever the definition lets it show."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conformance import ENGINES, weights
from marks import slow_after
from torch import Tensor

from torch_sinkhorn_attn import Dustbin, set_checks, sinkhorn_attention, sinkhorn_plan
from torch_sinkhorn_attn.engines import cpu

INF, NAN = torch.inf, torch.nan
# Below and around the widths of all vectors (4 to 16 numbers), blocks of rows (8) and of tiles (32).
SIZES = (1, 2, 4, 7, 8, 9, 16, 17, 33)


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    capability = cpu.capability()
    yield
    cpu.set_capability(capability)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "softmax": {"base_iters": 0, "tail_iters": 0},
    "one iteration": {"base_iters": 0, "tail_iters": 1},
    "tolerance": {"tolerance": 0.5, "over_relaxation": 1.3},
    "accelerated": {"acceleration": "chebyshev"},
    "implicit": {"gradient": "implicit"},
    "relaxed": {"relaxation": 1.0},
    "dustbin": {"dustbin": Dustbin(0.2, 0.1)},
    "learned mask": {"mask": lambda n: torch.zeros(n, n)},
    "mask of two halves": {"mask": lambda n: (torch.arange(n)[:, None] < n // 2) == (torch.arange(n) < n // 2)},
    "window": {"window": (70, 70)},
}


def everything(engine: str, tensors: list[Tensor], options: dict[str, Any]) -> dict[str, Tensor]:
    """Results and gradients of attention and of the plan, by name."""
    options, leaves = dict(options), [x.clone().requires_grad_() for x in tensors]
    mask = options.pop("mask", lambda n: None)(tensors[0].shape[-2])
    if mask is not None and mask.is_floating_point():
        leaves.append(mask := mask.to(tensors[0].dtype).requires_grad_())
    output, aux = sinkhorn_attention(*leaves[:3], mask, engine=engine, return_aux=True, **options)
    plan = sinkhorn_plan(*leaves[:2], mask, engine=engine, **options)
    found = {"output": output, "plan": plan, **{k: x for k, x in aux._asdict().items() if x is not None}}
    for name, x in (("", output), ("plan ", plan)):
        grads = torch.autograd.grad((x * weights(x)).sum(), leaves, allow_unused=True)
        found |= {f"{name}gradient {i}": g for i, g in enumerate(grads) if g is not None}
    return {k: x.detach() for k, x in found.items()}


def assert_seen(engine: str, tensors: list[Tensor], options: dict[str, Any], told: object) -> None:
    truth, found = everything("reference", tensors, options), everything(engine, tensors, options)
    for name, y in truth.items():
        hidden = ~y.isfinite() & found[name].isfinite()
        assert not hidden.any(), (name, told)


def tensors_of(size: int, dtype: torch.dtype, heads: int = 2) -> list[Tensor]:
    g = torch.Generator().manual_seed(size)
    return [torch.randn(1, heads, size, 5, generator=g).to(dtype) for _ in range(3)]


@pytest.mark.parametrize("capability", cpu.capabilities())
@pytest.mark.parametrize("dtype", slow_after(1, [torch.float32, torch.float64, torch.float16, torch.bfloat16]))
def test_a_nan_key_among_any_number_at_any_place(dtype: torch.dtype, capability: str) -> None:
    """Attention of softmax and one or more iterations: one NaN among n keys makes every output NaN."""
    cpu.set_capability(capability)
    for size in range(1, 71):
        for iters in (0, 2):
            tensors = tensors_of(size, dtype, heads=size)  # head h has its NaN in key h
            for h in range(size):
                tensors[1][0, h, h, h % 5] = NAN
            out, aux = sinkhorn_attention(
                *tensors, base_iters=iters, tail_iters=iters, engine="cpu", return_aux=True
            )  # fmt: skip
            assert out.isnan().all(), (size, iters)
            assert aux.row_residual.isnan().all() and aux.col_residual.isnan().all()
            assert aux.row_potential.isnan().all() and (iters == 0 or aux.col_potential.isnan().all())


@pytest.mark.parametrize("capability", slow_after(1, cpu.capabilities(), cpu.capabilities()[1:]))
@pytest.mark.parametrize("name", slow_after(1, OPTIONS))
def test_what_is_not_finite_shows_where_the_definition_shows_it(name: str, capability: str) -> None:
    cpu.set_capability(capability)
    for size in SIZES:
        if name == "mask of two halves" and size == 1:
            continue
        for which in range(3):
            for k, value in enumerate((NAN, INF, -INF)):
                tensors = tensors_of(size, torch.float64 if size % 2 else torch.float32)
                tensors[which][0, 0, (0, size // 2, size - 1)[(k + which + size) % 3], 1] = value
                assert_seen("cpu", tensors, OPTIONS[name], (size, which, value))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("how", ["lengths", "segments", "mask"])
def test_heads_of_few_active_keys_and_nobody_else(how: str, engine: str) -> None:
    """A NaN shows in the whole of its own problem, however few its tokens, and in no other."""
    for few in (1, 2, 3, 7, 8, 9, 10, 16, 17):
        for place in {0, few // 2, few - 1}:
            q, k, v = (x.expand(2, -1, -1, -1).contiguous() for x in tensors_of(24, torch.float32))
            k[0, 1, place] = NAN
            active = torch.arange(24) < few
            options: dict[str, Any] = {}
            mask = None
            if how == "lengths":
                options = {f"{x}_lengths": torch.tensor([few, 24]) for x in ("query", "key")}
            elif how == "segments":
                options = {f"{x}_segment_ids": (~active).long().expand(2, -1) for x in ("query", "key")}
            else:
                mask = active[:, None] == active
                mask = mask & active if few < 24 else mask
            out = sinkhorn_attention(q, k, v, mask, engine=engine, **options)
            assert out[0, 1, :few].isnan().all(), (few, place)
            assert out[1].isfinite().all() and out[0, 0].isfinite().all()
            if how != "mask" and engine == "cpu":
                assert out[0, 1, few:].isfinite().all()


@pytest.mark.parametrize("engine", ENGINES)
def test_overflow_is_not_silent(engine: str) -> None:
    """Scores beyond the dtype's largest number, of finite inputs; and a key that overflowed before, in float16."""
    for size in (2, 5, 8, 17):
        for dtype, big in ((torch.float32, 3e38), (torch.float64, 1e308)):
            tensors = [x.abs() + 0.5 for x in tensors_of(size, dtype)]
            tensors[1][0, 0, size - 1] = big
            tensors[0] *= 10
            assert not sinkhorn_attention(*tensors, engine=engine)[0, 0].isfinite().any()
        half = [x.abs().half() + 0.5 for x in tensors_of(size, torch.float32)]
        half[1][0, 0, 0] *= 60000  # infinity
        assert not sinkhorn_attention(*half, engine=engine)[0, 0].isfinite().any()


@pytest.mark.parametrize("engine", [*ENGINES, "reference"])
def test_a_nan_in_a_mask_nobody_looked_at(engine: str) -> None:
    set_checks("never")
    for size in (2, 5, 9):
        mask = torch.zeros(size, size)
        mask[size - 1, 0] = NAN
        assert sinkhorn_attention(*tensors_of(size, torch.float32), mask, engine=engine).isnan().all()


@pytest.mark.parametrize("engine", [*ENGINES, "reference"])
def test_a_line_of_nan_in_a_mask_is_no_padding(engine: str) -> None:
    """NaN lies neither above nor below `mask_floor`: where a key or query has no other entry it stays active."""
    set_checks("never")
    for size in (2, 5, 9):
        for shape in ((size, size), (1, size), (size, 1)):
            for place in ((..., -1), (-1, slice(None))):
                mask = torch.zeros(shape)
                mask[place] = NAN
                out = sinkhorn_attention(*tensors_of(size, torch.float32), mask, engine=engine)
                assert out.isnan().all(), (shape, place)
        padded = torch.zeros(size, size)
        padded[:, 0] = -1e4
        padded[-1, 0] = NAN  # amid padding
        assert sinkhorn_attention(*tensors_of(size, torch.float32), padded, engine=engine).isnan().all()


def off_the_support(n: int) -> dict[str, tuple[Tensor, dict[str, Any]]]:
    """Masks marked where they belong to no pair of the problem, and what makes it so."""
    half, none = torch.arange(n) // (n // 2), torch.zeros(n, dtype=torch.int64)
    hole, last = none.clone(), n - 2
    hole[n // 2] = -1
    rows, cols = torch.zeros(2, n, n, dtype=torch.bool).unbind()
    rows[last:], cols[:, last:] = True, True
    amid_rows, amid_cols = (hole < 0)[:, None].expand(n, n), (hole < 0).expand(n, n)
    lengths, distance = torch.tensor([last]), (torch.arange(n)[:, None] - torch.arange(n)).abs()
    return {
        "padded keys": (cols, {"key_lengths": lengths}),
        "padded queries": (rows, {"query_lengths": lengths}),
        "one row": (cols[:1], {"key_lengths": lengths}),
        "one column": (rows[:, :1], {"query_lengths": lengths}),
        "hole in the keys": (amid_cols, {"query_segment_ids": none, "key_segment_ids": hole}),
        "hole in the queries": (amid_rows, {"query_segment_ids": hole, "key_segment_ids": none}),
        "other segments": (half[:, None] != half, {"query_segment_ids": half, "key_segment_ids": half}),
        "beyond a window": (distance > 2, {"window": (2, 2)}),
        "beyond a wide one": (distance > n - 3, {"window": (n - 3, n - 3)}),
        "holes beside a window": (
            amid_cols | (distance > 4), {"window": (2, 2), "query_segment_ids": none, "key_segment_ids": hole}
        ),
    }  # fmt: skip


@pytest.mark.parametrize("engine", [*ENGINES, "reference"])
@pytest.mark.parametrize("checks", ["auto", "never"])
@pytest.mark.parametrize("name", slow_after(4, off_the_support(20)))
def test_what_a_mask_holds_off_the_support_is_nobodys(name: str, checks: str, engine: str) -> None:
    set_checks(checks)
    marked, options = off_the_support(20)[name]
    for more in ({}, {"dustbin": Dustbin(0.2, 0.1)}, {"gradient": "implicit", "base_iters": 60}):
        found = []
        for value in (0.0, NAN, INF):
            leaves = [x.double().requires_grad_() for x in tensors_of(20, torch.float32)]
            mask = torch.zeros(marked.shape, dtype=torch.float64).masked_fill(marked, value).requires_grad_()
            out = sinkhorn_attention(*leaves, mask, engine=engine, **options, **more)
            found.append([out, *torch.autograd.grad(out.sin().sum(), [*leaves, mask])])
        for other in found[1:]:
            for x, truth in zip(other, found[0], strict=True):
                assert torch.allclose(x, truth, atol=1e-12), (name, list(more))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("gradient", ["tail", "implicit"])
def test_a_nan_cotangent_shows_in_every_gradient(gradient: str, engine: str) -> None:
    for size in (2, 5, 8, 17, 33):
        leaves = [x.requires_grad_() for x in tensors_of(size, torch.float32)]
        out = sinkhorn_attention(*leaves, gradient=gradient, engine=engine)
        cotangent = torch.ones_like(out)
        cotangent[0, 0, size - 1, 2] = NAN
        for g in torch.autograd.grad(out, leaves, cotangent)[:2]:
            assert g[0, 0].isnan().all() and g[0, 1].isfinite().all()


@pytest.mark.parametrize("engine", [*ENGINES, "reference"])
@pytest.mark.parametrize("which", [1, 2])
@pytest.mark.parametrize("checks", ["auto", "never"])
def test_a_grouped_key_that_one_head_alone_sees(checks: str, which: int, engine: str) -> None:
    """NaN in a key, or its value, that the mask keeps for one of the two query heads that read it, is that head's."""
    tensors = tensors_of(9, torch.float32, heads=4)
    for i in (1, 2):
        tensors[i] = tensors[i][:, :2].clone()
    clean = [x.clone() for x in tensors]
    tensors[which][0, 0, 8, 0] = NAN
    mask = torch.ones(1, 4, 1, 9, dtype=torch.bool)
    mask[0, 1:, 0, 8] = False
    options: dict[str, Any] = {"enable_gqa": True, "engine": engine}
    set_checks(checks)
    try:
        leaves = [x.requires_grad_() for x in tensors]
        found = sinkhorn_attention(*leaves, mask, **options)
        gradients = torch.autograd.grad(found[0, 1:].sin().sum(), leaves)
    finally:
        set_checks("auto")
    clean = [x.requires_grad_() for x in clean]
    expected = sinkhorn_attention(*clean, mask, **options)
    assert found[0, 0].isnan().any()
    torch.testing.assert_close(found[0, 1:], expected[0, 1:])
    for x, y in zip(gradients[1:], torch.autograd.grad(expected[0, 1:].sin().sum(), clean)[1:]):
        torch.testing.assert_close(x[0, 1], y[0, 1])
