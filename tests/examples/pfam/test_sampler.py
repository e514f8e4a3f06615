"""Batches: a function of seed and step, of like lengths, cut into parts and shares, no pair lost, drawn by workers."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from examples.pfam.config import TRAIN_SAMPLE
from examples.pfam.loader import drawn_ahead
from examples.pfam.pairs import Family, Pair, family_from_alignment, load_families
from examples.pfam.sampler import PairSampler, collate, padding
from examples.pfam.stockholm import Alignment, read_stockholm


@pytest.fixture(scope="module")
def shipped() -> list[Family]:
    return load_families(read_stockholm(TRAIN_SAMPLE))


def sampler_of(families: list[Family], *, cells: int = 10**6, cap: int = 120, **options: int) -> PairSampler:
    options = {"seed": 0, **options}
    return PairSampler(families, size=5, cells=cells, cap=cap, mutation_rate=0.3, indels=1.0, **options)


def content(pairs: Sequence[Pair]) -> list[tuple[object, ...]]:
    return [(*pair.names, pair.query.tobytes(), pair.key.tobytes(), pair.target.tobytes()) for pair in pairs]


def test_batches_are_a_function_of_seed_and_step(shipped: list[Family]) -> None:
    def batch(seed: int, step: int) -> torch.Tensor:
        return sampler_of(shipped, seed=seed).batch(step).query

    sampler = sampler_of(shipped)
    for step in (0, 100, 40, 7):  # of several pools
        found = sampler.batch(step)
        assert torch.equal(found.query, batch(0, step))
        assert len(found.pairs) == 5 and found.query.shape[1] <= 120
    others = [batch(0, 8), batch(1, 7)]
    assert not any(torch.equal(batch(0, 7), other) for other in others)


def test_sorting_by_length_moves_pairs_between_steps_and_loses_none(shipped: list[Family]) -> None:
    drawn = [
        Counter(pair for step in range(16) for pair in content(sampler.batch(step).pairs))
        for sampler in (sampler_of(shipped, pool=1), sampler_of(shipped, pool=8))
    ]
    assert sum(drawn[0].values()) == 80
    assert drawn[0] == drawn[1]


def test_batches_hold_little_padding(shipped: list[Family]) -> None:
    unsorted, pooled = (
        np.mean([padding([sampler.batch(step)]) for step in range(32)])
        for sampler in (sampler_of(shipped, cap=500, pool=1), sampler_of(shipped, cap=500, pool=32))
    )
    assert unsorted > 0.3 and pooled < 0.4 * unsorted


def test_padding_is_the_share_of_the_plans_entries() -> None:
    def pair(n: int, m: int) -> Pair:
        return Pair("F", ("a", "b"), np.zeros(n, np.int64), np.zeros(m, np.int64), np.zeros((0, 2), np.int64))

    both = collate([pair(2, 4), pair(4, 3)])
    assert both.cells == 32
    assert padding([both]) == pytest.approx(1 - 20 / 32)
    assert padding([both, collate([pair(8, 1)])]) == pytest.approx(1 - 28 / 40)


def test_an_epoch_holds_every_family_by_its_weight(shipped: list[Family]) -> None:
    sampler = sampler_of(shipped)
    expected = np.sqrt([len(family.sequences) / 2 for family in shipped])  # the smallest have two
    assert sampler.epoch_pairs == int(np.ceil(expected.sum()))
    orders = []
    for epoch in range(3):
        order = [sampler.family_of(epoch * sampler.epoch_pairs + place) for place in range(sampler.epoch_pairs)]
        orders.append(order)
        counts = np.bincount(order, minlength=len(shipped))
        assert counts.min() >= 1
        scaled = expected * sampler.epoch_pairs / expected.sum()
        assert ((counts >= np.floor(scaled)) & (counts <= np.ceil(scaled))).all()
    assert orders[0] != orders[1] != orders[2]
    assert orders[0] != sorted(orders[0])
    assert sampler.epoch(3 * sampler.epoch_pairs) == 15.0


def test_parts_are_the_batch_within_the_cells(shipped: list[Family]) -> None:
    sampler = sampler_of(shipped, cells=40_000)
    numbers = []
    for step in range(20):
        pairs = sampler.pairs(step)
        parts = sampler.parts(pairs)
        numbers.append(len(parts))
        assert all(part.cells <= 40_000 or len(part.pairs) == 1 for part in parts)
        assert Counter(content(pairs)) == Counter(key for part in parts for key in content(part.pairs))
    assert min(numbers) == 1 < max(numbers) < 5
    tiny = sampler_of(shipped, cells=1)
    assert len(tiny.parts(pairs)) == 5


def test_processes_share_a_batch(shipped: list[Family]) -> None:
    whole = sampler_of(shipped)
    shares = [sampler_of(shipped, rank=rank, world=3) for rank in range(3)]
    for step in (0, 33):
        found = [share.batch(step).pairs for share in shares]
        assert [len(pairs) for pairs in found] == [2, 2, 1]
        together = Counter(key for pairs in found for key in content(pairs))
        assert together == Counter(content(whole.batch(step).pairs))
    with pytest.raises(ValueError, match="--batch-size 5 is less than the 6 processes"):
        sampler_of(shipped, world=6)


def test_workers_change_nothing(shipped: list[Family]) -> None:
    sampler = sampler_of(shipped)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    alone = list(drawn_ahead(sampler.pairs, 30, 37))
    ahead = list(drawn_ahead(sampler.pairs, 30, 37, workers=2))
    assert torch.equal(torch.get_rng_state(), state)
    assert [content(pairs) for pairs in alone] == [content(pairs) for pairs in ahead]
    assert len(alone) == 7
    sent = pickle.loads(pickle.dumps(sampler))  # where workers are started anew
    assert content(sent.pairs(33)) == content(alone[3])


def in_context(families: list[Family], flanked: float, unrelated: float, seed: int = 0) -> PairSampler:
    return PairSampler(
        families, size=5, cells=10**6, cap=120, mutation_rate=0.3, indels=1.0, seed=seed, flanked=flanked,
        unrelated=unrelated,
    )  # fmt: skip


def test_contexts_are_a_function_of_seed_and_number(shipped: list[Family]) -> None:
    sampler = in_context(shipped, 0.5, 0.2)
    kinds = Counter(sampler.setting_of(number).kind for number in range(1000))
    assert kinds["flanked"] == pytest.approx(500, abs=60) and kinds["unrelated"] == pytest.approx(200, abs=50)
    drawn = [sampler.pairs(step) for step in (0, 9, 30)]
    assert [content(pairs) for pairs in drawn] == [
        content(in_context(shipped, 0.5, 0.2).pairs(step)) for step in (0, 9, 30)
    ]
    assert content(in_context(shipped, 0.5, 0.2, seed=1).pairs(0)) != content(drawn[0])


def test_flanked_pairs_have_room_for_flanks_and_unrelated_ones_no_targets(shipped: list[Family]) -> None:
    flanked = [pair for step in range(20) for pair in in_context(shipped, 1.0, 0.0).pairs(step)]
    assert all(max(len(pair.query), len(pair.key)) <= 120 and len(pair.target) >= 5 for pair in flanked)
    begins = [(pair.target[0] > 10).any() for pair in flanked]
    assert 0.3 < np.mean(begins) < 0.95
    for pair in (pair for step in range(4) for pair in in_context(shipped, 0.0, 1.0).pairs(step)):
        assert len(pair.target) == 0 and min(len(pair.query), len(pair.key)) > 0


def test_a_family_of_fragments_gives_way() -> None:
    def family(name: str, *rows: str) -> Family:
        return family_from_alignment(Alignment(name, "", tuple(f"s{k}" for k in range(len(rows))), rows, "here"))

    apart, together = family("apart", "ACDEF----", "----FGHIK"), family("together", "ACDEFGHIK", "ACDEFGHIK")
    plain = PairSampler([apart, together], size=4, cells=10**6, cap=16, mutation_rate=0.0, indels=0.0, seed=0)
    assert {pair.family for step in range(4) for pair in plain.batch(step).pairs} == {"together"}
    with pytest.raises(ValueError, match="fewer than 5 aligned residues"):
        sampler_of([apart]).batch(0)


def test_a_sampler_needs_families() -> None:
    with pytest.raises(ValueError, match="no training family"):
        sampler_of([])
