"""The aligner: padding, marginals, gradients, rounds."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from examples.pfam.baselines import blosum62
from examples.pfam.config import GAPS, KIN, Config
from examples.pfam.evaluate import align_pairs, unpad
from examples.pfam.layers import PairScore, diagonal_means
from examples.pfam.model import DOUBT, DOUBT_IN_TRAINING, Aligner
from examples.pfam.objective import training_loss
from examples.pfam.pair_hmm import mean_of, posterior
from examples.pfam.pairs import Pair, encode
from examples.pfam.runs import BEGINNINGS, MODES, RELATIVES, Runs
from examples.pfam.sampler import collate

TARGET = np.array([[0, 0], [1, 1], [4, 3]])
SHORT = Pair("F", ("a", "b"), encode("MKVLA"), encode("MKLA"), TARGET)
LONG = Pair("F", ("c", "d"), encode("MKVLAWWGHPDEACDEFGHIKL"), encode("MKVLAGHPDEACDEYGHIKLMNPQRST"), TARGET)


@pytest.fixture(scope="module", params=["affine", "single"])
def model(request: pytest.FixtureRequest) -> Aligner:
    torch.manual_seed(0)
    return Aligner(Config(dim=24, gaps=request.param))


def test_padding_changes_nothing(model: Aligner) -> None:
    alone = dict((pair.names, plan) for pair, plan in align_pairs(model, [SHORT, LONG], batch_size=1))
    for pair, plan in align_pairs(model, [SHORT, LONG], batch_size=2):
        assert plan.shape == (len(pair.query) + 1, len(pair.key) + 1)
        np.testing.assert_allclose(plan, alone[pair.names], atol=2e-4)


def test_plans_are_transport_plans(model: Aligner) -> None:
    model.eval()
    with torch.no_grad():
        plans = model(collate([SHORT, LONG]))
    for plan in plans[:2]:
        short = unpad(plan[0].double().numpy(), 5, 4)
        assert short.sum(axis=1) == pytest.approx([1, 1, 1, 1, 1, 4], abs=1e-4)
        assert short.sum(axis=0) == pytest.approx([1, 1, 1, 1, 5], abs=0.05)
        assert plan[0].sum().item() == pytest.approx(9, abs=1e-3)  # nothing on the padding


def test_the_second_attention_repeats_in_evaluation_only(model: Aligner) -> None:
    batch = collate([SHORT])
    assert len(model.train().solve(batch)) == 1 + Config().train_rounds
    solved = model.eval().solve(batch)
    assert len(solved) == 1 + Config().rounds
    assert torch.equal(model(batch)[1], solved[-1][1])


def test_every_parameter_learns() -> None:
    torch.manual_seed(0)
    model = Aligner(Config(dim=24)).train()
    with torch.no_grad():  # the start, where gains are zero and what they multiply learns nothing yet, is left behind
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.encoder.embedding.weight[-1] = 0
    training_loss(model(collate([SHORT, LONG])), [SHORT, LONG], 0.1).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert set(gradients) == {name for name, _ in model.named_parameters()}
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    assert not gradients["encoder.embedding.weight"][-1].any()  # padding is not a residue


def test_gaps_as_runs_are_judged_in_both_attentions() -> None:
    torch.manual_seed(0)
    model, batch = Aligner(Config(dim=24)).eval(), collate([LONG])
    with torch.no_grad():
        plans = [model(batch)]
        for judge in (model.first, model.second):  # the last five of the maps are what the pair HMM says
            judge.linear[-4] = 2.0
            plans.append(model(batch))
    first, last, *_ = zip(*plans, strict=True)
    assert not torch.allclose(first[0], first[1], atol=1e-2)
    assert torch.equal(first[1], first[2]) and not torch.allclose(last[1], last[2], atol=1e-2)


def test_absurd_pairs_are_doubted_in_evaluation_more_than_in_training() -> None:
    log_p = torch.tensor([0.0, -7.0, -9.0, -17.0, -60.0, -1e9])
    assert DOUBT(log_p).tolist() == [0.0, 0.0, 2.0, 10.0, 53.0, 53.0]
    torch.testing.assert_close(DOUBT_IN_TRAINING(log_p), torch.tensor([0.0, 0.0, 0.0, 0.6, 6.0, 6.0]))
    torch.manual_seed(0)
    model, length = Aligner(Config(dim=24, dropout=0.0)), 150
    residues = np.random.default_rng(0).integers(0, 20, length)
    batch = collate([Pair("F", ("a", "b"), residues, residues, np.stack([np.arange(length)] * 2, axis=1))])
    far = (torch.arange(length)[:, None] - torch.arange(length)).abs() > 50
    with torch.no_grad():
        mass = [model.train(training)(batch)[1][0, :-1, :-1][far].sum() for training in (False, True)]
    assert mass[0] < 0.01 * mass[1]


def test_residues_start_at_blosum62_exactly() -> None:
    torch.manual_seed(0)
    model = Aligner(Config(dim=64))
    weight = model.encoder.embedding.weight.detach()[:21].double()
    products = (weight * model.encoder.metric.double()) @ weight.T
    np.testing.assert_allclose(products.numpy(), blosum62(), atol=2e-5)
    assert weight[:, 21:].abs().min() > 0  # the other dimensions are for the tokens
    with pytest.raises(ValueError, match="dim must be at least 21"):
        Aligner(Config(dim=20))


def test_the_log_odds_learn_by_the_posterior() -> None:
    torch.manual_seed(0)
    runs, lengths = Runs(4, "two-piece", "mixed"), (torch.tensor([5, 3]), torch.tensor([4, 6]))
    with torch.no_grad():
        runs.metric.normal_()
    inputs = (4 * torch.randn(2, 5, 6), torch.randn(2, 5, 4), torch.randn(2, 6, 4))
    found = runs(*inputs, lengths, "auto")
    (gradient,) = torch.autograd.grad(found.log_odds.sum(), found.scores)
    step = 1e-4
    for at in ((0, 1, 1), (1, 2, 5), (1, 0, 0)):
        moved = found.scores.detach().double()
        moved[at] += step
        here, costs = found.scores.double(), BEGINNINGS["two-piece"].costs
        above, below = (posterior(x, *lengths, costs).log_odds.sum() for x in (moved, here))
        assert float(gradient[at]) == pytest.approx(float(above - below) / step, abs=2e-3)


def test_what_changes_no_score_is_not_learned() -> None:
    torch.manual_seed(0)
    runs, lengths = Runs(4, "affine", "one"), (torch.tensor([30, 22]), torch.tensor([25, 31]))
    substitution = (4 * torch.randn(2, 30, 31)).requires_grad_()
    tokens = torch.randn(2, 30, 4), torch.randn(2, 31, 4)
    scores, log_odds = runs.trained(substitution, *tokens, lengths, "auto")
    more, more_odds = runs.trained(substitution + 7.0, *tokens, lengths, "auto")
    for k, (n, m) in enumerate(zip(*(sizes.tolist() for sizes in lengths), strict=True)):
        torch.testing.assert_close(more[k, :n, :m], scores[k, :n, :m], atol=1e-4, rtol=0)
    torch.testing.assert_close(more_odds, log_odds, atol=1e-3, rtol=1e-4)
    for learned in (log_odds.sum(), scores[0, 3, 4] + scores[1, 5, 6]):  # else a constant grows without end
        (gradient,) = torch.autograd.grad(learned, substitution, retain_graph=True)
        assert gradient.abs().sum() > 0.1
        torch.testing.assert_close(gradient.sum((1, 2)), torch.zeros(2), atol=1e-4, rtol=0)


def test_gaps_and_kin_are_those_of_the_settings() -> None:
    assert {*BEGINNINGS, "single"} == set(GAPS)
    assert set(RELATIVES) == set(KIN) and all(kinds[0] == RELATIVES["one"][0] for kinds in RELATIVES.values())


@pytest.mark.parametrize("kin", KIN)
def test_each_of_the_relatives_has_its_say(kin: str) -> None:
    torch.manual_seed(0)
    runs, lengths = Runs(4, "affine", kin), (torch.tensor([30, 22]), torch.tensor([25, 31]))
    inputs = (4 * torch.randn(2, 30, 31), torch.randn(2, 30, 4), torch.randn(2, 31, 4))
    found = runs(*inputs, lengths, "auto")
    scores, log_odds = runs.trained(*inputs, lengths, "auto")
    assert torch.equal(scores, found.scores) and torch.equal(log_odds, found.log_odds)
    said = [runs._posterior(scores, lengths, "auto", one) for one in RELATIVES[kin]]
    paired = mean_of(said).log_pairs.exp()
    torch.testing.assert_close(found.posterior.log_pairs.exp(), paired, atol=1e-5, rtol=1e-4)
    assert all((one.log_pairs.exp() - paired).abs().max() > 0.01 for one in said[1:])
    # What is known of the ends is known to all of them.
    for mode, free in (("global", 0.0), ("local", 1.0)):
        ends = runs(*inputs, lengths, mode).posterior.ends
        torch.testing.assert_close(ends[:, :, 2], torch.full((2, 2), free))


@pytest.mark.parametrize(("one", "other"), [("A", "A"), ("Q", "Q"), ("W", "W"), ("E", "D")])
def test_one_residue_over_and_over_is_no_relation(one: str, other: str) -> None:
    torch.manual_seed(0)
    pair = Pair("F", ("a", "b"), encode(150 * one)[:150], encode(120 * other)[:120], np.zeros((0, 2), dtype=np.int64))
    with torch.no_grad():
        _, log_odds = Aligner(Config()).eval().trained_runs(collate([pair]))
    assert float(log_odds) < 4  # every alignment weighs as much as chance; against BLOSUM62's frequencies, above 100


def test_the_mode_says_what_ends_are_of() -> None:
    rng = np.random.default_rng(3)
    part, others = rng.integers(0, 20, 60), rng.integers(0, 20, (4, 40))
    query, key = (np.concatenate([others[k], part, others[k + 1]]) for k in (0, 2))
    torch.manual_seed(0)
    model, batch = Aligner(Config(dim=24)).eval(), collate([Pair("F", ("a", "b"), query, key, TARGET)])
    odds = {}
    with torch.no_grad():
        for mode in MODES:
            model.mode = mode
            odds[mode] = float(model(batch).log_odds)
    assert odds["local"] > odds["auto"] > 50 > 0 > odds["global"] - odds["local"]


def by_definition(maps: torch.Tensor, width: int) -> torch.Tensor:
    """Every entry as the sum that ``diagonal_means`` stands for."""
    length, size = maps.shape[2:]
    reach = width - 1
    found = torch.zeros_like(maps)
    for i, j, k in itertools.product(range(length), range(size), range(-reach, reach + 1)):
        if 0 <= i + k < length and 0 <= j + k < size:
            found[:, :, i, j] += (width - abs(k)) / width**2 * maps[:, :, i + k, j + k]
    return found


def test_diagonal_means_are_what_they_say() -> None:
    maps = torch.randn(2, 3, 9, 7, dtype=torch.float64)
    expected = torch.cat([by_definition(maps, width) for width in (3, 5, 31)], dim=1)
    torch.testing.assert_close(diagonal_means(maps, (3, 5, 31)), expected)
    small = torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: diagonal_means(x, (3, 5)), small)


def test_pair_scores_do_not_depend_on_how_maps_are_grouped() -> None:
    score = PairScore(5, 4, (0.5, -1.0))
    torch.nn.init.normal_(score.score)
    maps = torch.randn(2, 5, 3, 6)
    torch.testing.assert_close(score(maps[:, :2], maps[:, 2:]), score(maps))
    with pytest.raises(RuntimeError):
        score(maps[:, :3])
