"""Compiled loops against their definitions in tensors, and evidence in parts against evidence at once."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from examples.pfam import layers, loops, model as aligner, pair_hmm, parts
from examples.pfam.config import Config
from examples.pfam.encodings import Encodings
from examples.pfam.evaluate import align_pairs, aligned
from examples.pfam.evidence_kernels import averages_at
from examples.pfam.kernels import MOST
from examples.pfam.layers import ContextBlock, PairScore, diagonal_means
from examples.pfam.model import Aligner, _sums
from examples.pfam.pair_hmm import Costs, posterior
from examples.pfam.pairs import Pair
from examples.pfam.parts import Part, Parts


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


@pytest.mark.parametrize(("length", "size"), [(9, 7), (1, 4), (40, 50), (3, 40)])
def test_averages_at_entries_are_those_of_the_maps(length: int, size: int) -> None:
    g = torch.Generator().manual_seed(length)
    maps, widths = torch.randn(3, 2, length, size, generator=g), (3, 5, 31)
    where = torch.rand(3, length, size, generator=g) < torch.tensor([0.3, 0.0, 1.0])[:, None, None]
    here, means = averages_at(maps, where.flatten().nonzero()[:, 0], widths)
    torch.testing.assert_close(here, maps.transpose(0, 1)[:, where], rtol=0, atol=0)
    expected = diagonal_means(maps.double(), widths).transpose(0, 1)[:, where].float()
    torch.testing.assert_close(means, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("entries", [5, 128, 300])
def test_the_compiled_perceptron_is_the_definition(entries: int) -> None:
    score = PairScore(7, 5, (0.5, -1.0))
    nn.init.normal_(score.score)
    groups = [torch.randn(2, channels, 1, entries) for channels in (3, 1, 3)]
    expected = score(*groups).detach()
    with torch.no_grad():
        torch.testing.assert_close(score(*groups), expected)


def test_sums_of_a_plan_are_those_of_its_rows_and_columns() -> None:
    plan = torch.rand(2, 6, 4)
    of_rows, of_columns = _sums(plan.clone().requires_grad_())
    with torch.no_grad():
        found = _sums(plan)
    torch.testing.assert_close(found[0], of_rows.detach())
    torch.testing.assert_close(found[1], of_columns.detach())


@pytest.mark.parametrize("cells", [1, 60, 10_000])
def test_what_is_judged_in_parts_is_what_is_judged_at_once(monkeypatch: pytest.MonkeyPatch, cells: int) -> None:
    monkeypatch.setattr(parts, "CELLS", cells)
    shape, g = (3, 140, 9), torch.Generator().manual_seed(0)
    maps, rows, columns = (torch.randn(size, generator=g) for size in (shape, shape[:2], (3, 9)))
    query, key, ones = (
        torch.randn(3, 140, 4, generator=g),
        torch.randn(3, 9, 4, generator=g),
        torch.randn(3, generator=g),
    )
    where = torch.rand(shape, generator=g) < 0.3
    where[1] = False

    def judge(part: Part) -> Tensor:
        here, means = part.averaged(lambda pairs, rows: maps[pairs, rows][:, None], (3, 5))
        of = part.of_maps(maps) + part.of_rows(rows) * part.of_columns(columns) + part.of_pairs(ones)
        return of + part.products(query, key) + here[:, 0] + means.sum(dim=1)

    expected = Parts.of(shape).judged(judge, maps, 0.0)
    with torch.no_grad():
        torch.testing.assert_close(Parts.of(shape).judged(judge, maps, 0.0), expected)
        found = Parts.of(shape, where).judged(judge, maps, -9.0)
    torch.testing.assert_close(found, expected.masked_fill(~where, -9.0))


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


def test_a_sequence_is_encoded_once_and_what_is_kept_has_a_bound() -> None:
    asked: list[int] = []

    def encode(residues: Tensor) -> Tensor:
        asked.append(len(residues))
        return torch.stack([residues.float(), residues.cumsum(1).float()], dim=2) * (residues != 20)[..., None]

    known, rows = Encodings(7), torch.tensor([[3, 4, 20], [1, 2, 5], [3, 4, 20]])
    expected = encode(rows)
    for lengths in (torch.tensor([2, 3, 2]),) * 2:
        torch.testing.assert_close(known.tokens(rows, lengths, encode, 20), expected)
    assert asked == [3, 2]
    known.tokens(torch.tensor([[7, 8, 9, 10]]), torch.tensor([4]), encode, 20)  # the longest ago goes: 3, 4
    torch.testing.assert_close(known.tokens(rows[1:2], torch.tensor([3]), encode, 20), expected[1:2])
    assert asked == [3, 2, 1]
    torch.testing.assert_close(known.tokens(rows[:1], torch.tensor([2]), encode, 20), expected[:1])
    assert asked == [3, 2, 1, 1]


def test_plans_are_the_same_whether_sequences_were_encoded_before() -> None:
    torch.manual_seed(0)
    model, pairs = Aligner(Config(dim=24)), [related(40, 0), related(60, 1)]
    known = Encodings()
    first, again = ([found.plan for found in aligned(model, pairs, 2, known=known)] for _ in range(2))
    alone = [found.plan for pair in pairs for found in aligned(model, [pair], 1)]
    for a, b, c in zip(first, again, alone, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_allclose(a[:-1], c[:-1], atol=1e-5)


def test_loops_are_compiled_where_nothing_can_be_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def locators(function: object) -> None:
        raise RuntimeError(f"cannot cache function {function!r}: no locator available")

    monkeypatch.setattr("numba.core.dispatcher.FunctionCache", locators)
    loops._say_once.cache_clear()
    one, other = loops.loop()(lambda x: x + 1), loops.loop(error_model="numpy")(lambda x: 1.0 / x)
    assert one(2) == 3 and other(0.0) == np.inf
    assert capsys.readouterr().err.count("NUMBA_CACHE_DIR can name one") == 1


def test_a_damaged_cache_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a crash leaves it, which Numba reads as it is; and an index without its code."""
    program, kept = tmp_path / "some.py", tmp_path / "kept"
    program.write_text("from examples.pfam.loops import loop\n@loop()\ndef twice(x):\n    return 2 * x\n")
    monkeypatch.setattr("numba.core.config.CACHE_DIR", str(kept))

    def notes() -> int:
        assert runpy.run_path(str(program))["twice"](4) == 8
        return capsys.readouterr().err.count("is compiled anew")

    assert notes() == 0 == notes()
    for suffix, content in ((".nbi", b""), (".nbc", b"damaged")):
        (file,) = kept.rglob(f"*{suffix}")
        file.write_bytes(content)
        assert notes() == 1
        assert notes() == 0
