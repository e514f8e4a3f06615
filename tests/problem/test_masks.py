"""What a mask leaves: finite "minus infinity", masks beside windows, tensor subclasses, default devices and dtypes."""

from __future__ import annotations

import problems
import pytest
import torch
from marks import slow_after
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn.functional import scaled_dot_product_attention

from torch_sinkhorn_attn import (
    Dustbin,
    SinkhornMultiheadAttention,
    certify,
    replace_attention,
    set_checks,
    sinkhorn_attention,
    sinkhorn_plan,
)
from torch_sinkhorn_attn.problem.masks import dense as dense_mask
from torch_sinkhorn_attn.problem.masks.entries import kept
from torch_sinkhorn_attn.problem.masks.module import forbidding
from torch_sinkhorn_attn.problem.masks.scan import scan_mask
from torch_sinkhorn_attn.problem.support import Support, build_support

ENGINES = ("reference", "tiled", None)
GONE = torch.tensor([False, False, True, False, False, True, True])  # of seven keys


def qkv(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, 4, generator=g, dtype=torch.float64).to(dtype) for _ in range(3)]


# A finite minus infinity over a whole line is -inf

MASKS = {
    "one row": torch.zeros(7).masked_fill(GONE, 1.0),
    "dense": torch.zeros(7, 7).masked_fill(GONE, 1.0),
    "of a head": torch.zeros(2, 1, 7).index_put((torch.tensor(1), torch.tensor(0)), GONE.float()),
    "of an element and head": torch.stack([torch.zeros(2, 7, 7), torch.zeros(2, 7, 7).masked_fill(GONE, 1.0)]),
    "rows and columns": torch.zeros(7, 7).masked_fill(GONE[:, None] | GONE, 1.0),
    "one column": torch.zeros(7, 1).masked_fill(GONE[:, None], 1.0),
}
OPTIONS: dict[str, dict] = {
    "plain": {},
    "window": {"window": (6, 6)},
    "narrow": {"window": (1, 1), "dustbin": Dustbin(0.3, -0.2)},
    "lengths": {"query_lengths": torch.tensor([7, 5]), "key_lengths": torch.tensor([7, 5])},
    "segments": {
        "query_segment_ids": torch.tensor([[0, 0, 0, 0, 1, 1, 1]]).expand(2, -1),
        "key_segment_ids": torch.tensor([[0, 0, 0, 0, 1, 1, 1]]).expand(2, -1),
    },
    "relaxed": {"relaxation": 1.0},
    "masses": {"row_mass": 1 + torch.arange(7.0), "relaxation": (None, 0.5)},
    "no iterations": {"base_iters": 0, "tail_iters": 0, "dustbin": Dustbin(0.0, 0.0)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("where", slow_after(2, MASKS.values()), ids=MASKS)
def test_a_line_of_finite_minus_infinity_is_one_of_minus_infinity(where: Tensor, options: dict) -> None:
    tokens, gone = qkv(2, 2, 7), where > 0
    base = 0.5 * torch.randn(7, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    bias = base if where.shape[-2:] == (7, 7) else torch.zeros((), dtype=torch.float64)
    for value, shift in ((-1e4, 0.0), (-1e9, 0.0), (-1e4, 0.0 if "relaxation" in options else 3e3)):
        infinite = (bias + shift).expand_as(where).masked_fill(gone, -torch.inf)
        expected = sinkhorn_plan(*tokens[:2], infinite, **options)
        mask = (bias + where * value + shift).requires_grad_()
        for engine in ENGINES:
            plan = sinkhorn_plan(*tokens[:2], mask, engine=engine, **options)
            torch.testing.assert_close(plan, expected, rtol=0, atol=2e-12 * max(1, shift), check_dtype=False)
        out = sinkhorn_attention(*tokens, mask, **options)
        (found,) = torch.autograd.grad(out.square().sum(), mask)
        assert (found[gone] == 0).all() and torch.isfinite(found).all()


@pytest.mark.parametrize("dtype", slow_after(1, [torch.float32, torch.float64, torch.float16, torch.bfloat16]))
@pytest.mark.parametrize("dense", [False, True])
def test_in_every_dtype(dtype: torch.dtype, dense: bool) -> None:
    q, k, v = qkv(2, 2, 7, dtype=dtype)
    keep = (~GONE).expand(7, 7) if dense else ~GONE
    expected, unpadded = sinkhorn_attention(q, k, v, keep), sinkhorn_attention(q, k[..., ~GONE, :], v[..., ~GONE, :])
    torch.testing.assert_close(expected, unpadded)
    for of_mask in {dtype, torch.float32}:
        for value in (-1e3, -1e4, -3e4):
            mask = torch.zeros(keep.shape, dtype=of_mask).masked_fill(~keep, value)
            for engine in ENGINES:
                assert torch.equal(sinkhorn_attention(q, k, v, mask, engine=engine).isnan(), expected.isnan())
                torch.testing.assert_close(sinkhorn_attention(q, k, v, mask, engine=engine), expected)


def test_a_large_bias_stays_possible() -> None:
    q, k, _ = qkv(1, 2, 7)
    mask = torch.zeros(7, dtype=torch.float64).masked_fill(GONE, -1e4)
    kept_all = sinkhorn_plan(q, k, mask, mask_floor=None, base_iters=200)
    torch.testing.assert_close(kept_all, sinkhorn_plan(q, k, base_iters=200), rtol=0, atol=1e-9)
    assert (sinkhorn_plan(q, k, mask / 10).sum(-2)[..., GONE] == 0).all()  # exactly 1e3 below
    assert (sinkhorn_plan(q, k, mask / 10.1).sum(-2) > 0.5).all()
    assert (sinkhorn_plan(q, k, mask / 10.1, mask_floor=-900.0).sum(-2)[..., GONE] == 0).all()
    for wrong, error in ((0.0, ValueError), (5, ValueError), (-torch.inf, ValueError), ("low", TypeError)):
        with pytest.raises(error, match="mask_floor"):
            sinkhorn_plan(q, k, mask_floor=wrong)
        with pytest.raises(error, match="mask_floor"):
            SinkhornMultiheadAttention(4, 2, mask_floor=wrong)


def test_what_is_low_everywhere_or_in_part_stays() -> None:
    q, k, _ = qkv(1, 2, 7)
    plain = sinkhorn_plan(q, k)
    for mask in (torch.full((7,), -2e3), torch.full((7, 7), -2e3), torch.full((1, 1), -2e3)):
        torch.testing.assert_close(sinkhorn_plan(q, k, mask.double()), plain, rtol=0, atol=1e-9)
    part = torch.zeros(7, 7, dtype=torch.float64)
    part[:3, 2] = -1e4
    assert (sinkhorn_plan(q, k, part, base_iters=300).sum(-2) - 1).abs().max() < 1e-6
    with pytest.raises(ValueError, match=r"left active by others.*-inf"):
        sinkhorn_plan(q.float(), k.float(), part.float() * 1e5)
    gone = part.clone()
    gone[:, 5] = -1e9
    assert (sinkhorn_plan(q.float(), k.float(), gone.float()).sum(-2)[..., 5] == 0).all()


def test_softmax_mode_is_softmax() -> None:
    q, k, v = qkv(2, 2, 7)
    mask = torch.zeros(7, 7, dtype=torch.float64).masked_fill(GONE, -1e4)
    mask[1] = -1e4  # uniform, as in softmax
    out = sinkhorn_attention(q, k, v, mask, base_iters=0, tail_iters=0)
    torch.testing.assert_close(out, scaled_dot_product_attention(q, k, v, mask), rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"window": (6, 6)}], ids=["plain", "window"])
@pytest.mark.parametrize("shape", slow_after(1, [(2, 1, 7, 7), (2, 1, 1, 7), (1, 2, 7, 1)]), ids=str)
def test_where_data_may_not_be_looked_at(shape: tuple[int, ...], options: dict) -> None:
    q, k, v = qkv(2, 2, 7)
    mask = torch.zeros(shape, dtype=torch.float64)
    mask = mask.masked_fill(GONE[:, None] if shape[-1] == 1 else GONE, -1e4)
    expected = sinkhorn_attention(q, k, v, mask, **options)
    compiled = torch.compile(lambda mask: sinkhorn_attention(q, k, v, mask, **options), backend="aot_eager")
    torch.testing.assert_close(compiled(mask), expected)
    shared = mask.shape[0] == 1

    def single(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return sinkhorn_attention(q, k, v, mask, **options)

    mapped = vmap(single, in_dims=(0, 0, 0, None if shared else 0))(q, k, v, mask[0] if shared else mask)
    torch.testing.assert_close(mapped, expected)
    set_checks("never")
    torch.testing.assert_close(sinkhorn_attention(q, k, v, mask, **options), expected)


def test_certificates_leave_low_keys_out() -> None:
    q, k, _ = qkv(1, 2, 7)
    mask = torch.zeros(7, dtype=torch.float64).masked_fill(GONE, -1e4)
    found, expected = certify(q, k, mask, base_iters=50), certify(q, k, ~GONE, base_iters=50)
    torch.testing.assert_close(found.rate, expected.rate)
    torch.testing.assert_close(found.diameter, expected.diameter)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", slow_after(1, [-1e3, -1e4, -8e4, -1e9]))
def test_the_module_pads_by_numbers(dtype: torch.dtype, value: float) -> None:
    torch.manual_seed(0)
    attention, x = SinkhornMultiheadAttention(12, 3, batch_first=True, dtype=dtype), torch.randn(2, 5, 12, dtype=dtype)
    pad = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    mask = torch.zeros(2, 5, dtype=dtype).masked_fill(pad, value)
    for given in (mask, mask.clone().requires_grad_()):
        out, weights = attention(x, x, x, key_padding_mask=given)
        expected, expected_weights = attention(x, x, x, key_padding_mask=pad)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(weights, expected_weights)
        torch.testing.assert_close(out[1:, :3], attention(*[x[1:, :3]] * 3)[0])
    everything, _ = attention(x, x, x, key_padding_mask=torch.full((2, 5), value, dtype=dtype))
    torch.testing.assert_close(everything, attention.out_proj.bias.expand_as(everything))
    if value == -1e4 and dtype == torch.float32:
        compiled = torch.compile(lambda x, mask: attention(x, x, x, key_padding_mask=mask)[0], backend="aot_eager")
        torch.testing.assert_close(compiled(x, mask), expected)


def test_the_encoder_pads_by_numbers() -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2).eval()
    replace_attention(encoder)
    x, pad = torch.randn(2, 6, 16), torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    found = encoder(x, src_key_padding_mask=torch.zeros(2, 6).masked_fill(pad, -1e4))
    torch.testing.assert_close(found[~pad], encoder(x, src_key_padding_mask=pad)[~pad])
    torch.testing.assert_close(found[1:, :4], encoder(x[1:, :4]))
    keeping = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 1).eval()
    assert "mask_floor=None" in str(replace_attention(keeping, mask_floor=None).options)


def test_forbidding_writes_minus_infinity_into_low_columns() -> None:
    mask = torch.zeros(2, 1, 3, 4)
    mask[0, :, :, 1], mask[0, :, 1, 2], mask[1] = -1e4, -1e4, -5e3
    found = forbidding(mask, -1e3)
    assert (found[0, :, :, 1] == -torch.inf).all() and (found == -torch.inf).sum() == 3
    assert torch.equal(forbidding(mask, None), mask)
    assert torch.equal(forbidding(torch.full((1, 2), -torch.inf), -1e3), torch.full((1, 2), -torch.inf))


# The scan


def defined(mask: Tensor, s: Support, packed: bool, dtype: torch.dtype, floor: float | None) -> list[Tensor]:
    """Active rows and columns, and the entries inside that are left, straight from the definition."""
    shape = (s.row_lo.shape[0], mask.shape[1], s.row_lo.shape[1], s.col_lo.shape[1])
    values, column = mask.expand(shape), torch.arange(shape[3])
    same = (s.row_segment[:, :, None] == s.col_segment[:, None]) | torch.tensor(not packed)
    pairs = (s.row_active[:, :, None] & s.col_active[:, None] & same)[:, None]
    within = pairs & kept(values, dtype)
    inside = within & ((column >= s.row_lo[..., None]) & (column < s.row_hi[..., None]))[:, None]
    high = torch.ones(shape, dtype=torch.bool)
    if floor is not None and mask.dtype != torch.bool:
        for n, h in torch.cartesian_prod(*(torch.arange(k) for k in shape[:2])).tolist():
            for group in set(s.row_segment[n].tolist()) if packed else {0}:
                own = same[n] & (s.row_segment[n] == group)[:, None] if packed else torch.tensor(True)
                found = values[n, h].to(dtype)[inside[n, h] & own]
                if len(found):
                    high[n, h] &= ~(own & (values[n, h].to(dtype) <= found.max() + floor))
    rows = (within & high).any(-1)
    asked = inside & rows[..., None]
    cols = torch.where(asked.any(-2), (asked & high).any(-2), (within & high).any(-2))
    return [rows, cols, inside & rows[..., None] & cols[..., None, :]]


@pytest.mark.slow
def test_the_scan_is_its_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(240):
        g = torch.Generator().manual_seed(seed)

        def draw(low: int, high: int, g: torch.Generator = g) -> int:
            return int(torch.randint(low, high + 1, (1,), generator=g))

        num, heads, length, size, packed = draw(1, 2), draw(1, 2), draw(1, 16), draw(1, 20), bool(draw(0, 1))
        ids = [torch.randint(-1, 3 if packed else 1, (num, n), generator=g).sort(-1).values for n in (length, size)]
        ids = ids if packed else [-(x.flip(-1) < 0).long() for x in ids]
        window = [None, (draw(0, 3), draw(0, 3)), (-1, draw(0, 2))][draw(0, 2)]
        support = build_support(*ids, window, packed)
        shape = [(num, heads, length, size), (1, heads, length, size), (num, 1, 1, size), (1, heads, length, 1)][
            seed % 4
        ]
        mask = torch.randn(shape, generator=g).to([torch.float32, torch.float16, torch.float64][draw(0, 2)])
        for part, share in ((shape, 0.4), ((*shape[:3], 1), 0.2), ((*shape[:2], 1, shape[3]), 0.2)):
            mask = mask.masked_fill(torch.rand(part, generator=g) < share, [-1e4, -torch.inf][draw(0, 1)])
        mask = mask > -1e3 if draw(0, 3) == 0 else mask
        monkeypatch.setattr(dense_mask, "_GATHER_COST", [4, 0.01, 1000][draw(0, 2)])
        monkeypatch.setattr(dense_mask, "_BLOCK_ELEMENTS", [1 << 21, 30][draw(0, 1)])
        monkeypatch.setattr(dense_mask, "_GATHERED_ELEMENTS", [1 << 21, 30][draw(0, 1)])
        for floor in (None, -1e3):
            rows, cols, left = defined(mask, support, packed, torch.float32, floor)
            scan = scan_mask(mask, support, packed, torch.float32, floor)
            assert torch.equal(scan.row_active, rows) and torch.equal(scan.col_active, cols), seed
            some = left.any(-1)
            first, last = left.int().argmax(-1), size - left.flip(-1).int().argmax(-1)
            assert torch.equal(scan.row_lo.expand_as(first), torch.where(some, first, 0)), seed
            assert torch.equal(scan.row_hi.expand_as(last), torch.where(some, last, 0)), seed
            assert torch.equal(scan.col_covered.expand_as(cols), left.any(-2)), seed
            active = scan_mask(mask, support, packed, torch.float32, floor, hulls=False)
            assert torch.equal(active.row_active, rows) and torch.equal(active.col_active, cols), seed


@pytest.mark.slow
@pytest.mark.parametrize("mask", [torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1)], ids=["bool", "float"])
@pytest.mark.parametrize("engine", ["tiled", None])
def test_beside_a_window_a_dense_mask_is_not_read_as_a_whole(mask: Tensor, engine: str | None) -> None:
    """Some 10^10 entries, all views of one, would take minutes (and a fourth of 10^9 half a second in each reading)."""
    x = torch.randn(1, 1, 1 << 17, 2, generator=torch.Generator().manual_seed(0))
    x = x if engine is None else x[:, :, : 1 << 14]
    out = sinkhorn_attention(x, x, x, mask.expand(x.shape[2], x.shape[2]), window=(1, 1), base_iters=1, engine=engine)
    torch.testing.assert_close(out, sinkhorn_attention(x, x, x, window=(1, 1), base_iters=1, engine=engine))


def test_beyond_the_window_nothing_is_read() -> None:
    q, k, v = qkv(1, 2, 40, dtype=torch.float32)
    mask = torch.zeros(40, 40)
    mask[0, 39] = torch.nan
    torch.testing.assert_close(
        sinkhorn_attention(q, k, v, mask, window=(2, 2)), sinkhorn_attention(q, k, v, window=(2, 2))
    )
    for value, name in ((torch.nan, "NaN"), (torch.inf, r"\+inf")):
        mask[3, 4] = value
        with pytest.raises(ValueError, match=f"attn_mask holds {name}"):
            sinkhorn_attention(q, k, v, mask, window=(2, 2))


# Defaults of torch, and transforms of torch.func


def everything(call: problems.Call, engine: str | None) -> list[Tensor | None]:
    out, aux = sinkhorn_attention(
        call.query, call.key, call.value, call.mask, engine=engine, return_aux=True, **call.options
    )
    plan = sinkhorn_plan(call.query, call.key, call.mask, engine=engine, **call.options)
    return [out, *aux, plan, *torch.autograd.grad(out.square().sum(), call.leaves, allow_unused=True)]


def of_modules(x: Tensor, pad: Tensor) -> list[Tensor]:
    found = []
    for options in ({"window": (3, 3)}, {"dustbin": True}, {"add_bias_kv": True, "add_zero_attn": True}):
        module = SinkhornMultiheadAttention(8, 2, batch_first=True, device="cpu", dtype=torch.float32, **options)
        for parameter in module.parameters():
            nn.init.constant_(parameter, 0.1)
        found += module(x, x, x, key_padding_mask=pad)
    certificate = certify(x[:, None], x[:, None], window=(3, 3))
    assert "contraction" in str(certificate)
    return [*found, certificate.measured_bias]


@pytest.mark.slow
@pytest.mark.parametrize("default", [torch.device("meta"), torch.float64, torch.bfloat16], ids=str)
def test_the_defaults_of_torch_change_nothing(default: torch.device | torch.dtype) -> None:
    x, pad = torch.randn(2, 6, 8), torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    calls = [(problems.make(seed, dropout=False), engine) for seed in range(12) for engine in ENGINES]
    expected = [everything(*call) for call in calls] + [of_modules(x, pad)]
    before = torch.get_default_dtype()
    try:
        if isinstance(default, torch.device):
            torch.set_default_device(default)
        else:
            torch.set_default_dtype(default)
        found = [everything(*call) for call in calls] + [of_modules(x, pad)]
    finally:
        torch.set_default_device(None)
        vars(torch._GLOBAL_DEVICE_CONTEXT).pop("device_context", None)  # None in it fails torch.get_default_device
        torch.set_default_dtype(before)
    for one, other in zip(expected, found, strict=True):
        for a, b in zip(one, other, strict=True):
            assert (a is None and b is None) or (a.dtype == b.dtype and torch.equal(a, b))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("gradient", ["tail", "implicit", "unrolled"])
def test_vmap_of_grad_is_a_loop(engine: str | None, gradient: str) -> None:
    q, k, v = qkv(3, 2, 6)
    mask = 0.3 * torch.randn(3, 1, 6, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    mask[:, :, :, 4] = -1e4

    def loss(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        out = sinkhorn_attention(q, k, v, mask, engine=engine, gradient=gradient, base_iters=60)
        assert isinstance(out, Tensor)
        return out.square().sum()

    found = vmap(grad(loss, argnums=(0, 1, 2, 3)))(q, k, v, mask)
    for i in range(3):
        alone = grad(loss, argnums=(0, 1, 2, 3))(q[i], k[i], v[i], mask[i])
        for x, y in zip(found, alone, strict=True):
            torch.testing.assert_close(x[i], y, rtol=1e-9, atol=1e-12)
