"""The generations of TPU: their names, a default topology of each, and what a projection needs to know of a chip."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch_sinkhorn_attn.engines.tpu.method.lowering import VMEM

GIB = 2**30
MIB = 2**20


@dataclass(frozen=True)
class Chip:
    """A generation of TPU.

    `hbm` (bytes), `bandwidth` (bytes per second) and `cores` are of a chip, as published; `vmem` is of a core.
    `clock` (Hz) is an assumption: for v4, v5e and v5p what the published bf16 peak and the matrix units imply, for v6e
    and tpu7x, where that leaves a factor of two open, the lower of the two.
    """

    name: str
    topology: str
    hbm: int
    vmem: int
    bandwidth: float
    clock: float
    cores: int


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", "v4:2x2x1", 32 * GIB, VMEM["v4"], 1.23e12, 1.05e9, 2),
        Chip("v5e", "v5e:2x4", 16 * GIB, VMEM["v5e"], 0.82e12, 1.5e9, 1),
        Chip("v5p", "v5p:2x2x1", 95 * GIB, VMEM["v5p"], 2.76e12, 1.75e9, 2),
        Chip("v6e", "v6e:2x4", 32 * GIB, VMEM["v6e"], 1.64e12, 1.75e9, 1),
        Chip("tpu7x", "tpu7x:2x2x1", 192 * GIB, VMEM["tpu7x"], 7.38e12, 2.2e9, 2),
    )
}


@dataclass(frozen=True)
class Topology:
    """A slice: its generation and libtpu's name of it, "v6e:2x4"."""

    chip: Chip
    name: str

    @property
    def chips(self) -> int:
        count = 1
        for side in self.name.partition(":")[2].split("x"):
            count *= int(side)
        return count

    def share(self, devices: int) -> float:
        """The part of a chip that one of the slice's `devices` is: 1/2 where each TensorCore is a device of its own."""
        return self.chips / devices


def parse_topology(text: str) -> Topology:
    """A generation ("v6e": its default slice) or a slice ("v6e:16x16").

    Raises:
        ValueError: neither.
    """
    name, _, shape = text.strip().lower().partition(":")
    name = {"v5litepod": "v5e", "v7x": "tpu7x", "7x": "tpu7x"}.get(name, name)
    if name not in CHIPS:
        known = ", ".join(CHIPS)
        raise ValueError(f"topology {text!r} is unknown; choose {known}, or a slice of one such as v6e:16x16")
    chip = CHIPS[name]
    if not shape:
        return Topology(chip, chip.topology)
    dimensions = chip.topology.count("x", chip.topology.index(":")) + 1
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) or shape.count("x") + 1 != dimensions:
        example = chip.topology
        raise ValueError(f"topology {text!r} is not a slice of {name}: it takes {dimensions} sides, such as {example}")
    return Topology(chip, f"{name}:{shape}")
