"""Components of a masked support, joined from those that each rank finds of its rows, without any process."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from torch_sinkhorn_attn.distributed.agreement import _blocks_of_keys
from torch_sinkhorn_attn.distributed.parts import _joined
from torch_sinkhorn_attn.problem.arguments import prepare
from torch_sinkhorn_attn.problem.feasibility.parts import masked_components, pair_labels


@pytest.mark.parametrize("seed", range(4))
def test_they_are_those_of_the_whole(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    length, size, cuts = 14, 11, (0, 3, 3, 9, 14)
    blocks = torch.randint(0, 4, (2, length, 1), generator=g) == torch.randint(0, 4, (2, 1, size), generator=g)
    mask = (blocks & (torch.rand(2, length, size, generator=g) < 0.5))[None]
    query, key = torch.zeros(1, 2, length, 1), torch.zeros(1, 2, size, 1)
    whole = prepare(query, key, None, mask, check_data=False)
    expected = masked_components(whole.inputs, whole.problem).col
    own = []
    for start, end in pairwise(cuts):
        support = replace(
            whole.problem.support, row_lo=whole.problem.support.row_lo[:, start:end],
            row_hi=whole.problem.support.row_hi[:, start:end],
        )  # fmt: skip
        masses = replace(whole.problem.marginals, log_row_mass=whole.problem.marginals.log_row_mass[..., start:end])
        problem = replace(whole.problem, support=support, marginals=masses)
        own.append(pair_labels(whole.inputs._replace(mask=mask[..., start:end, :]), problem)[1])
    found = _joined(torch.stack(own))
    met = mask.any(-2)
    for h in range(2):
        same = [(x[0, h, met[0, h]][:, None] == x[0, h, met[0, h]]) for x in (found, expected)]
        assert torch.equal(*same) and met[0, h].sum() > 3


def test_keys_without_a_value_are_split_as_told_or_evenly() -> None:
    assert _blocks_of_keys([[1, 1, 1], [4, 0, 3]], 7, 3) == [4, 0, 3]
    assert _blocks_of_keys([[1, 1, 1]], 7, 3) == [x.numel() for x in torch.arange(7).tensor_split(3)]
    assert _blocks_of_keys([[-1, -1, -1]], 7, 3) == [3, 2, 2]
