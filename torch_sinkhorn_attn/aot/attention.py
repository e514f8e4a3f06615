"""One attention, forward and backward in one program, compiled for one device of a topology. Runs without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch_sinkhorn_attn.aot import flash
from torch_sinkhorn_attn.aot.bundles import Kernel, Report, compile_and_read
from torch_sinkhorn_attn.options import Options

SHAPES = ("auto", "resident", "wavefront", "streaming", "blockwise")


@dataclass(frozen=True)
class Configuration:
    """What is compiled; the names are those of `sinkhorn_attention` and of the command line.

    `key_heads`, `keys` and `value_features` of 0 are those of the query; `window` of None is none.
    `lengths`, `segments`, `dustbin`: whether there are any. `mask`: "none", "bool" or "float", of all heads together.
    """

    batch: int = 1
    heads: int = 1
    key_heads: int = 0
    length: int = 8192
    keys: int = 0
    features: int = 64
    value_features: int = 0
    dtype: str = "bfloat16"
    window: tuple[int, int] | None = Options.window
    base_iters: int = Options.base_iters
    tail_iters: int = Options.tail_iters
    acceleration: str | None = Options.acceleration
    contraction: float | None = Options.contraction
    epsilon: float = Options.epsilon
    dustbin: bool = False
    segments: bool = False
    lengths: bool = False
    mask: str = "none"
    gradient: str = Options.gradient

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Configuration:
        """Complete and checked.

        Raises:
            ValueError: values that make no attention.
        """
        found = cls(**{**values, "window": tuple(values["window"]) if values.get("window") else None})
        complete = {
            "key_heads": found.key_heads or found.heads,
            "keys": found.keys or found.length,
            "value_features": found.value_features or found.features,
        }
        for name in ("batch", "heads", "length", "features", *complete):
            if (value := complete.get(name, getattr(found, name))) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        if found.heads % complete["key_heads"]:
            raise ValueError(f"--heads {found.heads} must be a multiple of --key-heads {found.key_heads}")
        for name in ("base_iters", "tail_iters"):
            if (value := getattr(found, name)) < 0:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 0, got {value}")
        if not 0 < found.epsilon < math.inf:
            raise ValueError(f"--epsilon must be above 0 and finite, got {found.epsilon}")
        Options.of({name: getattr(found, name) for name in ("acceleration", "contraction", "gradient")})
        if min(found.window or (0,)) < -1:
            raise ValueError(f"--window takes tokens to the left and right, -1 for unlimited, got {found.window}")
        return cls(**{**asdict(found), **complete, "window": found.window})

    @property
    def visited(self) -> float:
        """Scores in the support of all heads, before lengths, segments and mask; a band is counted to its edges."""
        rows = self.length
        width = self.keys if self.window is None else _band(self.length, self.keys, self.window)
        return float(self.batch * self.heads * rows * width)


def _band(length: int, keys: int, window: tuple[int, int]) -> float:
    """Mean number of keys in a row's window."""
    left, right = (keys if side < 0 else side for side in window)
    step = keys / length
    total = 0.0
    for row in range(length):
        centre = (row + 0.5) * step - 0.5
        total += max(0.0, min(keys - 1, centre + right) - max(0.0, centre - left) + 1)
    return total / length


def problem(c: Configuration) -> tuple[Any, Any, Any]:
    """Shapes of the inputs and constants, and the statics, of a configuration: `engines.tpu.problem`."""
    import jax
    import jax.numpy as jnp

    from torch_sinkhorn_attn.engines.tpu.method.problem import Constants, Inputs, Statics

    def floats(*shape: int, dtype: str = "float32") -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    def ints(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    n, h, hk, rows, cols = c.batch, c.heads, c.key_heads, c.length, c.keys
    masks = {"none": None, "float": floats(n, 1, rows, cols), "bool": jax.ShapeDtypeStruct((n, 1, rows, cols), bool)}
    scores: tuple[Any, ...] = (None, None, None)
    if c.dustbin:
        scores = floats(n, h, rows), floats(n, h, cols), floats(n, h)
    inputs = Inputs(
        floats(n, h, rows, c.features, dtype=c.dtype),
        floats(n, hk, cols, c.features, dtype=c.dtype),
        floats(n, hk, cols, c.value_features, dtype=c.dtype),
        masks[c.mask],
        *scores,
    )
    bins = (min(rows, cols) if c.segments else 1) if c.dustbin else 0
    capacity = floats(n, h, bins) if bins else None
    row_segment, col_segment = (ints(n, rows), ints(n, cols)) if c.segments else (None, None)
    constants = Constants(
        ints(n, rows), ints(n, rows), ints(n, cols), ints(n, cols),
        floats(n, h, rows), floats(n, h, cols), row_segment, col_segment, capacity, capacity,
    )  # fmt: skip
    unrolled = c.gradient == "unrolled"
    left, right = c.window or (-1, -1)
    statics = Statics(
        scale=c.features**-0.5,
        epsilon=c.epsilon,
        stopped=0 if unrolled else c.base_iters,
        kept=c.tail_iters + (c.base_iters if unrolled else 0),
        acceleration=c.acceleration,
        contraction=c.contraction or 0.0,
        implicit=c.gradient == "implicit",
        banded=c.segments or c.window is not None,
        window_left=left,
        window_right=right,
        uniform=not (c.segments or c.lengths),
    )
    return inputs, constants, statics


DIRECTIONS = ("forward", "backward")


def chosen(given: tuple[Any, Any, Any], lowering: Any) -> list[Any]:
    """The `choice.Choice` of the forward and of the backward kernels."""
    from torch_sinkhorn_attn.engines.tpu.method.choice import choose

    return [choose(*given, lowering, adjoint) for adjoint in (False, True)]


def in_words(choices: Sequence[Any]) -> tuple[str, str]:
    """The shapes of the kernels of both directions, and why they are those."""
    shapes = " and ".join(dict.fromkeys(choice.shape for choice in choices))
    reasons = [f"{name}: {choice.reason}" for name, choice in zip(DIRECTIONS, choices, strict=True)]
    return shapes, "; ".join(reasons if choices[0].reason != choices[1].reason else [choices[0].reason])


def disagreements(choices: Sequence[Any], kernels: Sequence[Kernel], answers: Mapping[int, Any]) -> list[str]:
    """Where the table of VMEM that programs choose by and the compiler do not agree, a sentence each.

    Args:
        choices: what the table says of each direction.
        kernels: those compiled.
        answers: the compiler's (`vmem.ask`) on the resident kernels that the table refuses, by the direction's place.
    """
    found = []
    for place, (name, choice) in enumerate(zip(DIRECTIONS, choices, strict=True)):
        used = max((k.vmem for k in kernels if f"sinkhorn_resident_{name}" in k.name), default=0)
        if choice.vmem is not None and used > choice.vmem:
            found.append(f"{name}: the table says {_mib(choice.vmem)} of VMEM, and the kernel takes {_mib(used)}")
        elif (answer := answers.get(place)) is not None and "error" not in answer:
            found.append(
                f"{name}: the table says {_mib(choice.vmem)} of VMEM and refuses the resident kernel, which compiles "
                f"with {_mib(answer['vmem'])}"
            )
    return [f"{text}; benchmarks/vmem.py makes the table" for text in found]


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def compile_attention(
    configuration: Mapping[str, Any], topology: str, generation: str, shape: str, base_dtype: str
) -> dict[str, Any]:
    """Compile it, and JAX's flash attention beside it; what came out, ready for JSON."""
    import jax

    from torch_sinkhorn_attn.aot.vmem import ask
    from torch_sinkhorn_attn.engines.tpu.method import run
    from torch_sinkhorn_attn.engines.tpu.method.lowering import VMEM, Lowering
    from torch_sinkhorn_attn.engines.tpu.method.problem import Result

    c = Configuration.of(configuration)
    inputs, constants, statics = problem(c)
    lowering = Lowering(shape, base_dtype=base_dtype, generation=generation)
    choices = chosen((inputs, constants, statics), lowering)
    shapes, why = in_words(choices)

    def step(inputs: Any, constants: Any, grad: jax.Array) -> Any:
        result: Result = run.forward(inputs, constants, statics, lowering, residuals=False)
        bins = None if result.row_dustbin is None else (result.row_dustbin, result.col_dustbin)
        assert result.output is not None
        duals = result.row_potentials, result.col_potentials
        to_bin, from_bin = bins or (None, None)
        cotangents, _ = run.backward(
            inputs, constants, statics, lowering, result.output, *duals, grad, to_bin, from_bin, c.mask == "float"
        )
        return result.output, cotangents

    grad = jax.ShapeDtypeStruct((c.batch, c.heads, c.length, c.value_features), "float32")
    reference = asdict(flash.measure(topology, c.features, "bfloat16" if c.dtype == "float16" else c.dtype))
    most = 2 * VMEM[generation]  # beyond it nobody need ask
    refused = [place for place, c in enumerate(choices) if c.shape != "resident" and (c.vmem or most) < most]
    answers = {place: ask(configuration, generation, bool(place), base_dtype, topology=topology) for place in refused}
    report = compile_and_read(step, [inputs, constants, grad], topology)  # last, for its listings are kept
    doubts = disagreements(choices, report.kernels, answers)
    found = {"shape": shapes, "why": why, "disagreements": doubts, "flash": reference}
    return {**found, **plain(report), **devices(topology)}


def plain(report: Report) -> dict[str, Any]:
    """A report as plain values."""
    return asdict(report)


def devices(topology: str) -> dict[str, Any]:
    """How many devices libtpu makes of a slice, and what it calls them."""
    from jax.experimental import topologies

    found: Any = topologies.get_topology_desc(topology_name=topology, platform="tpu").devices
    return {"devices": len(found), "device_kind": found[0].device_kind}
