"""Rules of shapes that torch's function and JAX's share, with the words for what breaks them."""

from __future__ import annotations

import math
from typing import Any

from torch_sinkhorn_attn.arrays import Array, namespace


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


def score_mask(mask: Array, shape: Shape, dtypes: tuple[Any, ...]) -> Array:
    """A mask that broadcasts to the scores' `shape` as a 4-D one that broadcasts to [N, H, L, S]; copied only if it
    broadcasts over some of several batch dimensions but not all."""
    if mask.dtype not in dtypes:
        raise TypeError(
            f"attn_mask has dtype {mask.dtype}; use bool (True = keep) or a float mask added to the scores."
        )
    if not broadcasts(mask.shape, shape):
        raise ValueError(f"attn_mask has shape {tuple(mask.shape)}, which does not broadcast to {shape}.")
    mask = mask.reshape(*(1,) * (len(shape) - mask.ndim), *mask.shape)
    batch, own = shape[:-3], mask.shape[-3:]
    if math.prod(mask.shape[:-3]) == 1:
        return mask.reshape(1, *own)
    return namespace(mask).broadcast_to(mask, (*batch, *own)).reshape(math.prod(batch), *own)


def not_positions(name: str, shape: Shape, found: Any) -> str:
    """What a TypeError says of places on an axis of tokens."""
    return (
        f"{name} must hold float32, float64 or integers, broadcasting to {tuple(shape)}, got {found}. (Shorter floats "
        "cannot tell the tokens of a long sequence apart.)"
    )


def potential_pair(given: Any) -> list[tuple[str, Any]]:
    """The two of `initial_potentials`, with their names."""
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        raise TypeError(
            f"initial_potentials must be a pair (row, column) as in SinkhornAux, got {type(given).__name__}."
        )
    pair = [(f"initial_potentials ({side})", x) for side, x in zip(("row", "column"), given)]
    for name, x in pair:
        if x is None:
            raise TypeError(f"{name} is None; pass both potentials, or initial_potentials=None.")
    return pair
