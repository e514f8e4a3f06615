"""Plans that need no learning: Sinkhorn, and a pair hidden Markov model, on BLOSUM62 alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.ndimage import gaussian_filter1d

from torch_sinkhorn_attn import Dustbin, sinkhorn_plan

from .baselines import GLOBAL_GAP, HALF_BIT, blosum62
from .pair_hmm import Costs, posterior
from .pairs import Pair

FloatArray = npt.NDArray[np.floating]


@dataclass(frozen=True)
class FixedScores:
    """Scores of a pair of residues that depend on the two sequences alone, and the plan of least entropic cost.

    The position's weight and the dustbin's score are the best of a few on Pfam families other than the evaluation's.

    Args:
        reach: standard deviation, in residues, of the Gaussian that averages BLOSUM62 along diagonals. What lies beyond
            the sequences' ends counts as 0, so scores fade there: better than averaging over what is inside.
        position: what a residue loses at the far end of the other sequence: the score falls by ``position`` times the
            squared difference of the relative positions, (i + 1/2) / n and (j + 1/2) / m.
        dustbin: score of leaving a residue unmatched. This and the scores are in BLOSUM62's half bits.
        epsilon: entropic regularisation, in the same unit.
        iterations: Sinkhorn iterations.
    """

    reach: float = 12.0
    position: float = 80.0
    dustbin: float = -1.5
    epsilon: float = 0.25
    iterations: int = 100

    def scores(self, pair: Pair) -> FloatArray:
        """[n, m], in half bits."""
        n, m = len(pair.query), len(pair.key)
        rows, cols = np.arange(n)[:, None], np.arange(m)[None, :]
        # Row i moved to the right by n - 1 - i: diagonals become columns.
        skewed = np.zeros((n, n + m - 1))
        at = (rows, cols - rows + n - 1)
        skewed[at] = blosum62()[np.ix_(pair.query, pair.key)]
        averaged = gaussian_filter1d(skewed, self.reach, axis=0, mode="constant")
        return averaged[at] - self.position * ((rows + 0.5) / n - (cols + 0.5) / m) ** 2

    def plan(self, pair: Pair) -> FloatArray:
        """[n+1, m+1], the dustbin last."""
        # The scores enter as a mask, which epsilon does not divide; the dustbin's are divided.
        mask = torch.from_numpy(self.scores(pair) / self.epsilon)[None]
        query, key = (torch.zeros(1, length, 1, dtype=mask.dtype) for length in mask.shape[1:])
        plan = sinkhorn_plan(
            query,
            key,
            mask,
            epsilon=self.epsilon,
            dustbin=Dustbin(self.dustbin, self.dustbin),
            base_iters=self.iterations,
            tail_iters=0,
        )
        return plan[0].numpy()


def pair_hmm_plan(pair: Pair, costs: Costs | None = None, unit: float = HALF_BIT) -> FloatArray:
    """[n+1, m+1], the dustbin last: how probable each pair is if alignments are as probable as their scores say.

    Scores and gap costs are those of ``needleman_wunsch``, taken for log odds, and alignments are global, unless
    ``costs`` are given; ``unit`` is what a half bit counts, in nats. The dustbin has what a residue lacks.
    """
    scores = torch.from_numpy(unit * blosum62()[np.ix_(pair.query, pair.key)])[None]
    n, m = (torch.tensor([length]) for length in scores.shape[1:])
    costs = costs or Costs(HALF_BIT * GLOBAL_GAP[0], HALF_BIT * GLOBAL_GAP[1])
    real = posterior(scores, n, m, costs).log_pairs[0].exp().numpy()
    plan = np.pad(real, (0, 1))
    plan[:-1, -1], plan[-1, :-1] = (np.maximum(1 - real.sum(axis=axis), 0.0) for axis in (1, 0))
    return plan
