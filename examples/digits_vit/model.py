"""A vision transformer of pre-norm blocks; the class of its attention is an argument, and all that changes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from torch_sinkhorn_attn import SinkhornMultiheadAttention

from .data import CLASSES, GRID, PATCH, to_patches
from .settings import Settings

Attention = Callable[..., nn.MultiheadAttention]
SOFTMAX, SINKHORN, DUSTBIN = "softmax", "Sinkhorn", "Sinkhorn, dustbin"

_DIM, _HEADS, _DEPTH = 48, 4, 2
_MEAN, _DEVIATION = 0.30, 0.38  # of the training pixels


def attentions(settings: Settings) -> dict[str, Attention]:
    """What is compared: a name, and what makes the attention of a block."""
    sinkhorn = partial(SinkhornMultiheadAttention, epsilon=settings.epsilon, base_iters=settings.base_iters)
    compared: dict[str, Attention] = {SOFTMAX: nn.MultiheadAttention, SINKHORN: sinkhorn}
    if settings.dustbin:
        compared[DUSTBIN] = partial(sinkhorn, dustbin=True)
    return compared


class Block(nn.Module):
    """Pre-norm block: tokens [N, L, dim] to tokens [N, L, dim]."""

    def __init__(self, dim: int, heads: int, attention: Attention) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(dim)
        self.attention = attention(dim, heads, batch_first=True)
        self.norm_perceptron = nn.LayerNorm(dim)
        self.perceptron = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor, need_weights: bool = False) -> tuple[Tensor, Tensor | None]:
        """The tokens, and the weights [N, heads, L, L] if wanted."""
        y = self.norm_attention(x)
        mixed, weights = self.attention(y, y, y, need_weights=need_weights, average_attn_weights=False)
        x = x + mixed
        return x + self.perceptron(self.norm_perceptron(x)), weights


class VisionTransformer(nn.Module):
    """Images [N, 8, 8] to class scores [N, 10], read off a class token: token 0, before the 16 patches."""

    def __init__(self, attention: Attention, dim: int = _DIM, heads: int = _HEADS, depth: int = _DEPTH) -> None:
        super().__init__()
        self.embed = nn.Linear(PATCH * PATCH, dim)
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = nn.Parameter(0.5 * torch.randn(1 + GRID * GRID, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, attention) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self._tokens(images)
        for block in self.blocks:
            x, _ = block(x)
        scores: Tensor = self.head(self.norm(x[:, 0]))
        return scores

    def attention_weights(self, images: Tensor) -> Tensor:
        """The weights of every block, [depth, N, heads, 17, 17]: query by key, the class token first."""
        x, weights = self._tokens(images), []
        for block in self.blocks:
            x, of_block = block(x, need_weights=True)
            weights.append(of_block)
        return torch.stack(weights)

    def _tokens(self, images: Tensor) -> Tensor:
        patches = self.embed((to_patches(images) - _MEAN) / _DEVIATION)
        return torch.cat([self.class_token.expand(len(images), -1, -1), patches], 1) + self.positions


def build(attention: Attention, seed: int) -> VisionTransformer:
    """A fresh model; one seed gives one set of initial weights, whichever attention it is (a dustbin starts at 0)."""
    torch.manual_seed(seed)
    return VisionTransformer(attention)
