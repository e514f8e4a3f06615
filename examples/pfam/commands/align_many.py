"""``align --pairs``: many proteins, all against all, one against the rest, or the pairs of a table."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from tqdm import tqdm

from examples.common.files import is_stream
from examples.common.settings import Range
from examples.common.text import clip, say, visible

from ..encodings import Encodings
from ..library import BATCH, Asked, solve
from ..many import Results, fingerprint
from ..pair_formats import FORMATS
from ..pair_lists import ALL, FIRST, PairList
from ..release import load_aligner
from ..sequences import Protein, count_of_pairs, read_many
from ..source import is_readable
from ..stockholm import shown

WHICH = (
    f"{ALL}, every two sequences of all files; {FIRST}, the first sequence against every other; or a table's path, "
    "lines of two names with a tab between"
)
_BATCH = Range(1, 100_000)
_NOTES = 10


def run(options: argparse.Namespace, folder: str) -> int:
    """Align what is not there yet; notes go to standard error."""
    formats = _formats("tsv" if options.format is None else options.format, options.pairs)
    batch = BATCH if options.batch_size is None else options.batch_size
    _BATCH.check("--batch-size", batch)
    notes: list[str] = []
    proteins = read_many(options.sequences, notes)
    pairs = _pairs(options.pairs, proteins, options.most_pairs, notes)
    if pairs.left_out:
        notes.append(
            f"left out: {pairs.left_out} of more than {count_of_pairs(options.most_pairs)} pairs of residues; "
            "cut long sequences, for example into domains, or see --most-pairs"
        )
    for note in notes[:_NOTES]:
        say(f"note: {note}", sys.stderr)
    if len(notes) > _NOTES:
        say(f"note: and {len(notes) - _NOTES} more of such notes", sys.stderr)
    if not pairs.total:
        why = "all are left out, see --most-pairs" if pairs.left_out else "give two or more sequences"
        raise ValueError(f"there is no pair to align: {why}")
    aligner = load_aligner(options.checkpoint)
    settings = {"aligner": aligner.digest(), "mode": options.mode, "decoder": options.decoder}
    heads = {"a3m": f">{proteins[0].name}\n{proteins[0].letters}\n"}
    with Results.open(folder, formats, fingerprint(pairs, settings), heads) as results:
        if results.done:
            say(f"note: {results.done} of {pairs.total} pairs are in {visible(folder)} already", sys.stderr)
        known, before, start = Encodings(), results.done, time.perf_counter()
        with tqdm(total=pairs.total, initial=before, desc="aligning", unit="pair", disable=options.quiet) as bar:
            for chunk in pairs.chunks(before):
                asked = [_asked(number, proteins, pair) for number, pair in enumerate(chunk.tolist())]
                found = []
                for _, pair in solve(aligner, asked, options.mode, options.decoder, batch, known=known):
                    found.append(pair)
                    bar.update()
                results.add(found)
        seconds = time.perf_counter() - start
    if not options.quiet:
        new = results.done - before
        speed = f" in {seconds:.1f} s, {new / max(seconds, 1e-9):.1f} a second" if new else ""
        say(f"aligned {new} pairs{speed}")
        for path in results.paths:
            say(f"wrote {path}")
    return 0


def _asked(number: int, proteins: Sequence[Protein], pair: Sequence[int]) -> Asked:
    query, key = (proteins[index] for index in pair)
    return Asked(number, (query.name, key.name), (query.letters, key.letters))


def _formats(names: str, pairs: str) -> list[str]:
    formats = list(dict.fromkeys(name.strip() for name in names.split(",")))
    for name in formats:
        if name not in FORMATS:
            raise ValueError(f"--format: {clip(visible(name))!r} is none of {', '.join(FORMATS)}")
    if "a3m" in formats and pairs != FIRST:
        raise ValueError(f"--format a3m holds what is aligned with one query, so it goes with --pairs {FIRST} alone")
    return formats


def _pairs(which: str, proteins: Sequence[Protein], most: int, notes: list[str]) -> PairList:
    if which == ALL:
        return PairList.all_against_all(proteins, most)
    if which == FIRST:
        return PairList.first_against_rest(proteins, most)
    if not is_readable(which):
        given = shown(which) or repr(which)
        raise FileNotFoundError(f"--pairs {given} is neither {ALL} nor {FIRST} nor a table that exists")
    if is_stream(which) and which == "-" and any(protein.source == "-" for protein in proteins):
        raise ValueError("standard input is read for the sequences; give the table another way")
    return PairList.from_table(which, proteins, most, notes)
