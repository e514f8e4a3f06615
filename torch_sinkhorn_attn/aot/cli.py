"""The command line: `attention` compiles one attention. What compiles a training step is made from its parts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from torch_sinkhorn_attn.aot import report
from torch_sinkhorn_attn.aot.attention import SHAPES, Configuration
from torch_sinkhorn_attn.aot.child import CompileError, call
from torch_sinkhorn_attn.aot.chips import CHIPS, Topology, parse_topology
from torch_sinkhorn_attn.aot.environment import missing
from torch_sinkhorn_attn.options import ACCELERATIONS, GRADIENTS, MEANINGS

DOES_NOT_FIT = 3
_MASKS = ("none", "bool", "float")
_DTYPES = ("bfloat16", "float32", "float16")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command."""
    return run(_parser().parse_args(arguments))


def run(options: argparse.Namespace) -> int:
    """`options.run(options, topology)`: 0 if what it compiles fits, 3 if not, 1 after an error, 130 after Ctrl-C."""
    try:
        topology = parse_topology(options.topology)
        return int(options.run(options, topology))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def _attention(options: argparse.Namespace, topology: Topology) -> int:
    names = [field.name for field in fields(Configuration)]
    c = Configuration.of({name: getattr(options, name) for name in names})
    if options.python is None and (reason := missing("jax", "libtpu")):
        raise ValueError(reason)
    head = (
        f"attention, forward and backward: {c.batch} x {c.heads} heads ({c.key_heads} of keys), {c.length} x {c.keys} "
        f"tokens, {c.features} features, {c.dtype},\n"
        f"window {c.window or 'none'}, T = {c.base_iters}, R = {c.tail_iters}, gradient {c.gradient}"
    )
    flags = [name for name in ("dustbin", "segments", "lengths") if getattr(c, name)]
    flags += [f"{c.acceleration} acceleration"] if c.acceleration else []
    flags += [f"{c.mask} mask"] if c.mask != "none" else []
    print(head + (f"; with {', '.join(flags)}" if flags else ""))
    arguments = {
        "configuration": {name: getattr(options, name) for name in names},
        "topology": topology.name,
        "generation": topology.chip.name,
        "shape": options.shape,
        "base_dtype": options.base_dtype,
    }
    if options.shards > 1:
        return _sharded(c, arguments, topology, options)
    target = "torch_sinkhorn_attn.aot.attention:compile_attention"
    found = _compiled(target, arguments, topology, options, python=options.python)
    if found is None:
        return DOES_NOT_FIT
    print(f"shape: {found['shape']}, {found['why']}", *found["disagreements"], sep="\n", end="\n\n")
    print(report.memory(found, topology), report.kernels(found, topology), sep="\n\n", end="\n\n")
    print(report.comparison(found, c.visited), report.projection(found, topology), sep="\n\n")
    return _status(found, topology)


def _sharded(c: Configuration, arguments: dict[str, Any], topology: Topology, options: argparse.Namespace) -> int:
    """Memory and traffic of the step whose sequence lies over several devices: no listings, which are of one."""
    print(f"its tokens over {options.shards} devices, {c.length // options.shards} queries each")
    target, arguments = "torch_sinkhorn_attn.aot.slices:compile_sharded", {**arguments, "shards": options.shards}
    quiet = {} if options.listings else {"LIBTPU_INIT_ARGS": ""}
    found = _compiled(target, arguments, topology, options, python=options.python, environment=quiet)
    if found is None:
        return DOES_NOT_FIT
    print(f"shape: {found['shape']}", report.memory(found, topology), sep="\n\n", end="\n\n")
    kept = c.tail_iters + (c.base_iters if c.gradient == "unrolled" else 0)
    print(report.wire(found, 2 * max(1, c.base_iters + c.tail_iters + kept)))
    return _status(found, topology)


def report_step(
    head: str, target: str, settings: Mapping[str, Any], topology: Topology, options: argparse.Namespace
) -> int:
    """Compile a training step and print what comes out, after `head`; the exit status is that of `run`.

    Args:
        target: for `child.call`: a function of `settings`, `topology` and `shape` that returns what
            `step.compile_step` does.
        options: those of `add_slice`, and `memory_only`: no listings, so no cost of kernels and no projection.
    """
    if reason := missing("torch_xla", "jax", "libtpu"):
        raise ValueError(reason)
    print(head)
    arguments = {**settings, "topology": topology.name, "shape": options.shape}
    environment = {"LIBTPU_INIT_ARGS": ""} if options.memory_only else {}
    found = _compiled(target, arguments, topology, options, environment=environment)
    if found is None:
        return DOES_NOT_FIT
    print(f"{found['layout']}\nshape: {found['shape']}", end="\n\n")
    parts = [report.memory] if options.memory_only else [report.memory, report.kernels, report.projection]
    for part in parts:
        print(part(found, topology), end="\n\n")
    return _status(found, topology)


def _compiled(
    target: str, arguments: dict[str, Any], topology: Topology, options: argparse.Namespace, **how: Any
) -> dict[str, Any] | None:
    """What the child found, with what it was compiled for printed; None, and why printed, if it cannot be compiled."""
    try:
        found = call(target, arguments, keep=options.listings, **how)
    except CompileError as error:
        print(f"for {topology.name}\n\ndoes not compile: {error}")
        return None
    per_chip = found["devices"] / topology.chips
    kind = f"{topology.chips} chips, {found['devices']} devices" if per_chip != 1 else f"{topology.chips} chips"
    print(f"for {topology.name}: {kind} ({found['device_kind']}); {found['versions']}")
    return found


def _status(found: dict[str, Any], topology: Topology) -> int:
    held = found["memory"]
    total = held["arguments"] + held["outputs"] - held["aliased"] + held["temporaries"] + held["code"]
    return 0 if total <= report.capacity(topology, found["devices"]) else DOES_NOT_FIT


def add_slice(parser: argparse.ArgumentParser) -> None:
    """The options that every command has: what is compiled for, and how."""
    text = f"{', '.join(CHIPS)}, or a slice such as v6e:16x16 (default: v6e, which is v6e:2x4)"
    parser.add_argument("--topology", default="v6e", metavar="NAME", help=text)
    text = "which kernels; auto: what fits VMEM (default: %(default)s)"
    parser.add_argument("--shape", choices=SHAPES, default="auto", help=text)
    parser.add_argument("--listings", metavar="PATH", help="keep the compiler's listings in this folder")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m torch_sinkhorn_attn.aot",
        description="Plan a TPU run on a machine without a TPU: compile it with the TPU's own compiler, and print "
        "whether it fits, its memory, what its kernels cost, and a projected time. No TPU is used or taken.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    attention = commands.add_parser("attention", help="one attention, forward and backward")
    attention.set_defaults(run=_attention)
    numbers = {"batch": "N", "heads": "H", "length": "L, queries", "features": "E"}
    defaults = {"key_heads": "--heads", "keys": "--length", "value_features": "--features"}
    for field in fields(Configuration):
        option = f"--{field.name.replace('_', '-')}"
        if field.name == "window":
            attention.add_argument(option, type=int, nargs=2, metavar=("LEFT", "RIGHT"), help=MEANINGS["window"])
        elif isinstance(field.default, bool):
            attention.add_argument(option, action="store_true", help="as in sinkhorn_attention")
        elif field.name == "acceleration":
            attention.add_argument(option, choices=ACCELERATIONS, help="as in sinkhorn_attention (default: none)")
        elif isinstance(field.default, str):
            choices = {"dtype": _DTYPES, "mask": _MASKS, "gradient": GRADIENTS}[field.name]
            attention.add_argument(option, choices=choices, default=field.default, help="(default: %(default)s)")
        else:
            default = defaults.get(field.name, str(field.default))
            text = MEANINGS.get(field.name) or f"{numbers.get(field.name, '')} (default: {default})".strip()
            kind, metavar = (float, "X") if field.name in ("epsilon", "contraction") else (int, "N")
            attention.add_argument(option, type=kind, default=field.default, metavar=metavar, help=text)
    text = "devices that the tokens lie over, each with an even block of queries and keys (default: %(default)s)"
    attention.add_argument("--shards", type=int, default=1, metavar="P", help=text)
    base = ("float32", "bfloat16")
    text = "of the products of the stopped iterations, resident only (default: %(default)s)"
    attention.add_argument("--base-dtype", choices=base, default="float32", help=text)
    text = "another Python with jax and libtpu, newer ones say; it needs no torch"
    attention.add_argument("--python", metavar="PATH", help=text)
    add_slice(attention)
    return parser
