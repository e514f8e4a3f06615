"""Random problems over all options, on one device and with their sequence over 2, 3, 4 and 8: run by test_sequence.py,
a process for many, with eight virtual devices.

    python tests/tpu_sequence_random.py FIRST COUNT DEVICES[,DEVICES...] ...

prints a line for each problem: its seed, its options, and the largest error on each number of devices. Several lists of
them are taken in turns.
"""

from __future__ import annotations

import random
import sys
from typing import Any

import jax
import numpy as np
from tpu_sequence import Case, compare, masked, on_devices, on_one

from torch_sinkhorn_attn.engines.tpu import Lowering
from torch_sinkhorn_attn.engines.tpu.releases import enable_x64


def runs(draw: random.Random, length: int, ids: int) -> list[int]:
    """Ids 0, 1, ... in runs with a hole between some of them, which is inactive."""
    ends = sorted(draw.sample(range(2, length, 2), ids - 1)) if ids > 1 else []
    found: list[int] = []
    for i, (start, end) in enumerate(zip([0, *ends], [*ends, length], strict=True)):
        hole = 1 if end - start > 4 and draw.random() < 0.4 else 0
        found += [i] * (end - start - hole) + [-1] * hole
    return found


def make(seed: int) -> Case:
    """Options that go together; each is drawn by its own chance."""
    draw = random.Random(seed)

    def often(chance: float) -> bool:
        return draw.random() < chance

    lengths = draw.choice([(24, 24), (24, 24), (48, 48), (24, 48), (48, 24)])
    heads = draw.choice([1, 2, 2, 4])
    support = draw.choice(["full", "full", "window", "window", "window", "causal", "centres"])
    tokens = draw.choice(["all", "all", "lengths", "segments", "segments", "masked", "masked"])
    dustbin, centred = often(0.35), support == "centres"
    relaxed = (support == "causal" and not dustbin) or (centred and not dustbin) or often(0.2)
    options: dict[str, Any] = {"lowering": Lowering("blockwise")}  # as on a CPU, without tracing twice
    options |= {"base_iters": draw.choice([0, 2, 3, 5]), "tail_iters": draw.choice([0, 1, 2, 2, 3])}
    if options["base_iters"] + options["tail_iters"] == 0 and not often(0.5):
        options["tail_iters"] = 1
    options["gradient"] = draw.choice(["tail", "tail", "tail", "unrolled", "implicit"])
    if often(0.3):
        options |= {"epsilon": draw.choice([0.5, 2.0]), "scale": draw.choice([None, 0.3])}
    if relaxed:
        options["relaxation"] = draw.choice([0.7, 2.0, (0.7, 1.5)])
    elif often(0.1) and not centred:
        options["relaxation"] = draw.choice([(0.7, None), (None, 2.0)])
    if options["gradient"] != "unrolled":
        options |= draw.choice([
            {}, {}, {"tolerance": 0.2}, {"tolerance": 1e-3}, {"over_relaxation": 1.3}, {"acceleration": "chebyshev"},
            {"acceleration": "chebyshev", "contraction": 0.6},
        ])  # fmt: skip
    if often(0.25):
        options["dropout_p"] = 0.3
    if support == "window":
        options["window"] = draw.choice([(3, 3), (2, 5), (6, 4), (9, 8), (-1, 6)])
    if support == "causal" and tokens != "masked":
        options["is_causal"] = True
    if centred:
        options["window"] = draw.choice([(6, 7), (30, 9)])
    case = Case(lengths, heads, draw.choice([x for x in (1, 2, 4) if heads % x == 0]), seed, **options)
    length, size = lengths
    if centred:
        at = np.arange(length) * (size / length) * draw.choice([0.9, 1.0])
        case.add("window_centers", at, 0)
    bins = 1 if dustbin else 0
    if tokens == "lengths":
        case.add("query_lengths", np.array([length, length - draw.randint(1, 9)]))
        if length != size or often(0.5):
            case.add("key_lengths", np.array([size - draw.randint(0, 9), size]))
    elif tokens == "segments":
        ids = draw.choice([1, 2, 3])
        case.segments(runs(draw, length, ids), runs(draw, size, ids) if length != size or often(0.5) else None)
        bins *= min(lengths)
    elif tokens == "masked":
        masked(case, draw.choice(["float", "bool"]), draw.choice([0, 0, 1]), draw.choice([1, heads]))
    if dustbin:
        case.dustbin(scalar=often(0.5))
        if often(0.3):
            case.options["capacities"] = draw.choice([(60.0, None), (None, 60.0)])
    if often(0.3) and (tokens == "all" or relaxed or dustbin):
        case.masses(*draw.choice([(True, True), (True, False), (False, True)]))
    if often(0.2):
        case.start(bins)
    return case


def told(case: Case) -> str:
    arrays = sorted(set(case.arrays) - {"query", "key", "value"})
    options = {name: x for name, x in case.options.items() if name != "lowering"}
    return f"{case.length} x {case.size}, heads {case.heads}/{case.key_heads}, {options}, {arrays}"


if __name__ == "__main__":
    first, count = map(int, sys.argv[1:3])
    turns, wrong = sys.argv[3:], 0
    with enable_x64(True):
        for seed in range(first, first + count):
            case = make(seed)
            print(seed, told(case), end=": ", flush=True)
            try:
                expected = on_one(case)
                for devices in map(int, turns[seed % len(turns)].split(",")):
                    error = compare(f"seed {seed} on {devices}", expected, on_devices(case, devices))
                    print(f"{devices}: {error:.1e}", end=" ", flush=True)
            except (AssertionError, ValueError, TypeError) as problem:
                wrong += 1
                print(f"WRONG {type(problem).__name__}: {problem}", end="")
            print(flush=True)
            if seed % 20 == 0:
                jax.clear_caches()
    print(count - wrong, "agree,", wrong, "do not")
    sys.exit(wrong > 0)
