"""From residues to what the attentions compare: embeddings, tokens in their context, and context profiles."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from .baselines import blosum62
from .encodings import Encodings
from .layers import ContextBlock
from .pairs import ALPHABET
from .profiles import KINDS, ContextProfile, log_odds
from .sampler import PADDING

_DILATIONS = (1, 1, 2, 4)
_START_MIX = (0.6, 2.8)
"""Weights of BLOSUM62, and of the log odds of profiles in nats, in the scores of pairs, before anything is learned."""


@dataclass(frozen=True)
class Side:
    """One of the two sequences: embeddings and tokens [N, L, d], what is compared of its profile, [N, L, 20], active
    [N, L, 1], positions [L], lengths [N]."""

    embedded: Tensor
    tokens: Tensor
    profile: Tensor | None
    active: Tensor
    positions: Tensor
    lengths: Tensor

    @property
    def everywhere(self) -> Tensor:
        """``positions`` in every pair, [N, L]."""
        return self.positions.expand(len(self.lengths), -1)

    def centres_on(self, other: Side) -> Tensor:
        """Where the scaled diagonal puts each residue on the other sequence, (i + 1/2) m/n - 1/2, [N, L]."""
        return (self.positions + 0.5) * (other.lengths / self.lengths)[:, None] - 0.5


class Encoder(nn.Module):
    """Maps residues [N, L] with lengths [N] to a ``Side``. With ``Encodings`` given, sequences are encoded once.

    Profiles foretell nothing until they are given weights: ``ContextProfile.start`` takes the shipped ones.

    Args:
        dim: width of the tokens.
        profiles: whether relatives' residues are foretold too, by ``ContextProfile``.
    """

    def __init__(self, dim: int, dropout: float, profiles: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(ALPHABET) + 1, dim, padding_idx=PADDING)
        self.metric: Tensor
        self.register_buffer("metric", torch.zeros(dim), persistent=False)
        self._initialise_embedding()
        self.context = nn.ModuleList(ContextBlock(dim, dilation, dropout) for dilation in _DILATIONS)
        self.profile: ContextProfile | None = None
        if profiles:
            self.profile = ContextProfile()
            self.expected = nn.Linear(KINDS, dim, bias=False)
            nn.init.zeros_(self.expected.weight)
            self.mix = nn.Parameter(torch.tensor(_START_MIX))

    def forward(self, residues: Tensor, lengths: Tensor, known: Encodings | None = None) -> Side:
        active = _active(residues, self.embedding.weight)
        encoded = known.tokens(residues, lengths, self._encoded, PADDING) if known else self._encoded(residues)
        dim = self.embedding.embedding_dim
        return Side(
            embedded=self.embedding(residues) * active,
            tokens=encoded[..., :dim],
            profile=encoded[..., dim:].detach() if self.profile is not None else None,
            active=active,
            positions=torch.arange(residues.shape[1], dtype=active.dtype, device=active.device),
            lengths=lengths.to(active.dtype),
        )

    def substitution(self, a: Side, b: Side) -> Tensor:
        """Scores of pairs of residues, [N, L, S], in half bits: products of embeddings, BLOSUM62 at the start; with
        profiles those and their log odds, in the mixture ``mix``."""
        products = (a.embedded * self.metric) @ b.embedded.transpose(1, 2)
        if a.profile is None or b.profile is None:
            return products
        return self.mix[0] * products + self.mix[1] * log_odds(a.profile, b.profile)

    def _encoded(self, residues: Tensor) -> Tensor:
        """Residues in their context, [N, L, d + 20]: tokens, and what is compared of profiles; or [N, L, d]."""
        active = _active(residues, self.embedding.weight)
        tokens = self.embedding(residues) * active
        profile = []
        if self.profile is not None:
            with torch.autocast(residues.device.type, enabled=False), torch.no_grad():
                log_profile = self.profile(residues)
                profile = [self.profile.compared(log_profile, residues)]
                told = (log_profile - self.profile.frequency.log()) * active
            tokens = tokens + self.expected(told)
        for block in self.context:
            tokens = block(tokens, active)
        return torch.cat([tokens.to(active.dtype), *profile], dim=2)

    @torch.no_grad()
    def _initialise_embedding(self) -> None:
        # Products of the embeddings start at BLOSUM62, exactly: what decades of aligned proteins say about
        # substitutions need not be learned again from few families. Its eigenvalues are of both signs, so the metric
        # is; dimensions of neither are for the tokens alone. All but the metric stays trainable.
        values, vectors = np.linalg.eigh(blosum62())
        root = torch.tensor(vectors * np.sqrt(np.abs(values)), dtype=torch.float32)
        if self.embedding.embedding_dim < root.shape[1]:
            raise ValueError(f"dim must be at least {root.shape[1]}, got {self.embedding.embedding_dim}")
        self.metric[: root.shape[1]] = torch.tensor(np.sign(values), dtype=torch.float32)
        weight = self.embedding.weight
        weight.normal_(std=0.1)
        weight[: len(ALPHABET), : root.shape[1]] = root
        weight[PADDING] = 0.0


def _active(residues: Tensor, like: Tensor) -> Tensor:
    """[N, L, 1]: 0 on padding."""
    return (residues != PADDING)[..., None].to(like.dtype)
