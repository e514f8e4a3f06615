"""Target pairs from alignments, crops, augmentation, padding."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from examples.pfam import pairs
from examples.pfam.augment import insert_and_delete, mutate, substitution_cdf
from examples.pfam.config import TRAIN_SAMPLE
from examples.pfam.pairs import (
    ALPHABET,
    Family,
    Pair,
    crop_pair,
    decode,
    encode,
    evaluation_pairs,
    family_from_alignment,
    load_families,
    make_pair,
    slice_pair,
)
from examples.pfam.sampler import PADDING, collate
from examples.pfam.stockholm import Alignment, read_stockholm


def family(*rows: str) -> Family:
    return family_from_alignment(Alignment("F", "PF1", tuple(f"s{k}" for k in range(len(rows))), rows, "here"))


@pytest.fixture(scope="module")
def shipped() -> list[Family]:
    return load_families(read_stockholm(TRAIN_SAMPLE))


def letters(pair: Pair) -> list[tuple[str, str]]:
    return [(decode(pair.query)[i], decode(pair.key)[j]) for i, j in pair.target]


def test_targets_are_columns_where_both_are_upper_case() -> None:
    #              0123456
    pair = make_pair(family("AC-DeFG", "-CWDE.g"), 0, 1)
    assert decode(pair.query) == "ACDEFG"
    assert decode(pair.key) == "CWDEG"
    assert pair.target.tolist() == [[1, 0], [2, 2]]


def test_every_kind_of_gap_is_a_gap() -> None:
    pair = make_pair(family("A.-_~C", "AWWWWC"), 0, 1)
    assert decode(pair.query) == "AC"
    assert pair.target.tolist() == [[0, 0], [1, 5]]


def test_rare_letters_stand_for_their_neighbours() -> None:
    assert decode(encode("UOBZJXa")) == "CKDELXA"
    assert encode("X").item() == ALPHABET.index("X")


def test_families_without_a_pair_are_left_out() -> None:
    lone = Alignment("L", "", ("a", "b"), ("ACD", "---"), "here")
    assert load_families([lone]) == []


def test_targets_increase_strictly_on_the_shipped_families(shipped: list[Family]) -> None:
    for one in shipped:
        pair = make_pair(one, 0, 1)
        assert len(pair.target) > 10
        assert (np.diff(pair.target, axis=0) > 0).all()
        assert (pair.target < [len(pair.query), len(pair.key)]).all()


def test_slicing_shifts_and_drops_targets() -> None:
    pair = make_pair(family("ACDEFG", "ACDEFG"), 0, 1)
    cut = slice_pair(pair, (1, 4), (2, 6))
    assert (decode(cut.query), decode(cut.key)) == ("CDE", "DEFG")
    assert cut.target.tolist() == [[1, 0], [2, 1]]


def test_crops_respect_the_cap_and_the_alignment(shipped: list[Family]) -> None:
    one = next(f for f in shipped if f.name == "Pkinase")
    whole = make_pair(one, 0, 1)
    rng = np.random.default_rng(0)
    for _ in range(20):
        crop = crop_pair(whole, 100, rng)
        assert max(len(crop.query), len(crop.key)) <= 100
        assert len(crop.target) > 0
        query_at = decode(whole.query).index(decode(crop.query))
        key_at = decode(whole.key).index(decode(crop.key))
        assert {(i + query_at, j + key_at) for i, j in crop.target} <= set(map(tuple, whole.target.tolist()))


def test_evaluation_pairs_are_whole_distinct_and_counted(shipped: list[Family]) -> None:
    first = evaluation_pairs(shipped, per_family=5, cap=300, seed=3)
    again = evaluation_pairs(shipped, per_family=5, cap=300, seed=3)
    other = evaluation_pairs(shipped, per_family=5, cap=300, seed=4)
    assert [p.names for p in first.pairs] == [p.names for p in again.pairs] != [p.names for p in other.pairs]
    assert len({p.names for p in first.pairs}) == len(first.pairs)
    assert first.skipped > 0  # 12TM_1 is longer than 300
    available = sum(min(5, len(f.sequences) * (len(f.sequences) - 1) // 2) for f in shipped)
    assert len(first.pairs) + first.skipped == available


@pytest.mark.parametrize("few", [0, 100])
def test_evaluation_pairs_are_drawn_from_all(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "_FEW", few)
    every = sorted(pairs._distinct_pairs(7, 99, np.random.default_rng(0)))
    assert every == list(itertools.combinations(range(7), 2))
    some = list(pairs._distinct_pairs(7, 4, np.random.default_rng(0)))
    assert len(set(some)) == 4 and set(some) < set(every)


def test_the_largest_family_takes_no_memory_for_all_its_pairs() -> None:
    drawn = list(pairs._distinct_pairs(200_000, 40, np.random.default_rng(0)))
    assert len(set(drawn)) == 40 and all(0 <= first < second < 200_000 for first, second in drawn)


def test_mutation_follows_blosum() -> None:
    rng = np.random.default_rng(0)
    source = np.full(20_000, ALPHABET.index("I"))
    mutated = mutate(source, 1.0, rng)
    frequency = np.bincount(mutated, minlength=20) / len(mutated)
    expected = np.diff(substitution_cdf()[ALPHABET.index("I")], prepend=0)
    assert np.abs(frequency - expected).max() < 0.02
    assert frequency[ALPHABET.index("V")] > 5 * frequency[ALPHABET.index("G")]
    assert (mutate(source, 0.0, rng) == source).all()
    unknown = np.full(50, ALPHABET.index("X"))
    assert (mutate(unknown, 1.0, rng) == unknown).all()


def test_indels_keep_the_alignment_true() -> None:
    pair = make_pair(family("ACDEFGHIKLMNPQRSTVWY" * 4, "ACDEFGHIKLMNPQRSTVWY" * 4), 0, 1)
    changed = 0
    for seed in range(20):
        new = insert_and_delete(pair, 4.0, np.random.default_rng(seed))
        changed += len(new.target) < len(pair.target)
        assert all(a == b for a, b in letters(new))
        assert (np.diff(new.target, axis=0) > 0).all()
    assert changed > 10


def test_collate_pads_with_lengths() -> None:
    batch = collate([make_pair(family("ACD", "AC-"), 0, 1), make_pair(family("A---", "ACDE"), 0, 1)])
    assert batch.query.tolist() == [encode("ACD").tolist(), [0, PADDING, PADDING]]
    assert batch.query_lengths.tolist() == [3, 1]
    assert batch.key_lengths.tolist() == [2, 4]
