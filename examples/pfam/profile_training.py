"""The network of ``profiles``, trained on profile HMMs and on alignments.

A profile HMM of Pfam says which residues a family has in each of its columns. Sequences drawn from it, residue by
residue, are what the network is shown, and the column in the middle is what it has to foretell. So a few thousand HMMs
teach what hundreds of thousands of aligned sequences would. A share of the windows are of real sequences of alignments,
whose neighbours are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from tqdm import trange

from .augment import BACKGROUND, substitution_cdf
from .pairs import ALPHABET, Family
from .profile_hmms import ProfileHmm
from .profiles import CODES, KINDS, REACH, WINDOW, ContextProfile
from .sampler import PADDING

FloatArray = npt.NDArray[np.floating]
IntArray = npt.NDArray[np.int64]

_UNKNOWN = ALPHABET.index("X")
_SHARPNESS = 2.5
"""Residues are drawn from the odds of a column to this power: HMMER blurs columns until a family's mean information is
0.6 bits a place, and what is drawn from them as they are is harder to recognise than any relative."""
_ENDS = 0.4
"""How often what lies beyond a family's columns is beyond the sequence's ends too; else there are any residues."""
_SHIFTED = 0.2
"""How often the neighbours to a side are, from some on, those of up to ``_LONGEST`` columns further away, as after a
deletion, or nearer, so that some columns are seen twice."""
_LONGEST = 3
_BATCH, _RATE, _DECAY, _DROPOUT = 1024, 2e-3, 0.01, 0.4
_ALIGNED = 0.2
"""Share of the windows that are of alignments."""
_AVERAGED = 0.99
"""Of the moving average of the weights, which is what is kept: how much of it stays at a step."""
_NOTHING_ALIGNED = "no family has two sequences with residues in one column"


class HmmWindows:
    """Windows of sequences drawn from profile HMMs, and the columns in their middles.

    Families weigh by the square roots of their lengths.
    """

    def __init__(self, hmms: Sequence[ProfileHmm]) -> None:
        between = np.tile(BACKGROUND / BACKGROUND.sum(), (REACH + _LONGEST * 2, 1))
        places = [part for hmm in hmms for part in (between, hmm.columns)] + [between]
        weights = [
            part for hmm in hmms for part in (len(between) * [0.0], len(hmm.columns) * [len(hmm.columns) ** -0.5])
        ]
        self.columns = np.concatenate(places)
        weight = np.concatenate([*weights, np.zeros(len(between))])
        self.inside = weight > 0
        self._places = np.cumsum(weight / weight.sum())
        sharp = (self.columns / BACKGROUND) ** _SHARPNESS * BACKGROUND
        self._residues = np.cumsum(sharp / sharp.sum(axis=1, keepdims=True), axis=1)

    def draw(self, count: int, rng: np.random.Generator) -> tuple[IntArray, FloatArray]:
        """Windows [count, WINDOW] and probabilities [count, 20]."""
        middle = np.minimum(np.searchsorted(self._places, rng.random(count)), len(self.columns) - 1)
        offsets = np.tile(np.arange(-REACH, REACH + 1), (count, 1))
        for side in (-1, 1):
            start = rng.integers(1, REACH + 1, (count, 1))
            run = rng.integers(1, _LONGEST + 1, (count, 1)) * rng.choice([-1, 1], (count, 1))
            shifted = (rng.random((count, 1)) < _SHIFTED) & (offsets * side >= start)
            offsets = offsets + shifted * run
        places = (middle[:, None] + offsets).clip(0, len(self.columns) - 1)
        drawn = (rng.random((count, WINDOW, 1)) > self._residues[places]).sum(axis=2).clip(max=KINDS - 1)
        beyond = ~self.inside[places] & (rng.random((count, 1)) < _ENDS)
        return np.where(beyond, PADDING, drawn), self.columns[middle]


class AlignedWindows:
    """Windows of the sequences of alignments, and what the others have in their middles' columns.

    Sequences weigh by how rare their residues are (Henikoff and Henikoff, J. Mol. Biol. 243 (1994) 574); families
    alike, or less where there is little in them.
    """

    _PLENTY = 5000
    """Residues from which on a family weighs in full."""

    def __init__(self, families: Sequence[Family]) -> None:
        parts = [part for family in families if (part := _aligned(family)) is not None]
        if not parts:
            raise ValueError(_NOTHING_ALIGNED)
        self.windows = np.concatenate([windows for windows, _, _ in parts])
        self.columns = np.concatenate([columns for _, columns, _ in parts])
        shares = [min(1.0, len(share) / self._PLENTY) ** 0.5 * share / share.sum() for _, _, share in parts]
        weight = np.concatenate(shares)
        self._places = np.cumsum(weight / weight.sum())

    def draw(self, count: int, rng: np.random.Generator) -> tuple[IntArray, FloatArray]:
        """Windows [count, WINDOW] and probabilities [count, 20]."""
        at = np.minimum(np.searchsorted(self._places, rng.random(count)), len(self.windows) - 1)
        return self.windows[at], self.columns[at]


def _aligned(family: Family) -> tuple[IntArray, FloatArray, FloatArray] | None:
    """Windows, columns without the sequence itself, and weights, of a family's matched residues; None if there are
    none that others have a residue beside."""
    sequences = [sequence for sequence in family.sequences if len(sequence)]
    width = max((int(sequence.columns.max()) + 1 for sequence in sequences), default=0)
    table = np.full((len(sequences), width), -1)
    counted = [sequence.matched & (sequence.residues < KINDS) for sequence in sequences]
    for row, (sequence, known) in enumerate(zip(sequences, counted, strict=True)):
        table[row, sequence.columns[known]] = sequence.residues[known]
    counts = np.stack([(table == kind).sum(axis=0) for kind in range(KINDS)], axis=1)
    each = 1 / np.maximum(counts * (counts > 0).sum(axis=1)[:, None], 1)
    rarity = np.array([each[row >= 0, row[row >= 0]].sum() for row in table])
    weight = rarity / np.maximum((table >= 0).sum(axis=1), 1)
    if not weight.sum() > 0:
        return None
    weight /= weight.sum()
    columns = np.stack([weight @ (table == kind) for kind in range(KINDS)], axis=1)
    windows, others, weights = [], [], []
    for sequence, known, own in zip(sequences, counted, weight, strict=True):
        rest = columns[sequence.columns[known]]
        rest[np.arange(len(rest)), sequence.residues[known]] -= own
        share = rest.clip(min=0).sum(axis=1)
        some = share > 1e-9
        windows.append(windows_of(sequence.residues)[known][some])
        others.append(rest[some].clip(min=0) / share[some, None])
        weights.append(own * np.minimum(share[some] / max(1 - own, 1e-9), 1.0))
    found = np.concatenate(windows), np.concatenate(others), np.concatenate(weights)
    return found if len(found[0]) else None


def windows_of(residues: npt.NDArray[np.integer]) -> IntArray:
    """[n, WINDOW], one around each residue."""
    around = np.full(len(residues) + 2 * REACH, PADDING, dtype=np.int64)
    around[REACH : REACH + len(residues)] = np.minimum(residues, _UNKNOWN)
    return np.lib.stride_tricks.sliding_window_view(around, WINDOW)


def cross_entropy(profile: ContextProfile, families: Sequence[Family]) -> float:
    """Nats that a relative's residue takes, told the profile: the mean over a family's matched residues, and over the
    families."""
    found = []
    for family in families:
        if (part := _aligned(family)) is None:
            continue
        windows, columns, weights = part
        with torch.no_grad():
            told = torch.cat([profile.of_windows(some) for some in torch.from_numpy(windows).split(20_000)]).numpy()
        found.append(float(np.average(-(columns * told).sum(axis=1), weights=weights)))
    if not found:
        raise ValueError(_NOTHING_ALIGNED)
    return float(np.mean(found))


def train_profile(
    hmms: Sequence[ProfileHmm], families: Sequence[Family], steps: int, seed: int, progress: bool = False
) -> ContextProfile:
    """A network that foretells columns; the same arguments give the same weights on the same machine.

    Args:
        families: alignments, a fifth of what it is shown; none: HMMs alone.
    """
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    drawn = HmmWindows(hmms)
    aligned = AlignedWindows(families) if families else None
    of_aligned = int(_ALIGNED * _BATCH) if aligned else 0
    profile = beginning()
    weights = [weight.requires_grad_() for weight in (profile.window, profile.weight)]
    biases = [bias.requires_grad_() for bias in (profile.hidden, profile.alone)]
    groups = [{"params": weights, "weight_decay": _DECAY}, {"params": biases, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=_RATE)
    average = {name: tensor.detach().clone() for name, tensor in profile.state_dict().items()}
    for step in trange(steps, desc="profiles", disable=not progress):
        for group in optimizer.param_groups:
            group["lr"] = _RATE * min(1.0, (step + 1) / 50) * (0.03 + 0.485 * (1 + math.cos(math.pi * step / steps)))
        parts = [drawn.draw(_BATCH - of_aligned, rng)]
        if aligned:
            parts.append(aligned.draw(of_aligned, rng))
        windows, columns = (torch.from_numpy(np.concatenate(side)) for side in zip(*parts, strict=True))
        loss = -(columns.float() * profile.of_windows(windows, _DROPOUT)).sum(dim=1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for name, tensor in profile.state_dict().items():
            average[name].lerp_(tensor.detach(), 1 - _AVERAGED)
    found = ContextProfile()
    found.load_state_dict(average)
    return found


def beginning() -> ContextProfile:
    """What BLOSUM62 says of a residue; of its neighbours nothing that counts yet."""
    profile = ContextProfile()
    profile.window.normal_(std=0.1)
    known = np.diff(substitution_cdf(), axis=1, prepend=0.0)
    alone = np.concatenate([known, np.tile(BACKGROUND, (CODES - KINDS, 1))])
    profile.alone.copy_(torch.from_numpy(np.log(alone)))
    return profile
