"""The Stockholm reader: what it accepts, and that every kind of damage is named with file and line."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from examples.pfam.config import HELDOUT_SAMPLE, TRAIN_SAMPLE
from examples.pfam.stockholm import StockholmError, read_stockholm, stockholm_files

PLAIN = """# STOCKHOLM 1.0
#=GF ID   One
#=GF AC   PF00001.2
#=GF SQ   2
#=GS a/1-4  AC P1.1

a/1-4         AC-dE
#=GR a/1-4 SS HHHHH
b/1-3         ..CDE
#=GC SS_cons  HHHHH
//
"""

INTERLEAVED = """# STOCKHOLM 1.0
#=GF ID   Two

a  ACDE
b  A-DE

a  FG
b  .G
//
"""


def write(folder: Path, text: str, name: str = "x.sto") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_plain_record(tmp_path: Path) -> None:
    (record,) = read_stockholm(write(tmp_path, PLAIN))
    assert (record.name, record.accession) == ("One", "PF00001.2")
    assert record.names == ("a/1-4", "b/1-3")
    assert record.rows == ("AC-dE", "..CDE")
    assert record.source.endswith("x.sto:1")


def test_interleaved_blocks_are_joined(tmp_path: Path) -> None:
    (record,) = read_stockholm(write(tmp_path, INTERLEAVED))
    assert record.rows == ("ACDEFG", "A-DE.G")
    assert record.accession == ""


def test_a_blank_line_inside_a_block_does_not_start_another(tmp_path: Path) -> None:
    text = "# STOCKHOLM 1.0\n#=GF ID X\na ACD\n\nb AC-\n//\n"
    (record,) = read_stockholm(write(tmp_path, text))
    assert record.rows == ("ACD", "AC-")


def test_several_records_keep_their_order_and_lines(tmp_path: Path) -> None:
    records = list(read_stockholm(write(tmp_path, PLAIN + "\n" + INTERLEAVED)))
    assert [record.name for record in records] == ["One", "Two"]
    assert records[1].source.endswith(":13")


def test_records_without_an_id_are_named_after_their_file_and_line(tmp_path: Path) -> None:
    text = "# STOCKHOLM 1.0\na AC\nb AC\n//\n"
    records = read_stockholm(write(tmp_path, text + text, "PF05371.seed.txt"))
    assert [record.name for record in records] == ["PF05371", "PF05371:5"]


def test_gzip_is_recognised_by_content_not_by_name(tmp_path: Path) -> None:
    path = tmp_path / "no-suffix"
    path.write_bytes(gzip.compress(PLAIN.encode()))
    assert next(read_stockholm(path)).name == "One"


def test_bytes_outside_ascii_are_fine_in_comments(tmp_path: Path) -> None:
    path = tmp_path / "x.sto"
    path.write_bytes(PLAIN.replace("#=GF SQ   2", "#=GF AU   M\u00fcller\n#=GF SQ   2").encode("latin-1"))
    assert next(read_stockholm(path)).name == "One"


def test_directory_reads_every_stockholm_file_sorted(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path, INTERLEAVED, "b.sto")
    write(tmp_path, PLAIN, "a.stk")
    write(tmp_path, "not an alignment", "notes.md")
    (tmp_path / "sub" / "c.seed.gz").write_bytes(gzip.compress(PLAIN.encode()))
    assert [p.name for p in stockholm_files(tmp_path)] == ["a.stk", "b.sto", "c.seed.gz"]
    assert [record.name for record in read_stockholm(tmp_path)] == ["One", "Two", "One"]


def test_reading_is_lazy(tmp_path: Path) -> None:
    records = read_stockholm(write(tmp_path, PLAIN + "garbage\n"))
    assert next(records).name == "One"
    with pytest.raises(StockholmError, match=r"x\.sto:12"):
        next(records)


HEADER = "# STOCKHOLM 1.0\n"
MALFORMED = {
    "no header": ("a ACD\n//\n", 1, "a record starts with 'a ACD'"),
    "another format": ("\n>a\nACD\n", 2, "expected '# STOCKHOLM 1.0'"),
    "version": ("# STOCKHOLM 2.0\na A\n//\n", 1, "unknown version"),
    "no end": (HEADER + "a ACD\nb ACD\n", 3, "ends inside the record of line 1"),
    "header twice": (HEADER + "a ACD\n" + HEADER + "b ACD\n//\n", 3, "a header inside a record"),
    "empty record": (HEADER + "#=GF ID X\n//\n", 3, "without sequences"),
    "name only": (HEADER + "a\n//\n", 2, "1 field(s)"),
    "three fields": (HEADER + "a ACD EFG\n//\n", 2, "3 field(s)"),
    "bad character": (HEADER + "a ACD\nb A1D\n//\n", 3, "character '1' in the row of b"),
    "ragged": (HEADER + "a ACD\nb ACDE\n//\n", 3, "the row of b has 4 columns; expected 3"),
    "ragged in block two": (HEADER + "a AC\nb AC\n\na DE\nb D\n//\n", 6, "the row of b has 3 columns"),
    "duplicate name": (HEADER + "a ACD\na ACD\n//\n", 3, "a second row of a in one block"),
    "new name in block two": (HEADER + "a AC\nb AC\n\na DE\nc DE\n//\n", 6, "c appears first in block 2"),
    "missing in block two": (HEADER + "a AC\nb AC\n\na DE\n//\n", 3, "the row of b has 2 columns"),
    "unknown markup": (HEADER + "#=XX foo\na AC\n//\n", 2, "unknown markup '#=XX'"),
    "no value": (HEADER + "#=GF ID\na AC\n//\n", 2, "'#=GF ID' without a value"),
    "two ids": (HEADER + "#=GF ID X\n#=GF ID Y\na AC\n//\n", 3, "a second '#=GF ID'"),
    "count is no number": (HEADER + "#=GF SQ many\na AC\n//\n", 2, "'#=GF SQ' is 'many'"),
    "count is wrong": (HEADER + "#=GF SQ 3\na AC\nb AC\n//\n", 5, "2 sequences in the record; expected 3"),
    "empty file": ("", 1, "no record in the file"),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_input_is_refused_with_file_and_line(tmp_path: Path, kind: str) -> None:
    text, line, message = MALFORMED[kind]
    path = write(tmp_path, text, "bad.sto")
    with pytest.raises(StockholmError) as caught:
        list(read_stockholm(path))
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert message in str(caught.value)
    assert "; expected " in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_damaged_gzip_is_a_stockholm_error(tmp_path: Path, damage: str) -> None:
    packed = bytearray(gzip.compress(PLAIN.encode() * 50))
    packed = packed[:-12] if damage == "truncated" else packed[:-6] + bytes([packed[-6] ^ 255]) + packed[-5:]
    path = tmp_path / "bad.sto.gz"
    path.write_bytes(packed)
    with pytest.raises(StockholmError, match=r"bad\.sto\.gz:\d+: damaged gzip data"):
        list(read_stockholm(path))


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no Stockholm file or directory"):
        list(read_stockholm(tmp_path / "absent.sto"))
    with pytest.raises(FileNotFoundError, match="no file ending in"):
        list(read_stockholm(tmp_path))


def test_the_shipped_sample_parses() -> None:
    train, heldout = list(read_stockholm(TRAIN_SAMPLE)), list(read_stockholm(HELDOUT_SAMPLE))
    assert {record.name: len(record.rows) for record in heldout} == {"fn3": 98, "COX2_TM": 11, "ArsP_1": 11}
    assert sum(len(record.rows) for record in train) == 170
    assert all(record.accession.startswith("PF") for record in (*train, *heldout))
    assert not {record.accession for record in train} & {record.accession for record in heldout}
    assert HELDOUT_SAMPLE.stat().st_size + TRAIN_SAMPLE.stat().st_size < 400_000
