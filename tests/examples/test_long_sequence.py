"""The example over processes: its losses are those of one process, and it learns."""

from __future__ import annotations

import pytest
import torch

from examples.long_sequence import training
from examples.long_sequence.genome import genome, masked


def test_the_genome_is_made_by_its_seed() -> None:
    assert torch.equal(genome(500, seed=1), genome(500, seed=1)) and not torch.equal(genome(500, 1), genome(500, 2))
    given, hidden = masked(genome(500, seed=1), seed=0)
    assert bool((given[hidden] == 4).all()) and 0 < hidden.sum() < 150


@pytest.mark.slow
def test_two_processes_train_as_one() -> None:
    one = training.train(192, 32, torch.device("cpu"), None)
    two = training.spread(2, 192, 32)
    assert two == pytest.approx(one, rel=1e-5)
    assert sum(one[-8:]) < sum(one[:8])
