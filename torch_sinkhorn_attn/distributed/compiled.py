"""The functions over a process group as ops, for torch.compile: what talks to other ranks is inside, opaque.

Their arguments are the caller's own: tensors by name, the scalar options in words, and the group's registered name. The
backward prepares the problem again, with the potentials that were found, and takes the derivative as eager calls do. So
all that a program keeps between forward and backward are its arguments, the potentials and the output.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_sinkhorn_attn._ops import add_op_namespace_prefix, ops as lib
from torch_sinkhorn_attn.bands import PlanBand
from torch_sinkhorn_attn.boundary.autograd import _load, _save
from torch_sinkhorn_attn.compat.releases import group_named, recorded_inside
from torch_sinkhorn_attn.distributed import attention as eager, plans
from torch_sinkhorn_attn.distributed.preparation import Call, Sharded, prepare_shard
from torch_sinkhorn_attn.distributed.wire import Wire
from torch_sinkhorn_attn.dustbin import Dustbin
from torch_sinkhorn_attn.options import DEFAULTS
from torch_sinkhorn_attn.problem import per_head
from torch_sinkhorn_attn.problem.argument_checks import lower_precision, options as checked_options
from torch_sinkhorn_attn.problem.problem import Potentials, Result, compute_dtype, full_precision
from torch_sinkhorn_attn.problem.status import SinkhornAux

_BINS = ("row_score", "col_score", "corner_score", "value", "row_capacity", "col_capacity")
_KEYWORDS = (
    "window_centers", "query_lengths", "key_lengths", "query_segment_ids", "key_segment_ids", "row_mass", "col_mass",
)  # fmt: skip
_TOKENS = ("query", "key", "value", "attn_mask")
_TENSORS = (*_TOKENS, *(f"bin_{x}" for x in _BINS), *_KEYWORDS, "initial_row", "initial_col")
_DIFFERENTIABLE = len(_TOKENS) + 4  # of them, the first
_ARGUMENTS = f"Tensor {', Tensor? '.join(_TENSORS)}, float[] floats, int[] ints, str options, str group, str kind"


class _Kind(NamedTuple):
    """An op: how many tensors it gives back to the caller, of which the first so many have a derivative, and how many
    it keeps for that beside its arguments."""

    returned: int
    differentiable: tuple[int, ...]
    kept: int


_KINDS = {"attention": _Kind(7, (0, 5, 6), 4), "plan": _Kind(1, (0,), 2), "band": _Kind(4, (0, 2, 3), 2)}


# The caller's side, which torch.compile traces


def attention(group: Any, call: Call, aux: bool) -> Tensor | tuple[Tensor, SinkhornAux]:
    """`sinkhorn_attention`; the aux does not know whether a plan exists."""
    output, row, col, *rest = _called("attention", group, _lowered(call), str(aux))[:7]
    if not aux:
        return output
    bins = rest[2:] if call.keywords.get("dustbin") is not None else (None, None)
    return output, SinkhornAux(*(x.detach() for x in (row, col, *rest[:2])), *bins)


def plan(group: Any, call: Call, log: bool) -> Tensor:
    """`sinkhorn_plan`."""
    found: Tensor = _called("plan", group, call if log else _lowered(call), str(log))[0]
    return found


def band(group: Any, call: Call, log: bool) -> PlanBand:
    """`sinkhorn_plan_band`."""
    values, first, *bins = _called("band", group, _lowered(call), str(log))[:4]
    return PlanBand(values, first, *(bins if call.keywords.get("dustbin") is not None else (None, None)))


def _lowered(call: Call) -> Call:
    """Autocast applied, which no op sees."""
    key, value = (x if x is None else lower_precision(x) for x in (call.key, call.value))
    query = call.query if key is None else lower_precision(call.query)
    return call._replace(query=query, key=key, value=value)


def _called(name: str, group: Any, call: Call, kind: str) -> Sequence[Tensor]:
    keywords, mask = call.keywords, call.mask
    for x in (call.query, call.key, call.value, mask):
        if x is not None and not isinstance(x, Tensor):
            raise TypeError(f"query, key, value and attn_mask must be tensors, got {type(x).__name__}.")
    scalars = {x: getattr(checked_options(keywords), x) for x in DEFAULTS}
    dustbin, initial = keywords.get("dustbin"), keywords.get("initial_potentials")
    bins: dict[str, Any] = {} if dustbin is None else {x: getattr(dustbin, x) for x in _BINS}
    told = {x: y for x, y in bins.items() if not isinstance(y, Tensor)}
    row, col = (None, None) if initial is None else initial
    tensors: list[Any] = [y if isinstance(y, Tensor) else None for y in (bins.get(x) for x in _BINS)]
    tensors += [keywords.get(x) for x in _KEYWORDS]
    floats: list[float] = []
    ints: list[int] = []
    words = _worded((scalars, told if dustbin is not None else None), floats, ints)
    op = getattr(lib, f"sharded_{name}")
    found: Sequence[Tensor] = op(
        call.query, call.key, call.value, mask, *tensors, row, col, floats, ints, words, group.group_name, kind
    )
    return found


def _worded(x: Any, floats: list[float], ints: list[int]) -> str:
    """As JSON, but for numbers, which may be symbols of a compiler: they go into the lists, and say where."""
    if isinstance(x, dict):
        return "{" + ", ".join([f'"{k}": {_worded(y, floats, ints)}' for k, y in x.items()]) + "}"
    if isinstance(x, (tuple, list)):
        return "[" + ", ".join([_worded(y, floats, ints) for y in x]) + "]"
    if x is None or isinstance(x, (bool, str)):
        return {None: "null", True: "true", False: "false"}[x] if not isinstance(x, str) else f'"{x}"'
    if isinstance(x, float):
        floats.append(x)
        return '{"is": "float"}'
    ints.append(x)
    return '{"is": "int"}'


def _told(words: str, floats: Sequence[float], ints: Sequence[int]) -> Any:
    """Its inverse, with tuples for lists."""
    numbers = {"float": iter(floats), "int": iter(ints)}

    def read(x: Any) -> Any:
        if isinstance(x, list):
            return tuple(read(y) for y in x)
        if not isinstance(x, dict):
            return x
        return next(numbers[x["is"]]) if "is" in x else {k: read(y) for k, y in x.items()}

    return read(json.loads(words))


# The ops' side


def _unpacked(args: Sequence[Any]) -> tuple[Call, str, bool]:
    """The call, its group's name, and what its kind says."""
    given = dict(zip(_TENSORS, args, strict=False))
    (scalars, told), kind = _scalars(args), args[-1] == "True"
    keywords = {**scalars, **{x: given[x] for x in _KEYWORDS}}
    if told is not None:
        keywords["dustbin"] = Dustbin(**(told | {x: y for x in _BINS if (y := given[f"bin_{x}"]) is not None}))
    if given["initial_row"] is not None:
        keywords["initial_potentials"] = given["initial_row"], given["initial_col"]
    tokens: Any = [given[x] for x in _TOKENS]
    return Call._make(("", *tokens, keywords, None, None)), args[-2], kind


def _sharded(name: str, args: Sequence[Any], seed: Tensor | None = None) -> tuple[Sharded, bool]:
    call, group, kind = _unpacked(args)
    sharded = prepare_shard(Wire(group_named(group)), call._replace(function=f"compiled {name}({kind})"))
    if seed is not None and seed.numel():
        share = replace(sharded.share, problem=replace(sharded.share.problem, dropout_seed=seed))
        prepared = sharded.prepared._replace(problem=share.problem)
        sharded = sharded._replace(share=share, prepared=prepared)
    return sharded, kind


def _scalars(args: Sequence[Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Options, and the dustbin's numbers."""
    floats, ints, words = args[len(_TENSORS) : len(_TENSORS) + 3]
    found: tuple[dict[str, Any], dict[str, Any] | None] = _told(words, floats, ints)
    return found


def _run(name: str, sharded: Sharded, kind: bool, args: Sequence[Any], known: Any = None) -> list[Tensor | None]:
    """What the caller gets and what is kept, as `_KINDS` says."""
    if name == "attention":
        result = eager.solved(sharded, kind, known)
        found = eager.of_result(sharded, result, kind)
        given = [found, *[None] * 6] if isinstance(found, Tensor) else [found[0], *found[1]]
        return [*given, result.output, *result.potentials, sharded.share.problem.dropout_seed]
    if name == "plan":
        dense, potentials = plans.returned_plan(sharded, kind, known)
        return [dense, *potentials]
    entries, potentials = plans.returned_band(sharded, kind, _scalars(args)[0]["window"], known)
    return [*entries, *potentials]


def _known(name: str, sharded: Sharded, kept: Sequence[Tensor]) -> Any:
    if name != "attention":
        return Potentials(*kept)
    output, row, col, _ = kept
    none, problem = output.new_zeros(output.shape[:2]), sharded.share.problem
    bins = [output.new_zeros(0)] * 2
    if problem.has_dustbin:  # their numbers are not asked for again
        bins = [output.new_zeros(*output.shape[:2], n) for n in (output.shape[2], col.shape[-1] - problem.num_dustbins)]
    return Result(output, Potentials(row, col), none, none, *bins)


def _forward(name: str, *args: Any) -> tuple[Tensor, ...]:
    like = args[0]
    with torch.no_grad(), full_precision(like.device):
        sharded, kind = _sharded(name, args)
        return _fresh(_run(name, sharded, kind, args), like)


def _backward(name: str, *given: Any) -> tuple[Tensor, ...]:
    kind = _KINDS[name]
    count = len(kind.differentiable)
    grads, wanted, rest = given[:count], given[count], given[count + 1 :]
    kept, args = rest[: kind.kept], list(rest[kind.kept :])
    leaves = [i for i in range(_DIFFERENTIABLE) if wanted[i] == "1"]
    with recorded_inside(), full_precision(args[0].device):
        for i in leaves:
            args[i] = args[i].detach().requires_grad_()
        sharded, said = _sharded(name, args, kept[3] if name == "attention" else None)
        found = _run(name, sharded, said, args, _known(name, sharded, kept))
        pairs = [
            (x, g)
            for x, g in zip((found[i] for i in kind.differentiable), grads, strict=True)
            if x is not None and g is not None and x.requires_grad
        ]
        results = torch.autograd.grad(
            [x for x, _ in pairs], [args[i] for i in leaves], [g for _, g in pairs], allow_unused=True
        )
    by_place = dict(zip(leaves, results, strict=True))
    zeros = {i: torch.zeros_like(args[i]) for i in leaves if by_place[i] is None}
    return _fresh([zeros.get(i, by_place.get(i)) for i in range(_DIFFERENTIABLE)], args[0])


def _fresh(tensors: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """Contiguous tensors that share no memory; an absent one is empty."""
    return tuple(
        like.new_empty(0) if x is None else x.detach().clone(memory_format=torch.contiguous_format) for x in tensors
    )


# What they give, before they run


def _fake(name: str, *args: Any) -> tuple[Tensor, ...]:
    call, _, kind = _unpacked(args)
    query, key, value = call.query, call.key, call.value
    unknown = torch.library.get_ctx().new_dynamic_size
    leading, length = query.shape[:-2], query.shape[-2]
    of_value = query if value is None or key is not None else value
    dtype = of_value.dtype if name == "attention" else query.dtype
    wide = query.new_empty(0, dtype=compute_dtype(dtype))
    keys = key if value is None else value
    solver = checked_options(call.keywords).solver(query.shape[-1], "float32")
    dustbin, packed = call.keywords.get("dustbin") is not None, call.keywords.get("query_segment_ids") is not None
    bins = 1 if dustbin else 0
    batch, heads = query.shape[:-3], query.shape[-3] if query.ndim > 2 else 1
    of_heads = query.ndim > 2 and per_head.wanted(batch, heads, call.keywords)
    flat = (math.prod(batch) * heads, 1) if of_heads else (math.prod(batch), heads)
    hidden = dustbin and packed  # as many dustbins as the whole sequence has room for
    rows: Any = unknown() if hidden else length + bins
    cols: Any = unknown() if hidden or keys is None else keys.shape[-2] + bins
    kept = [wide.new_empty(solver.kept + 1, *flat, n) for n in (rows, cols)]
    if name == "plan":
        shape = (*leading, length + bins, query.shape[-1] + bins if key is None else unknown())
        return query.new_empty(shape, dtype=wide.dtype if kind else dtype), *kept
    if name == "band":
        values = wide.new_empty(*leading, length, unknown(), dtype=wide.dtype if kind else dtype)
        places = leading if of_heads else batch
        of_keys: Any = unknown() if dustbin and keys is None else 0 if keys is None else keys.shape[-2]
        masses = [values.new_empty(*leading, n) if dustbin else query.new_empty(0) for n in (length, of_keys)]
        return values, values.new_empty(*places, length, dtype=torch.int64), *masses, *kept
    assert value is not None
    width = value.shape[-1]
    aux = [query.new_empty(0)] * 6
    if kind:
        shapes = [(*leading, rows), (*leading, cols), leading, leading]
        sizes = length, value.shape[-2]
        masses = [wide.new_empty(*leading, n) if dustbin else query.new_empty(0) for n in sizes]
        aux = [*(wide.new_empty(x) for x in shapes), *masses]
    seed = query.new_empty(2, dtype=torch.int64) if solver.dropout_p else query.new_empty(0)
    raw = wide.new_empty(*flat, length, width)
    return query.new_empty(*leading, length, width, dtype=dtype), *(x.clone() for x in aux), raw, *kept, seed


def _backward_fake(name: str, *given: Any) -> tuple[Tensor, ...]:
    kind = _KINDS[name]
    wanted, args = given[len(kind.differentiable)], given[len(kind.differentiable) + 1 + kind.kept :]
    return tuple(
        torch.empty_like(args[i], memory_format=torch.contiguous_format) if on == "1" else args[0].new_empty(0)
        for i, on in enumerate(wanted)
    )


def _setup_context(name: str, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _save(ctx, *output[_KINDS[name].returned :], *inputs)


def _derivative(name: str, ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
    kind = _KINDS[name]
    saved = _load(ctx)
    args = saved[kind.kept :]
    needed = [on and isinstance(x, Tensor) for on, x in zip(ctx.needs_input_grad, args[:_DIFFERENTIABLE], strict=False)]
    wanted = "".join("01"[bool(x)] for x in needed)
    found = getattr(lib, f"sharded_{name}_backward")(*(grads[i] for i in kind.differentiable), wanted, *saved)
    given = [g if on else None for g, on in zip(found, needed, strict=True)]
    return (*given, *[None] * (len(args) - _DIFFERENTIABLE))


def _register(name: str) -> None:
    kind = _KINDS[name]
    grads = ", ".join(f"Tensor? grad_{i}" for i in kind.differentiable)
    kept = ", ".join(f"Tensor kept_{i}" for i in range(kind.kept))
    results = f"({', '.join(['Tensor'] * (kind.returned + kind.kept))})"
    ops = {
        f"sharded_{name}": (f"({_ARGUMENTS}) -> {results}", _forward, _fake),
        f"sharded_{name}_backward": (
            f"({grads}, str wanted, {kept}, {_ARGUMENTS}) -> ({', '.join(['Tensor'] * _DIFFERENTIABLE)})",
            _backward,
            _backward_fake,
        ),
    }
    for op, (schema, run, fake) in ops.items():
        tags = (torch.Tag.nondeterministic_seeded,)  # dropout; and never merged
        torch.library.define(add_op_namespace_prefix(op), schema, tags=tags)
        torch.library.impl(add_op_namespace_prefix(op), "default", functools.partial(run, name))
        torch.library.register_fake(add_op_namespace_prefix(op), functools.partial(fake, name))
    torch.library.register_autograd(
        add_op_namespace_prefix(f"sharded_{name}"),
        functools.partial(_derivative, name),
        setup_context=lambda ctx, inputs, output: _setup_context(name, ctx, inputs, output),
    )


for _name in _KINDS:
    _register(_name)
