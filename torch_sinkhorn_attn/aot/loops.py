"""The listings of the TPU compiler: what a kernel issues, loop by loop.

A TensorCore issues one bundle of instructions a cycle. The compiler writes the final schedule of every kernel twice:
with every cycle spelt out, empty bundles for the latencies that it could not hide (read here), and once more with runs
of empty bundles folded into delays (its "final bundles"). So `bundles` below are cycles, but for HBM that comes late,
and `filled` the ones that hold an instruction.

Of each loop it also says how it counts, where the bounds are constants.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch_sinkhorn_attn.aot.program import instructions

_LISTING = re.compile(r"(\d+-.+?)-\d\d-([^/]*)\.txt")
_BUNDLE = re.compile(r"\s*(?:0x)?([0-9a-f]+)\s+(?:([A-Z]{2})\s*)?:[> ]*\{(.*)")
_BRANCH = re.compile(r"sbr\.rel .*?target (?:bundleno = (\d+)|= \$region(\d+))")
_START = re.compile(r"(?:Start|Start/End empty) region (\d+)")
_END = re.compile(r"End region (\d+)")
_COUNTED = re.compile(r"\s*loop: start=(-?\d+), step=(-?\d+), limit=(-?\d+)")
_HEADER = re.compile(r"\s*\$region(\d+): .*// loop_header$")
_VMEM = re.compile(r"\s*#allocation\d+(_spill)? \[.*space=vmem, size = 0x([0-9a-f]+),")
_LIMIT = re.compile(r'"scoped_memory_configs":\[\{"memory_space":"1","offset":"0","size":"(\d+)"')
_OPERATION = re.compile(r'op_name="([^"]*)/pallas_call"')
_CUT = re.compile(r"(.{64,})-\d{10,}")
_DELAY_SLOTS = 4
_PIPELINE_STAGES = 2  # a grid of n steps runs n + 2 times: a copy in goes ahead, a copy out follows
_LARGEST_VMEM = 2**40  # memory-space assignment writes an allocation that is not made as 2**64 - 1


@dataclass(frozen=True)
class Loop:
    """A loop of a kernel, in the order in which the kernel's loops begin.

    Attributes:
        first, last: its bundles.
        depth: 1 for a loop in no other.
        bundles: per trip, those of the loops inside not counted.
        filled: of them, those that hold an instruction.
        skippable, skippable_filled: of either, those behind a forward branch (`pl.when`), not run in every trip; the
            branch around a whole step of the grid does not count.
        trips: times it runs per trip of the loop around it, or None where that depends on data.
        grid: whether it is the grid of the kernel; then `trips` are the steps of the grid.
        slots: share of each unit's slots used, over all the loop's bundles, inner loops included.
    """

    first: int
    last: int
    depth: int
    bundles: int
    filled: int
    skippable: int
    skippable_filled: int
    trips: int | None
    grid: bool
    slots: Mapping[str, float]


@dataclass(frozen=True)
class Kernel:
    """A Pallas kernel of a compiled program, or a fusion made by XLA.

    Attributes:
        name: that of the pallas_call, or of the function around it; of a fusion, XLA's.
        instruction: the program's instruction that runs it.
        pallas: whether it is a Pallas kernel.
        bundles: of all of it, each counted once.
        loops: in program order; a loop's children follow it at greater depth.
        vmem: bytes of its windows, scratch and spills.
        spills: of them, those for what the registers do not hold.
        vmem_limit: what it may have.
        executions: how often the program runs it, or None where that depends on data; a loop of the program that may
            end early counts in full. Branches that only unfit data take do not count.
        unfit: how often it runs in these branches, where they are taken.
    """

    name: str
    instruction: str
    pallas: bool
    bundles: int
    loops: tuple[Loop, ...]
    vmem: int
    spills: int
    vmem_limit: int | None
    executions: int | None = 1
    unfit: int | None = 0


def weighted(
    loops: Sequence[Loop],
    trips: Mapping[int, float] | None = None,
    *,
    skipped: Mapping[int, float] | None = None,
    filled: bool = False,
) -> float:
    """Bundles that the loops issue in all: the sum of each one's own, times its trips and those of the loops around it.

    Args:
        loops: of one kernel, in its order.
        trips: times a loop runs, by its index in `loops`; the compiler's figure where absent.
        skipped: share of a loop's trips that skip what can be skipped, by its index; none where absent.
        filled: count filled bundles only.

    Raises:
        ValueError: nobody says how often a loop runs.
    """
    total, around = 0.0, [1.0]
    for index, loop in enumerate(loops):
        count = (trips or {}).get(index, loop.trips)
        if count is None:
            raise ValueError(f"the trips of loop {index} (bundles {loop.first:#x} to {loop.last:#x}) depend on data")
        del around[loop.depth :]
        around.append(around[-1] * count)
        own, skippable = (loop.filled, loop.skippable_filled) if filled else (loop.bundles, loop.skippable)
        total += around[-1] * (own - (skipped or {}).get(index, 0.0) * skippable)
    return total


def read_kernels(folder: Path) -> tuple[Kernel, ...]:
    """Every Pallas kernel and fusion whose listings are in the folder, in the order of compilation."""
    listings: dict[str, dict[str, Path]] = {}
    names: dict[str, str] = {}
    for path in folder.iterdir():
        if found := _LISTING.fullmatch(path.name):
            number, _, name = found[1].partition("-")
            listings.setdefault(number, {})[found[2]] = path
            names[number] = min(name, names.get(number, name), key=len)
    program = instructions("".join(path.read_text(errors="replace") for path in folder.glob("*-TLP-hlo.txt")))
    listed = {
        instruction: files
        for number, files in sorted(listings.items())
        if (instruction := _instruction(names[number], program)) and "schedule-analysis_final_bundles" in files
    }
    times: dict[str, list[int | None]] = {name: [0, 0] for name in listed}
    first = {program[name].content: name for name in reversed(listed)}
    for name, found_there in program.items():
        if twin := name if name in listed else first.get(found_there.content):
            before, more = times[twin][found_there.unfit], found_there.times
            times[twin][found_there.unfit] = None if before is None or more is None else before + more
    return tuple(_kernel(files, name, *times[name]) for name, files in listed.items())


def _instruction(name: str, program: Mapping[str, Any]) -> str | None:
    """That of a listing. Of a long name the name of a file has the beginning, as much as there is room for, and a
    number."""
    if name in program:
        return name
    cut = _CUT.fullmatch(name)
    begun = [x for x in program if x.startswith(cut[1])] if cut else []
    return begun[0] if len(begun) == 1 else None


def _kernel(files: Mapping[str, Path], instruction: str, times: int | None, unfit: int | None) -> Kernel:
    def listing(name: str) -> list[str]:
        return files[name].read_text(errors="replace").splitlines()

    original = listing("original")
    analysis = files["schedule-analysis_final_bundles"].read_text(errors="replace")
    lines = listing("packed-bundles-post-ra")
    units, used = _slots(listing("pre-delay_hlo-static-per-bundle-utilization"))
    loops = tuple(_loops(lines, _counts(original), units, used))
    limit = _LIMIT.search(analysis)
    sizes = [(int(m[2], 16), m[1]) for line in listing("post-ra") if (m := _VMEM.match(line))]
    sizes = [(size, spilled) for size, spilled in sizes if size < _LARGEST_VMEM]
    first = next((line for line in analysis.splitlines() if "scheduled bundles (" in line), "")
    pallas = 'custom_call_target="tpu_custom_call"' in first
    return Kernel(
        name=_name(analysis, instruction) if pallas else instruction,
        instruction=instruction,
        pallas=pallas,
        bundles=sum(1 for line in lines if _BUNDLE.match(line)),
        loops=loops,
        vmem=sum(size for size, _ in sizes),
        spills=sum(size for size, spilled in sizes if spilled),
        vmem_limit=int(limit[1]) if limit else None,
        executions=times,
        unfit=unfit,
    )


def _name(analysis: str, default: str) -> str:
    operation = _OPERATION.search(analysis)
    if operation is None:
        return default
    last = operation[1].split("/")[-1]
    inner = re.findall(r"\w+", last)
    return last if "(" not in last else inner[-1]


def _counts(original: list[str]) -> dict[int, tuple[int | None, bool]]:
    """Trips of a loop, None unless constant, and whether it is the grid, by the region of its header."""
    counts: dict[int, tuple[int | None, bool]] = {}
    trips: int | None = None
    for number, line in enumerate(original):
        if counted := _COUNTED.match(line):
            start, step, limit = (int(x) for x in counted.groups())
            trips = max(0, -(-(limit - start) // step))
        elif line.strip() == "// While loop":
            trips = None
        elif header := _HEADER.match(line):
            grid = "iteration index, stage" in original[number + 1]
            if grid and trips is not None:
                trips -= _PIPELINE_STAGES
            counts[int(header[1])] = trips, grid
    return counts


def _slots(listing: list[str]) -> tuple[dict[str, int], list[list[int]]]:
    """Slots of each unit in a bundle, and how many each bundle uses."""
    rows = [line for line in listing if re.fullmatch(r"[\d ]+", line) and line.strip()]
    heading = next(line for line in listing if "VALU" in line)
    names = [name.strip() for name in re.split(r"[|,]", heading)]
    return dict(zip(names, map(int, rows[0].split()))), [list(map(int, row.split())) for row in rows[1:]]


def _loops(
    lines: list[str], counts: dict[int, tuple[int | None, bool]], units: dict[str, int], used: list[list[int]]
) -> list[Loop]:
    starts: dict[int, int] = {}
    over: dict[int, int] = {}  # the last bundle of a region
    branches: list[tuple[int, int]] = []
    empty: set[int] = set()
    for line in lines:
        if not (bundle := _BUNDLE.match(line)):
            continue
        address = int(bundle[1], 16)
        if bundle[3].startswith("}"):
            empty.add(address)
        for region in _START.findall(line):
            starts.setdefault(int(region), address)
        over |= {int(region): address for region in _END.findall(line)}
        for target, region in _BRANCH.findall(line):
            branches.append((address, int(target) if target else -int(region)))
    end = address
    resolved = [(at, to if to >= 0 else starts.get(-to, at + 1)) for at, to in branches]
    ends: dict[int, int] = {}
    for at, to in resolved:
        if to <= at:
            ends[to] = max(ends.get(to, 0), min(at + _DELAY_SLOTS, end))
    spans = sorted(ends.items())
    owner = _owners(spans, end)
    headers = _headers(counts, starts, over, spans, owner)
    found = []
    for index, (first, last) in enumerate(spans):
        own = [x for x in range(first, last + 1) if owner[x] == index]
        trips, grid = counts.get(headers.get(index, -1), (None, False))
        body = used[first : last + 1]
        share = {
            name: sum(row[unit] for row in body) / (width * (last - first + 1))
            for unit, (name, width) in enumerate(units.items())
        }
        depth = sum(a <= first and last <= b for a, b in spans)
        behind = _skippable([pair for pair in resolved if pair[0] <= pair[1] and owner[pair[0]] == index], grid)
        rare = [x for x in own if x in behind]
        filled, rare_filled = (sum(x not in empty for x in part) for part in (own, rare))
        found.append(Loop(first, last, depth, len(own), filled, len(rare), rare_filled, trips, grid, share))
    return found


def _headers(
    counts: Mapping[int, Any], starts: Mapping[int, int], over: Mapping[int, int], spans: Any, owner: list[int]
) -> dict[int, int]:
    """The header's region of each loop, by the loop's index: the one that ends where the loop does, or a few bundles
    later, since a loop and the one that it begins with may start in the same bundle; else one that starts in it."""
    last = {end: index for index, (_, end) in enumerate(spans)}
    found = max(  # by how many bundles later, a release of libtpu does alike for all loops
        (
            {last[over[region] - later]: region for region in counts if over.get(region, -1) - later in last}
            for later in range(_DELAY_SLOTS + 1)
        ),
        key=len,
    )
    for region in counts:
        if region in starts and region not in found.values():
            found.setdefault(owner[starts[region]], region)
    return found


def _skippable(branches: list[tuple[int, int]], grid: bool) -> set[int]:
    """Bundles that a forward branch of a loop jumps over; a grid's longest one guards its steps as a whole."""
    spans = sorted((range(at + _DELAY_SLOTS + 1, to) for at, to in branches), key=len)
    return {address for span in (spans[:-1] if grid else spans) for address in span}


def _owners(spans: list[tuple[int, int]], end: int) -> list[int]:
    """Index of the innermost loop that each bundle is in, -1 for none. Loops nest, so later starts are further in."""
    owner = [-1] * (end + 1)
    begins = [first for first, _ in spans]
    for address in range(end + 1):
        for index in range(bisect_right(begins, address) - 1, -1, -1):
            if spans[index][1] >= address:
                owner[address] = index
                break
    return owner
