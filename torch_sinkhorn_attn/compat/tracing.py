"""Calls recorded to be run later: by torch.compile, torch.export, torch.jit.trace, torch.onnx.export and torch.fx.

In a graph of torch.fx torch's attention is one node: its function by an override, its module because Tracer takes
classes of torch.nn for leaves. So are ours, whatever tracer it is, by asking for its `Proxy` objects."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn
from torch.fx import Proxy

from torch_sinkhorn_attn.compat.releases import is_fx_symbolic_tracing

P = ParamSpec("P")
T = TypeVar("T")

call_for_real = nn.Module.__call__  # before a tracer patches it


NOT_IN_ONNX = (
    "ONNX has no operator for Sinkhorn attention, and this program holds this package's own. Hand the module to "
    "torch.onnx.export, with engine=None or 'reference', and not a program that torch.export made of it."
)


def recording() -> bool:
    """Whether a program is being made of the calls: what a tensor holds now is not what it will hold."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]


def for_onnx() -> bool:
    """Whether that program is for ONNX, which has none of this package's operators."""
    return torch.onnx.is_in_onnx_export()


def refuse_onnx() -> None:
    """RuntimeError while a program that holds this package's operators is turned into ONNX."""
    if for_onnx():
        raise RuntimeError(NOT_IN_ONNX)


_LEAVES = frozenset({torch.Tensor, nn.Parameter, type(None), bool, int, float, str})  # most arguments; hold no `Proxy`


def tracer_of(arguments: object) -> Any:
    """The tracer of the first `Proxy` in the arguments, their tuples, lists, dicts and dataclasses; None without."""
    if type(arguments) in _LEAVES or (type(arguments) is list and _LEAVES.issuperset(map(type, arguments))):
        return None
    if isinstance(arguments, Proxy):
        return arguments.tracer
    if isinstance(arguments, torch.Tensor):
        return None
    if isinstance(arguments, (tuple, list)):
        parts = list(arguments)
    elif isinstance(arguments, (dict, Mapping)):
        parts = list(arguments.values())
    elif is_dataclass(arguments) and not isinstance(arguments, type):
        parts = [getattr(arguments, field.name) for field in fields(arguments)]
    else:
        return None
    return next((tracer for tracer in map(tracer_of, parts) if tracer is not None), None)


def one_node(function: Callable[P, T]) -> Callable[P, T]:
    """The function, recorded as one `call_function` node where an argument is a `Proxy`."""

    @functools.wraps(function)
    def recordable(*args: P.args, **kwargs: P.kwargs) -> T:
        tracer = None if torch.compiler.is_compiling() else tracer_of([*args, *kwargs.values()])
        if tracer is None:
            return function(*args, **kwargs)
        proxy: T = tracer.create_proxy("call_function", recordable, args, kwargs)
        return proxy

    return recordable


def call_module(module: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What `module(*args, **kwargs)` is: while torch.fx traces, one `call_module` node, as of a module of torch.nn,
    into whose hooks and forward no tracer looks."""
    tracer = tracer_of([*args, *kwargs.values()])
    if tracer is None and is_fx_symbolic_tracing():  # of constants: then a parameter tells, which is a Proxy now
        tracer = tracer_of(getattr(module.out_proj, "weight", None))
    if tracer is None:
        return nn.Module.__call__(module, *args, **kwargs)
    given = (*args, *kwargs.values())

    def leaf(*args: Any, **kwargs: Any) -> Any:
        now = (*args, *kwargs.values())
        if tracer_of(now) is None and any(x is not y for x, y in zip(given, now)):
            return call_for_real(module, *args, **kwargs)  # some tracers follow shapes with meta tensors
        return tracer.create_proxy("call_module", tracer.path_of_module(module), args, kwargs)

    return tracer.call_module(module, leaf, args, kwargs)
