"""`align`: what it reads, the columns and their confidence, the text, the files."""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from Bio import AlignIO, SeqIO

from examples.common import files
from examples.pfam import align_files, cli
from examples.pfam.align_files import FASTA, PICTURE, RECORD, STOCKHOLM, check_folder, write_files
from examples.pfam.alignment import PairwiseAlignment
from examples.pfam.alignment_picture import draw_alignment
from examples.pfam.cli import main
from examples.pfam.commands import align
from examples.pfam.config import Config
from examples.pfam.decode import DECODERS
from examples.pfam.model import Aligner
from examples.pfam.pairs import load_families, make_pair
from examples.pfam.release import save_release
from examples.pfam.sequences import Protein, read_proteins, short_name
from examples.pfam.stockholm import read_stockholm
from examples.pfam.three_lines import display_names, summary_lines, three_lines

QUERY, KEY = "MKVLAWX", "MKILGGWX"
PAIRS = np.array([[0, 0], [1, 1], [2, 2], [3, 3], [5, 6], [6, 7]])
PROTEINS = (
    Protein("sp|P1|ONE_HUMAN", "of a test", QUERY, "one.fasta"),
    Protein("sp|P2|TWO_MOUSE", "", KEY, "two.fasta"),
)
FILES = {FASTA, STOCKHOLM, PICTURE, RECORD}


def hand_made_plan() -> np.ndarray:
    plan = np.zeros((8, 9))
    for (i, j), value in zip(PAIRS, (1.02, 0.949, 0.95, 0.44, 0.05, 0.049), strict=True):
        plan[i, j] = value
    plan[4, 8] = 0.7  # the query's A has no partner
    plan[7, 4], plan[7, 5] = 0.85, 0.849  # nor have the key's two Gs
    return plan


def hand_made() -> PairwiseAlignment:
    return PairwiseAlignment.from_plan((QUERY, KEY), hand_made_plan(), PAIRS)


def random_alignment(seed: int) -> PairwiseAlignment:
    """Of random letters, random increasing pairs and a random plan."""
    rng = np.random.default_rng(seed)
    n, m = rng.integers(1, 150, 2)
    count = rng.integers(0, min(n, m) + 1)
    pairs = np.stack([np.sort(rng.choice(size, count, replace=False)) for size in (n, m)], axis=1)
    letters = tuple("".join(rng.choice(list("ACDEFGHIKLMNPQRSTVWYBZXUOJ"), size)) for size in (n, m))
    return PairwiseAlignment.from_plan((letters[0], letters[1]), rng.random((n + 1, m + 1)), pairs)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = Config(dim=24)
    torch.manual_seed(0)
    return save_release(Aligner(config), config, tmp_path_factory.mktemp("release") / "tiny.safetensors")


def test_columns_of_hand_made_pairs() -> None:
    alignment = hand_made()
    assert alignment.rows == ("MKVLA--WX", "MKIL-GGWX")
    assert alignment.middle == "||:|   |."  # X is unknown, so not the same as another X
    assert alignment.digits == "*9*479810"
    assert alignment.confidence.max() == 1.0
    assert alignment.paired.tolist() == [True] * 4 + [False] * 3 + [True] * 2


def test_the_middle_line_is_blosum62s() -> None:
    """Identical; scores of 1, 0 and -1; a rare letter scored as its neighbour."""
    pairs = np.stack([np.arange(5)] * 2, axis=1)
    assert PairwiseAlignment.from_plan(("ASSSU", "AAGLC"), np.ones((6, 6)), pairs).middle == "|:..:"


def test_the_text_of_a_hand_made_alignment() -> None:
    expected = """\
ONE_HUMAN  1 MKVLA--WX 7
             ||:|   |.
TWO_MOUSE  1 MKIL-GGWX 8
confidence   *9*479810"""
    assert three_lines(hand_made(), display_names(PROTEINS)) == expected


def test_blocks_of_sixty_columns_and_rows_of_gaps() -> None:
    n, m = 61, 125
    pairs = np.array([[0, 0]])
    plan = np.zeros((n + 1, m + 1))
    plan[0, 0] = 1.0
    text = three_lines(PairwiseAlignment.from_plan(("A" * n, "A" * m), plan, pairs), ("a", "b"))
    indent = " " * 15
    blocks = [
        [f"a            1 {'A' * 60} 60", f"{indent}|", f"b            1 A{'-' * 59} 1", f"confidence     *{'0' * 59}"],
        [f"a           61 A{'-' * 59} 61", "", f"b            2 -{'A' * 59} 60", f"confidence     {'0' * 60}"],
        [f"a              {'-' * 60}", "", f"b           61 {'A' * 60} 120", f"confidence     {'0' * 60}"],
        [f"a              {'-' * 5}", "", f"b          121 {'A' * 5} 125", f"confidence     {'0' * 5}"],
    ]
    assert text == "\n\n".join("\n".join(block) for block in blocks)


def test_the_figures_of_a_hand_made_alignment() -> None:
    summary = hand_made().summary()
    assert (summary.pairs, summary.identical, summary.similar, summary.doubtful) == (6, 4, 5, 3)
    pairs, lone = 1.0 + 0.949 + 0.95 + 0.44 + 0.05 + 0.049, 0.7 + 0.85 + 0.849
    assert summary.mean_confidence == pytest.approx(pairs / 6)
    assert summary.expected_accuracy == pytest.approx((2 * pairs + lone) / 15)
    assert summary_lines(hand_made(), ("one", "two")) == (
        "aligned pairs      6, 86 % of one and 75 % of two\n"
        "identity           66.7 % (4) of the pairs, similar 83.3 % (5)\n"
        "mean confidence    0.57: about 3 of the 6 pairs should be right; 3 of them below 0.5\n"
        "expected accuracy  0.62 of all residues should have the right partner, or none"
    )


def test_the_verdict_comes_first() -> None:
    lines = [summary_lines(hand_made(), ("one", "two"), p).splitlines() for p in (None, 0.97, 0.13)]
    assert lines[0] == lines[1][1:] == lines[2][1:]
    assert lines[1][0] == "a common part: related with probability 0.97, where half of all pairs are"
    assert lines[2][0] == "no common part found: related with probability 0.13, where half of all pairs are"


def test_nothing_aligned() -> None:
    none = np.zeros((0, 2), dtype=np.int64)
    alignment = PairwiseAlignment.from_plan(("AC", "W"), np.full((3, 2), 0.5), none)
    assert alignment.rows == ("AC-", "--W")
    assert summary_lines(alignment, ("a", "b")).startswith("no residue was aligned")
    assert summary_lines(alignment, ("a", "b"), 0.9).startswith("no common part found: related with probability 0.90")
    assert alignment.summary().expected_accuracy == pytest.approx(0.5)
    assert draw_alignment(alignment, np.full((3, 2), 0.5), ("a", "b")).startswith(b"\x89PNG")


def test_pairs_that_cannot_stand_in_columns_are_refused() -> None:
    for pairs in ([[0, 1], [1, 0]], [[0, 0], [0, 1]], [[0, 1], [1, 1]]):
        with pytest.raises(ValueError, match="cross or share a residue"):
            PairwiseAlignment.from_plan(("AC", "AC"), np.ones((3, 3)), np.array(pairs))
    with pytest.raises(ValueError, match=r"of 2 and 2 residues is \[3, 3\], got \[2, 2\]"):
        PairwiseAlignment.from_plan(("AC", "AC"), np.ones((2, 2)), PAIRS[:1])


@pytest.mark.parametrize("seed", range(20))
def test_files_hold_the_sequences_and_the_pairs(seed: int, tmp_path: Path) -> None:
    alignment = random_alignment(seed)
    names = ("sp|P1|ONE", "tr|P2|TWO/1-9")
    proteins = tuple(Protein(name, "text", row, "") for name, row in zip(names, alignment.letters, strict=True))
    write_files(tmp_path, (proteins[0], proteins[1]), alignment, b"picture", {"decoder": "none"})
    pairs = alignment.columns[alignment.paired]

    fasta = list(SeqIO.parse(tmp_path / FASTA, "fasta"))
    assert tuple(record.id for record in fasta) == names
    assert tuple(str(record.seq).replace("-", "") for record in fasta) == alignment.letters

    (ours,) = read_stockholm(tmp_path / STOCKHOLM)
    assert (ours.names, ours.rows) == (names, alignment.rows)
    (family,) = load_families([ours])
    assert make_pair(family, 0, 1).target.tolist() == pairs.tolist()
    theirs = AlignIO.read(tmp_path / STOCKHOLM, "stockholm")
    assert tuple(str(record.seq) for record in theirs) == alignment.rows
    assert theirs.column_annotations["posterior_probability"] == alignment.digits

    record = json.loads((tmp_path / RECORD).read_text())
    assert record["names"] == list(names) and record["lengths"] == [len(row) for row in alignment.letters]
    assert record["query_residues"] == (pairs[:, 0] + 1).tolist()
    assert record["key_residues"] == (pairs[:, 1] + 1).tolist()
    np.testing.assert_allclose(record["confidence"], alignment.confidence[alignment.paired], atol=1e-6)
    assert record["made_with"] == {"decoder": "none"}


def test_only_its_own_files_are_replaced(tmp_path: Path) -> None:
    for _ in range(2):
        check_folder(tmp_path)
        assert {p.name for p in write_files(tmp_path, PROTEINS, hand_made(), b"picture", {})} == FILES
    (tmp_path / PICTURE).unlink()  # one that is gone is no reason to stop
    check_folder(tmp_path)

    for name in (FASTA, STOCKHOLM, RECORD):
        before = (tmp_path / name).read_bytes()
        (tmp_path / name).write_text("{}")
        with pytest.raises(FileExistsError, match="was changed since; move it, or choose another --out"):
            check_folder(tmp_path)
        (tmp_path / name).write_bytes(before)
    (tmp_path / RECORD).unlink()
    with pytest.raises(FileExistsError, match=FASTA):
        check_folder(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot write to --out"):
        check_folder(tmp_path / "file")


def test_a_full_disk_leaves_the_files_that_were_there(tmp_path: Path) -> None:
    write_files(tmp_path, PROTEINS, hand_made(), b"picture", {})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"cannot write to --out .*; what was there is as it was"):
            write_files(tmp_path, PROTEINS, random_alignment(0), b"picture" * 1000, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("replaced", range(5))
def test_what_a_crash_leaves_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaced: int) -> None:
    """Killed after so many files, over files of another alignment or none."""
    left: list[int] = []

    def replace(source: Path, target: Path) -> None:
        if not left:
            raise KeyboardInterrupt
        left.pop()
        source.rename(target)

    for number in range(2):
        with monkeypatch.context() as patched:
            patched.setattr(files.os, "replace", replace)
            left[:] = [0] * replaced
            with contextlib.suppress(KeyboardInterrupt):
                write_files(tmp_path, PROTEINS, random_alignment(number), b"picture", {})
        check_folder(tmp_path)
        write_files(tmp_path, PROTEINS, hand_made(), b"picture", {})


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_fasta_files_plain_gzip_and_untidy(tmp_path: Path) -> None:
    notes: list[str] = []
    plain = write(tmp_path / "plain.fasta", "; a comment\n\n>sp|P1|ONE_HUMAN  a  protein\r\nmk v-l.\r\nA*\r\n")
    packed = tmp_path / "packed.fa.gz"
    packed.write_bytes(gzip.compress("\ufeff>two\nMKUBZOJX\n".encode()))
    first, second = read_proteins([plain, str(packed)], notes)
    assert first == Protein("sp|P1|ONE_HUMAN", "a protein", "MKVLA", plain)
    assert second == Protein("two", "", "MKUBZOJX", str(packed))
    assert notes == [
        f"{plain}: sp|P1|ONE_HUMAN: 2 gaps were removed",
        f"{plain}: sp|P1|ONE_HUMAN: the stop codon '*' at the end was removed",
    ]


def test_several_sequences_in_a_file(tmp_path: Path) -> None:
    notes: list[str] = []
    three = write(tmp_path / "three.fasta", ">a\nMKV\n>b\nMRV\n>c\nMLV\n")
    assert [p.letters for p in read_proteins([three], notes)] == ["MKV", "MRV"]
    assert [p.letters for p in read_proteins(["LLL", three], notes)] == ["LLL", "MKV"]
    assert notes == [
        f"{three} holds 3 sequences; the first 2 will be aligned",
        f"{three} holds 3 sequences; the first will be aligned",
    ]


def test_equal_and_missing_names(tmp_path: Path) -> None:
    notes: list[str] = []
    twice = write(tmp_path / "twice.fasta", ">a x\nMKV\n>a y\nMRV\n")
    assert [p.name for p in read_proteins([twice], notes)] == ["a_1", "a_2"]
    assert notes == ["both sequences are called a; they are a_1 and a_2 here"]
    nameless = write(tmp_path / "no.name.fasta", ">\nMKV\n>#é\nMRV\n")
    assert [p.name for p in read_proteins([nameless], notes)] == ["no_1", "é"]


def test_bare_sequences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    long = "mkv" * 500  # longer than a file's name may be
    first, second = read_proteins([long, "MR-V*"], notes)
    assert (first.name, first.letters) == ("sequence_1", long.upper())
    assert (second.name, second.letters) == ("sequence_2", "MRV")
    assert notes == ["sequence 2: 1 gap was removed", "sequence 2: the stop codon '*' at the end was removed"]
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "MKV", ">from_a_file\rLLLL\r")
    assert read_proteins(["MKV", "MRV"], notes)[0].letters == "LLLL"


@pytest.mark.parametrize(
    "letters, noted", [("ACGTACGTNN", True), ("acguacguac", True), ("ACGT", False), ("ACGTACGTKK", False)]
)
def test_nucleotides_are_noticed(letters: str, noted: bool) -> None:
    notes: list[str] = []
    read_proteins([letters, "MKV"], notes)
    assert [note.startswith("sequence 1 looks like nucleotides") for note in notes] == [True] * noted


def test_bad_input_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "x.fasta"
    for text, message in (
        ("", f"{file} holds no sequence; expected FASTA"),
        ("MKV\n", f"{file} holds no sequence; expected FASTA"),
        (">a\n", f"{file}: a has no residues"),
        (">a\n--*\n", f"{file}: a has no residues"),
        (">a\nMK1V\n", f"{file}: a: '1' at residue 3 is not an amino acid's letter"),
        (">a\nM-KéV\n", f"{file}: a: 'é' at residue 3 is not an amino acid's letter"),
        (">a\nM*V\n", f"{file}: a: '*' at residue 2 is not an amino acid's letter; translate one reading frame"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError) as error:
            read_proteins([str(file), "MKV"], [])
        assert str(error.value).startswith(message)
    file.write_text(">a\nMKV\n")
    with pytest.raises(ValueError, match=r"holds 1 sequence; expected .* with 2 or more"):
        read_proteins([str(file)], [])
    file.write_bytes(gzip.compress(b">a\nMKV\n" * 99)[:-9])
    with pytest.raises(ValueError, match="damaged gzip data"):
        read_proteins([str(file), "MKV"], [])
    for argument in ("absent.fasta", "MKV2", "*-", ""):
        with pytest.raises(FileNotFoundError, match="neither a file that exists nor a sequence"):
            read_proteins([argument, "MKV"], [])
    with pytest.raises(ValueError, match="is a folder"):
        read_proteins([str(tmp_path), "MKV"], [])
    with pytest.raises(ValueError, match="one sequence is not enough"):
        read_proteins(["MKV"], [])
    with pytest.raises(ValueError, match="3 sequences or files"):
        read_proteins(["MKV", "MKV", "MKV"], [])


def test_names_to_show() -> None:
    assert short_name("sp|P69905|HBA_HUMAN") == "HBA_HUMAN"
    assert short_name("gi|1|ref|NP_1.1|") == "NP_1.1"
    assert short_name("|||") == "|||"
    assert short_name("a_name_that_is_too_long_to_show") == "a_name_th..._to_show"
    same = (Protein("sp|P1|A", "", "M", ""), Protein("tr|P2|A", "", "M", ""))
    assert display_names(same) == ("sp|P1|A", "tr|P2|A")


@pytest.mark.slow
def test_the_command_from_end_to_end(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write(tmp_path / "one.fasta", ">sp|P1|ONE_HUMAN a\nMKVLAAGWWGHPDEACDEFGHIKL-\n")
    arguments = ["align", one, "MKVLAGHPDEACDEYGHIKLMN", "--checkpoint", str(checkpoint), "--threads", "1"]
    out = tmp_path / "out"
    assert main([*arguments, "--out", str(out)]) == 0
    text, notes = capsys.readouterr()
    assert notes == f"note: {one}: sp|P1|ONE_HUMAN: 1 gap was removed\n"
    for words in (
        "ONE_HUMAN  ",
        "sequence_2 ",
        "confidence ",
        "identical",
        "related with probability ",
        "mean confidence",
        f"wrote {out / PICTURE}",
    ):
        assert words in text
    assert {path.name for path in out.iterdir()} == FILES
    assert (out / PICTURE).read_bytes().startswith(b"\x89PNG")
    rows = [str(record.seq) for record in SeqIO.parse(out / FASTA, "fasta")]
    assert [row.replace("-", "") for row in rows] == ["MKVLAAGWWGHPDEACDEFGHIKL", "MKVLAGHPDEACDEYGHIKLMN"]
    record = json.loads((out / RECORD).read_text())
    assert record["made_with"] == {"checkpoint": str(checkpoint), "decoder": "f1", "mode": "auto"}
    assert 0 <= record["homology"] <= 1

    assert main([*arguments, "--out", str(out), "--quiet", "--decoder", "monotone"]) == 0
    text, notes = capsys.readouterr()
    assert len(text.splitlines()) == 4 and notes.startswith("note: ")
    assert json.loads((out / RECORD).read_text())["made_with"]["decoder"] == "monotone"

    assert main([*arguments, "--out", str(out), "--mode", "global"]) == 0
    assert "probability" not in capsys.readouterr().out  # it was fitted on what auto finds
    record = json.loads((out / RECORD).read_text())
    assert record["made_with"]["mode"] == "global" and record["homology"] is None


def test_the_decoder_is_the_one_named(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(DECODERS, "monotone", lambda plan: np.zeros((0, 2), dtype=np.int64))
    arguments = ["align", "MKVLA", "MKVLA", "--checkpoint", str(checkpoint), "--out", str(tmp_path)]
    assert main([*arguments, "--decoder", "monotone"]) == 0
    assert "no residue was aligned" in capsys.readouterr().out


def test_the_command_refuses_before_it_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(align, "load_aligner", None)  # calling it would be a TypeError
    out = tmp_path / "out"
    assert main(["align", "M" * 5000, "K" * 5000, "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: sequence_1 has 5000 residues and sequence_2 5000: 25 million pairs, where memory")
    few = write(tmp_path / "few.fasta", ">a\nMKVL\n>b\nMKV\n")
    assert main(["align", few, "--most-pairs", "2", "--out", str(out)]) == 1
    assert "a has 4 residues and b 3: 12 pairs, where memory for 2 is foreseen" in capsys.readouterr().err
    assert not out.exists()
    monkeypatch.chdir(tmp_path)
    assert main(["align", "MKV", "MRV", "--out", ""]) == 1
    assert capsys.readouterr().err == "error: --out is empty; name a folder\n"
    out.mkdir()
    (out / PICTURE).write_text("a picture of my own")
    assert main(["align", "MKV", "MRV", "--out", str(out)]) == 1
    assert f"error: {out / PICTURE} was not written by this command" in capsys.readouterr().err
    assert (out / PICTURE).read_text() == "a picture of my own"
    assert main(["align", "MKV", "absent.fasta", "--out", str(out)]) == 1
    assert (
        capsys.readouterr().err == "error: 'absent.fasta' is neither a file that exists nor a sequence, letters alone\n"
    )
    with pytest.raises(SystemExit):
        main(["align", "MKV", "MRV", "--decoder", "mutual"])


@pytest.mark.parametrize("command", ["align", "release"])
def test_every_option_says_what_it_is(command: str) -> None:
    parser = next(action for action in cli._parser()._actions if isinstance(action, argparse._SubParsersAction))
    for action in parser.choices[command]._actions:
        assert action.help and action.help[0].islower() and (action.nargs == 0 or action.metavar), action.option_strings


def test_the_record_names_its_writer(tmp_path: Path) -> None:
    (tmp_path / RECORD).write_text(json.dumps({"written_by": "somebody", "files": {}}))
    assert align_files._hashes(tmp_path / RECORD) is None
    with pytest.raises(FileExistsError, match=RECORD):
        check_folder(tmp_path)
