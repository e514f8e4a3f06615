"""The registered ops refuse what does not fit together: an error that names it, no crash and no answer."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import hostile_calls
import pytest
import torch
from conformance import ENGINES
from torch import Tensor

from torch_sinkhorn_attn import Dustbin
from torch_sinkhorn_attn.boundary import ops
from torch_sinkhorn_attn.engines import cpu, cpu_ranks
from torch_sinkhorn_attn.problem.arguments import prepare
from torch_sinkhorn_attn.problem.support import build_support

LIB = torch.ops.torch_sinkhorn_attn
I64 = torch.int64


def flat_of(engine: str = "cpu", value: bool = True, **options: Any) -> dict[str, Any]:
    q, k, v = (torch.randn(1, 2, 8, 4) for _ in range(3))
    given = prepare(q, k, v if value else None, **options)
    return dict(zip(ops.NAMES, ops.flatten(given.inputs, given.problem, engine), strict=True))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "intervals too short": ({"row_lo": torch.zeros(1, 1, dtype=I64)}, r"row_lo is int64\[1, 1\]; int64\[1, 8\] is"),
    "more queries than masses": ({"query": torch.randn(1, 2, 99, 4)}, r"row_lo is int64\[1, 8\]; int64\[1, 99\]"),
    "more keys than values": ({"key": torch.randn(1, 2, 99, 4)}, r"value is float32\[1, 2, 8, 4\]; float32\[1, 2, 99"),
    "more key than query heads": ({"key": torch.randn(1, 5, 8, 4)}, "its heads must divide the 2 of query"),
    "no key heads": ({"key": torch.randn(1, 0, 8, 4)}, "its heads must divide the 2 of query"),
    "no key batch": ({"key": torch.randn(0, 2, 8, 4)}, r"key is float32\[0, 2, 8, 4\]"),
    "fewer key features": ({"query": torch.randn(1, 2, 8, 4000)}, r"key is float32\[1, 2, 8, 4\]; "),
    "mask of another size": ({"mask": torch.ones(1, 1, 2, 3, dtype=torch.bool)}, "that broadcast to"),
    "mask of two dimensions": ({"mask": torch.ones(8, 8)}, "four dimensions that broadcast"),
    "query of integers": ({"query": torch.ones(1, 2, 8, 4, dtype=I64)}, "query is int64"),
    "masses of complex": ({"log_row_mass": torch.zeros(1, 2, 8, dtype=torch.complex64)}, "log_row_mass is complex64"),
    "masses of NaN": ({"log_row_mass": torch.full((1, 2, 8), torch.nan)}, "log_row_mass holds (nan|NaN)"),
    "negative iterations": ({"tail_iters": -5}, "tail_iters=-5"),
    "endless iterations": ({"base_iters": 1 << 40}, "base_iters=1099511627776"),
    "unknown acceleration": ({"acceleration": "anderson"}, "acceleration='anderson'"),
    "acceleration of over-relaxation": ({"acceleration": "chebyshev", "over_relaxation": 1.5}, "acceleration='cheb"),
    "contraction of 1": ({"acceleration": "chebyshev", "contraction": 1.0}, "contraction=1.0"),
    "contraction of a plain base": ({"contraction": 0.5}, "contraction=0.5"),
    "unknown gradient": ({"gradient": "imp"}, "gradient='imp'"),
    "NaN epsilon": ({"epsilon": torch.nan}, "epsilon=nan"),
    "seed without dropout": ({"dropout_seed": torch.zeros(2, dtype=I64)}, "dropout_seed is given beside dropout_p=0"),
    "empty seed": ({"dropout_seed": torch.zeros(0, dtype=I64), "dropout_p": 0.5}, r"dropout_seed is int64\[0\]"),
    "short warm start": ({"initial_row": torch.zeros(1)}, r"initial_row is float32\[1\]; float32\[1, 2, 8\]"),
    "intervals that fall": ({"row_lo": torch.full((1, 8), 5), "row_hi": torch.full((1, 8), 3)}, r"hold \[5, 3\)"),
    "intervals beyond the keys": ({"row_hi": torch.full((1, 8), 9)}, r"hold \[0, 9\)"),
    "intervals of extremes": (
        {"row_lo": torch.full((1, 8), 2**63 - 1), "row_hi": torch.full((1, 8), -(2**63))}, "row_lo and row_hi hold"
    ),
    "a band that nobody speaks of": ({"row_hi": torch.full((1, 8), 2)}, "row_lo and row_hi"),
    "segments of one side": ({"row_segment": torch.zeros(1, 8, dtype=I64)}, "belong together"),
    "a dustbin of one part": ({"row_score": torch.zeros(1, 2, 8)}, "a dustbin has all of them"),
    "unknown engine": ({"engine": "nope"}, "engine='nope'"),
}  # fmt: skip
DUSTBIN: dict[str, tuple[dict[str, Any], str]] = {
    "huge segments": (
        {"row_segment": torch.full((1, 8), 10**9), "col_segment": torch.full((1, 8), 10**9), "banded": True},
        "row_segment",
    ),
    "negative segments": (
        {"row_segment": torch.full((1, 8), -7), "col_segment": torch.full((1, 8), -7), "banded": True}, "row_segment"
    ),
    "segments that fall": (
        {
            "row_segment": torch.tensor([[1, 0, 1, 0, 1, 0, 1, 0]]), "col_segment": torch.zeros(1, 8, dtype=I64),
            "banded": True, "log_row_capacity": torch.zeros(1, 2, 2), "log_col_capacity": torch.zeros(1, 2, 2),
        }, "row_segment",
    ),
    "short scores": ({"row_score": torch.zeros(1)}, r"row_score is float32\[1\]"),
    "no scores": ({"row_score": None, "col_score": None, "corner_score": None}, "row_score is missing"),
    "flat capacity": ({"log_row_capacity": torch.zeros(1)}, r"log_row_capacity is float32\[1\]"),
    "many dustbins, no segments": ({"log_row_capacity": torch.zeros(1, 2, 3)}, "one without segments"),
}  # fmt: skip


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", [*WRONG, *DUSTBIN])
def test_what_does_not_fit_is_named(name: str, engine: str) -> None:
    changed, message = (WRONG | DUSTBIN)[name]
    options = {"dustbin": Dustbin(0.0, 0.0)} if name in DUSTBIN else {}
    for value, op in ((True, LIB.forward), (False, LIB.plan)):
        arguments = flat_of(engine, value, **options) | changed
        if not value and name in ("more keys than values", "a band that nobody speaks of"):
            continue
        with pytest.raises((ValueError, TypeError), match=message):
            op(*(ops.with_residuals([*arguments.values()], False) if value else arguments.values()))


@pytest.mark.parametrize("engine", ENGINES)
def test_cotangents_that_do_not_fit(engine: str) -> None:
    flat = list(flat_of(engine).values())
    output, row, col = LIB.forward(*ops.with_residuals(flat, False))[:3]
    ones = torch.ones_like(output)
    for given, message in (
        ((ones, None, None, False, output, torch.zeros(1), torch.zeros(1)), "row_potentials is float32"),
        ((ones, None, None, False, torch.zeros(1), row, col), "output is float32"),
        ((torch.ones(1, 1, 1, 4), None, None, False, output, row, col), "grad_output is float32"),
        ((torch.ones(0, 0, 0, 0), None, None, False, output, row, col), "grad_output is float32"),
        ((ones, torch.ones(1, 2, 8), None, False, output, row, col), "grad_to_bin is given"),
        ((ones, None, None, False, output, row[:1], col), "row_potentials is float32"),
    ):
        with pytest.raises(ValueError, match=message):
            LIB.backward(*given, *flat)
    without = list((flat_of(engine) | {"value": None}).values())
    with pytest.raises(ValueError, match="value is missing"):
        LIB.backward(ones, None, None, False, output, row, col, *without)
    flat = list(flat_of(engine, value=False).values())
    plan, row, col = LIB.plan(*flat)
    for grad in (plan[..., :7], plan[0], plan[:0], plan.expand(2, -1, -1, -1)):
        with pytest.raises(ValueError, match="grad_plan is float32"):
            LIB.plan_backward(grad, row, col, False, *flat)


def lists(**options: Any) -> tuple[dict[str, Tensor | None], list[float], list[int]]:
    given = prepare(*(torch.randn(1, 2, 8, 4) for _ in range(3)), **options)
    tensors, numbers, counts = cpu.arguments(given.inputs, given.problem)
    return dict(zip((*ops.Inputs._fields, *cpu.TENSORS), tensors, strict=True)), numbers, counts


def test_the_compiled_ops_look_for_themselves() -> None:
    """What engines/cpu.py puts right or never sends."""
    tensors, numbers, counts = lists()
    apart = torch.zeros(1, 2, 8, 2)[..., 0]
    for changed, message in (
        ({"row_lo": None}, "row_lo is missing"),
        ({"log_row_mass": apart}, "log_row_mass is not contiguous"),
        ({"log_row_mass": torch.zeros(1, 2, 8, dtype=torch.float64)}, "log_row_mass is float64"),
        ({"row_lo": torch.zeros(1, 8, dtype=torch.int32)}, "row_lo is int32"),
        ({"query": torch.zeros(1).expand(1, 2, 8, 1 << 50)}, "key is float32|too large"),
        ({"row_hi": torch.full((1, 8), 2)}, "without a band all of the active columns"),
        ({"key": torch.zeros(1, 2, 8, 4, dtype=torch.complex64).conj().imag}, "a tensor has the negative bit"),
        ({"mask": torch.zeros(8, 8, dtype=torch.complex64)}, "mask is complex64|mask is ComplexFloat"),
        ({"query": torch.zeros(1, 2, 8, 4).to_sparse()}, "SparseCPU|not strided"),
        ({"value": torch.zeros(1, 2, 8, 4, device="meta")}, "not on the CPU|Meta"),
    ):
        with pytest.raises((ValueError, NotImplementedError), match=message):
            LIB.cpu_forward(list((tensors | changed).values()), numbers, counts, False)
    for k, value in ((0, -3), (1, 1 << 62), (2, 7), (3, -1), (4, -(10**12)), (5, 2), (6, -1)):
        with pytest.raises(ValueError, match=f"is {value}; 0 to"):
            LIB.cpu_forward(list(tensors.values()), numbers, [*counts[:k], value, *counts[k + 1 :]], False)
    omega, contraction = cpu._NUMBERS.index("over_relaxation"), cpu._NUMBERS.index("contraction")
    for k, value, message in ((contraction, 1.0, "contraction is 1; a number"), (omega, 1.5, "1 is needed beside")):
        with pytest.raises(ValueError, match=message):
            spoiled = [*numbers[:k], value, *numbers[k + 1 :]]
            LIB.cpu_forward(list(tensors.values()), spoiled, [*counts[:-1], 1], False)
    with pytest.raises(ValueError, match="got 18 tensors, 8 numbers and 7 counts; 19, 8 and 7 are needed"):
        LIB.cpu_plan(list(tensors.values())[:-1], numbers, counts)
    with pytest.raises(ValueError, match="potentials are too large"):
        LIB.cpu_forward(list(huge().values()), numbers, [0, 1 << 24, 0, 0, 0, 0, 0], False)
    with pytest.raises(ValueError, match="num_bytes is -5"):
        LIB.cpu_retain_workspace(-5)
    with pytest.raises(ValueError, match="capability='sse99' is not usable"):
        LIB.cpu_set_capability("sse99")


SCANS: dict[str, tuple[dict[str, Any], str]] = {
    "intervals too short": ({"row_hi": torch.zeros(2, 1, dtype=I64)}, r"row_hi is int64\[2, 1\]; int64\[2, 6\] is"),
    "flat intervals": ({"row_lo": torch.zeros(6, dtype=I64)}, r"row_lo is int64\[6\]; two dimensions"),
    "intervals beyond the keys": ({"row_hi": torch.full((2, 6), 1 << 40)}, "0 <= row_lo <= row_hi <= 8"),
    "intervals beyond the queries": ({"col_hi": torch.full((2, 8), 7)}, "0 <= col_lo <= col_hi <= 6"),
    "intervals of floats": ({"col_lo": torch.zeros(2, 8)}, r"col_lo is float32\[2, 8\]; int64"),
    "segments that do not exist": ({"col_segment": torch.full((2, 8), 9), "packed": True}, "indices from 0 to 5"),
    "negative segments": ({"row_segment": torch.full((2, 6), -1), "packed": True}, "indices from 0 to 5"),
    "activity of numbers": ({"row_active": torch.ones(2, 6)}, r"row_active is float32\[2, 6\]; bool"),
    "mask of another size": ({"mask": torch.zeros(2, 3, 6, 7)}, r"that broadcast to \[2, 3, 6, 8\]"),
    "mask of two dimensions": ({"mask": torch.zeros(6, 8)}, "four dimensions"),
    "mask of integers": ({"mask": torch.zeros(1, 1, 6, 8, dtype=I64)}, "mask is int64"),
    "no mask": ({"mask": None}, "mask is missing"),
    "half precision": ({"dtype": torch.float16}, "dtype=torch.float16"),
    "a floor of nothing": ({"floor": 0.0}, "floor=0.0"),
    "a floor of NaN": ({"floor": torch.nan}, "floor=nan"),
}  # fmt: skip


@pytest.mark.parametrize("name", SCANS)
def test_reading_a_mask_that_does_not_fit(name: str) -> None:
    ids = [torch.zeros(2, n, dtype=I64) for n in (6, 8)]
    support = build_support(*ids, (2, 2), False)
    good: dict[str, Any] = {"mask": torch.zeros(2, 3, 6, 8), **support._asdict()}
    good |= {"packed": False, "dtype": torch.float32, "floor": -1.0}
    assert [x.all() for x in LIB.scan_mask(*good.values())] == [True, True]
    changed, message = SCANS[name]
    with pytest.raises((ValueError, TypeError), match=message):
        LIB.scan_mask(*(good | changed).values())


def huge() -> dict[str, Tensor | None]:
    given = prepare(torch.randn(1, 1, 70_000, 1), torch.randn(1, 1, 2, 1), torch.randn(1, 1, 2, 1))
    return dict(zip((*ops.Inputs._fields, *cpu.TENSORS), cpu.arguments(given.inputs, given.problem)[0], strict=True))


@pytest.mark.slow
def test_random_calls_that_do_not_fit() -> None:
    """`python tests/hostile_calls.py` makes 2,000."""
    outcomes = hostile_calls.run(0, 150)
    assert len(outcomes) == 150 and not hostile_calls.wrong(outcomes), hostile_calls.wrong(outcomes)


def test_the_random_calls_see_an_answer_and_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their report, when one of them is answered, and when one ends its process."""
    program = "import os\nprint('call\\t0\\tbegins\\tx', flush=True)\n"
    for ending, kinds in (("print('call\\t0\\tanswer\\tx')", ["answer"]), ("os.abort()", ["crash"])):
        real = hostile_calls.subprocess.run

        def run(command: list[str], real: Any = real, ending: str = ending, **options: Any) -> Any:
            return real([command[0], "-c", program + ending], **options)

        with monkeypatch.context() as patch:
            patch.setattr(hostile_calls.subprocess, "run", run)
            assert [x.kind for x in hostile_calls.wrong(hostile_calls.run(0, 1))] == kinds


def test_the_places_of_the_kernels_lists_are_the_fields_of_a_problem() -> None:
    header = (Path(__file__).parents[2] / "csrc/checks.h").read_text()

    def places(enum: str) -> list[str]:
        found = re.search(rf"enum {enum} : size_t \{{(.*?)\}}", header, re.S)
        assert found is not None
        return [x.strip() for x in found[1].split(",") if x.strip()][:-1]

    def constants(names: Iterable[str]) -> list[str]:
        return ["k" + "".join(part.capitalize() for part in name.split("_")) for name in names]

    assert places("Tensors") == constants([*ops.Inputs._fields, *cpu.TENSORS])
    assert places("Numbers") == constants(cpu._NUMBERS)
    assert places("Counts") == constants(cpu.COUNTS)
    assert places("Vectors") == constants(cpu_ranks.VECTORS)
