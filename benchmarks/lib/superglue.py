"""SuperGlue's optimal transport as its paper describes it: the plain loop in the log domain, for autograd."""

from __future__ import annotations

import torch
from torch import Tensor


def log_optimal_transport(scores: Tensor, bin_score: Tensor, iterations: int) -> Tensor:
    """The log plan `(B, M + 1, N + 1)` of scores `(B, M, N)`, rows of mass 1, dustbins last.

    The scores are bordered by the one learned score, corner included. Rows and columns of keypoints have mass
    1 / (M + N), the dustbins N / (M + N) and M / (M + N); rows are scaled first, columns last, and the result is
    multiplied by M + N. Written here from Sarlin et al., SuperGlue, CVPR 2020, section 3.2.
    """
    batch, m, n = scores.shape
    bins = bin_score.reshape(1, 1, 1)
    right, below = bins.expand(batch, m, 1), bins.expand(batch, 1, n + 1)
    couplings = torch.cat([torch.cat([scores, right], 2), below], 1)
    norm = -scores.new_tensor(m + n).log()
    log_mu = torch.cat([norm.expand(m), (scores.new_tensor(n).log() + norm)[None]])
    log_nu = torch.cat([norm.expand(n), (scores.new_tensor(m).log() + norm)[None]])
    v = couplings.new_zeros(batch, n + 1)
    for _ in range(iterations):
        u = log_mu - (couplings + v[:, None, :]).logsumexp(2)
        v = log_nu - (couplings + u[:, :, None]).logsumexp(1)
    return couplings + u[:, :, None] + v[:, None, :] - norm
