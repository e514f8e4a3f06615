"""What others wrote is text: shown, drawn and filed as such, and read from whatever can be read, within bounds."""

from __future__ import annotations

import argparse
import bz2
import contextlib
import gzip
import io
import itertools
import os
import random
import threading
from pathlib import Path

import numpy as np
import pytest
from Bio import SeqIO
from marks import slow_after
from matplotlib.figure import Figure

from examples.common.plots import legend, write
from examples.common.text import decoded, file_stems, say, visible
from examples.pfam import dataset, sequences, source, stockholm
from examples.pfam.alignment import PairwiseAlignment
from examples.pfam.alignment_picture import draw_alignment
from examples.pfam.cli import _parser, main
from examples.pfam.commands import release
from examples.pfam.commands.options import given_settings, keep_streams
from examples.pfam.config import Config
from examples.pfam.dataset import load_dataset, read_families
from examples.pfam.pairs import Pair, encode
from examples.pfam.plots import plot_plan
from examples.pfam.sequences import read_many, read_proteins
from examples.pfam.source import Budget, TooLargeError, UnlikelyError, lines
from examples.pfam.stockholm import StockholmError, read_stockholm

MARK = b"\xef\xbb\xbf"
HOSTILE = "a\x1b]0;owned\x07\x9b31m\u202eb\u2028c\x7f"
SHOWN = "a\\x1b]0;owned\\x07\\x9b31m\\u202eb\\u2028c\\x7f"


def stream(content: bytes) -> str:
    """The path of a pipe's reading end that holds ``content``."""
    reading, writing = os.pipe()

    def fill() -> None:
        with contextlib.suppress(BrokenPipeError), open(writing, "wb") as file:
            file.write(content)

    threading.Thread(target=fill, daemon=True).start()
    return f"/dev/fd/{reading}"


def test_what_cannot_be_seen_is_escaped_and_the_rest_left() -> None:
    assert visible(HOSTILE) == SHOWN
    assert visible(visible(HOSTILE)) == SHOWN
    for text in ("Heterocapsa\u00a0steinii", "\u00c5ngstr\u00f6m", "\u5de0", "a$_^\\{b}", "e\u0301", "\u3000"):
        assert visible(text) == text
    assert visible("a\nb\tc\rd", keep="\n\t") == "a\nb\tc\\rd"
    for code in [*range(32), *range(127, 160), 0xAD, *range(0x200B, 0x2010), *range(0x202A, 0x202F), 0xFEFF, 0xDC85]:
        assert visible(chr(code)).isascii() and visible(chr(code)).isprintable(), hex(code)


def test_utf8_where_it_is_that_and_latin1_elsewhere() -> None:
    assert decoded("\u00e5\u00c5".encode().decode("latin-1")) == "\u00e5\u00c5"  # bytes 85 and A5
    assert decoded("M\xfcller") == "M\xfcller"
    assert decoded("\xc2\x9b") == "\\x9b"  # a control character in UTF-8


@pytest.mark.parametrize(
    "name",
    ["\u00c5ngstr\u00f6m_1/1-2", "Heterocapsa\u00a0steinii", "Epichlo\u00eb", "\u5de0/1-2", "\u0420\u0430\u0430\u0425"],
)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_names_with_any_bytes_are_whole(tmp_path: Path, name: str, end: str) -> None:
    path = tmp_path / "x.sto"
    text = end.join(["# STOCKHOLM 1.0", f"#=GF ID {name}", f"{name} MK", "b MR", "//", ""])
    for encoding in ("utf-8", "latin-1"):
        try:
            path.write_bytes(text.encode(encoding))
        except UnicodeEncodeError:
            continue
        (found,) = read_stockholm(path)
        assert (found.name, found.names) == (name, (name, "b"))
        (family,) = read_families(str(path), stream_from=0, cache=tmp_path / "cache")  # through a store
        assert [chain.name for chain in family.sequences] == [name, "b"]


def test_a_byte_order_mark_anywhere_a_file_begins(tmp_path: Path) -> None:
    record = MARK + b"# STOCKHOLM 1.0\na MK\nb MR\n//\n"
    fasta = MARK + b">a\nMK\n" + MARK + b">b\nMR\n"
    for packed in (bytes, gzip.compress):
        (tmp_path / "x.sto").write_bytes(packed(record) + packed(record))
        assert [found.names for found in read_stockholm(tmp_path / "x.sto")] == [("a", "b")] * 2
        (tmp_path / "x.fa").write_bytes(packed(fasta))
        assert [protein.name for protein in read_proteins([str(tmp_path / "x.fa")], [])] == ["a", "b"]
    (tmp_path / "x.sto").write_text("# STOCKHOLM 1.0\na MK\n//\n", encoding="utf-16")
    with pytest.raises(StockholmError, match=r"x\.sto:1: text in UTF-16; save it in UTF-8"):
        list(read_stockholm(tmp_path / "x.sto"))


def test_a_stop_codon_fills_a_column_and_is_no_residue(tmp_path: Path) -> None:
    path = tmp_path / "x.sto"
    path.write_text("# STOCKHOLM 1.0\na MK*VL*\nb MRAVL-\n//\n")
    (record,) = read_stockholm(path)
    assert record.rows == ("MK*VL*", "MRAVL-")
    (family,) = read_families(str(path))
    assert [chain.columns.tolist() for chain in family.sequences] == [[0, 1, 3, 4], [0, 1, 2, 3, 4]]


def test_fasta_headers_become_plain_names(tmp_path: Path) -> None:
    path = tmp_path / "x.fa"
    notes: list[str] = []
    path.write_bytes(f"> {HOSTILE}  two \x1b[2J words\nMKV\n>//\u00c5\u00a0x\ty\nMKV\n".encode())
    first, second = read_proteins([str(path)], notes)
    assert (first.name, first.description) == ("a_]0;owned__31m_b_c_", "two \\x1b[2J words")
    assert (second.name, second.description) == ("\u00c5_x", "y")


@pytest.mark.slow
def test_escapes_reach_neither_terminal_nor_files(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    sequence = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ"
    path, out = tmp_path / "a\x1b[31m.fa", tmp_path / "out"
    path.write_text(f">a x{HOSTILE}\n{sequence}\n>b{HOSTILE}\n{sequence}\n>c\nM\n")
    assert main(["align", str(path), "--out", str(out)]) == 0
    text, notes = capfdbinary.readouterr()
    assert b"a\\x1b[31m.fa holds 3 sequences" in notes
    written = b"".join((out / name).read_bytes() for name in ("alignment.fasta", "alignment.sto", "alignment.json"))
    for output in (text, notes, written):
        assert not any(code in output for code in (b"\x1b", b"\x07", b"\xc2\x9b", "\u202e".encode(), b"\x7f"))
    again = list(SeqIO.parse(out / "alignment.fasta", "fasta"))
    assert [str(found.seq) for found in again] == [sequence] * 2 and len({found.id for found in again}) == 2
    assert again[0].description == f"a x{SHOWN}"

    (tmp_path / "a.sto").write_text("# STOCKHOLM 1.0\na\x1b[31m ACD\nb AC\n//\n")
    for arguments in (
        ["evaluate", "--data", str(tmp_path / "a.sto")],
        ["evaluate", "--data", "absent\x1b[31m\nerror: forged"],
        ["evaluate", "absent\x1b[31m"],
        ["evaluate", "absent\x1b[31m.safetensors"],
        ["align", "\x1b[31m", "MKV"],
        ["train", "--resume", "absent\x1b[31m"],
        ["release", "absent\x1b[31m"],
    ):
        assert main([*arguments, *([] if "--resume" in arguments else ["--out", str(tmp_path / "r.safetensors")])]) == 1
        text, error = capfdbinary.readouterr()
        assert b"\x1b" not in text + error and error.startswith(b"error: ") and error.count(b"\n") == 1, error
    with pytest.raises(SystemExit):
        main(["align", "MKV", "MRV", "--\x1b[31m"])
    assert b"\x1b" not in capfdbinary.readouterr().err


NAMES = ["lcl|$\\frac$x", "p$_$a", "x_{1}", "_hidden", "\\", "^", "$", "\u5de0", "n" * 5000]


@pytest.mark.slow
@pytest.mark.parametrize("name", slow_after(1, ["_$\\frac$x_{1}^\u5de0", "n" * 5000]))
def test_pictures_of_any_name_can_be_drawn(name: str, tmp_path: Path) -> None:
    identical = np.array([[0, 0], [1, 1]])
    plan = np.full((3, 3), 0.5)
    alignment = PairwiseAlignment.from_plan(("AC", "AC"), plan, identical)
    assert draw_alignment(alignment, plan, (name, name)).startswith(b"\x89PNG")
    plot_plan(Pair(name, (name, name), encode("AC"), encode("AC"), identical), plan, tmp_path / "x.png")


def test_names_are_drawn_as_they_are() -> None:
    axes = Figure().subplots()
    for index, _ in enumerate(NAMES):
        axes.plot([0, index], label=f"artist {index}")
    legend(axes, NAMES)
    drawn = axes.get_legend().get_texts()
    for name, text in zip(NAMES, drawn, strict=True):
        write(axes.xaxis.label, name)
        for artist in (text, axes.xaxis.label):
            assert artist.get_text() == (name if len(name) <= 80 else f"{name[:77]}...")
            assert not artist.get_parse_math() and not artist.get_usetex()


def test_file_names_stay_in_their_folder_and_apart() -> None:
    names = ["fn3", "../../etc/passwd", "..", "", "a/b", "a_b", "A_B", "con", "n" * 300, "n" * 301, "\u5de0", "\x00"]
    stems = file_stems(names)
    assert stems[0] == "fn3" and len({stem.casefold() for stem in stems}) == len(names)
    for stem in stems:
        assert stem == Path(stem).name and 0 < len(stem) < 100 and stem.isascii() and stem not in (".", "..", "con")


def test_pipes_are_files_that_are_read_once(tmp_path: Path) -> None:
    fasta, record = b">a\nMKV\n>b\nMRV\n", b"# STOCKHOLM 1.0\na MKTAYIAKQR\nb MKTAYIAKQR\n//\n"
    for packed in (bytes, gzip.compress):
        assert [p.letters for p in read_proteins([stream(packed(fasta))], [])] == ["MKV", "MRV"]
        assert [p.letters for p in read_proteins([stream(packed(fasta)), "MMM"], [])] == ["MKV", "MMM"]
        assert len(read_families(stream(packed(record)))) == 1
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    threading.Thread(target=lambda: fifo.write_bytes(record), daemon=True).start()
    assert [len(family.sequences) for family in read_families(str(fifo))] == [2]
    one = stream(fasta)
    with pytest.raises(ValueError, match="can be read only once; give it once"):
        read_proteins([one, one], [])
    if os.geteuid() != 0:
        (tmp_path / "locked").touch(mode=0)
        with pytest.raises(OSError, match=r"cannot read .*locked \(Permission denied\)"):
            read_proteins([str(tmp_path / "locked"), "MKV"], [])


def test_standard_input_is_read_once_though_it_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "two.fa"
    file.write_text(">a\nMKV\n>b\nMKVL\n")
    kept = os.dup(0)
    try:
        with open(file, "rb") as given:
            os.dup2(given.fileno(), 0)
        with pytest.raises(ValueError, match="standard input can be read only once; give it once, with both"):
            read_proteins(["-", "-"], [])
        assert main(["align", "-", "--pairs", "-", "--out", str(tmp_path / "out")]) == 1
        assert "standard input is read for the sequences" in capsys.readouterr().err
    finally:
        os.dup2(kept, 0)
        os.close(kept)


@pytest.mark.parametrize(
    "arguments",
    [
        ["evaluate", "--data", ""],
        ["evaluate", "--out", ""],
        ["evaluate", "--program-results", ""],
        ["flanks", "--data", ""],
        ["train", "--eval-data", ""],
        ["ablate", "--cache", ""],
        ["release", "run", "--out", ""],
    ],
)
def test_an_empty_path_is_no_path(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        status = main(arguments)
    except SystemExit as error:
        status = error.code  # type: ignore[assignment]
    assert status in (1, 2) and not list(tmp_path.iterdir())
    assert f"{arguments[-2]}" in (error := capsys.readouterr().err) and "is empty; name a file or a folder" in error


def test_a_run_keeps_what_came_through_a_pipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = random.Random(0)
    rows = ["".join(rng.choices("ACDEFGHIKLMNPQRSTVWY", k=40)) for _ in range(4)]
    record = "# STOCKHOLM 1.0\n#=GF ID {}\n" + "".join(f"s{k} {row}\n" for k, row in enumerate(rows)) + "//\n"
    text = "".join(record.format(f"F{k}") for k in range(4)).encode()
    parser = _parser()

    def options(command: str, *arguments: str) -> argparse.Namespace:
        return parser.parse_args([command, "--cache", str(tmp_path / "cache"), "--max-text", "1", *arguments])

    for command in ("train", "ablate"):
        given = options(command, "--data", stream(text))
        keep_streams(given)
        (kept,) = (tmp_path / "cache").iterdir()
        assert kept.read_bytes() == text and given.data == str(kept)
        assert f"is kept as {kept}, for it is read again" in capsys.readouterr().err
        for _ in range(2):  # as a run that goes on does
            assert len(load_dataset(given_settings(given, Config())).train) == 3
    twice = stream(text)
    given = options("train", "--data", twice, "--eval-data", twice)
    keep_streams(given)
    assert given.data == given.eval_data == str(kept)
    with pytest.raises(ValueError, match=r"--data /dev/fd/.* is a pipe, which 2 processes cannot share"):
        keep_streams(options("train", "--data", stream(text)), processes=2)
    with pytest.raises(ValueError, match="holds more than 1 MB of text, unpacked; --max-text allows more"):
        keep_streams(options("train", "--data", stream(b"x" * 1_000_001)))
    assert list((tmp_path / "cache").iterdir()) == [kept]


def test_what_grows_is_stopped_while_it_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "UNSUSPICIOUS", 100_000)
    monkeypatch.setattr(source, "LONGEST_LINE", 1_000_000)
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(b">a\n" + b"A" * 4_000_000, 9)[:-1000])  # read to its end it would be damaged
    with pytest.raises(ValueError, match=r"bomb\.gz: a line of more than 1 million characters; expected FASTA"):
        read_proteins([str(path), "MKV"], [])
    path.write_bytes(gzip.compress(b">a\n" + b"A\n" * 4_000_000, 9)[:-1000])
    with pytest.raises(ValueError, match=r"bomb\.gz: 0\.0 MB of gzip data grow to more than .*with gunzip first"):
        read_proteins([str(path), "MKV"], [], longest=10**7)
    for text in (b"MK\n" * 1000, b">a\n" + b"MK\n" * 1000, b">a\nMKV\n>b\n" + b"MK\n" * 1000):
        path.write_bytes(text)
        with pytest.raises(ValueError, match="more than 1999 letters"):
            read_proteins([str(path)], [], longest=1999)
    path.write_bytes(b">a\nMKV\n>b\n" + b"M" * 100_001)
    with pytest.raises(ValueError, match="more than 100000 letters in sequence 2, more than any known protein has"):
        read_many([str(path)], [])
    with pytest.raises(ValueError, match="sequence 2 has more than 100000 residues"):
        read_proteins(["MKV", "M" * 100_001], [])
    monkeypatch.setattr(sequences, "_LOOK_ON", 100)
    path.write_bytes(b">a\nMKV\n>b\nMKV\n" + b">c\nMKVMKVMKV\n" * 1000)
    notes: list[str] = []
    read_proteins([str(path)], notes)
    assert notes == [f"{path} holds 12 or more sequences; the first 2 will be aligned"]
    path.write_bytes(bz2.compress(b">a\nMKV\n"))
    with pytest.raises(ValueError, match=r"bzip2 data; plain text and gzip are read, or a pipe: <\(bzcat FILE\)"):
        read_proteins([str(path), "MKV"], [])
    with pytest.raises(ValueError, match="a line of more than 1 million characters"):
        read_proteins(["/dev/zero", "MKV"], [])


def test_stockholm_is_bounded_in_all_and_in_each_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = "# STOCKHOLM 1.0\n" + "".join(f"s{k} {'MKV' * 100}\n" for k in range(400)) + "//\n"
    path = tmp_path / "x.sto"
    path.write_text(record * 10)
    assert len(list(read_stockholm(path, max_text=1.3, max_record=0.2))) == 10
    with pytest.raises(StockholmError, match=r"more than 1 MB of text, unpacked; expected less .*--max-text"):
        list(read_stockholm(path, max_text=1, max_record=1))
    with pytest.raises(StockholmError, match=r"the record of line 1 exceeds 0\.1 MB; .*--max-text"):
        list(read_stockholm(path, max_text=0.8))
    monkeypatch.setattr(dataset, "_IN_MEMORY", 1)  # beyond that from disk, with the same result
    (stored, *_) = found = read_families(str(path), stream_from=0.9, cache=tmp_path / "cache", max_text=20)
    assert len(found) == 10 and not isinstance(stored.sequences, tuple)
    packed = tmp_path / "x.sto.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    (stored, *_) = found = read_families(str(packed), stream_from=1, cache=tmp_path / "cache", max_text=20)
    assert len(found) == 10 and not isinstance(stored.sequences, tuple)
    with pytest.raises(
        ValueError, match="holds more than 1 MB of text, too much to read from a pipe; write it to a file"
    ):
        read_families(stream(path.read_bytes()), stream_from=1, max_text=20)
    monkeypatch.setattr(stockholm, "LONGEST_LINE", 299)
    with pytest.raises(StockholmError, match="300 columns; expected 299 at most"):
        list(read_stockholm(path))


def test_budgets_are_of_all_files_together(tmp_path: Path) -> None:
    budget = Budget(0.001)
    (tmp_path / "a").write_text("x" * 600)
    assert len(list(lines(tmp_path / "a", budget))) == 1
    with pytest.raises(TooLargeError, match=r"more than 0\.001 MB of text"):
        list(lines(tmp_path / "a", budget))
    (tmp_path / "a").write_bytes(b"PK\x03\x04...")
    with pytest.raises(UnlikelyError, match="zip data"):
        list(lines(tmp_path / "a"))


def test_nucleotides_are_noticed_by_every_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = random.Random(0)
    path = tmp_path / "x.sto"
    rows = ["".join(rng.choices("ACGU", k=38)) + "RN" for _ in range(4)]
    record = "# STOCKHOLM 1.0\n#=GF ID 5S_rRNA\n#=GF AC RF00001\n"
    path.write_text(record + "".join(f"s{k} {row[:20]}--{row[20:].lower()}\n" for k, row in enumerate(rows)) + "//\n")
    note = "note: 1 of 1 alignments looks like nucleotides (5S_rRNA (RF00001)), but is read as residues; translate"
    for stream_from in (16, 0):  # from memory and from a store
        assert [family.nucleotides for family in read_families(str(path), stream_from, cache=tmp_path / "c")] == [True]
    options = ["--data", str(path), "--quiet", "--out", str(tmp_path / "out")]
    assert main(["evaluate", *options, "--gap-grid"]) == 0
    assert note in capsys.readouterr().out
    for text in (load_dataset(Config(eval_data=str(path))).summary(), load_dataset(Config(data=str(path))).summary()):
        assert text.count("looks like nucleotides (5S_rRNA (RF00001))") == 1
    assert "nucleotides" not in load_dataset(Config()).summary()
    notes: list[str] = []
    read_proteins([rows[0], "ACGTRRKKMMSS"], notes)
    assert len(notes) == 1 and notes[0].startswith("sequence 1 looks like nucleotides, but is read as residues")


def test_without_a_reader_the_end_is_quiet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(release, "run", lambda options: say("text" * 10_000) or 0)
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as output, monkeypatch.context() as patch:
        patch.setattr("sys.stdout", output)
        status = main(["release", "run"])
        output.write("nobody will miss this")  # nor complain, when the file is closed
    assert (status, capfd.readouterr().err) == (141, "")


def test_letters_that_the_terminal_has_not_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    output = io.BytesIO()
    monkeypatch.setattr(release, "run", lambda options: say("a\u5de0") or 0)
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(output, encoding="ascii"))
    assert main(["release", "run"]) == 0 and output.getvalue() == b"a\\u5de0\n"


@pytest.mark.parametrize(
    "fault", [MemoryError(), RuntimeError("can't allocate memory: you tried"), OverflowError("a"), RecursionError("b")]
)
def test_what_a_user_can_cause_ends_in_a_sentence(
    fault: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(options: object) -> int:
        raise fault

    monkeypatch.setattr(release, "run", fail)
    assert main(["release", "run"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


def test_every_pair_of_blanks_and_bytes_in_a_name(tmp_path: Path) -> None:
    path = tmp_path / "x.sto"
    for first, second in itertools.product((0x80, 0x85, 0xA0, 0xAD, 0xC2, 0xE3, 0xFF), repeat=2):
        name = b"n" + bytes((first, second)) + b"m"
        path.write_bytes(b"# STOCKHOLM 1.0\n" + name + b" MK\nb MR\n//\n")
        (record,) = read_stockholm(path)
        assert record.rows == ("MK", "MR") and record.names[0].startswith("n") and record.names[0].endswith("m")
