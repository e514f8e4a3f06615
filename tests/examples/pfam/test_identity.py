"""Which alignments are of one family: what is split, what is scored, what was trained on, all by one rule."""

from __future__ import annotations

import dataclasses
import itertools
import random
from pathlib import Path

import pytest
import torch

from examples.pfam import comparison, report
from examples.pfam.comparison import CONFIDENCE, compare
from examples.pfam.config import Config
from examples.pfam.dataset import load_dataset
from examples.pfam.identity import Known, identities, labels, related
from examples.pfam.model import Aligner
from examples.pfam.pairs import Family, evaluation_pairs, load_families
from examples.pfam.stockholm import read_stockholm
from examples.pfam.train import Trainer

LETTERS = "ACDEFGHIKLMNPQRSTVWY"


def named(*records: tuple[str, str]) -> list[Family]:
    return [Family(name, accession, ()) for name, accession in records]


def record(name: str, accession: str, rows: int, seed: int, columns: int = 30) -> str:
    """A record of rows that differ from a common ancestor in about a third of the columns."""
    rng = random.Random(seed)
    ancestor = rng.choices(LETTERS, k=columns)
    letters = ("".join(c if rng.random() < 0.7 else rng.choice(LETTERS) for c in ancestor) for _ in range(rows))
    head = f"# STOCKHOLM 1.0\n#=GF ID {name}\n" + (f"#=GF AC {accession}\n" if accession else "")
    return head + "".join(f"s{index} {row}\n" for index, row in enumerate(letters)) + "//\n"


@pytest.mark.parametrize(
    ("records", "groups", "shown"),
    [
        # An accession decides, version and case aside, whatever the IDs are.
        ([("A", "PF00001.1"), ("B", "pf00001.22")], [0, 0], ["A (PF00001.1)"] * 2),
        ([("A", "PF00001.1"), ("A", "PF00002.1")], [0, 1], ["A (PF00001.1)", "A (PF00002.1)"]),
        ([("A", "PF00001.1"), ("full_PF00001", "")], [0, 0], ["A (PF00001.1)"] * 2),
        ([("A", "T1.2"), ("B_PF00001", "T1"), ("C", "PF00001")], [0, 0, 0], ["A (T1.2)"] * 3),
        ([("A", "T1"), ("C", "PF00001"), ("B_PF00001", "T1")], [0, 0, 0], ["A (T1)"] * 3),  # joined by the last
        # The ID alone: perhaps one, so together in a split and apart in scores.
        ([("Cluster", ""), ("cluster", ""), ("Other", "")], [0, 0, 1], ["Cluster", "cluster", "Other"]),
        ([("Cluster", ""), ("Cluster", ""), ("Cluster #1", "")], [0, 0, 1], ["Cluster #2", "Cluster #3", "Cluster #1"]),
        ([("A", "PF00001.1"), ("A", "")], [0, 0], ["A (PF00001.1)", "A"]),
        ([("A", "PF00001.1"), ("A", ""), ("A", "PF00002.1")], [0, 0, 0], ["A (PF00001.1)", "A", "A (PF00002.1)"]),
        ([("T1", ""), ("B", "T1.4")], [0, 0], ["T1", "B (T1.4)"]),
        ([("E\u0301tude", ""), ("\u00c9tude", "")], [0, 0], ["E\u0301tude", "\u00c9tude"]),  # one name, written twice
        # No accession is none, whatever stands for it.
        ([("A", "-"), ("B", "-")], [0, 1], ["A (-)", "B (-)"]),
    ],
)
def test_one_perhaps_one_and_different(records: list[tuple[str, str]], groups: list[int], shown: list[str]) -> None:
    families = named(*records)
    assert related(families) == groups
    assert labels(families) == shown
    for first, second in itertools.permutations(range(len(families)), 2):
        if Known([identities(families[first])]).may_hold(families[second]):
            assert groups[first] == groups[second]
    for order in itertools.permutations(range(len(families))):  # in any order the same records are together
        again = related([families[index] for index in order])
        together = {(a, b) for a, b in itertools.combinations(range(len(order)), 2) if groups[a] == groups[b]}
        place = {index: at for at, index in enumerate(order)}
        assert together == {
            (a, b) for a, b in itertools.combinations(range(len(order)), 2) if again[place[a]] == again[place[b]]
        }


def test_what_was_trained_on_is_known_by_the_same_rule() -> None:
    known = Known([("PF00041", "fn3"), ("Globin",)])
    asked = {
        ("fn3", "PF00041.9"): True,
        ("another", "PF00041.9"): True,
        ("fn3", ""): True,
        ("fn3", "PF00042.1"): False,
        ("globin", ""): True,
        ("globin", "PF00042.1"): True,
        ("other", ""): False,
    }
    assert {of: known.may_hold(*named(of)) for of in asked} == asked


@pytest.mark.parametrize("accessions", [True, False])
@pytest.mark.parametrize("files", [1, 2])
def test_a_family_never_stands_on_both_sides_of_a_split(tmp_path: Path, accessions: bool, files: int) -> None:
    texts = [
        "".join(record(f"Fam{k}", f"PF{k:05}.{part}" if accessions else "", 3 + part, 10 * k + part) for k in range(8))
        for part in range(2)
    ]
    for index in range(files):
        (tmp_path / f"Pfam{index}.sto").write_text("".join(texts) if files == 1 else texts[index])
    for seed in range(3):
        config = Config(data=str(tmp_path), eval_data=None, holdout=0.25, seed=seed)
        data = load_dataset(config)
        train, out = ({family.name for family in side} for side in (data.train, data.heldout_families))
        assert not train & out and len(out) == 2 and len(train) == 6
        assert len(data.train) == 12 and len(data.heldout_families) == 4
        (tmp_path / "held.txt").write_text(texts[1])
        split = load_dataset(
            dataclasses.replace(config, eval_data=str(tmp_path / "held.txt"), data=str(tmp_path / "Pfam0.sto"))
        )
        assert split.train == () and len(split.dropped) == (16 if files == 1 else 8)


def test_records_that_cannot_be_told_apart_cannot_be_split(tmp_path: Path) -> None:
    path = tmp_path / "x.sto"
    path.write_text("".join(record("Cluster", "", 3, seed) for seed in range(4)))
    with pytest.raises(
        ValueError, match=r"4 families .* that cannot be told apart by ID and accession; .* --eval-data"
    ):
        load_dataset(Config(data=str(path), eval_data=None))


def test_families_of_one_name_are_scored_apart_and_records_of_one_family_together(tmp_path: Path) -> None:
    path = tmp_path / "x.sto"
    path.write_text(
        "".join(record("Cluster", "", 3, seed) for seed in range(10))
        + record("Seed", "PF00001.1", 3, 20)
        + record("Full", "PF00001.2", 5, 21)
    )
    families = load_families(read_stockholm(path))
    pairs = evaluation_pairs(families, 4, 100, 0).pairs
    count = {label: sum(pair.family == label for pair in pairs) for label in dict.fromkeys(p.family for p in pairs)}
    assert count == {**{f"Cluster #{k}": 3 for k in range(1, 11)}, "Seed (PF00001.1)": 4}  # at most four a family
    assert [pair.number for pair in pairs] == list(range(len(pairs)))
    # What an ordinary family's pairs are depends on its place in the file alone.
    (alone,) = (pairs[k : k + 3] for k in (27,))
    again = evaluation_pairs([*named(*[("x", "")] * 9), families[9]], 4, 100, 0).pairs
    assert [pair.names for pair in again] == [pair.names for pair in alone]


def test_confidences_go_with_their_own_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two alignments of one family whose rows have the same names: errors and confidences by pair, not by name."""
    path = tmp_path / "x.sto"
    path.write_text(record("A", "PF00001.1", 3, 1, 20) + record("A", "PF00001.2", 3, 2, 45))
    pairs = evaluation_pairs(load_families(read_stockholm(path)), 6, 100, 0).pairs
    assert len(pairs) == 6 and len({pair.names for pair in pairs}) == 3 and len({pair.family for pair in pairs}) == 1
    monkeypatch.setattr(comparison, "certificates", lambda model, pair: {"length": float(len(pair.query))})
    torch.manual_seed(0)
    found = compare({"mine": Aligner(Config(dim=24, base_iters=4))}, pairs[::-1], progress=False)
    doubts = found.doubts["mine"]
    assert doubts.numbers["length"] == [float(len(pair.query)) for pair in pairs[::-1]]
    own = {result.number: result for result in found.results["mine"]}
    assert len(own) == 6
    assert [1 - own[number].values["confidence"] for number in range(6)] == doubts.numbers[CONFIDENCE]
    counted = [result.counts.target for result in doubts.results]
    assert counted == [len(pair.target) for pair in pairs[::-1]]


def test_pictures_of_families_whose_names_are_alike_or_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.sto"
    names = ["../../up", "a/b", "a_b"]
    path.write_text("".join(record(name, "", 3, seed) for seed, name in enumerate(names)))
    config = Config(eval_data=str(path), dim=24, eval_pairs=1, attention="softmax")
    trainer = Trainer(config, tmp_path / "run" / "deep")
    trainer.folder.mkdir(parents=True)
    monkeypatch.setattr(report, "plot_plan", lambda pair, plan, path: path.write_text(pair.family))
    monkeypatch.setattr(report, "plot_learning", lambda history, baselines, path: path.touch())
    paths = report.write_pictures(trainer, progress=False)
    assert sorted(picture.read_text() for picture in paths) == sorted(["", *names])
    assert all(picture.parent == trainer.folder for picture in paths)
    assert {child.name for child in tmp_path.iterdir()} == {"x.sto", "run"}
