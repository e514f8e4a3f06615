"""The problems that are timed, and their results in float64."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_sinkhorn_attn import sinkhorn_attention

from .measure import leaves, step

DENSE_TRUTH = 2048**2  # score entries of a head up to which the float64 truth comes from the dense definition
UNROLLED_TRUTH = 25 * 1024**2  # entries times iterations up to which it is differentiated through every iteration


@dataclass(frozen=True)
class Case:
    """Self-attention of `batch` x `heads` sequences of `length` tokens, unit masses, scale 1/sqrt(width)."""

    batch: int
    heads: int
    length: int
    width: int = 64
    window: tuple[int, int] | None = None
    base_iters: int = 20
    tail_iters: int = 2
    dtype: str = "float32"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.heads, self.length, self.width

    @property
    def iterations(self) -> int:
        return self.base_iters + self.tail_iters

    @property
    def tokens(self) -> int:
        return self.batch * self.heads * self.length

    @property
    def entries(self) -> int:
        """Scores of the full support, which is what everything but the engines visits."""
        return self.tokens * self.length

    @property
    def support(self) -> str:
        return "full" if self.window is None else f"band {self.window[0]}"

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"{self.support}, {shape}, {self.dtype}, T = {self.base_iters}, R = {self.tail_iters}"

    def inputs(self) -> list[Tensor]:
        return leaves(self.shape, getattr(torch, self.dtype))


def attend(case: Case, inputs: Sequence[Tensor], engine: str, gradient: str = "tail") -> Tensor:
    """This package's attention of a case, on inputs that may be its own or others of any shape."""
    out = sinkhorn_attention(
        *inputs, engine=engine, gradient=gradient, window=case.window, base_iters=case.base_iters,
        tail_iters=case.tail_iters,
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out


def scores_of(query: Tensor, key: Tensor, window: tuple[int, int] | None) -> Tensor:
    """q k^T / sqrt(d), dense, -inf outside the window: what every function without a window of its own is given."""
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    return scores if window is None else scores.masked_fill(~band(query.shape[-2], window), -torch.inf)


def band(length: int, window: tuple[int, int]) -> Tensor:
    """True where key j is in the window of query i, `[length, length]`."""
    offset = torch.arange(length) - torch.arange(length)[:, None]
    return (offset >= -window[0]) & (offset <= window[1])


@functools.cache
def truth(case: Case, gradient: str) -> tuple[Tensor, Tensor | None]:
    """Output and query gradient of the first head, `[1, 1, L, E]` in float64, from the inputs as `case` rounds them;
    no gradient where it would take too much memory."""
    inputs = [x.detach()[:1, :1].double().requires_grad_() for x in case.inputs()]
    entries = case.length**2
    if gradient != "tail" and entries * case.iterations > UNROLLED_TRUTH:
        return truth(case, "tail")[0], None
    engine = "reference" if entries <= DENSE_TRUTH else "tiled"
    return step(inputs, lambda *x: attend(case, x, engine, gradient))
