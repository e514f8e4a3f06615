"""What a tensor handed to an op must be, in words: presence, shape, dtype and device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def check_present(**given: Tensor | None) -> None:
    """A schema's `Tensor` takes None all the same, from Python."""
    for name, x in given.items():
        if x is None:
            raise ValueError(f"{name} is missing.")


def check_mask(mask: Tensor | None, shape: tuple[int, ...], device: torch.device) -> None:
    if mask is None:
        return
    if mask.dtype not in (torch.bool, *FLOATS):
        raise TypeError(f"mask is {described(mask)}; bool, float32, float64, float16 or bfloat16 is needed.")
    if mask.device != device or mask.ndim != 4 or not all(x in (1, y) for x, y in zip(mask.shape, shape, strict=True)):
        raise ValueError(
            f"mask is {described(mask)}; four dimensions that broadcast to {list(shape)}, on {device}, are needed."
        )


def described(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"


def refuse(name: str, x: Tensor, dtype: torch.dtype, shape: Sequence[int], device: torch.device) -> None:
    needed = f"{str(dtype).removeprefix('torch.')}{list(shape)}"
    places = "" if x.device == device else f" on {x.device}", "" if x.device == device else f" on {device}"
    raise ValueError(f"{name} is {described(x)}{places[0]}; {needed}{places[1]} is needed.")
