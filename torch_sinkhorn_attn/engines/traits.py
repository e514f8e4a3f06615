"""What an engine says of the devices whose tensors are its own. The generic code asks `engines.traits_of(device)`, and
names no engine that is bound to another library."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

from torch import Tensor


def _directly(function: Callable[..., Any], args: Sequence[Any]) -> Any:
    return function(*args)


def _unplaced(x: Tensor, source: Tensor) -> Tensor:
    return x


def _as_it_is(tree: Any) -> Any:
    return tree


@dataclass(frozen=True)
class Traits:
    """Traits of a device, and what its engine does to tensors there; the defaults are those of a plain eager device.

    Attributes:
        device: the type of `torch.device`; None for an engine that has no device of its own.
        compiles: every new computation is compiled there, so what data hold must not decide what is computed, and
            loops in Python are unrolled.
        wrappers: packages of the subclasses of Tensor that stand for plain tensors there.
        call: run the body of an op, `call(function, args)`, on its tensors.
        placed: x `[N, H, L, E]`, made from the user's `source`, lying on the devices that source lies on.
        fetched: a tuple, NamedTuple or dataclass with tensors that may be looked at without compiling for it.
    """

    device: str | None = None
    compiles: bool = False
    wrappers: tuple[str, ...] = ()
    call: Callable[[Callable[..., Any], Sequence[Any]], Any] = _directly
    placed: Callable[[Tensor, Tensor], Tensor] = _unplaced
    fetched: Callable[[Any], Any] = _as_it_is


PLAIN = Traits()


def each_tensor(tree: Any, function: Callable[[Tensor], Any]) -> Any:
    """A tuple, NamedTuple or dataclass with `function` of each tensor in its place."""
    if isinstance(tree, Tensor):
        return function(tree)
    if is_dataclass(tree) and not isinstance(tree, type):
        return replace(tree, **{name: each_tensor(x, function) for name, x in vars(tree).items()})
    if isinstance(tree, tuple):
        parts = [each_tensor(x, function) for x in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    return tree
