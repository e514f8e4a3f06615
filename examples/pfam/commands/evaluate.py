"""``evaluate``: trained aligners beside the baselines, on any alignments."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from examples.common.files import CHECKPOINT, REPORT, prepare_folder, replace_text
from examples.common.settings import Range, add_quiet
from examples.common.text import file_stems, say, visible

from ..comparison import Comparison, compare
from ..comparison_plots import plot_errors, plot_reliability
from ..comparison_tables import as_values, report
from ..config import Config
from ..dataset import in_brief, load_dataset, nucleotide_notes, read_families
from ..decode import DECODERS, DEFAULT_DECODER
from ..device import open_device
from ..flank_report import CAP, FlankReport, NoFlankTest, flank_report
from ..gap_grid import gap_grid, grid_table
from ..identity import labels
from ..pairs import EvaluationSet, Family, evaluation_pairs
from ..program_results import check_program_results
from ..programs import PROGRAMS, TIMEOUT, Installed, find
from ..release import SUFFIX, TrainedAligner, load_aligner
from ..stockholm import shown
from ..tables import aligner_name
from .options import add_device, add_reading, check_reading, named_path

_FOLDER = "runs/evaluation"
_FILES = (REPORT, "scores.json", "reliability.png")
"""Beside a picture of errors for each aligner."""
_PAIRS, _CAP, _FLANKED = 40, 1024, 6
_PAIR_SEED = 0
_SECONDS = Range(0, 86_400, "(]")


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    text = "Score aligners beside the baselines, on any Stockholm alignments"
    parser = commands.add_parser("evaluate", aliases=["eval"], help=text, description=f"{text}.")
    parser.set_defaults(run=run)
    text = "releases (.safetensors), runs' folders or checkpoint files, a row each (default: the shipped aligner)"
    parser.add_argument("checkpoints", metavar="PATH", nargs="*", help=text)
    text = "Stockholm file, pipe or directory, plain or gzip (default: the first checkpoint's held-out families)"
    parser.add_argument("--data", metavar="PATH", help=text)
    text = "leave out families whose name starts so; may be repeated"
    parser.add_argument("--exclude", metavar="PREFIX", action="append", default=[], help=text)
    text = f"at most so many pairs of each family (default: {_PAIRS})"
    parser.add_argument("--pairs", type=int, metavar="N", default=_PAIRS, help=text)
    text = f"pairs with a longer side are skipped, and counted (default: {_CAP})"
    parser.add_argument("--cap", type=int, metavar="N", default=_CAP, help=text)
    text = "pairs of each family that are scored between flanks too, with as many unrelated ones; 0 leaves that out"
    parser.add_argument("--flanks", type=int, metavar="N", default=_FLANKED, help=f"{text} (default: {_FLANKED})")
    text = f"from plans to pairs: {', '.join(DECODERS)} (default: {DEFAULT_DECODER})"
    parser.add_argument("--decoder", metavar="NAME", choices=DECODERS, default=DEFAULT_DECODER, help=text)
    text = f"installed aligners to put beside it, of {', '.join(PROGRAMS)}: names with commas between, or none"
    parser.add_argument("--programs", metavar="NAMES", help=f"{text} (default: all that are on the PATH)")
    text = f"seconds that an installed aligner may take over a pair, then it is stopped (default: {TIMEOUT:g})"
    parser.add_argument("--program-timeout", type=float, metavar="X", default=TIMEOUT, help=text)
    text = "file for what installed aligners find: what it has of the same versions and pairs is not done again"
    parser.add_argument("--program-results", metavar="PATH", type=named_path, help=text)
    text = "instead, score gap costs of both alignment programs on --data, or on the shipped training families"
    parser.add_argument("--gap-grid", action="store_true", help=text)
    text = f"folder for the tables and pictures (default: {_FOLDER})"
    parser.add_argument("--out", metavar="PATH", type=named_path, default=Path(_FOLDER), help=text)
    add_reading(parser)
    add_quiet(parser)
    add_device(parser)


def run(options: argparse.Namespace) -> int:
    """Print and write the tables and the pictures."""
    Range(1).check("--pairs", options.pairs)
    Range(1).check("--cap", options.cap)
    Range(0).check("--flanks", options.flanks)
    _SECONDS.check("--program-timeout", options.program_timeout)
    check_reading(options)
    device, progress = open_device(options.device), not options.quiet
    if not options.gap_grid:
        if (options.out / CHECKPOINT).exists():
            raise ValueError(f"--out {options.out} holds a training run, whose report stays; choose another folder")
        prepare_folder(options.out)
        if folders := [name for name in _FILES if (options.out / name).is_dir()]:
            raise ValueError(f"--out {options.out} holds a folder {folders[0]}, where a file goes; choose another one")
    if options.gap_grid:
        _, chosen, head = _pairs(options, options.data or Config().data)
        say(f"{head}\n\n{grid_table(gap_grid(chosen.pairs, progress))}")
        return 0
    programs, notes = _programs(options.programs)
    if options.program_results is not None:
        check_program_results(options.program_results)
    aligners = _load(options.checkpoints)
    families, chosen, head = _pairs(options, options.data or next(iter(aligners.values())).config)
    head = "\n".join([head, *_overlaps(aligners, families), *(f"note: {note}" for note in notes)])
    say(head + "\n")
    models = {name: aligner.model for name, aligner in aligners.items()}
    of_programs = (programs, options.program_timeout, options.program_results)
    comparison = compare(models, chosen.pairs, options.decoder, device, progress, *of_programs)
    text = f"decoder: {options.decoder}\n\n{report(comparison)}"
    say(text)
    flanks, note = _between_flanks(options, aligners, families, progress, *of_programs)
    between = note if flanks is None else flanks.text
    if between:
        say(f"\n{between}")
    text = f"{head}\n\n{text}\n\n{between}".rstrip() + "\n"
    for path in _write(options, comparison, text, chosen, flanks):
        say(f"wrote {path}")
    return 0


def _programs(names: str | None) -> tuple[list[Installed], list[str]]:
    """What ``--programs`` names, and notes on what is not used."""
    if names == "none":
        return [], []
    return find(names if names is None else [name.strip() for name in names.split(",")])


def _load(paths: Sequence[str]) -> dict[str, TrainedAligner]:
    """The aligners by the names of their rows: one goes without, several by what tells their paths apart."""
    if len(paths) < 2:
        aligner = load_aligner(*paths)
        return {aligner_name(aligner.config): aligner}
    short = [path.stem if path.suffix == SUFFIX else path.name for path in map(Path, paths)]
    names = [visible(name) for name in (short if len(set(short)) == len(short) else paths)]
    if len(set(names)) < len(names):
        raise ValueError(f"a checkpoint is given twice: {', '.join(names)}; leave one out")
    return {name: load_aligner(path) for name, path in zip(names, paths, strict=True)}


def _pairs(options: argparse.Namespace, source: str | Config) -> tuple[list[Family], EvaluationSet, str]:
    """The families of alignments, or those that a run held out; the pairs drawn of them; both in words."""
    reading = {"cache": options.cache, "max_text": options.max_text}
    if isinstance(source, str):
        found, where = read_families(source, **reading), shown(source)
    else:
        found, where = list(load_dataset(source, **reading).heldout_families), "held-out families"
    families = [family for family in found if not family.name.startswith(tuple(options.exclude))]
    if not families:
        left_out = f", {len(found)} being left out by --exclude" if found else ""
        raise ValueError(f"no family with two sequences in {where}{left_out}")
    chosen = evaluation_pairs(families, options.pairs, options.cap, _PAIR_SEED)
    count = len(set(labels(families)))
    records = f" in {len(families)} alignments" if count < len(families) else ""
    head = (
        f"{where}: {count} families{records}, {len(chosen.pairs)} pairs, at most {options.pairs} a family, "
        f"{chosen.skipped} skipped (longer than {options.cap}, or nothing aligned)"
    )
    return families, chosen, "\n".join([head, *nucleotide_notes(families)])


def _overlaps(aligners: Mapping[str, TrainedAligner], families: Sequence[Family]) -> list[str]:
    """A line for each aligner trained on some of the families, so that nobody reports them as unseen, or on unknown."""
    lines = []
    for name, aligner in aligners.items():
        if not aligner.trained_on:
            lines.append(f"note: the families that {name} was trained on are not recorded; these may be among them")
        elif seen := aligner.seen(families):
            lines.append(f"warning: {name} was trained on {len(seen)} of the families: {in_brief(seen)}")
        if told := aligner.profiled(families):
            lines.append(f"note: the context profiles of {name} were taught by {len(told)} of them: {in_brief(told)}")
    return lines


def _between_flanks(
    options: argparse.Namespace,
    aligners: Mapping[str, TrainedAligner],
    families: Sequence[Family],
    progress: bool,
    programs: Sequence[Installed],
    timeout: float,
    kept: Path | None,
) -> tuple[FlankReport | None, str]:
    """The flank test, and a note where there is none."""
    if not options.flanks:
        return None, ""
    try:
        found = flank_report(
            aligners, families, options.flanks, min(CAP, options.cap), _PAIR_SEED, progress, programs, timeout, kept,
            options.decoder,
        )  # fmt: skip
    except NoFlankTest as error:
        return None, f"note: no flank test: {error}"
    return found, ""


def _write(
    options: argparse.Namespace, comparison: Comparison, text: str, chosen: EvaluationSet, flanks: FlankReport | None
) -> list[Path]:
    folder = options.out
    paths = [folder / name for name in _FILES]
    protocol = {
        "data": options.data and visible(options.data),
        "exclude": [visible(prefix) for prefix in options.exclude],
        "pairs_a_family": options.pairs,
        "cap": options.cap,
        "decoder": options.decoder,
        "pairs": len(chosen.pairs),
        "skipped": chosen.skipped,
    }
    replace_text(paths[0], text)
    values = {"protocol": protocol, "aligners": as_values(comparison), "flanks": flanks and flanks.values}
    replace_text(paths[1], json.dumps(values, indent=1) + "\n")
    plot_reliability(comparison, paths[2])
    for name, stem in zip(comparison.models, file_stems(comparison.models), strict=True):
        suffix = "" if len(comparison.models) == 1 else f"_{stem}"
        paths.append(folder / f"errors{suffix}.png")
        plot_errors(comparison.doubts[name], name, paths[-1])
    return paths
