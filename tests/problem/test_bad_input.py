"""Bad input: every kind is refused before any work, by a message that names the argument and its value."""

from __future__ import annotations

import math

import pytest
import torch

from torch_sinkhorn_attn import (
    Dustbin,
    SinkhornMultiheadAttention,
    certify,
    set_checks,
    sinkhorn_attention,
    sinkhorn_plan,
)

Q, K, V = torch.randn(2, 4, 6, 8), torch.randn(2, 4, 5, 8), torch.randn(2, 4, 5, 3)
IDS = torch.zeros(2, 6, dtype=torch.int64), torch.zeros(2, 5, dtype=torch.int64)


def run(query=Q, key=K, value=V, mask=None, **options):
    return sinkhorn_attention(query, key, value, mask, **options)


def nan_mask(value: float) -> torch.Tensor:
    mask = torch.zeros(6, 5)
    mask[2, 3] = value
    return mask


KINDS = {
    "query a list": (TypeError, "query must be a tensor, got list", dict(query=[1.0])),
    "key an array": (TypeError, "key must be a tensor, got ndarray", dict(key=K.numpy())),
    "integer query": (TypeError, "query has dtype torch.int64", dict(query=Q.long())),
    "complex value": (TypeError, "value has dtype torch.complex64", dict(value=V.to(torch.complex64))),
    "two dtypes": (TypeError, "key has dtype torch.float64 but query has torch.float32", dict(key=K.double())),
    "two devices": (ValueError, "key is on meta but query is on cpu", dict(key=K.to("meta"))),
    "no head dimension": (ValueError, r"query has shape \(6, 8\).*query\[None\]", dict(query=Q[0, 0])),
    "two batches": (ValueError, r"key has batch shape \(1,\) but query has \(2,\)", dict(key=K[:1])),
    "two feature sizes": (ValueError, "key has 7 features but query has 8", dict(key=K[..., :7])),
    "no features": (ValueError, "at least one feature", dict(query=Q[..., :0], key=K[..., :0])),
    "value tokens": (ValueError, r"value has \(heads, tokens\) \(4, 4\) but key has \(4, 5\)", dict(value=V[:, :, :4])),
    "heads without gqa": (ValueError, "pass enable_gqa=True", dict(key=K[:, :2], value=V[:, :2])),
    "heads not a multiple": (
        ValueError,
        r"query heads \(4\) to be a multiple of key heads \(3\)",
        dict(key=K[:, :3], value=V[:, :3], enable_gqa=True),
    ),
    "nested": (TypeError, "query is a nested tensor; pad it", dict(query=torch.nested.nested_tensor([Q[0], Q[1]]))),
    "mask dtype": (TypeError, "attn_mask has dtype torch.int64; use bool", dict(mask=torch.ones(6, 5).long())),
    "mask type": (TypeError, "attn_mask must be a tensor", dict(mask=[[True]])),
    "mask shape": (
        ValueError,
        r"attn_mask has shape \(5, 6\).*broadcast to \(2, 4, 6, 5\)",
        dict(mask=torch.ones(5, 6).bool()),
    ),
    "mask device": (ValueError, "attn_mask is on meta", dict(mask=torch.ones(6, 5, device="meta"))),
    "mask NaN": (ValueError, "attn_mask holds NaN", dict(mask=nan_mask(math.nan))),
    "mask +inf": (ValueError, r"attn_mask holds \+inf", dict(mask=nan_mask(math.inf))),
    "epsilon zero": (ValueError, "epsilon=0.0 must be positive", dict(epsilon=0)),
    "epsilon negative": (ValueError, "epsilon=-1.0 must be positive", dict(epsilon=-1)),
    "epsilon NaN": (ValueError, "epsilon=nan must be finite", dict(epsilon=math.nan)),
    "epsilon text": (TypeError, "epsilon must be a number, got 'small'", dict(epsilon="small")),
    "epsilon tensor": (
        TypeError,
        r"epsilon must be a Python number.*float\(epsilon\)",
        dict(epsilon=torch.tensor(1.0)),
    ),
    "epsilon learned": (ValueError, "epsilon is a constant", dict(epsilon=torch.ones((), requires_grad=True))),
    "scale infinite": (ValueError, "scale=inf must be finite", dict(scale=math.inf)),
    "window one number": (TypeError, "window must be a pair", dict(window=3)),
    "window three": (TypeError, "window must be a pair", dict(window=(1, 2, 3))),
    "window fraction": (TypeError, "window must be a pair of integers", dict(window=(1.5, 2))),
    "window negative": (ValueError, r"window=\(-2, 1\) must have sides of 0 or more", dict(window=(-2, 1))),
    "lengths list": (TypeError, "query_lengths must be an integer tensor", dict(query_lengths=[3, 4])),
    "lengths float": (TypeError, "key_lengths must be an integer tensor", dict(key_lengths=torch.ones(2))),
    "lengths shape": (ValueError, r"query_lengths has shape \(3,\)", dict(query_lengths=torch.ones(3).long())),
    "lengths too long": (
        ValueError,
        "key_lengths holds 6; lengths must lie between 0 and 5",
        dict(key_lengths=torch.tensor([6, 1])),
    ),
    "lengths negative": (ValueError, "query_lengths holds -1", dict(query_lengths=torch.tensor([-1, 1]))),
    "one-sided segments": (ValueError, "belong together", dict(query_segment_ids=IDS[0])),
    "segments shape": (
        ValueError,
        r"key_segment_ids has shape \(2, 6\)",
        dict(query_segment_ids=IDS[0], key_segment_ids=IDS[0]),
    ),
    "segments split": (
        ValueError,
        "query_segment_ids: id 1 of batch 0 is not one contiguous run",
        dict(query_segment_ids=torch.tensor([1, 2, 2, 1, 3, 3]), key_segment_ids=IDS[1]),
    ),
    "segments order": (
        ValueError,
        "different order",
        dict(query_segment_ids=torch.tensor([1, 1, 1, 2, 2, 2]), key_segment_ids=torch.tensor([2, 2, 1, 1, 1])),
    ),
    "mass type": (TypeError, "row_mass must be a floating-point tensor", dict(row_mass=[1.0])),
    "mass integer": (TypeError, "col_mass must be a floating-point tensor", dict(col_mass=torch.ones(5).long())),
    "mass shape": (ValueError, r"row_mass has shape \(5,\)", dict(row_mass=torch.ones(5))),
    "mass zero": (
        ValueError,
        "row_mass is 0 at batch 0, head 0, token 2",
        dict(row_mass=torch.tensor([1.0, 1, 0, 1, 1, 1])),
    ),
    "mass negative": (ValueError, "col_mass is -1 at", dict(col_mass=-torch.ones(5))),
    "mass NaN": (ValueError, "row_mass is nan", dict(row_mass=torch.full((6,), math.nan))),
    "mass infinite": (ValueError, "row_mass is inf", dict(row_mass=torch.full((6,), math.inf))),
    "mass learned": (ValueError, "row_mass is a constant", dict(row_mass=torch.ones(6, requires_grad=True))),
    "mass device": (ValueError, "row_mass is on meta", dict(row_mass=torch.ones(6, device="meta"))),
    "unequal totals": (
        ValueError,
        "row_mass sums to 6 and col_mass to 5",
        dict(row_mass=torch.ones(6), col_mass=torch.ones(5)),
    ),
    "relaxation zero": (ValueError, "relaxation=0.0 must be positive", dict(relaxation=0.0)),
    "relaxation vanishing": (
        ValueError,
        "relaxation=1e-308 is too small beside epsilon",
        dict(relaxation=1e-308, epsilon=1e30),
    ),
    "relaxation NaN": (ValueError, "relaxation=nan must be finite", dict(relaxation=(math.nan, None))),
    "relaxation three": (TypeError, "relaxation must be", dict(relaxation=(1.0, 1.0, 1.0))),
    "dustbin number": (TypeError, "dustbin must be a Dustbin", dict(dustbin=1.0)),
    "dustbin per-head vector": (
        ValueError,
        r"row_score has shape \(4,\).*per head is \(H, 1\)",
        dict(dustbin=Dustbin(torch.zeros(4), 0.0)),
    ),
    "dustbin NaN": (ValueError, "Dustbin row_score holds NaN", dict(dustbin=Dustbin(torch.tensor(math.nan), 0.0))),
    "dustbin device": (
        ValueError,
        "Dustbin col_score is on meta",
        dict(dustbin=Dustbin(0.0, torch.zeros(1, device="meta"))),
    ),
    "capacity unbalanced": (
        ValueError,
        "capacities are out of balance",
        dict(dustbin=Dustbin(0.0, 0.0, row_capacity=5.0, col_capacity=5.0)),
    ),
    "capacity too small": (
        ValueError,
        "Dustbin row_capacity is -0.5",
        dict(dustbin=Dustbin(0.0, 0.0, col_capacity=0.5)),
    ),
    "capacity varying": (
        ValueError,
        "constant within each problem",
        dict(dustbin=Dustbin(0.0, 0.0, row_capacity=torch.linspace(5, 6, 6))),
    ),
    "base_iters negative": (ValueError, "base_iters=-1 must be 0 or more", dict(base_iters=-1)),
    "tail_iters fraction": (TypeError, "tail_iters must be an integer, got 1.5", dict(tail_iters=1.5)),
    "gradient name": (ValueError, "gradient='exact' is unknown; choose one of 'tail'", dict(gradient="exact")),
    "warm start type": (TypeError, "initial_potentials must be a pair", dict(initial_potentials=torch.zeros(6))),
    "warm start shape": (
        ValueError,
        r"initial_potentials \(row\) has shape \(5,\)",
        dict(initial_potentials=(torch.zeros(5), torch.zeros(5))),
    ),
    "warm start NaN": (
        ValueError,
        r"initial_potentials \(column\) holds NaN",
        dict(initial_potentials=(torch.zeros(6), torch.full((5,), math.nan))),
    ),
    "warm start None": (
        TypeError,
        r"initial_potentials \(row\) is None",
        dict(initial_potentials=(None, torch.zeros(5))),
    ),
    "warm start learned": (
        ValueError,
        "is a constant",
        dict(initial_potentials=(torch.zeros(6, requires_grad=True), torch.zeros(5))),
    ),
    "dropout one": (ValueError, r"dropout_p=1.0 must lie in \[0, 1\)", dict(dropout_p=1.0)),
    "engine type": (TypeError, "engine must be a name or None", dict(engine=3)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_attention_refuses(kind: str) -> None:
    error, message, arguments = KINDS[kind]
    with pytest.raises(error, match=message):
        run(**arguments)


def test_there_are_at_least_thirty_kinds() -> None:
    assert len(KINDS) >= 30


@pytest.mark.parametrize(
    ("error", "message", "build"),
    [
        (TypeError, "Dustbin row_score must be a number or a tensor, got NoneType", lambda: Dustbin(None, 0.0)),
        (TypeError, "Dustbin col_score must be a floating-point tensor", lambda: Dustbin(0.0, torch.zeros(1).long())),
        (ValueError, "Dustbin row_score must be finite, got inf", lambda: Dustbin(math.inf, 0.0)),
        (ValueError, "Dustbin row_capacity must be positive, got 0", lambda: Dustbin(0.0, 0.0, row_capacity=0)),
        (TypeError, "Dustbin value must be a tensor", lambda: Dustbin(0.0, 0.0, value=1.0)),
        (
            ValueError,
            "col_capacity is a constant",
            lambda: Dustbin(0.0, 0.0, col_capacity=torch.ones(1, requires_grad=True)),
        ),
        (ValueError, "mode='sometimes'; choose one of 'auto'", lambda: set_checks("sometimes")),
        (
            TypeError,
            "unknown option 'window_size'; it takes scale, epsilon",
            lambda: sinkhorn_plan(Q, K, window_size=3),
        ),
        (ValueError, "dropout_p=0.5: the plan has no dropout", lambda: sinkhorn_plan(Q, K, dropout_p=0.5)),
        (TypeError, "unknown option 'values'", lambda: certify(Q, K, values=V)),
        (ValueError, "grad_output without value", lambda: certify(Q, K, grad_output=Q)),
        (ValueError, r"grad_output has shape \(2, 4, 6, 8\)", lambda: certify(Q, K, value=V, grad_output=Q)),
        (
            ValueError,
            "embed_dim=10 must be a positive multiple of num_heads=4",
            lambda: SinkhornMultiheadAttention(10, 4),
        ),
        (
            TypeError,
            "dustbin must be True or False, got Dustbin",
            lambda: SinkhornMultiheadAttention(8, 4, dustbin=Dustbin(0.0, 0.0)),
        ),
        (ValueError, "dropout=1.5 must lie", lambda: SinkhornMultiheadAttention(8, 4, dropout=1.5)),
        (
            ValueError,
            "cannot be combined with add_bias_kv",
            lambda: SinkhornMultiheadAttention(8, 4, add_bias_kv=True, window=(1, 1)),
        ),
    ],
)
def test_the_other_verbs_refuse(error, message, build) -> None:
    with pytest.raises(error, match=message):
        build()


def test_nothing_is_computed_before_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_sinkhorn_attn.engines import ENGINES

    for engine in ENGINES.values():
        monkeypatch.setattr(engine, "forward", lambda *a, **k: pytest.fail("the engine ran"))
    for error, _, arguments in KINDS.values():
        with pytest.raises(error):
            run(**arguments)
