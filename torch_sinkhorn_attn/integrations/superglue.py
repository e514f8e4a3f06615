"""Swap SuperGlue's loop for ours in a model that exists, and back: transformers' SuperGlue, and what is built like it.

Such models call a function `log_optimal_transport(scores, bin_score, iterations)`, a global of the module their class
is written in, or an attribute of theirs. Only the one model changes: its class becomes a subclass whose methods look
that one name up elsewhere, so other models, other threads and the module itself stay as they are.
"""

from __future__ import annotations

import copyreg
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from torch_sinkhorn_attn.dustbin import Dustbin
from torch_sinkhorn_attn.functional import sinkhorn_plan
from torch_sinkhorn_attn.problem import argument_checks

NAME = "log_optimal_transport"
_OPTIONS = (
    "gradient", "base_iters", "tail_iters", "tolerance", "over_relaxation", "acceleration", "contraction", "engine",
)  # fmt: skip
_REPLACED = "_superglue_loop"  # on a class made here: the class before, and the loop
_LOWEST = -1e9  # padding stays within the support, as in the loop, where it takes part in the dustbins
_ROOT = "(the model itself)"


@dataclass(frozen=True)
class SuperGlueLoop:
    """What is called in place of `log_optimal_transport`: the same numbers, whatever the number of iterations.

    SuperGlue scales rows first and columns last, and the plan here is the other way round: so the sides are exchanged.

    Attributes:
        options: of `sinkhorn_plan`, as pairs.
        names: of the three arguments of the function that it stands for.
        before: that function, where it was an attribute of the model; None where the class has it.
    """

    options: tuple[tuple[str, Any], ...]
    names: tuple[str, ...]
    before: Callable[..., Tensor] | None = None

    def __call__(self, *args: Any, **named: Any) -> Tensor:
        given = {self.names[i]: x for i, x in enumerate(args)} | named
        scores, score, count = (given[name] for name in self.names)
        options = dict(self.options)
        if count < 1:
            raise ValueError(f"{self.names[2]}={count}: at least one iteration is needed.")
        tail = options.setdefault("tail_iters", min(2, count))
        options.setdefault("base_iters", max(0, count - tail))
        wide = scores if scores.dtype == torch.float64 else scores.float()
        if isinstance(score, Tensor) and score.numel() == 1:
            score = score.reshape(())
        log_plan = sinkhorn_plan(
            wide.clamp(min=_LOWEST).transpose(1, 2)[:, None], log=True, dustbin=Dustbin.superglue(score),
            mask_floor=None, **options,
        )  # fmt: skip
        return log_plan[:, 0].transpose(1, 2).to(scores.dtype)


def replace_superglue(model: nn.Module, **options: Any) -> tuple[str, ...]:
    """Let a SuperGlue model compute its optimal transport here, in place: the same numbers, faster, in less memory.

    `SuperGlueForKeypointMatching` of Hugging Face transformers, and every model whose modules call a function or
    attribute `log_optimal_transport(scores, bin_score, iterations)`: that function is first run beside ours on a small
    example, since many things bear its name. The model keeps its identity, parameters, hooks and `state_dict`; copies,
    pickles and saved models are as they should be, except that `from_pretrained` builds a model with its own loop
    again.

    Args:
        model: the model.
        options: as in `sinkhorn_plan`: gradient, base_iters, tail_iters, tolerance, over_relaxation, acceleration,
            contraction, engine. Defaults: as many iterations as the model asks for, all of them differentiated
            (`gradient="unrolled"`), which is what the loop does. `gradient="implicit", tolerance=1e-4` stops where
            it has converged.

    Returns:
        The names of the modules whose loop was replaced now; none if all were before, with these options.

    Raises:
        TypeError: model is no module, or an option is unknown or of the wrong type.
        ValueError: an option has a wrong value, the model has no such loop, computes something else under its name, or
            was replaced before with other options. Nothing has then been changed.

    >>> from transformers import SuperGlueConfig, SuperGlueForKeypointMatching
    >>> model = SuperGlueForKeypointMatching(SuperGlueConfig(gnn_layers_types=["self", "cross"]))
    >>> replace_superglue(model)
    ('(the model itself)',)
    >>> restore_superglue(model)
    ('(the model itself)',)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"replace_superglue needs an nn.Module, got {type(model).__name__}.")
    chosen = _checked(options)
    wanted: list[tuple[str, nn.Module, SuperGlueLoop]] = []
    again = False
    for name, module in model.named_modules():
        before = _loop_of(module)
        if before is not None:
            again = True
            if before.options != chosen:
                raise ValueError(
                    f"{name or _ROOT} was replaced before with other options, {dict(before.options)}: "
                    "restore_superglue(model) first."
                )
            continue
        for function in _functions(name, module):
            own = module.__dict__.get(NAME)
            wanted.append((name, module, SuperGlueLoop(chosen, _same(name, function, chosen), own)))
    if not wanted and not again:
        raise ValueError(
            f"{type(model).__name__} has no SuperGlue loop: none of its modules calls a function {NAME}(scores, "
            f"bin_score, iterations). Call sinkhorn_plan(scores, log=True, dustbin=Dustbin.superglue(score)) where it "
            "computes its plan."
        )
    for _, module, loop in wanted:
        if hasattr(module, NAME):
            module.__dict__[NAME] = loop
        else:
            cls: Any = type(module)
            module.__class__ = _with(cls, loop)
    return tuple(name or _ROOT for name, _, _ in wanted)


def restore_superglue(model: nn.Module) -> tuple[str, ...]:
    """Undo `replace_superglue`: the model, or a copy of it, has its own loop again.

    Returns:
        The names of the modules restored.

    Raises:
        TypeError: model is no module.
        ValueError: a module has got another class since, by `fully_shard` for instance.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"restore_superglue needs an nn.Module, got {type(model).__name__}.")
    found = [(name, module) for name, module in model.named_modules() if _loop_of(module) is not None]
    for name, module in found:
        if NAME not in module.__dict__ and _REPLACED not in vars(type(module)):
            raise ValueError(
                f"{name or _ROOT} is a {type(module).__name__} now, a class made since (by fully_shard?); "
                "restore_superglue before that."
            )
    for _, module in found:
        loop = module.__dict__.get(NAME)
        if loop is None:
            module.__class__ = vars(type(module))[_REPLACED][0]
        elif loop.before is None:
            del module.__dict__[NAME]
        else:
            module.__dict__[NAME] = loop.before
    return tuple(name or _ROOT for name, _ in found)


def _checked(options: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    unknown = sorted(set(options) - set(_OPTIONS))
    if unknown:
        raise TypeError(f"replace_superglue() got unknown option {unknown[0]!r}; it takes {', '.join(_OPTIONS)}.")
    chosen = {"gradient": "unrolled"} | options
    argument_checks.options(chosen).solver(1, "float32")
    return tuple(sorted(chosen.items()))


def _loop_of(module: nn.Module) -> SuperGlueLoop | None:
    own = module.__dict__.get(NAME)
    if isinstance(own, SuperGlueLoop):
        return own
    replaced: tuple[type, SuperGlueLoop] | None = getattr(type(module), _REPLACED, None)
    return None if replaced is None else replaced[1]


def _functions(name: str, module: nn.Module) -> Iterator[Callable[..., Any]]:
    """The `log_optimal_transport` that the module has or its methods call: one, or none."""
    attribute = getattr(module, NAME, None)
    if callable(attribute):
        yield attribute
        return
    found = {}
    for method in (x for cls in type(module).__mro__ for x in _methods(cls).values()):
        inner = inspect.unwrap(method)
        if not _calls(inner):
            continue
        if inner is not method:
            raise ValueError(
                f"{name or _ROOT}: {method.__qualname__} calls {NAME} within a decorator, which cannot be looked "
                "through; decorate the method that calls it instead."
            )
        function = method.__globals__[NAME]
        found[id(function)] = function
    yield from found.values()


def _methods(cls: type) -> dict[str, FunctionType]:
    """The functions that the class itself defines."""
    return {name: x for name, x in vars(cls).items() if isinstance(x, FunctionType)}


def _calls(function: Any) -> bool:
    def names(code: CodeType) -> Iterator[str]:
        yield from code.co_names
        for inner in code.co_consts:
            if isinstance(inner, CodeType):
                yield from names(inner)

    return isinstance(function, FunctionType) and NAME in function.__globals__ and NAME in names(function.__code__)


def _same(name: str, function: Callable[..., Any], options: tuple[tuple[str, Any], ...]) -> tuple[str, ...]:
    """The names of its three arguments, if it computes what SuperGlue does; a ValueError if not."""
    scores = torch.arange(24, dtype=torch.float64, device="cpu").reshape(2, 3, 4).cos()
    score, given = torch.tensor(0.5, dtype=torch.float64, device="cpu"), f"{name or _ROOT}: its {NAME}"
    try:
        names = tuple(inspect.signature(function).parameters)
        with torch.no_grad():
            found = function(scores, score, 3)
    except Exception as error:
        raise ValueError(
            f"{given} does not take (scores, bin_score, iterations) of shapes {tuple(scores.shape)} and (): {error}"
        ) from error
    engine = dict(options).get("engine")
    exact = (("engine", engine if engine in ("tiled", "reference") else None), ("gradient", "unrolled"))
    with torch.no_grad():
        truth = SuperGlueLoop(exact, ("scores", "score", "count"))(scores, score, 3)
    same = isinstance(found, Tensor) and found.shape == truth.shape and torch.allclose(found, truth, atol=1e-6)
    if len(names) != 3 or not same:
        raise ValueError(
            f"{given} computes something else than SuperGlue's: 2 x 3 x 4 scores do not give SuperGlue's log plan "
            f"of {tuple(truth.shape)} after three iterations."
        )
    return names


@cache
def _with(cls: Any, loop: SuperGlueLoop) -> type[nn.Module]:
    """A subclass of the same name whose methods find `loop` under the global name."""

    def reduce(self: Any, protocol: Any) -> Any:
        made, args, *rest = super(replaced, self).__reduce_ex__(max(2, protocol))
        return (_empty, (cls, loop), *rest) if made is copyreg.__newobj__ else (made, args, *rest)  # type: ignore[attr-defined]

    def derived(base: Any, bases: tuple[Any, ...], **more: Any) -> Any:
        same = {x: getattr(base, x) for x in ("__module__", "__qualname__", "__doc__")}
        methods = {name: _rebound(method, loop) for name, method in _methods(base).items() if _calls(method)}
        return type(base)(base.__name__, bases, same | methods | more)

    # Parents whose methods call it stand, derived, between their children and themselves: where super() finds them.
    calling = [x for x in cls.__mro__[1:] if any(map(_calls, _methods(x).values()))]
    bases = (cls, *(derived(parent, (parent,)) for parent in calling))
    replaced: type[nn.Module] = derived(cls, bases, **{_REPLACED: (cls, loop), "__reduce_ex__": reduce})
    return replaced


def _rebound(function: FunctionType, loop: SuperGlueLoop) -> FunctionType:
    # Without __name__, by which torch.compile would look its globals up in the module they were copied from.
    scope = {name: x for name, x in function.__globals__.items() if name != "__name__"} | {NAME: loop}
    bound = FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    bound.__kwdefaults__ = function.__kwdefaults__
    for name in ("__module__", "__qualname__", "__doc__", "__annotations__"):
        setattr(bound, name, getattr(function, name))
    bound.__dict__.update(function.__dict__)
    return bound


def _empty(cls: Any, loop: SuperGlueLoop) -> nn.Module:
    """What copies and pickles begin with."""
    made: nn.Module = object.__new__(_with(cls, loop))
    return made
