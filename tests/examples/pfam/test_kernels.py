"""Compiled loops against their definitions in tensors, and evidence in parts against evidence at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from examples.pfam import layers, model as aligner, pair_hmm, parts
from examples.pfam.config import Config
from examples.pfam.evaluate import align_pairs
from examples.pfam.kernels import MOST
from examples.pfam.layers import ContextBlock, PairScore, diagonal_means
from examples.pfam.model import Aligner
from examples.pfam.pair_hmm import Costs, posterior
from examples.pfam.pairs import Pair


@pytest.mark.parametrize("ends", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.4, 0.3, 0.3)])
@pytest.mark.parametrize(("length", "size"), [(5, 4), (66, 130), (20, 700)])
def test_the_compiled_sweep_is_the_pair_hmm_s(
    monkeypatch: pytest.MonkeyPatch, ends: tuple[float, float, float], length: int, size: int
) -> None:
    scores = torch.randn(3, length, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1.5 - 0.4
    n, m = torch.tensor([length, length // 2 + 1, 1]), torch.tensor([size, size, size // 2])
    costs = Costs(5.2, 0.8, 0.1, ends, long_opening=7.5, long_extension=0.02)
    compiled = posterior(scores, n, m, costs)
    monkeypatch.setattr(pair_hmm, "MOST", -1e30)  # no scores are so low, so the sweep is the one in tensors
    expected = posterior(scores, n, m, costs)
    for name in ("log_pairs", "log_odds", "ends", "query_flank", "key_flank"):
        torch.testing.assert_close(getattr(compiled, name), getattr(expected, name), atol=1e-9, rtol=1e-9, msg=name)


def test_what_is_e_to_the_minus_2000_of_its_row_is_still_there() -> None:
    """A short domain at the end of a protein of thousands of residues, aligned from end to end."""
    scores = torch.full((1, 30, 6000), -1.0)
    scores[0, torch.arange(30), torch.arange(5970, 6000)] = 4.0
    costs = Costs(5.2, 0.35)
    found = posterior(scores, torch.tensor([30]), torch.tensor([6000]), costs).log_pairs[0]
    assert found[torch.arange(5, 30), torch.arange(5975, 6000)].exp().min() > 0.99


def test_scores_that_no_block_could_hold_take_the_definition() -> None:
    scores = torch.zeros(1, 40, 40)
    scores[0].fill_diagonal_(10 * MOST)
    found = posterior(scores, torch.tensor([40]), torch.tensor([40]), Costs(5.2, 0.35)).log_pairs[0]
    torch.testing.assert_close(found.diagonal(), torch.zeros(40), atol=1e-3, rtol=0)


@pytest.mark.parametrize(("length", "size"), [(9, 7), (3, 40), (50, 4)])
def test_compiled_averages_are_those_of_running_sums(length: int, size: int) -> None:
    maps, widths = torch.randn(2, 3, length, size, dtype=torch.float64), (3, 5, 31)
    columns = layers._diagonals(maps)
    expected = torch.cat([layers._from_diagonals(layers._twice(columns, width), size) for width in widths], dim=1)
    torch.testing.assert_close(diagonal_means(maps, widths), expected)


def test_entries_in_parts_are_entries_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "_PART", 7)
    score = PairScore(5, 4, (0.5, -1.0))
    nn.init.normal_(score.score)
    maps, where = torch.randn(2, 5, 3, 6), torch.rand(2, 3, 6) > 0.4
    expected = score(maps[:, :2], maps[:, 2:]).detach()
    with torch.no_grad():
        torch.testing.assert_close(score(maps[:, :2], maps[:, 2:]), expected)
        chosen = score(maps[:, :2], maps[:, 2:], where=where, otherwise=-9.0)
    torch.testing.assert_close(chosen, expected.masked_fill(~where, -9.0))
    torch.testing.assert_close(score(maps, where=where, otherwise=-9.0).detach(), chosen)


@pytest.mark.parametrize("dilation", [1, 4])
def test_shifted_copies_are_the_convolution(dilation: int) -> None:
    block, x = ContextBlock(8, dilation, 0.0).eval(), torch.randn(2, 11, 8)
    active = (torch.arange(11) < torch.tensor([[11], [6]]))[..., None].float()
    expected = block(x * active, active).detach()
    with torch.no_grad():
        torch.testing.assert_close(block(x * active, active), expected)


def related(length: int, seed: int) -> Pair:
    rng = np.random.default_rng(seed)
    query = rng.integers(0, 20, length)
    key = np.where(rng.random(length) < 0.5, query, rng.integers(0, 20, length))
    key = np.concatenate([key[: length // 2], rng.integers(0, 20, 12), key[length // 2 :]])
    return Pair("F", (f"a{seed}", "b"), query, key, np.zeros((0, 2), dtype=np.int64))


def test_a_few_rows_at_a_time_and_possible_pairs_alone_make_the_same_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Aligner(Config(dim=24))
    for weights in (model.first.score, model.second.score, model.runs.metric):  # which start at zero
        nn.init.normal_(weights, std=0.1)
    pairs = [related(70, 0), related(90, 1)]

    def plans() -> list[np.ndarray]:
        return [plan for _, plan in align_pairs(model, pairs, 2)]

    usual = plans()
    monkeypatch.setattr(parts, "CELLS", 2 * 102 * 20)
    in_rows = plans()
    monkeypatch.setattr(aligner, "_WORTH", -1e30)
    everywhere = plans()
    for a, b, c in zip(usual, in_rows, everywhere, strict=True):
        np.testing.assert_allclose(a[:-1], b[:-1], atol=1e-5)
        np.testing.assert_allclose(a[:-1], c[:-1], atol=1e-5)
