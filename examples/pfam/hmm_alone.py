"""The pair HMM trained by itself, before the attentions that rest on it.

An attention costs twenty times what the recursion does. So the scores, and what residues in their contexts add to them,
are first learned from many more pairs than the whole aligner sees: ``--hmm-steps``.
"""

from __future__ import annotations

from torch import Tensor, nn

from .model import Aligner
from .sampler import Batch


class HmmAlone(nn.Module):
    """The parts of an aligner that the pair HMM's scores are made of; its parameters are the aligner's own.

    Maps a batch to the scores [N, L, S] and the log odds [N] of ``RunEvidence``.
    """

    def __init__(self, aligner: Aligner) -> None:
        super().__init__()
        runs = aligner.runs
        assert runs is not None
        # Each of them must take part: see ``Processes.share_gradients``.
        self.modules_used = nn.ModuleList([aligner.encoder, aligner.norm, runs.project])
        self.numbers_used = nn.ParameterList([runs.gain, runs.offset, runs.metric])
        self._aligner = (aligner,)  # in a tuple, so that the rest of it is no part of this

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self._aligner[0].trained_runs(batch)
