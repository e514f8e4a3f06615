"""The table of options: what is documented, and where it is used, are its words, defaults and checks."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from torch_sinkhorn_attn import SinkhornMultiheadAttention, register_transformers, sinkhorn_attention
from torch_sinkhorn_attn.modules import ModuleOptions
from torch_sinkhorn_attn.options import CHECKS, DEFAULTS, MEANINGS, OF_A_LAYER, Options
from torch_sinkhorn_attn.problem.argument_checks import options

BAD = {
    "dropout_p": 1.0, "is_causal": 1, "scale": "1", "epsilon": 0.0, "window": (1, 2, 3), "relaxation": -1.0,
    "base_iters": -1, "tail_iters": 0.5, "tolerance": -1e-3, "over_relaxation": 2.0, "acceleration": "anderson",
    "contraction": 1.0, "gradient": "tails", "mask_floor": 1.0, "engine": 3,
}  # fmt: skip


def words(text: str | None) -> str:
    return re.sub(r"\s+", " ", text or "")


@pytest.mark.parametrize("name", MEANINGS)
def test_functions_are_documented_in_the_words_of_the_table(name: str) -> None:
    described: list[Callable[..., Any]] = [sinkhorn_attention]
    if name != "engine":
        tpu = pytest.importorskip("torch_sinkhorn_attn.engines.tpu")
        described.append(tpu.sinkhorn_attention)
    for function in described:
        assert f"{name}: {words(MEANINGS[name])}" in words(function.__doc__)


def test_defaults_are_those_of_the_table() -> None:
    given = {x.name: x.default for x in inspect.signature(sinkhorn_attention).parameters.values()}
    assert {name: given[name] for name in DEFAULTS} == DEFAULTS
    made = {x.name: x.default for x in inspect.signature(SinkhornMultiheadAttention).parameters.values()}
    assert {name: made[name] for name in OF_A_LAYER} == {name: DEFAULTS[name] for name in OF_A_LAYER}
    assert set(ModuleOptions._fields) == {*OF_A_LAYER, "dustbin"}
    assert Options.of({}) == Options.of(DEFAULTS) == options(DEFAULTS)


@pytest.mark.parametrize("name", BAD)
def test_every_door_refuses_in_the_same_words(name: str) -> None:
    doors: list[Callable[[], Any]] = [
        lambda: Options.of({name: BAD[name]}),
        lambda: sinkhorn_attention(*torch.ones(3, 1, 2, 2), **{name: BAD[name]}),
    ]
    if name in OF_A_LAYER:
        doors.append(lambda: SinkhornMultiheadAttention(4, 2, **{name: BAD[name]}))
        doors.append(lambda: register_transformers("never", **{name: BAD[name]}))
    said = set()
    for door in doors:
        with pytest.raises((TypeError, ValueError), match=f"^{name}") as caught:
            door()
        said.add(str(caught.value))
    assert len(said) == 1
    assert {*BAD, "enable_gqa"} == {*CHECKS}  # every option but that flag, of which anything is true or false
