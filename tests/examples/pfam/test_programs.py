"""Installed aligners beside ours, with small programs that stand in for them."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from examples.pfam.commands.evaluate import _programs
from examples.pfam.comparison import compare
from examples.pfam.comparison_tables import as_values, report
from examples.pfam.pairs import Pair, encode
from examples.pfam.program_results import ProgramResults, align_program, check_program_results, remembered
from examples.pfam.programs import MOST_FAILURES, PROGRAMS, Installed, ProgramError, find

PAIR = Pair("F", ("first", "second"), encode("MKVLA"), encode("MKLA"), np.array([[0, 0], [1, 1], [3, 2], [4, 3]]))
ALIGNED = ">b x\nMK-La\n>a\nmkVLA\n"


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return folder


def program(folder: Path, name: str, body: str) -> None:
    file = folder / name
    file.write_text(f"#!{sys.executable} -S\nimport os, sys, time\narguments = sys.argv[1:]\n{body}\n")
    file.chmod(0o755)


def printing(text: str, version: str = "fake version 1.4") -> str:
    return f"sys.stdout.write({text!r} if 'pair.fasta' in arguments else {version!r})"


def installed(folder: Path, body: str) -> Installed:
    program(folder, "probcons", body)
    return Installed(PROGRAMS["probcons"], str(folder / "probcons"), "1.4")


def test_what_is_installed_is_found_with_its_version(path: Path) -> None:
    program(path, "probcons", printing(ALIGNED))
    program(path, "muscle", "sys.stderr.write('MUSCLE v3.8.1551 by Robert C. Edgar')")
    program(path, "kalign", "print('no number here')")
    found, notes = find()
    assert [one.label for one in found] == ["ProbCons (1.4)", "Kalign (unknown)"]
    assert notes == [
        f"MUSCLE 5 is left out: {path}/muscle says version 3.8.1551",
        "not installed, so not compared: Probalign, Clustal Omega, MAFFT L-INS-i, MAFFT G-INS-i",
    ]
    assert [one.program.name for one in _programs("probcons , kalign")[0]] == ["ProbCons", "Kalign"]
    assert _programs("none") == ([], [])
    with pytest.raises(ValueError, match="Probalign is not installed: no probalign on the PATH"):
        _programs("probalign")
    with pytest.raises(ValueError, match=r"--programs: 'tcoffee' is none of probalign, probcons"):
        _programs("tcoffee")


def test_a_pair_is_aligned_in_an_empty_folder_that_is_removed(path: Path, tmp_path: Path) -> None:
    body = "assert os.listdir() and open('pair.fasta').read() == '>a\\nMKVLA\\n>b\\nMKLA\\n', 'input'\n"
    found = installed(path, body + "open('junk', 'w')\n" + printing(ALIGNED)).align(PAIR)
    assert found.tolist() == [[0, 0], [1, 1], [3, 2], [4, 3]]
    assert os.listdir(tmp_path) == ["bin"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("sys.exit('first line\\nout of \\x1b memory')", r"ended with status 1: out of \\x1b memory"),
        ("os.kill(os.getpid(), 11)", "was ended by signal 11"),
        ("print('nonsense')", "wrote 0 sequences"),
        ("print('>a\\nMKVLA\\n>b\\nMK')", "other than those"),
        ("print('>a\\nMKVLA\\n>b\\nMKLA')", "rows of 5 and 4 columns"),
        ("print('x' * 2_000_000)", "wrote 2000001 bytes"),
    ],
)
def test_what_goes_wrong_is_said(path: Path, body: str, message: str) -> None:
    with pytest.raises(ProgramError, match=message):
        installed(path, body).align(PAIR)


def test_a_program_that_hangs_is_stopped_with_all_it_started(path: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    hanging = installed(path, f"if os.fork() == 0:\n  time.sleep(0.6)\n  open({str(mark)!r}, 'w')\ntime.sleep(60)")
    with pytest.raises(ProgramError, match=r"took more than 0\.2 s and was stopped"):
        hanging.align(PAIR, 0.2)
    time.sleep(0.7)
    assert not mark.exists()
    with pytest.raises(ProgramError, match="cannot be started"):
        Installed(PROGRAMS["probcons"], str(path / "absent"), "").align(PAIR)


def test_programs_stand_in_every_table(path: Path) -> None:
    good = installed(path, printing(ALIGNED))
    comparison = compare({}, [PAIR] * 2, progress=False, programs=[good])
    assert comparison.programs == ["ProbCons (1.4)"]
    assert [result.values["f1"] for result in comparison.results["ProbCons (1.4)"]] == [1.0, 1.0]
    text = report(comparison)
    assert text.count("ProbCons (1.4)") == 3 and "seconds a pair" in text
    assert as_values(comparison)["ProbCons (1.4)"]["seconds_a_pair"]["wall"] > 0


def test_failures_count_as_nothing_aligned_until_there_are_too_many(path: Path, tmp_path: Path) -> None:
    once = f"mark = {str(tmp_path / 'once')!r}\nif not os.path.exists(mark):\n  open(mark, 'w')\n  sys.exit('no')\n"
    comparison = compare({}, [PAIR] * 3, progress=False, programs=[installed(path, once + printing(ALIGNED))])
    assert [result.values["f1"] for result in comparison.results["ProbCons (1.4)"]] == [0.0, 1.0, 1.0]
    assert comparison.notes == [
        "ProbCons (1.4) failed on 1 of 3 pairs, which count as nothing aligned; first and second: it ended with "
        "status 1: no"
    ]
    broken = installed(path, "sys.exit(3)")
    comparison = compare({}, [PAIR] * (MOST_FAILURES + 1), progress=False, programs=[broken])
    assert comparison.programs == [] and "ProbCons (1.4)" not in comparison.results
    assert report(comparison).count("ProbCons (1.4) is left out after 5 failures; first and second: it ended") == 1


def test_what_programs_found_is_kept_for_the_same_version_and_pairs(path: Path, tmp_path: Path) -> None:
    one, file = installed(path, printing(ALIGNED)), tmp_path / "found.jsonl"
    other = replace(PAIR, key=encode("MKIA"))
    calls: list[str] = []

    def run(of: Installed, pair: Pair) -> ProgramResults:
        def ask() -> ProgramResults:
            calls.append(of.label)
            return align_program(of, [pair], 20.0, lambda: (0.5 * len(calls), 0.25))

        return remembered(file, of, [pair], 20.0, ask)

    first, again = run(one, PAIR), run(one, PAIR)
    assert first.found is not None and again.found is not None
    np.testing.assert_array_equal(again.found[0], first.found[0])
    assert (again.seconds, again.failures, calls) == (first.seconds, first.failures, [one.label])
    for _ in range(2):  # it writes another sequence
        assert run(one, other).failures.count == 1 and calls == [one.label] * 2
    run(replace(one, version="1.5"), PAIR)
    assert calls == [one.label, one.label, "ProbCons (1.5)"]
    whole = file.read_bytes()
    for text, message in ((whole[:-9], "line 3 was cut off; remove it"), (b"my notes\n", "was not written by this")):
        file.write_bytes(text)
        with pytest.raises(ValueError, match=message):
            check_program_results(file)
    with pytest.raises(ValueError, match="is no file; choose another name"):
        check_program_results(tmp_path)
    with pytest.raises(OSError, match=r"cannot write to --program-results .* \(No such file or directory\)"):
        check_program_results(tmp_path / "absent" / "file")
    assert file.read_bytes() == b"my notes\n"
