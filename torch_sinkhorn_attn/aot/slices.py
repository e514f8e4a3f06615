"""One attention with its sequence over several chips of a slice, compiled for all of them: what one device holds, and
what it sends. Runs without torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch_sinkhorn_attn.aot.attention import Configuration
from torch_sinkhorn_attn.aot.bundles import Memory, versions
from torch_sinkhorn_attn.aot.environment import prepare
from torch_sinkhorn_attn.aot.program import instructions

AXIS = "sequence"
_COLLECTIVE = re.compile(
    r" (collective-permute|all-reduce|all-gather|all-to-all|reduce-scatter|collective-broadcast)(?:-start)?\("
)
_ARRAY = re.compile(r"\b(pred|[suf]\d+|bf16)\[([\d,]*)\]")


@dataclass(frozen=True)
class Traffic:
    """What one device sends: `bytes` each of `times` times a step (None: by data), counted as the usual algorithms go,
    a ring's where all devices take part. Of a message between neighbours in the middle, that is: the ends send half."""

    operation: str
    array: str
    times: int | None
    bytes: float


def wire(text: str, shards: int) -> list[Traffic]:
    """The collectives of a compiled program, those left out that only unfit data need."""
    found = []
    for instruction in instructions(text).values():
        if instruction.unfit or not (match := _COLLECTIVE.search(instruction.content)):
            continue
        arrays = _ARRAY.findall(instruction.content[: match.start()])
        dtype, shape = arrays[0]
        size = math.prod(int(n) for n in shape.split(",") if n) * _width(dtype)
        share = {
            "collective-permute": 1.0,
            "all-reduce": 2 * (shards - 1) / shards,
            "all-gather": (shards - 1) / (1 if "-start(" in match[0] else shards),
            "reduce-scatter": (shards - 1) * (1 if "-start(" not in match[0] else 1 / shards),
        }.get(match[1], (shards - 1) / shards)
        found.append(Traffic(match[1], f"{dtype}[{shape}]", instruction.times, size * share))
    return found


def _width(dtype: str) -> float:
    return 1 if dtype == "pred" else int(re.sub(r"\D", "", dtype)) / 8


def in_kernels(text: str, c: Configuration) -> list[Traffic]:
    """What the resident kernels send each other by themselves, which no listing of collectives shows: for each head the
    maxima, the column sums of each iteration, and of each kept one in the backward."""
    assert c.window is not None
    unrolled = c.gradient == "unrolled"
    sides = 2 * sum(c.window) * 4.0
    counts = {"forward": c.base_iters + c.tail_iters + 1, "backward": c.tail_iters + (c.base_iters if unrolled else 0)}
    return [
        Traffic("copies of the kernel", f"f32[{sum(c.window)}] twice", count * c.batch * c.heads, sides)
        for direction, count in counts.items()
        if f"sinkhorn_resident_{direction}" in text
    ]


def compile_sharded(
    configuration: Mapping[str, Any], topology: str, generation: str, shape: str, base_dtype: str, shards: int
) -> dict[str, Any]:
    """Compile the step of all shards; what came out, ready for JSON.

    Raises:
        ValueError: a slice of fewer devices, or tokens that the shards do not divide.
    """
    prepare()
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh

    from torch_sinkhorn_attn.engines.tpu.method.lowering import Lowering
    from torch_sinkhorn_attn.engines.tpu.releases import lowered_for_tpu

    c = Configuration.of(configuration)
    devices: Any = topologies.get_topology_desc(topology_name=topology, platform="tpu").devices
    if len(devices) < shards:
        raise ValueError(f"{topology} has {len(devices)} devices and --shards is {shards}; name a larger slice")
    for name, count in (("length", c.length), ("keys", c.keys)):
        if count % shards:
            raise ValueError(f"--{name} {count} is not divided by --shards {shards}; pad it to a multiple")
    mesh = Mesh(np.array(devices[:shards]), (AXIS,))
    step, arguments = _step(c, mesh, Lowering(shape, base_dtype=base_dtype, generation=generation))
    compiled = lowered_for_tpu(step, arguments, devices[0], mesh).compile()
    text, stats = compiled.as_text(), compiled.memory_analysis()
    kernels = [name for name in ("resident", "streaming") if _KERNELS[name] in text]
    held = Memory(
        stats.argument_size_in_bytes, stats.output_size_in_bytes, stats.alias_size_in_bytes,
        stats.temp_size_in_bytes, stats.generated_code_size_in_bytes,
    )  # fmt: skip
    sent = wire(text, shards) + (in_kernels(text, c) if "resident" in kernels else [])
    return {
        "shape": kernels[0] if kernels else "blockwise",
        "memory": asdict(held),
        "wire": [asdict(x) for x in sent],
        "devices": len(devices),
        "device_kind": devices[0].device_kind,
        "versions": versions(),
    }


_KERNELS = {"resident": "sinkhorn_resident_forward", "streaming": "tpu_custom_call"}


def _step(c: Configuration, mesh: Any, lowering: Any) -> tuple[Any, list[Any]]:
    """Forward and backward inside shard_map, and the shapes of its arguments, the whole sequence's."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from torch_sinkhorn_attn.engines.tpu import Dustbin, sinkhorn_attention

    def lies(*dims: str | None) -> PartitionSpec:
        return PartitionSpec(*dims)

    tokens, options = lies(None, None, AXIS), _options(c)
    arrays: dict[str, tuple[tuple[int, ...], Any, PartitionSpec]] = {
        "query": ((c.batch, c.heads, c.length, c.features), c.dtype, tokens),
        "key": ((c.batch, c.key_heads, c.keys, c.features), c.dtype, tokens),
        "value": ((c.batch, c.key_heads, c.keys, c.value_features), c.dtype, tokens),
        "grad": ((c.batch, c.heads, c.length, c.value_features), c.dtype, tokens),
    }
    if c.dustbin:
        arrays |= {name: ((c.heads, 1), "float32", lies()) for name in ("row_score", "col_score")}
    if c.lengths:
        arrays["lengths"] = (c.batch,), "int32", lies()
    if c.segments:
        arrays["ids"] = (c.batch, c.length), "int32", lies(None, AXIS)
    if c.mask != "none":
        dtype = "bool" if c.mask == "bool" else "float32"
        arrays["attn_mask"] = (c.batch, 1, c.length, c.keys), dtype, tokens

    def step(*given: Any) -> Any:
        named = dict(zip(arrays, given, strict=True))
        grad = named.pop("grad")
        data: dict[str, Any] = {name: named.pop(name) for name in ("lengths", "ids") if name in named}
        if c.mask == "bool":
            data["attn_mask"] = named.pop("attn_mask")

        def attend(named: Any) -> Any:
            more = {**named, **{name: data[name] for name in ("attn_mask",) if name in data}}
            if "row_score" in more:
                more["dustbin"] = Dustbin(more.pop("row_score"), more.pop("col_score"))
            for option, name in (("lengths", "lengths"), ("segment_ids", "ids")):
                if name in data:
                    more |= {f"{side}_{option}": data[name] for side in ("query", "key")}
            return sinkhorn_attention(
                **more, **options, enable_gqa=c.key_heads != c.heads, lowering=lowering, sequence_axis=AXIS
            )

        output, pull = jax.vjp(attend, named)
        return output, pull(grad)[0]

    specs = {name: spec for name, (_, _, spec) in arrays.items()}
    moving = [n for n in arrays if n not in ("grad", "lengths", "ids") and not (n == "attn_mask" and c.mask == "bool")]
    run = jax.shard_map(
        step, mesh=mesh, in_specs=tuple(specs.values()), out_specs=(tokens, {name: specs[name] for name in moving})
    )
    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=NamedSharding(mesh, spec))
        for shape, dtype, spec in arrays.values()
    ]
    return run, shapes


def _options(c: Configuration) -> dict[str, Any]:
    names = "window", "base_iters", "tail_iters", "acceleration", "contraction", "epsilon", "gradient"
    return {name: getattr(c, name) for name in names}
