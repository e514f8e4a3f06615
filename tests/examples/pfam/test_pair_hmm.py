"""The posterior of alignments with affine gap costs, against every alignment written out."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from examples.pfam.augment import BACKGROUND
from examples.pfam.baselines import GLOBAL_GAP, HALF_BIT, blosum62, needleman_wunsch
from examples.pfam.pair_hmm import Costs, Posterior, log_posterior, mean_of, of_chance, posterior
from examples.pfam.pairs import encode


def by_enumeration(scores: Tensor, opening: float, extension: float) -> Tensor:
    """The probability of each pair of [n, m] scores: every alignment's weight, added up."""
    n, m = scores.shape
    found, total = torch.zeros(n, m, dtype=torch.float64), 0.0
    # Position, the last column, log weight, pairs so far.
    waiting: list[tuple[int, int, str, float, list[tuple[int, int]]]] = [(0, 0, "", 0.0, [])]
    while waiting:
        i, j, last, weight, pairs = waiting.pop()
        if (i, j) == (n, m):
            total += math.exp(weight)
            for pair in pairs:
                found[pair] += math.exp(weight)
        if i < n and j < m:
            waiting.append((i + 1, j + 1, "pair", weight + float(scores[i, j]), [*pairs, (i, j)]))
        if i < n:
            waiting.append((i + 1, j, "query", weight - (extension if last == "query" else opening), pairs))
        if j < m:
            waiting.append((i, j + 1, "key", weight - (extension if last == "key" else opening), pairs))
    return found / total


def with_free_ends(scores: Tensor, costs: Costs) -> Posterior:
    """Every alignment of [n, m] scores with every kind of its two ends, written out and added up."""
    n, m = scores.shape
    pairs, ends = torch.zeros(n, m, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64)
    flanks, total = (torch.zeros(n, dtype=torch.float64), torch.zeros(m, dtype=torch.float64)), 0.0
    places = (1, n + m - 1, n * m)
    once = [
        prior * (costs.stop**0.5 if kind == 2 else 1.0) / places[kind] ** 0.5 for kind, prior in enumerate(costs.ends)
    ]

    def possible(kind: int, at: tuple[int, int], last: tuple[int, int]) -> bool:
        return kind == 2 or (kind == 1 and (at[0] == last[0] or at[1] == last[1]))

    def count(path: list[tuple[int, int]], weight: float, kinds: tuple[int, int]) -> None:
        nonlocal total
        total += weight
        for at in path:
            pairs[at] += weight
        for end, kind in enumerate(kinds):
            ends[end, kind] += weight
            for side, flank in enumerate(flanks):
                if kind > 0 and end == 0:
                    flank[: path[0][side]] += weight
                elif kind > 0:
                    flank[path[-1][side] + 1 :] += weight

    def grow(i: int, j: int, last: str, weight: float, path: list[tuple[int, int]], begun: int) -> None:
        """What is aligned up to i and j, exclusive; beyond a free end nothing stands but pairs."""
        if (i, j) == (n, m):
            count(path, weight * once[0], (begun, 0))
        if last == "pair":
            for kind in (1, 2):
                if possible(kind, path[-1], (n - 1, m - 1)):
                    count(path, weight * once[kind], (begun, kind))
        if i < n and j < m:
            grow(i + 1, j + 1, "pair", weight * math.exp(scores[i, j] - costs.pair), [*path, (i, j)], begun)
        for length, (opening, extension) in zip(("short", "long"), costs.gaps, strict=True):
            for side, (down, right) in (("query", (1, 0)), ("key", (0, 1))):
                before_is_same = last.split() == [length, side]
                if (last.endswith(side) and not before_is_same) or i + down > n or j + right > m:
                    continue
                cost = extension if before_is_same else opening
                grow(i + down, j + right, f"{length} {side}", weight * math.exp(-cost), path, begun)

    grow(0, 0, "", once[0], [], 0)
    for i in range(n):
        for j in range(m):
            for kind in (1, 2):
                if possible(kind, (i, j), (0, 0)):
                    grow(i + 1, j + 1, "pair", once[kind] * math.exp(scores[i, j] - costs.pair), [(i, j)], kind)
    log_odds = torch.tensor(total, dtype=torch.float64).log()
    return Posterior((pairs / total).log(), log_odds, ends / total, *(flank / total for flank in flanks))


FREE = Costs(1.5, 0.4, 0.2, (0.5, 0.2, 0.3), 0.1)
LONG = replace(FREE, long_opening=2.0, long_extension=0.1)


@pytest.mark.parametrize(
    "costs", [FREE, LONG, Costs(0.3, 0.3, -0.1, (0.0, 1.0, 0.0)), Costs(2.0, 0.1, 0.5, (0.0, 0.0, 1.0), 1.0)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_free_ends_are_the_sum_over_every_alignment_and_every_kind_of_end(costs: Costs, dtype: torch.dtype) -> None:
    scores = 2 * torch.randn(4, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    n, m = torch.tensor([3, 2, 1, 3]), torch.tensor([4, 4, 2, 1])
    for batch, sizes in ((scores, (n, m)), (scores.mT, (m, n))):
        found = posterior(batch.to(dtype), *sizes, costs)
        atol, rtol = (1e-5, 1e-5) if dtype == torch.float32 else (1e-12, 1e-9)
        for index, (rows, columns) in enumerate(zip(*(size.tolist() for size in sizes), strict=True)):
            expected = with_free_ends(batch[index, :rows, :columns], costs)
            shown = (
                (found.log_pairs[index, :rows, :columns].exp(), expected.log_pairs.exp()),
                (found.log_odds[index], expected.log_odds),
                (found.ends[index], expected.ends),
                (found.query_flank[index, :rows], expected.query_flank),
                (found.key_flank[index, :columns], expected.key_flank),
            )
            for ours, truth in shown:
                torch.testing.assert_close(ours.double(), truth, atol=atol, rtol=rtol)
            assert not found.query_flank[index, rows:].any() and not found.key_flank[index, columns:].any()


@pytest.mark.parametrize("costs", [(1.5, 0.4), (0.3, 0.3), (4.0, 0.0)])
def test_it_is_the_sum_over_every_alignment(costs: tuple[float, float]) -> None:
    scores = torch.randn(4, 5, 4, generator=torch.Generator().manual_seed(0))
    n, m = torch.tensor([5, 3, 1, 5]), torch.tensor([4, 4, 2, 1])
    found = log_posterior(scores, n, m, *costs)
    for index in range(4):
        active = (index, slice(int(n[index])), slice(int(m[index])))
        expected = by_enumeration(scores[active], *costs)
        torch.testing.assert_close(found[active].exp().double(), expected, atol=1e-6, rtol=1e-5)
        assert (found[index, int(n[index]) :] < -1e8).all() and (found[index, :, int(m[index]) :] < -1e8).all()


def test_the_order_of_the_sequences_and_their_direction_do_not_matter() -> None:
    scores = torch.randn(1, 40, 33, generator=torch.Generator().manual_seed(1))
    n, m = torch.tensor([40]), torch.tensor([33])
    found = log_posterior(scores, n, m, 3.0, 0.5)
    torch.testing.assert_close(log_posterior(scores.mT, m, n, 3.0, 0.5), found.mT, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(log_posterior(scores.flip(1, 2), n, m, 3.0, 0.5), found.flip(1, 2), atol=1e-4, rtol=1e-4)


def test_sharp_scores_give_the_needleman_wunsch_alignment() -> None:
    rng = np.random.default_rng(0)
    query = rng.integers(0, 20, 120)
    key = np.concatenate([query[:30], rng.integers(0, 20, 70), query[30:]])  # one insertion of seventy residues
    scores = torch.tensor(HALF_BIT * blosum62()[np.ix_(query, key)])[None].float()
    costs = (HALF_BIT * cost for cost in GLOBAL_GAP)
    found = log_posterior(scores, torch.tensor([120]), torch.tensor([190]), *costs)[0].exp()
    expected = needleman_wunsch(query, key)
    assert len(expected) == 120
    assert found[expected[:, 0], expected[:, 1]].mean() > 0.97
    assert float(found.sum(dim=1).max()) <= 1 + 1e-4 and float(found.sum(dim=0).max()) <= 1 + 1e-4


def test_one_long_insertion_beside_weak_scores_is_one_where_gaps_may_be_long() -> None:
    """Of a domain whose middle has ninety residues more in one sequence; where they begin is told by what is likely."""
    rng = np.random.default_rng(5)
    query = rng.integers(0, 20, 120)
    noisy = np.where(rng.random(120) < 0.7, rng.integers(0, 20, 120), query)
    key = np.concatenate([noisy[:60], rng.integers(0, 20, 90), noisy[60:]])
    scores = torch.tensor(0.25 * blosum62()[np.ix_(query, key)])[None]
    at = torch.arange(120)
    right = at + 90 * (at >= 60)
    short = Costs(5.4, 0.9)
    of_short, of_long = (
        posterior(scores, torch.tensor([120]), torch.tensor([210]), costs).log_pairs[0, at, right].exp().mean()
        for costs in (short, replace(short, long_opening=7.9, long_extension=0.057))
    )
    assert of_long > 0.8 > 0.65 > of_short


def test_thousands_of_residues_stay_finite() -> None:
    residues = encode("MKVLAWWGHPDEACDEFGHIKLMNPQRSTVWY" * 40)
    scores = torch.tensor(HALF_BIT * blosum62()[np.ix_(residues, residues[:900])])[None].float()
    found = log_posterior(scores, torch.tensor([len(residues)]), torch.tensor([900]), 5.2, 0.35)
    assert torch.isfinite(found).all() and float(found.max()) <= 0.0
    assert float(found.exp().sum()) == pytest.approx(900, rel=0.01)


def test_a_part_that_is_shared_is_found_wherever_it_stands() -> None:
    rng = np.random.default_rng(1)
    part, before, after, other = (rng.integers(0, 20, length) for length in (80, 90, 70, 60))
    costs = Costs(5.2, 0.35, 0.05, (0.4, 0.3, 0.3))
    kinds = {
        "local": (np.concatenate([before, part, after]), np.concatenate([other, part, other])),
        "overlap": (np.concatenate([before, part]), np.concatenate([part, after])),
        "global": (part, part),
    }
    for kind, (query, key) in kinds.items():
        scores = torch.tensor(HALF_BIT * blosum62()[np.ix_(query, key)])[None]
        found = posterior(scores, torch.tensor([len(query)]), torch.tensor([len(key)]), costs)
        windows = (np.lib.stride_tricks.sliding_window_view(side, 80) for side in (query, key))
        at = [int((window == part).all(1).argmax()) for window in windows]
        true = found.log_pairs[0, at[0] : at[0] + 80, at[1] : at[1] + 80].diagonal().exp()
        assert true[3:-3].min() > 0.95, kind
        assert found.ends[0, :, ("global", "overlap", "local").index(kind)].min() > 0.5
        assert found.query_flank[0, at[0] + 3 : at[0] + 77].max() < 0.05
        if at[0]:
            assert found.query_flank[0, : at[0] - 5].mean() > 0.8
        assert found.log_odds > 50


def test_single_precision_is_within_its_bound() -> None:
    rng = np.random.default_rng(4)
    query, key = rng.integers(0, 20, 420), rng.integers(0, 20, 380)
    key[60:300] = query[100:340]
    scores = torch.tensor(HALF_BIT * blosum62()[np.ix_(query, key)])[None]
    sizes = torch.tensor([420]), torch.tensor([380])
    costs = Costs(5.2, 0.35, 0.05, (0.4, 0.3, 0.3))
    exact, found = posterior(scores, *sizes, costs), posterior(scores.float(), *sizes, costs)
    likely = exact.log_pairs > -5
    assert float((found.log_pairs.double() - exact.log_pairs)[likely].abs().max()) < 0.002
    assert float(found.log_odds.double() - exact.log_odds) == pytest.approx(0, abs=0.002)
    torch.testing.assert_close(found.query_flank.double(), exact.query_flank, atol=1e-3, rtol=0)


def test_sequences_that_share_nothing_have_odds_below_one() -> None:
    rng = np.random.default_rng(2)
    background = np.array(BACKGROUND) / BACKGROUND.sum()
    costs = Costs(5.2, 0.35, 0.05, (0.4, 0.3, 0.3))
    odds = []
    for n, m in ((60, 200), (150, 150), (300, 250)):
        scores = torch.tensor(HALF_BIT * blosum62())[rng.choice(20, n, p=background)][
            :, rng.choice(20, m, p=background)
        ]
        odds.append(float(posterior(scores[None], torch.tensor([n]), torch.tensor([m]), costs).log_odds))
    assert max(odds) < 0


def test_the_odds_of_chance_are_those_of_the_pairs_that_there_are() -> None:
    torch.manual_seed(0)
    scores = 3 * torch.randn(3, 6, 5)
    n, m = torch.tensor([6, 2, 1]), torch.tensor([5, 3, 1])
    found = of_chance(scores, n, m)
    for k, (rows, columns) in enumerate(zip(n.tolist(), m.tolist(), strict=True)):
        expected = scores[k, :rows, :columns].double().exp().mean().log()
        assert float(found[k]) == pytest.approx(float(expected), abs=1e-5)
    torch.testing.assert_close(of_chance(scores + 40.0, n, m), found + 40.0)
    torch.testing.assert_close(of_chance(scores - found[:, None, None], n, m), torch.zeros(3), atol=1e-5, rtol=0)


def test_the_mean_of_several_is_that_of_their_probabilities() -> None:
    torch.manual_seed(1)
    scores, n, m = torch.randn(2, 7, 9), torch.tensor([7, 4]), torch.tensor([6, 9])
    said = [posterior(sharp * scores, n, m, Costs(3.0, 0.4, ends=(0.5, 0.2, 0.3))) for sharp in (0.5, 1.0, 2.5)]
    said[1], said[2] = (replace(said[k], log_odds=said[0].log_odds + more) for k, more in ((1, 5.0), (2, 0.0)))
    found = mean_of(said)
    expected = torch.stack([one.log_pairs.exp() for one in said]).mean(0)
    torch.testing.assert_close(found.log_pairs.exp(), expected)
    assert torch.isfinite(found.log_pairs).all() and (found.log_pairs[1, 4:] < -1e8).all()
    assert found.log_odds is said[0].log_odds
    torch.testing.assert_close(found.ends.sum(2), torch.ones(2, 2))
    torch.testing.assert_close(found.key_flank, (said[0].key_flank + said[1].key_flank + said[2].key_flank) / 3)
    assert torch.equal(mean_of(said[:1]).log_pairs, said[0].log_pairs)


def test_one_that_finds_no_alignment_has_no_say_where_it_would_be() -> None:
    torch.manual_seed(2)
    scores, n, m = torch.randn(1, 7, 9), torch.tensor([7]), torch.tensor([9])
    first, other = (posterior(x, n, m, Costs(3.0, 0.4, ends=(0.5, 0.2, 0.3))) for x in (scores, scores.flip(2)))
    shares = []
    for less in (0.0, -3.0, -60.0, -1e6):
        found = mean_of([first, replace(other, log_odds=first.log_odds + less)])
        moved = found.log_pairs.exp() - first.log_pairs.exp()
        shares.append(float(moved.norm() / (other.log_pairs.exp() - first.log_pairs.exp()).norm()))
        assert torch.isfinite(found.log_pairs).all()
    assert shares[0] == pytest.approx(0.5, abs=1e-4) and 0 < shares[1] < 0.3 and max(shares[2:]) < 1e-6


def test_priors_must_be_probabilities() -> None:
    with pytest.raises(ValueError, match="ends must be three probabilities of global, overlap, local"):
        Costs(1.0, 0.1, ends=(0.5, 0.5, 0.5))
    with pytest.raises(ValueError, match="stop must be a probability above 0, got 0"):
        Costs(1.0, 0.1, stop=0)
