"""Ten thousand random problems over all options, every CPU engine against the dense definition in float64.

    python tests/fuzz.py [--problems 10000] [--first 0] [--record build/fuzz.jsonl] [--jobs 2]

Problem k is made from the seed k, which also draws the sizes' limit, the number of threads, the instruction set, the
tiles' size and the budget. Problems run in chunks, each in a process of its own, so that a crash costs one chunk and is
seen. What a chunk found is a line of `--record`; chunks that stand there are not run again. The last line counts;
the exit status is 1 if anything disagreed, was not finite, or crashed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CHUNK = 200
FIRST_SEED = 1_000_000  # away from those of the suite


def run_chunk(first: int) -> dict[str, object]:
    """In this process: what the problems `first`... gave."""
    import problems
    import torch
    from conformance import ENGINES, assert_agrees, results

    from torch_sinkhorn_attn.engines import cpu
    from torch_sinkhorn_attn.engines.tiled import tiles

    sized = tiles.block_size
    found: dict[str, object] = {"first": first, "checked": 0, "refused": 0, "wrong": []}
    for seed in range(FIRST_SEED + first, FIRST_SEED + first + CHUNK):
        g = torch.Generator().manual_seed(seed)

        def draw(items: list, g: torch.Generator = g):
            return items[int(torch.randint(len(items), (1,), generator=g))]

        call = problems.make(seed, largest=draw([4, 12, 12, 24, 40, 70]))
        torch.set_num_threads(draw([1, 1, 2, 3, 16]))
        cpu.set_capability(draw(cpu.capabilities()))
        cpu.set_workspace_budget(draw([0, 3000, cpu.DEFAULT_BUDGET]))
        small = draw([4, 7, 0])
        tiles.block_size = (lambda heads, reach=None, small=small: small) if small else sized
        try:
            expected = results(call, "reference")
        except ValueError:  # a drawn window or mask may leave no plan
            found["refused"] += 1
            continue
        for engine in ENGINES:
            try:
                assert_agrees(call, engine, expected=expected)
                found["checked"] += 1
            except Exception as error:
                found["wrong"].append(f"{engine}: {call}: {type(error).__name__}: {error}")
    return found


def chunk_in_child(first: int) -> dict[str, object]:
    done = subprocess.run([sys.executable, __file__, "--chunk", str(first)], capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    last = (done.stderr.strip().splitlines() or [""])[-1]
    return {"first": first, "checked": 0, "refused": 0, "wrong": [f"ended with {done.returncode}: {last}"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=10_000, help=f"rounded up to whole chunks of {CHUNK}")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--record", type=Path, default=Path("build/fuzz.jsonl"))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--chunk", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.chunk is not None:
        print(json.dumps(run_chunk(arguments.chunk)))
        return 0
    arguments.record.parent.mkdir(parents=True, exist_ok=True)
    lines = arguments.record.read_text().splitlines() if arguments.record.exists() else []
    found = {x["first"]: x for x in map(json.loads, lines)}
    chunks = range(arguments.first, arguments.first + arguments.problems, CHUNK)
    with arguments.record.open("a") as record, ThreadPoolExecutor(arguments.jobs) as pool:
        for result in pool.map(chunk_in_child, [k for k in chunks if k not in found]):
            found[result["first"]] = result
            record.write(json.dumps(result) + "\n")
            record.flush()
            for wrong in result["wrong"]:
                print(wrong, flush=True)
    here = [found[k] for k in chunks]
    checked, refused = (sum(x[key] for x in here) for key in ("checked", "refused"))
    wrong = sum(len(x["wrong"]) for x in here)
    print(f"{len(here) * CHUNK} problems, {refused} refused: {checked} results of engines agree, {wrong} do not")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
