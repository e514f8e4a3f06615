"""Many pairs: which, in which formats, and what a run that was stopped goes on with."""

from __future__ import annotations

import io
import itertools
import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from Bio import SeqIO

from examples.pfam import many, pair_lists
from examples.pfam.alignment import PairwiseAlignment
from examples.pfam.cli import main
from examples.pfam.commands import align_many
from examples.pfam.config import Config
from examples.pfam.library import AlignedPair
from examples.pfam.many import LOG, Results
from examples.pfam.model import Aligner
from examples.pfam.pair_formats import FORMATS, TSV_COLUMNS, a3m, cigar, fasta, json_line, paf, tsv
from examples.pfam.pair_lists import PairList
from examples.pfam.release import save_release
from examples.pfam.sequences import Protein, read_many

PAIRS = np.array([[1, 0], [2, 2], [3, 3]])


def hand_made(homology: float | None = 0.25) -> AlignedPair:
    """MKVLA and KGVLW: M alone, K-K, G alone, V-V, L-L, A alone, W alone."""
    plan = np.full((6, 6), 0.1)
    plan[PAIRS[:, 0], PAIRS[:, 1]] = 0.5, 1.0, 0.9
    return AlignedPair(("q", "k"), PairwiseAlignment.from_plan(("MKVLA", "KGVLW"), plan, PAIRS), plan, homology, 1.0)


def nothing() -> AlignedPair:
    alignment = PairwiseAlignment.from_plan(("AC", "W"), np.ones((3, 2)), np.zeros((0, 2), dtype=np.int64))
    return AlignedPair(("q", "k"), alignment, None, None, None)


def test_a_pair_in_every_format() -> None:
    pair = hand_made()
    assert cigar(pair) == "1M1D2M"
    row = dict(zip(TSV_COLUMNS, tsv(pair).rstrip("\n").split("\t"), strict=True))
    assert row == {
        "query": "q", "key": "k", "query_length": "5", "key_length": "5", "query_start": "2", "query_end": "4",
        "key_start": "1", "key_end": "4", "pairs": "3", "identical": "3", "similar": "3", "mean_confidence": "0.8000",
        "expected_accuracy": f"{(2 * 2.4 + 0.4) / 10:.4f}", "homology": "0.2500", "cigar": "1M1D2M",
    }  # fmt: skip
    assert paf(pair) == "q\t5\t1\t4\t+\tk\t5\t0\t4\t3\t4\t7\tcg:Z:1M1D2M\tcf:f:0.8000\thp:f:0.2500\n"
    assert fasta(pair) == ">q\nMK-VLA-\n>k\n-KGVL-W\n\n"
    assert a3m(pair) == ">k confidence=0.8000 homology=0.2500\n-KgVL-w\n"
    values = json.loads(json_line(pair))
    assert values["query_residues"] == [2, 3, 4] and values["key_residues"] == [1, 3, 4]
    assert values["confidence"] == [0.5, 1.0, 0.9] and values["homology"] == 0.25


def test_nothing_aligned_in_every_format() -> None:
    pair = nothing()
    assert tsv(pair) == "q\tk\t2\t1\t\t\t\t\t0\t0\t0\t0.0000\t1.0000\t\t\n"
    assert paf(pair) == "" and a3m(pair) == ">k confidence=0.0000\n--w\n"
    assert json.loads(json_line(pair))["homology"] is None


def proteins(*lengths: int) -> list[Protein]:
    return [Protein(f"p{number}", "", "M" * length, "") for number, length in enumerate(lengths)]


@pytest.mark.parametrize("most", [10**9, 60])
def test_all_against_all_is_every_pair_once(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(pair_lists, "CHUNK", 4)
    given = proteins(5, 9, 2, 9, 30, 1, 7)
    found = PairList.all_against_all(given, most)
    every = [p for p in itertools.combinations(range(7), 2) if np.prod([len(given[k].letters) for k in p]) <= most]
    chunks = list(found.chunks())
    assert sorted(map(tuple, np.concatenate(chunks).tolist())) == every
    assert (found.total, found.left_out) == (len(every), 21 - len(every))
    assert all(len(chunk) == 4 for chunk in chunks[:-1])
    for k in range(len(chunks)):  # from wherever it was stopped
        again = np.concatenate(list(found.chunks(4 * k)))
        assert again.tolist() == np.concatenate(chunks[k:]).tolist()
    assert list(found.chunks(found.total)) == []


def test_a_sequence_too_long_for_any_pair_is_left_out_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(align_many, "load_aligner", lambda path: (_ for _ in ()).throw(ValueError("far enough")))
    file = tmp_path / "some.fa"
    file.write_text(">a\nMKV\n>b\nMKVLAAGW\n>c\nMM\n")
    assert main(["align", str(file), "--pairs", "all", "--most-pairs", "6"]) == 1
    error = capsys.readouterr().err
    assert "left out: 2 of more than 6 pairs of residues" in error and error.endswith("error: far enough\n")


def test_the_first_against_the_rest_in_order_of_length() -> None:
    found = PairList.first_against_rest(proteins(5, 9, 2, 7), 40)
    assert np.concatenate(list(found.chunks())).tolist() == [[0, 2], [0, 3]] and found.left_out == 1


def test_pairs_of_a_table(tmp_path: Path) -> None:
    table = tmp_path / "pairs.tsv"
    table.write_text("# query\tkey\n\np2\tp0\np0 \tp1\np2\tp0\n")
    notes: list[str] = []
    found = PairList.from_table(str(table), proteins(5, 9, 2), 10**9, notes)
    assert np.concatenate(list(found.chunks())).tolist() == [[2, 0], [0, 1]]
    assert notes == [f"{table}: 1 pairs are named again; they are aligned once"]
    for text, message in (
        ("p0\tp1\np0 p1\n", f"{table}, line 2: 'p0 p1' is not two names with a tab between"),
        ("p0\t\x1bx\n", rf"{table}, line 1: no sequence is called '\\\\x1bx'"),
        ("query\tkey\np0\tp1\n", "line 1: no sequence is called 'query'; .* header, begin it with '#'"),
        ("# nothing\n", f"{table} names no pair"),
    ):
        table.write_text(text)
        with pytest.raises(ValueError, match=message):
            PairList.from_table(str(table), proteins(5, 9, 2), 10**9, [])


def test_names_are_made_different(tmp_path: Path) -> None:
    one, two = tmp_path / "one.fa", tmp_path / "two.fa"
    one.write_text(">a x\nMKV\n>a_2\nM\n>b\nMK-V\n")
    two.write_text(">a\nLLL\n>\x1b[31m\nMM\n")
    notes: list[str] = []
    found = read_many([str(one), str(two), "mkv"], notes)
    assert [protein.name for protein in found] == ["a", "a_2", "b", "a_3", "_[31m", "sequence_3"]
    assert notes[-1] == f"another sequence is called a; that of {two} is a_3"
    with pytest.raises(ValueError, match="holds no sequence"):
        two.write_text("")
        read_many([str(one), str(two)], [])


ABOUT = {"written_by": "examples.pfam align --pairs", "input": "x"}


def test_what_a_crash_left_is_cut_off(tmp_path: Path) -> None:
    with Results.open(tmp_path, ["tsv", "fasta"], ABOUT) as results:
        results.add([hand_made()])
        results.add([nothing(), hand_made()])
    tables = [(tmp_path / FORMATS[name].file) for name in ("tsv", "fasta")]
    whole, log = [table.read_bytes() for table in tables], (tmp_path / LOG).read_bytes()
    end = log.rstrip(b"\n").rfind(b"\n") + 1  # the last line's beginning
    for cut in (end, end + 1, len(log) - 1):
        (tmp_path / LOG).write_bytes(log[:cut])
        with Results.open(tmp_path, ["tsv", "fasta"], ABOUT) as results:
            assert results.done == 1
            results.add([nothing(), hand_made()])
        assert [table.read_bytes() for table in tables] == whole and (tmp_path / LOG).read_bytes() == log
    (tmp_path / LOG).write_bytes(log[: log.index(b"\n") + 1])  # before anything was done
    with Results.open(tmp_path, ["tsv", "fasta"], ABOUT) as results:
        assert results.done == 0
    assert tables[0].read_text() == "\t".join(TSV_COLUMNS) + "\n"


def test_what_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    def refused(formats: list[str], about: dict[str, str], message: str) -> None:
        with pytest.raises(FileExistsError, match=message), Results.open(tmp_path, formats, about):
            pass

    table = tmp_path / "alignments.tsv"
    table.write_text("mine")
    refused(["tsv"], ABOUT, r"alignments\.tsv is there without pairs\.log")
    table.unlink()
    with Results.open(tmp_path, ["tsv"], ABOUT) as results:
        results.add([hand_made()])
    refused(["tsv"], {**ABOUT, "input": "y"}, r"holds other results; .* \(input is not the same\)")
    refused(["tsv", "paf"], ABOUT, r"\(formats is not the same\)")
    before = table.read_bytes()
    table.write_bytes(before[:-3])
    refused(["tsv"], ABOUT, "bytes where")
    table.unlink()
    refused(["tsv"], ABOUT, "is missing")
    for notes in ("my own notes\n", "my own notes", "0123abcd my own", "\0\0mine"):
        (tmp_path / LOG).write_text(notes)
        refused(["tsv"], ABOUT, "was not written by this command; choose another --out")
        assert (tmp_path / LOG).read_text() == notes
    table.write_text("mine")
    for begun in ("", "0123ab", '0123abcd {"aligner": "', "\0\0\0"):  # as a crash may leave it
        (tmp_path / LOG).write_text(begun)
        refused(["tsv"], ABOUT, "is there without")
        assert table.read_text() == "mine"
    table.unlink()
    with Results.open(tmp_path, ["tsv"], ABOUT) as results:
        assert results.done == 0
    (tmp_path / LOG).unlink()
    (tmp_path / LOG).mkdir()
    refused(["tsv"], ABOUT, "was not written by this command")


def test_a_log_that_cannot_be_opened_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path) -> io.FileIO:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(many, "_opened", refused)
    message = r"cannot write to .*pairs\.log \(Permission denied\); choose another --out"
    with pytest.raises(OSError, match=message), Results.open(tmp_path, ["tsv"], ABOUT):
        pass


def test_two_runs_do_not_write_into_one_folder(tmp_path: Path) -> None:
    code = "import sys; from examples.common.files import lock; file = open(sys.argv[1]); print(lock(file))"
    other = [sys.executable, "-c", code, str(tmp_path / LOG)]
    with Results.open(tmp_path, ["tsv"], ABOUT) as results:
        results.add([hand_made()])
        before = (tmp_path / "alignments.tsv").read_bytes()
        with (
            pytest.raises(FileExistsError, match="another run is writing to --out"),
            Results.open(tmp_path, ["tsv"], ABOUT),
        ):
            pass
        assert (tmp_path / "alignments.tsv").read_bytes() == before
        assert subprocess.run(other, check=True, capture_output=True, text=True).stdout == "False\n"
    assert subprocess.run(other, check=True, capture_output=True, text=True).stdout == "True\n"


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Results.open(tmp_path, ["tsv", "fasta"], ABOUT) as results:
        results.add([hand_made()])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    size = max(map(len, before.values())) + 20  # in the midst of a row
    message = r"cannot write to --out .*; the 1 pairs that are there are kept: make room, and start it again to go on"
    try:
        with pytest.raises(OSError, match=message), Results.open(tmp_path, ["tsv", "fasta"], ABOUT) as results:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
            results.add([hand_made()] * 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "alignments.tsv").stat().st_size == size
    with Results.open(tmp_path, ["tsv", "fasta"], ABOUT) as results:
        assert results.done == 1
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    config = Config(dim=24)
    return str(save_release(Aligner(config), config, tmp_path_factory.mktemp("release") / "tiny.safetensors"))


def test_the_command_goes_on_where_it_was(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pair_lists, "CHUNK", 2)
    file, out = tmp_path / "some.fa", tmp_path / "out"
    file.write_text(">a\nMKVLAAGWWGHPDE\n>b\nMKVLAGHPDEACD\n>c\nMRVLAAGWW\n")
    options = ["--pairs", "all", "--format", "tsv,jsonl,fasta,paf", "--checkpoint", checkpoint, "--threads", "1"]
    arguments = ["align", str(file), "MKVLAGH", *options, "--out", str(out)]
    solve, calls = align_many.solve, []

    def stopping(*given: object, **more: object) -> object:
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return solve(*given, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(align_many, "solve", stopping)
    assert main(arguments) == 130
    capsys.readouterr()
    assert main(arguments) == 0
    text, notes = capsys.readouterr()
    assert "note: 2 of 6 pairs are in" in notes and text.startswith("aligned 4 pairs in")
    rows = [line.split("\t") for line in (out / "alignments.tsv").read_text().splitlines()[1:]]
    assert len({(row[0], row[1]) for row in rows}) == 6
    assert [json.loads(line)["names"] for line in (out / "alignments.jsonl").read_text().splitlines()] == [
        row[:2] for row in rows
    ]
    assert len(list(SeqIO.parse(out / "alignments.fasta", "fasta"))) == 12
    assert main(arguments) == 0
    assert "6 of 6 pairs are in" in capsys.readouterr().err and len(calls) == 4


@pytest.mark.slow
def test_one_against_many_as_a3m_and_as_the_command_for_two(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, two = tmp_path / "some.fa", tmp_path / "two"
    file.write_text(">a\nMKVLAAGWWGHPDE\n>b\nMKVLAGHPDEACD\n>c\nMRVLAAGWW\n")
    arguments = ["align", str(file), "--checkpoint", checkpoint, "--threads", "1", "--quiet"]
    many = ["--pairs", "first", "--format", "a3m,tsv", "--out", str(tmp_path / "out")]
    assert main([*arguments, *many]) == 0 and capsys.readouterr().out == ""
    records = list(SeqIO.parse(tmp_path / "out" / "alignments.a3m", "fasta"))
    assert [record.id for record in records] == ["a", "c", "b"]
    for record in records:
        assert sum(not letter.islower() for letter in str(record.seq)) == 14
    assert main([*arguments, "--out", str(two)]) == 0
    query, key = (str(record.seq) for record in SeqIO.parse(two / "alignment.fasta", "fasta"))
    row = "".join(b.lower() if a == "-" else b for a, b in zip(query, key, strict=True))
    assert row == str(records[2].seq)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pairs", "all", "--format", "xml"], "--format: 'xml' is none of tsv, jsonl, fasta, a3m, paf"),
        (["--pairs", "all", "--format", "a3m"], "goes with --pairs first alone"),
        (["--pairs", "absent.tsv"], "--pairs absent.tsv is neither all nor first nor a table that exists"),
        (["--pairs", "all", "--batch-size", "0"], "--batch-size must be at least 1"),
        (["--pairs", "all", "--most-pairs", "8"], "there is no pair to align: all are left out, see --most-pairs"),
        (["--pairs", "all", "--most-pairs", "8"], "note: left out: 1 of more than 8 pairs of residues; cut"),
        (["--pairs", ""], "--pairs '' is neither all nor first nor a table that exists"),
        (["--pairs", "/"], "--pairs / is neither all nor first nor a table that exists"),
        (["--pairs", "all", "--format", ""], "--format: '' is none of tsv, jsonl, fasta, a3m, paf"),
        (["--format", "tsv"], "--format is for many pairs; give --pairs too"),
    ],
)
def test_what_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(align_many, "load_aligner", None)  # calling it would be a TypeError
    monkeypatch.chdir(tmp_path)
    assert main(["align", "MKV", "MRV", *options]) == 1
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())
