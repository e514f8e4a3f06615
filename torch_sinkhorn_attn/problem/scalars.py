"""Checks of one argument at a time that torch's function and JAX's share: each returns the argument in canonical form
or raises a TypeError or ValueError that names it, its value and the way out. Numbers are Python's here: what is no
number of theirs, the callers refuse before."""

from __future__ import annotations

import math
import operator
from typing import Any

WIDEST_WINDOW = 1 << 24  # wider sides mean the same, and the window's integers stay far from overflow


def number(name: str, x: Any) -> float:
    try:
        value = float(x) if not isinstance(x, (bool, str)) else None
    except (TypeError, ValueError):
        value = None
    if value is None:
        raise TypeError(f"{name} must be a number, got {x!r}.")
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name}={value} must be finite.")
    return value


def positive(name: str, x: Any) -> float:
    value = number(name, x)
    if value <= 0:
        raise ValueError(f"{name}={value} must be positive.")
    return value


def count(name: str, x: Any) -> int:
    try:
        value = operator.index(x) if not isinstance(x, bool) else None
    except TypeError:
        value = None
    if value is None:
        raise TypeError(f"{name} must be an integer, got {x!r}.")
    if value < 0:
        raise ValueError(f"{name}={value} must be 0 or more.")
    return value


def window_sides(name: str, window: Any) -> tuple[int, int]:
    try:
        sides = [operator.index(x) for x in window if not isinstance(x, bool)]
    except TypeError:
        sides = []
    if len(sides) != 2 or len(window) != 2:
        raise TypeError(f"{name} must be a pair of integers (left, right), got {window!r}; -1 lifts a side.")
    if min(sides) < -1:
        raise ValueError(f"{name}={tuple(sides)} must have sides of 0 or more, or -1 for unlimited.")
    return min(sides[0], WIDEST_WINDOW), min(sides[1], WIDEST_WINDOW)


def broadcasts(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    if len(shape) > len(target):
        return False
    # A list and a plain zip: torch.compile traces neither a generator nor `strict` here.
    return all([x in (1, y) for x, y in zip(shape[::-1], target[::-1])])


Shape = tuple[int, ...]


def token_shapes(query: Shape, key: Shape, value: Shape | None, enable_gqa: bool) -> None:
    """ValueError unless `(..., H, L, E)`, `(..., Hk, S, E)` and `(..., Hk, S, Ev)` belong together."""
    given = {"query": query, "key": key} | ({} if value is None else {"value": value})
    for name, shape in given.items():
        if len(shape) < 3:
            raise ValueError(f"{name} has shape {shape}; (..., heads, tokens, features) is needed: use {name}[None].")
        if shape[:-3] != query[:-3]:
            raise ValueError(f"{name} has batch shape {shape[:-3]} but query has {query[:-3]}; expand them to one.")
    if query[-1] == 0:
        raise ValueError(f"query has shape {query}: at least one feature is needed.")
    if key[-1] != query[-1]:
        raise ValueError(f"key has {key[-1]} features but query has {query[-1]}; they must agree.")
    if value is not None and value[-3:-1] != key[-3:-1]:
        raise ValueError(f"value has (heads, tokens) {value[-3:-1]} but key has {key[-3:-1]}; they must agree.")
    heads, key_heads = query[-3], key[-3]
    if heads == 0:
        raise ValueError(f"query has shape {query}: at least one head is needed.")
    if heads != key_heads and not enable_gqa:
        raise ValueError(f"query has {heads} heads but key has {key_heads}; pass enable_gqa=True for grouped queries.")
    if key_heads == 0 or heads % key_heads:
        raise ValueError(f"enable_gqa needs query heads ({heads}) to be a multiple of key heads ({key_heads}).")
