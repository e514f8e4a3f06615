"""The aligner from Python, and the notebook that shows it."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import examples.pfam
from examples.pfam import AlignedPair, align, align_many, library
from examples.pfam.cli import main
from examples.pfam.config import Config
from examples.pfam.model import Aligner
from examples.pfam.notebook import NOTEBOOK, run_cells
from examples.pfam.release import save_release

QUERY, KEY = "MKVLAAGWWGHPDEACDEFGHIKL", "MKVLAGHPDEACDEYGHIKLMN"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    config = Config(dim=24)
    return str(save_release(Aligner(config), config, tmp_path_factory.mktemp("release") / "tiny.safetensors"))


def test_importing_the_package_imports_nothing_else() -> None:
    code = "import sys, examples.pfam; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)
    with pytest.raises(AttributeError, match="no attribute 'aline'"):
        _ = examples.pfam.aline


def test_two_strings_in_an_object_out(checkpoint: str) -> None:
    found = align("mkv-" + QUERY[3:], KEY + "*", names=("one", "two x"), checkpoint=checkpoint)
    assert isinstance(found, AlignedPair) and found.names == ("one", "two_x")
    assert found.alignment.letters == (QUERY, KEY)
    assert found.plan is not None and found.plan.shape == (len(QUERY) + 1, len(KEY) + 1)
    np.testing.assert_allclose(found.confidence, found.plan[found.pairs[:, 0], found.pairs[:, 1]].clip(0, 1))
    assert found.summary.pairs == len(found.pairs) > 0
    assert str(found) == found.text and "one " in found.text and 0 <= (found.homology or 0) <= 1
    assert align(QUERY, KEY, mode="local", checkpoint=checkpoint).homology is None


@pytest.mark.slow
def test_the_text_is_the_command_s(checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["align", QUERY, KEY, "--checkpoint", checkpoint, "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert text.startswith(align(QUERY, KEY, names=("sequence_1", "sequence_2"), checkpoint=checkpoint).text)


def test_many_are_as_one_by_one_and_in_their_order(checkpoint: str) -> None:
    pairs = [(QUERY, KEY), ("MKV", KEY), (KEY, "MRVL"), (QUERY, QUERY)]
    found = align_many(pairs, checkpoint=checkpoint, keep_plans=False)
    assert [pair.alignment.letters for pair in found] == pairs and found[0].plan is None
    for pair, many in zip(pairs, found, strict=True):
        alone = align(*pair, checkpoint=checkpoint)
        assert alone.pairs.tolist() == many.pairs.tolist()
        np.testing.assert_allclose(alone.confidence, many.confidence, atol=1e-4)
    assert align_many([], checkpoint=checkpoint) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"query": ""}, "'query' has no residues"),
        ({"query": "MK1"}, "'query': '1' at residue 3 is not an amino acid's letter"),
        ({"query": "M" * 9000, "key": "M" * 9000}, "9000 and 9000 residues are more than 9 million pairs"),
        ({"key": "M" * 100_001}, "'key' has more than 100000 residues, more than any known protein has; cut it"),
        ({"mode": ["auto"]}, r"mode must be one of auto, global, local, got \['auto'\]"),
        ({"names": ("a",)}, "names must be two strings, got 1"),
        ({"checkpoint": ""}, "the aligner's path is empty"),
        ({"mode": "best"}, "mode must be one of auto, global, local, got 'best'"),
        ({"decoder": "mutual"}, "decoder must be one of f1, monotone, accuracy, got 'mutual'"),
    ],
)
def test_what_the_library_refuses(checkpoint: str, arguments: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        align(**{"query": QUERY, "key": KEY, "checkpoint": checkpoint, **arguments})
    with pytest.raises(ValueError, match="names must be as many as pairs, 1, got 0"):
        align_many([(QUERY, KEY)], names=[])
    with pytest.raises(ValueError, match=r"'key' of pairs\[1\]: '1' at residue 1 is not"):
        align_many([(QUERY, KEY), (QUERY, "1")])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pairs": None}, "pairs must be a sequence of two strings each, got None"),
        ({"pairs": QUERY}, "pairs must be a sequence of two strings each, got 'MKV"),
        ({"pairs": {QUERY: KEY}}, "pairs must be a sequence of two strings each, got {"),
        ({"pairs": [QUERY, KEY]}, r"pairs\[0\] must be two strings, got 'MKV"),
        ({"pairs": [(QUERY, KEY), None]}, r"pairs\[1\] must be two strings, got None"),
        ({"pairs": [(QUERY, b"MKV")]}, r"pairs\[0\]\[1\] must be a string, got b'MKV'"),
        ({"pairs": [(QUERY, KEY)], "names": ["ab"]}, r"names\[0\] must be two strings, got 'ab'"),
        ({"pairs": [(QUERY, KEY)], "names": [(1, "b")]}, r"names\[0\]\[0\] must be a string, got 1"),
        ({"pairs": [], "batch_size": 1.5}, "batch_size must be a whole number, got 1.5"),
        ({"pairs": [], "batch_size": None}, "batch_size must be a whole number, got None"),
        ({"pairs": [], "checkpoint": 5}, "checkpoint must be a path, or None for the shipped aligner, got 5"),
    ],
)
def test_what_is_of_another_type_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        align_many(**arguments)


@pytest.mark.parametrize("value", [None, b"MKV", 5, ["M", "K"]])
def test_a_sequence_is_a_string(value: Any) -> None:
    with pytest.raises(TypeError, match="query must be a string, letters of amino acids, got"):
        align(value, KEY)
    with pytest.raises(TypeError, match="key must be a string, letters of amino acids, got"):
        align(QUERY, value)
    if not isinstance(value, list):
        with pytest.raises(TypeError, match="names must be two strings, got"):
            align(QUERY, KEY, names=value)


def test_arrays_and_generators_are_sequences_of_pairs(checkpoint: str) -> None:
    for pairs in (np.array([[QUERY, KEY]]), [[QUERY, KEY]], (pair for pair in [(QUERY, KEY)])):
        assert align_many(pairs, checkpoint=checkpoint)[0].alignment.letters == (QUERY, KEY)  # type: ignore[arg-type]


def test_threads_do_not_change_each_other_s_mode(checkpoint: str) -> None:
    modes = ["local", "global"] * 4
    expected = [align(QUERY, KEY[9:], mode=mode, checkpoint=checkpoint).log_odds for mode in modes]
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda mode: align(QUERY, KEY[9:], mode=mode, checkpoint=checkpoint).log_odds, modes)
        assert list(found) == expected


def test_the_shipped_aligner_takes_no_low_complexity_for_a_relation() -> None:
    ubiquitin = "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG"
    other = "MLIKVKTLTGKEIEIDIEPTDKVERIKERVEEKEGIPPQQQRLIYSGKQMNDEKTAADYKILGGSVLHLVLALRGG"
    poor = [("A" * 300, "A" * 250), ("Q" * 80, "Q" * 60), ("AG" * 60, "GA" * 50), ("DE" * 50, "EEDD" * 30)]
    assert max(pair.homology for pair in align_many(poor)) < 0.5
    rich = [(ubiquitin, other), (ubiquitin + "Q" * 60, other), ("AG" * 60 + ubiquitin, other + "E" * 50)]
    assert min(pair.homology for pair in align_many(rich)) > 0.9
    starts = [pair.pairs[0].tolist() for pair in align_many(rich)]
    assert starts == [[0, 0], [0, 0], [120, 0]]


def test_the_notebook_runs(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cell by cell, with a small aligner in the shipped one's place."""
    loaded = library._loaded(checkpoint)
    monkeypatch.setattr(library, "_loaded", lambda path: loaded)
    monkeypatch.chdir(NOTEBOOK.parent)
    monkeypatch.setattr(sys, "path", list(sys.path))
    book = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert book["nbformat"] == 4 and NOTEBOOK.stat().st_size < 30_000
    printed = run_cells(book)
    kept = ["".join(o["text"]) for cell in book["cells"] if cell["cell_type"] == "code" for o in cell["outputs"]]
    assert len(kept) == sum(map(bool, printed))
    for ours, theirs in zip(filter(None, printed), kept, strict=True):
        assert ours.split()[:2] == theirs.split()[:2] or ours[:2] == theirs[:2]
