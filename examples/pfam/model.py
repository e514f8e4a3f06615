"""The aligner: residues in context, an optimal-transport attention between the two sequences, and a second look.

Both sequences go through the same network, so the model is symmetric in them but for the order of the half-steps.

1. Residue embeddings and convolutions give a token per residue.
2. First attention: scores are inner products of tokens plus a mild preference for small displacements; a learned
   dustbin score per residue. Its plan says what could align with what.
3. Second attention: each token reads what it was aligned with; where the first plan sends its neighbourhood becomes a
   position preference; evidence along diagonals of the first plan is added to the scores. Its plan is the alignment,
   or, in evaluation, the first plan of another round.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_sinkhorn_attn import Dustbin, sinkhorn_plan

from .baselines import blosum62
from .config import Config
from .layers import ContextBlock, DiagonalEvidence, Harmonics
from .pairs import ALPHABET
from .sampler import PADDING, Batch

_WAVELENGTHS = (6.0, 12.0, 24.0, 48.0, 96.0, 192.0, 384.0, 768.0)
_FRACTIONS = (2.0, 1.0, 0.5, 0.25)
_DILATIONS = (1, 1, 2, 4)
_REACH = 12


@dataclass(frozen=True)
class AttentionProblem:
    """The arguments of one attention, so that training, certificates and pictures solve the same problem."""

    query: Tensor
    key: Tensor
    attn_mask: Tensor | None
    options: dict[str, Any]

    def plan(self) -> Tensor:
        """[N, L+1, S+1], the dustbin last."""
        return sinkhorn_plan(self.query, self.key, self.attn_mask, **self.options)[:, 0]


@dataclass(frozen=True)
class Side:
    """One of the two sequences in the network: tokens [N, L, d], active [N, L, 1], positions [N, L], lengths [N]."""

    tokens: Tensor
    active: Tensor
    positions: Tensor
    lengths: Tensor

    def centres_on(self, other: Side) -> Tensor:
        """Where the scaled diagonal puts each residue on the other sequence, (i + 1/2) m/n - 1/2, [N, L]."""
        return (self.positions + 0.5) * (other.lengths / self.lengths)[:, None] - 0.5

    def fractions(self) -> Tensor:
        """(i + 1/2) / n, [N, L]."""
        return (self.positions + 0.5) / self.lengths[:, None]


class Aligner(nn.Module):
    """Maps a batch of pairs to the plans of the first and the last attention, [N, L+1, S+1], the dustbin last."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        dim = config.dim
        self.rounds = config.rounds
        self.options: dict[str, Any] = {"base_iters": config.base_iters, "tail_iters": config.tail_iters}
        if config.window is not None:
            self.options["window"] = (config.window, config.window)
        self.embedding = nn.Embedding(len(ALPHABET) + 1, dim, padding_idx=PADDING)
        self._initialise_embedding()
        self.context = nn.ModuleList(ContextBlock(dim, dilation, config.dropout) for dilation in _DILATIONS)
        self.first = AttentionHead(dim)
        self.displacement = Harmonics(_WAVELENGTHS, 0.3)
        self.fraction = Harmonics(_FRACTIONS, 0.3)
        self.read = nn.Linear(2 * dim + 2, dim)
        nn.init.normal_(self.read.weight, std=0.02)
        self.context_again = ContextBlock(dim, 1, config.dropout)
        self.second = AttentionHead(dim)
        self.landing = Harmonics(_WAVELENGTHS, 0.3)
        self.log_reach = nn.Parameter(torch.tensor(0.5))
        self.evidence = DiagonalEvidence(maps=3)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        solved = self.solve(batch)
        return solved[0][1], solved[-1][1]

    def solve(self, batch: Batch) -> list[tuple[AttentionProblem, Tensor]]:
        """The attentions in order, each with its plan [N, L+1, S+1]; each depends on the plan before it.

        The second attention is asked once in training, which is cheaper, and ``rounds`` times in evaluation, each time
        about the plan of the time before.
        """
        a = self._encode(batch.query, batch.query_lengths)
        b = self._encode(batch.key, batch.key_lengths)
        options = {**self.options, "query_lengths": batch.query_lengths, "key_lengths": batch.key_lengths}
        first = self._first(a, b, options)
        solved = [(first, first.plan())]
        for _ in range(1 if self.training else self.rounds):
            problem = self._second(a, b, first, solved[-1][1][:, :-1, :-1], options)
            solved.append((problem, problem.plan()))
        return solved

    def _first(self, a: Side, b: Side, options: dict[str, Any]) -> AttentionProblem:
        query, query_bin = self.first(a.tokens)
        key, key_bin = self.first(b.tokens)
        query = torch.cat([query, self.displacement(a.centres_on(b)), self.fraction(a.fractions())], dim=-1)
        key = torch.cat([key, self.displacement(b.positions), self.fraction(b.fractions())], dim=-1)
        return _problem(query, key, query_bin, key_bin, None, options)

    def _second(
        self, a: Side, b: Side, first: AttentionProblem, plan: Tensor, options: dict[str, Any]
    ) -> AttentionProblem:
        query, query_bin = self.second(self._reread(a, b, plan))
        key, key_bin = self.second(self._reread(b, a, plan.transpose(1, 2)))
        a_landing, b_landing = self._land(a, b, plan), self._land(b, a, plan.transpose(1, 2))
        query = torch.cat([query, self.landing(a_landing), self.landing(a.positions)], dim=-1)
        key = torch.cat([key, self.landing(b.positions), self.landing(b_landing)], dim=-1)
        dim = self.embedding.embedding_dim
        content = first.query[:, 0, :, :dim] @ first.key[:, 0, :, :dim].transpose(1, 2)
        conditional = plan * plan.sum(2, keepdim=True) / (plan.sum(1, keepdim=True) + 1e-6)
        active = (a.active @ b.active.transpose(1, 2))[:, None]
        mask = self.evidence(torch.stack([0.3 * content, 2 * plan, conditional], dim=1), active)
        return _problem(query, key, query_bin, key_bin, mask, options)

    def _encode(self, residues: Tensor, lengths: Tensor) -> Side:
        active = (residues != PADDING)[..., None].to(self.embedding.weight.dtype)
        tokens = self.embedding(residues) * active
        for block in self.context:
            tokens = block(tokens, active)
        positions = torch.arange(residues.shape[1], dtype=tokens.dtype, device=tokens.device)
        return Side(tokens, active, positions.expand(len(residues), -1), lengths)

    def _reread(self, side: Side, other: Side, plan: Tensor) -> Tensor:
        """Tokens after reading, through the plan [N, L, S], the tokens they were aligned with, [N, L, d]."""
        mass = plan.sum(dim=2, keepdim=True)
        sharpness = plan.square().sum(dim=2, keepdim=True)
        read = self.read(torch.cat([side.tokens, plan @ other.tokens, mass, sharpness], dim=-1))
        return self.context_again(side.tokens + read, side.active)

    def _land(self, side: Side, other: Side, plan: Tensor) -> Tensor:
        """Where the neighbourhood of each residue lands on the other sequence, [N, L].

        Displacements from the scaled diagonal, averaged over neighbours with weights that fall off with the distance
        and rise with the sharpness of the neighbour's row.
        """
        centre = side.centres_on(other)
        barycentre = (plan @ other.positions[..., None])[..., 0] / (plan.sum(dim=2) + 1e-6)
        weight = (plan.square().sum(dim=2) + 1e-4) * side.active[..., 0]
        offsets = torch.arange(-_REACH, _REACH + 1, dtype=plan.dtype, device=plan.device)
        kernel = torch.exp(-offsets.abs() / self.log_reach.exp())[None, None]
        total = F.conv1d(((barycentre - centre) * weight)[:, None], kernel, padding=_REACH)
        return centre + (total / (F.conv1d(weight[:, None], kernel, padding=_REACH) + 1e-6))[:, 0]

    @torch.no_grad()
    def _initialise_embedding(self) -> None:
        # Inner products of the embeddings start at BLOSUM62 (its positive part): what decades of aligned proteins
        # says about substitutions need not be learned again from ten families. Everything stays trainable.
        values, vectors = np.linalg.eigh(blosum62())
        root = torch.tensor(vectors * np.sqrt(np.maximum(values, 0.0)), dtype=torch.float32)
        if self.embedding.embedding_dim < root.shape[1]:
            raise ValueError(f"dim must be at least {root.shape[1]}, got {self.embedding.embedding_dim}")
        weight = self.embedding.weight
        weight.normal_(std=0.1)
        weight[: len(ALPHABET), : root.shape[1]] += 0.7 * root
        weight[PADDING] = 0.0


class AttentionHead(nn.Module):
    """Scaled projections [N, L, d], shared by both sequences, and a dustbin score per residue [N, L]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.project = nn.Linear(dim, dim, bias=False)
        self.dustbin = nn.Linear(dim, 1)
        nn.init.zeros_(self.dustbin.weight)
        nn.init.zeros_(self.dustbin.bias)
        self.log_scale = nn.Parameter(torch.tensor(0.0))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm(tokens)
        # d^(-1/4) on either side makes the scores' temperature 1/sqrt(d), as in any attention.
        return self.project(x) * (self.log_scale.exp() * x.shape[-1] ** -0.25), self.dustbin(x)[..., 0]


def _problem(
    query: Tensor, key: Tensor, query_bin: Tensor, key_bin: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> AttentionProblem:
    dustbin = Dustbin(query_bin[:, None], key_bin[:, None])
    return AttentionProblem(query[:, None], key[:, None], mask, {**options, "scale": 1.0, "dustbin": dustbin})
