"""What the engine would launch for a problem, on a machine without a GPU: `launches` runs its schedule on tensors of
the device "meta", which have shapes and no memory.

Whatever would wait for the device, or copy between it and the host, cannot be captured in a CUDA graph: it is an error
here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torch_sinkhorn_attn import Dustbin
from torch_sinkhorn_attn.engines.triton import ENGINE
from torch_sinkhorn_attn.engines.triton.launch import Chip, Launch, recording
from torch_sinkhorn_attn.problem.arguments import prepare
from torch_sinkhorn_attn.problem.problem import OutputGrads

Options = Callable[["Case"], dict[str, Any]]


def _none(case: Case) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Case:
    """A problem by its shapes: `options` makes the keyword arguments, tensors on "meta"."""

    name: str
    length: int = 1024
    size: int | None = None  # keys; None: as many as queries
    num: int = 2
    heads: int = 4
    key_heads: int | None = None
    width: int = 64
    dtype: torch.dtype = torch.bfloat16
    options: Options = _none
    verbs: tuple[str, ...] = ("forward", "backward")
    numbers: dict[str, Any] = field(default_factory=dict)  # options that are plain numbers

    @property
    def keys(self) -> int:
        return self.size or self.length


class NoWaiting(TorchDispatchMode):
    """An error for operators that copy between host and device, or bring a number of the device to the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        kinds = {x.device.type for x in (*given, *tree_leaves(found)) if isinstance(x, Tensor)}
        if "meta" in kinds and ("_local_scalar_dense" in str(func) or "nonzero" in str(func)):
            raise AssertionError(f"{func} waits for the device")
        copied = func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_) and len(kinds) > 1
        if copied or len({x.device.type for x in given if x.dim()}) > 1:
            raise AssertionError(f"{func} copies from the host to the device")
        return found


class NoNumbers(TorchFunctionMode):
    """An error for tensors that are made of the host's numbers on the device, which the dispatcher does not see."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor, Tensor.new_tensor) and found.is_meta:
            raise AssertionError(f"{func} copies from the host to the device")
        return found


def launches(case: Case, chip: Chip) -> list[Launch]:
    """Those of the case's verbs, in order, as they are made for `chip`."""
    with recording(chip) as found, NoWaiting(), NoNumbers():
        key_heads = case.key_heads or case.heads
        shapes = ((case.heads, case.length), (key_heads, case.keys), (key_heads, case.keys))
        query, key, value = (
            torch.empty(case.num, heads, lines, case.width, dtype=case.dtype, device="meta") for heads, lines in shapes
        )
        arguments = {**case.options(case), **case.numbers}
        mask = arguments.pop("attn_mask", None)
        inputs, problem = prepare(query, key, value, mask, enable_gqa=True, **arguments)[:2]
        for verb in case.verbs:
            _run(verb, inputs, problem)
    return found


def distinct(found: list[Launch]) -> list[Launch]:
    """One of each that the compiler can tell apart."""
    known: dict[str, Launch] = {}
    for launch in found:
        source = {name: x for name, x in launch.source().items() if name != "fn"}
        known.setdefault(f"{launch.kernel.__name__} {source} {launch.options}", launch)
    return list(known.values())


def _run(verb: str, inputs: Any, problem: Any) -> None:
    if verb == "plan":
        plan, potentials = ENGINE.plan(inputs._replace(value=None), problem)
        ENGINE.plan_backward(inputs._replace(value=None), problem, potentials, plan, False)
    elif verb == "forward":
        ENGINE.forward(inputs, problem, residuals=True)
    else:
        result = ENGINE.forward(inputs, problem, residuals=False)
        floats = inputs.mask is not None and inputs.mask.dtype.is_floating_point
        bins = (result.row_dustbin, result.col_dustbin) if inputs.has_dustbin else (None, None)
        ENGINE.backward(inputs, problem, result.output, result.potentials, OutputGrads(result.output, *bins, floats))


# What an option is given, on "meta"


def lengths(case: Case) -> dict[str, Any]:
    return {f"{side}_lengths": torch.ones(case.num, dtype=torch.int64, device="meta") for side in ("query", "key")}


def segments(case: Case) -> dict[str, Any]:
    sizes = {"query": case.length, "key": case.keys}
    return {
        f"{side}_segment_ids": torch.ones(case.num, n, dtype=torch.int64, device="meta") for side, n in sizes.items()
    }


def bool_mask(case: Case) -> dict[str, Any]:
    return {"attn_mask": torch.ones(case.num, 1, case.length, case.keys, dtype=torch.bool, device="meta")}


def float_mask(case: Case) -> dict[str, Any]:
    return {"attn_mask": torch.ones(case.heads, case.length, case.keys, dtype=torch.float32, device="meta")}


def dustbin(case: Case) -> dict[str, Any]:
    scores = (torch.ones(case.heads, n, device="meta") for n in (case.length, case.keys))
    return {"dustbin": Dustbin(*scores, value=torch.ones(case.heads, case.width, device="meta"))}


def masses(case: Case) -> dict[str, Any]:
    return {"row_mass": torch.ones(case.length, device="meta"), "relaxation": 2.0}
