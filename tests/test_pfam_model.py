"""The aligner: padding, marginals, gradients, rounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from examples.pfam.baselines import blosum62
from examples.pfam.config import Config
from examples.pfam.evaluate import align_pairs, unpad
from examples.pfam.layers import Harmonics
from examples.pfam.model import Aligner
from examples.pfam.objective import training_loss
from examples.pfam.pairs import Pair, encode
from examples.pfam.sampler import collate

TARGET = np.array([[0, 0], [1, 1], [4, 3]])
SHORT = Pair("F", ("a", "b"), encode("MKVLA"), encode("MKLA"), TARGET)
LONG = Pair("F", ("c", "d"), encode("MKVLAWWGHPDEACDEFGHIKL"), encode("MKVLAGHPDEACDEYGHIKLMNPQRST"), TARGET)


@pytest.fixture(scope="module")
def model() -> Aligner:
    torch.manual_seed(0)
    return Aligner(Config(dim=24))


def test_padding_changes_nothing(model: Aligner) -> None:
    alone = dict((pair.names, plan) for pair, plan in align_pairs(model, [SHORT, LONG], batch_size=1))
    for pair, plan in align_pairs(model, [SHORT, LONG], batch_size=2):
        assert plan.shape == (len(pair.query) + 1, len(pair.key) + 1)
        np.testing.assert_allclose(plan, alone[pair.names], atol=2e-4)


def test_plans_are_transport_plans(model: Aligner) -> None:
    model.eval()
    with torch.no_grad():
        plans = model(collate([SHORT, LONG]))
    for plan in plans:
        short = unpad(plan[0].double().numpy(), 5, 4)
        assert short.sum(axis=1) == pytest.approx([1, 1, 1, 1, 1, 4], abs=1e-4)
        assert short.sum(axis=0) == pytest.approx([1, 1, 1, 1, 5], abs=0.05)
        assert plan[0].sum().item() == pytest.approx(9, abs=1e-3)  # nothing on the padding


def test_the_second_attention_repeats_in_evaluation_only(model: Aligner) -> None:
    batch = collate([SHORT])
    assert len(model.train().solve(batch)) == 2
    solved = model.eval().solve(batch)
    assert len(solved) == 1 + Config().rounds
    assert torch.equal(model(batch)[1], solved[-1][1])


def test_every_parameter_learns(model: Aligner) -> None:
    model.train().zero_grad()
    training_loss(model(collate([SHORT, LONG])), [SHORT, LONG], 0.1).backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert not model.embedding.weight.grad[-1].any()  # padding is not a residue


def test_embeddings_start_at_blosum62() -> None:
    torch.manual_seed(0)
    weight = Aligner(Config(dim=64)).embedding.weight.detach()[:20].double().numpy()
    inner, published = (weight @ weight.T)[np.triu_indices(20)], blosum62()[:20, :20][np.triu_indices(20)]
    assert np.corrcoef(inner, published)[0, 1] > 0.9
    with pytest.raises(ValueError, match="dim must be at least 21"):
        Aligner(Config(dim=20))


def test_harmonics_depend_on_the_distance_alone() -> None:
    features = Harmonics((8.0, 32.0), 0.5)(torch.tensor([[0.0, 3.0, 10.0, 13.0]]))[0]
    products = (features @ features.T).detach()
    assert products[0, 1].item() == pytest.approx(products[2, 3].item(), abs=1e-5)
    assert products[0, 0].item() == pytest.approx(1.0, abs=1e-5)
    expected = 0.5 * (np.cos(2 * np.pi * 3 / 8) + np.cos(2 * np.pi * 3 / 32))
    assert products[0, 1].item() == pytest.approx(expected, abs=1e-5)
