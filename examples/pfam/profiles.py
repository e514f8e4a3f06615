"""Which residues relatives have at a place, foretold from one sequence alone: from its residue and its neighbours.

A substitution matrix knows the residue alone. What surrounds it tells a leucine inside the fold from one in a loop, and
a glycine that must be one: Biegert and Soeding, Sequence context-specific profiles for homology searching, PNAS 106
(2009) 3770. Here a network of one hidden layer foretells the profile. It is trained beforehand, on the profile HMMs of
many families (``profile_training``), and stays as it is while an aligner is trained.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from examples.common.files import replacing
from examples.common.text import clip, one_line

from .augment import BACKGROUND
from .identity import are_families
from .pairs import ALPHABET
from .sampler import PADDING

SHIPPED = Path(__file__).parent / "data" / "profiles.safetensors"
KINDS = len(ALPHABET) - 1
"""Kinds of residues, X not counted."""
REACH = 8
"""Neighbours to either side that are looked at."""
WINDOW = 2 * REACH + 1
WIDTH = 512
CODES = PADDING + 1
_ITSELF = 0.1
"""How much of a profile is the residue itself, where it is compared with another's."""
_FLOOR = 1e-3
"""Odds are not taken for less."""


class Taught(NamedTuple):
    """The shipped weights, and the ``identities`` of the families whose profile HMMs or alignments taught them."""

    weights: dict[str, Tensor]
    families: tuple[tuple[str, ...], ...]


class ContextProfile(nn.Module):
    """Residues [N, L], as codes of ``pairs.ALPHABET`` or padding, to log probabilities of their relatives', [N, L, 20].

    Beyond the ends of a sequence stands padding. The weights are buffers: part of an aligner, and not trained with it.
    They start at zero; ``start`` takes the shipped ones. How frequent residues are, and what a residue alone says,
    stand beside them.
    """

    window: Tensor
    hidden: Tensor
    weight: Tensor
    alone: Tensor
    frequency: Tensor
    itself: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("window", torch.zeros(WINDOW, CODES, WIDTH))
        self.register_buffer("hidden", torch.zeros(WIDTH))
        self.register_buffer("weight", torch.zeros(KINDS, WIDTH))
        self.register_buffer("alone", torch.zeros(CODES, KINDS))
        frequency = torch.tensor(BACKGROUND, dtype=torch.float32)
        itself = torch.cat([torch.eye(KINDS), frequency.expand(CODES - KINDS, -1)])
        self.register_buffer("frequency", frequency, persistent=False)
        self.register_buffer("itself", itself, persistent=False)

    def forward(self, residues: Tensor) -> Tensor:
        around = F.pad(residues.long(), (REACH, REACH), value=PADDING)
        seen = self.seen_by_sums(around) if residues.device.type == "cpu" else self.seen_by_convolution(around)
        return self._foretold(seen, residues.long())

    def seen_by_sums(self, around: Tensor) -> Tensor:
        """What the hidden layer is given, [N, L, WIDTH], of residues with ``REACH`` more to either side: sums of rows,
        less work than a convolution of zeros and ones, where there is a loop for them."""
        windows = around.unfold(1, WINDOW, 1) + torch.arange(WINDOW, device=around.device) * CODES
        found = F.embedding_bag(windows.flatten(0, 1), self.window.flatten(0, 1), mode="sum")
        return found.unflatten(0, windows.shape[:2])

    def seen_by_convolution(self, around: Tensor) -> Tensor:
        """What ``seen_by_sums`` gives, as one convolution."""
        ones = F.one_hot(around, CODES).to(self.window.dtype)
        return F.conv1d(ones.mT, self.window.permute(2, 1, 0)).mT

    def of_windows(self, windows: Tensor, dropout: float = 0.0) -> Tensor:
        """Log probabilities of the relatives of the residues in the middle of windows [N, WINDOW], [N, 20]."""
        return self._foretold(self.seen_by_sums(windows)[:, 0], windows[:, REACH], dropout)

    def compared(self, log_profile: Tensor, residues: Tensor) -> Tensor:
        """What products of two sequences' are odds: probabilities, of log profiles [N, L, 20] and, with a tenth of the
        weight, of the residues [N, L] themselves, over the square roots of how frequent residues are; zeros on
        padding."""
        mixed = (1 - _ITSELF) * log_profile.exp() + _ITSELF * F.embedding(residues.long(), self.itself)
        return mixed / self.frequency.sqrt() * (residues != PADDING)[..., None]

    def start(self) -> None:
        """Take the shipped weights."""
        for name, weight in shipped().weights.items():
            self.get_buffer(name).copy_(weight)

    def _foretold(self, seen: Tensor, residues: Tensor, dropout: float = 0.0) -> Tensor:
        hidden = F.dropout(F.gelu(seen + self.hidden), dropout, training=dropout > 0)
        return (hidden @ self.weight.T + F.embedding(residues, self.alone)).log_softmax(-1)


def log_odds(query: Tensor, key: Tensor) -> Tensor:
    """How much likelier a residue drawn from one profile is in the other than in any protein, in the mean:
    log sum_a p_a q_a / f_a in nats, [N, L, S], of what ``ContextProfile.compared`` made of two sequences, [N, L, 20]
    and [N, S, 20]; zeros on padding."""
    odds = query @ key.mT
    return torch.where(odds > 0, odds.clamp_min(_FLOOR).log(), 0.0)


def save_profiles(profile: ContextProfile, families: list[list[str]], path: Path) -> Path:
    """Write the weights in half precision, and the ``identities`` of the families that taught them.

    Raises:
        ValueError: a weight is not finite, or too large for half precision.
    """
    weights = {name: weight.detach().half().contiguous() for name, weight in profile.state_dict().items()}
    if not all(torch.isfinite(weight).all() for weight in weights.values()):
        raise ValueError("profiles with weights that are not finite in half precision cannot be written")
    with replacing(path) as file:
        file.write(save(weights, {"families": json.dumps(families)}))
    return path


@lru_cache(maxsize=1)
def shipped() -> Taught:
    """What ``SHIPPED`` holds.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is damaged, or of another version.
    """
    if not SHIPPED.is_file():
        raise FileNotFoundError(f"{SHIPPED}, the shipped context profiles, is missing; the command profiles makes one")
    try:
        with torch.device("cpu"), safe_open(SHIPPED, framework="pt") as file:
            families = json.loads(file.metadata()["families"])
            weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        expected = {name: weight.shape for name, weight in ContextProfile().state_dict().items()}
        if {name: weight.shape for name, weight in weights.items()} != expected:
            raise ValueError("its weights are of other names or sizes")
        if not all(torch.isfinite(weight).all() for weight in weights.values()):
            raise ValueError("some of its weights are not finite")
        if not are_families(families):
            raise ValueError("its families are not lists of names")
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{SHIPPED} is damaged, or of another version ({clip(one_line(error), 200)})") from error
    return Taught(weights, tuple(tuple(family) for family in families))
