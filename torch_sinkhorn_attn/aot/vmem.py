"""The VMEM that a resident kernel really takes: the compiler's answer, beside the table that programs choose by.

A kernel is compiled alone, without what its data may fall back to, and with the limit of its generation whatever the
table says. An answer is kept in a folder of the user's cache, by the kernel, the generation and the versions.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch_sinkhorn_attn.aot.attention import Configuration, problem
from torch_sinkhorn_attn.aot.bundles import compile_and_read, versions
from torch_sinkhorn_attn.aot.chips import CHIPS
from torch_sinkhorn_attn.aot.failures import explain

_ADDRESS = re.compile(r"0x[0-9a-f]+")


def measure(points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the compiler says of several kernels; ready for JSON.

    Args:
        points: arguments of `ask`.
    """
    return {"answers": [ask(**point) for point in points]}


def ask(
    configuration: Mapping[str, Any],
    generation: str,
    adjoint: bool,
    base_dtype: str = "float32",
    statics: Mapping[str, Any] | None = None,
    topology: str | None = None,
) -> dict[str, Any]:
    """What the compiler says of the resident kernel of one direction.

    Args:
        configuration: as of `attention.Configuration`.
        statics: further fields of `Statics`, by name.

    Returns:
        "estimate", what the choice reckons with in all, and "width" of the strip; and "vmem", "spills" and "limit" of
        the compiled kernel, or "error", why it does not compile.
    """
    kernel, arguments, known = alone(Configuration.of(configuration), statics or {}, generation, base_dtype, adjoint)
    topology = topology or CHIPS[generation].topology
    kept = _cache(_ADDRESS.sub("", str(kernel)), topology)
    if kept is not None and kept.exists():
        return {**known, **json.loads(kept.read_text())}
    try:
        (found,) = compile_and_read(_function(kernel), arguments, topology).kernels
        answer: dict[str, Any] = {"vmem": found.vmem, "spills": found.spills, "limit": found.vmem_limit}
    except Exception as error:  # whatever the compiler says
        reason = explain(str(error))
        if "VMEM overflow" not in reason:
            raise
        answer = {"error": reason}
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(answer))
    return {**known, **answer}


def _cache(kernel: str, topology: str) -> Path | None:
    """Where the answer for a kernel, by its program in JAX's words, is kept; None where there is no such folder."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.path.isabs(home) or not os.access(home if os.path.isdir(home) else os.path.dirname(home), os.W_OK):
        return None
    name = hashlib.sha256(json.dumps([kernel, topology, versions()]).encode()).hexdigest()
    return Path(home, "torch_sinkhorn_attn", "vmem", f"{name}.json")


def alone(
    c: Configuration, statics: Mapping[str, Any], generation: str, base_dtype: str, adjoint: bool
) -> tuple[Any, list[Any], dict[str, Any]]:
    """The resident kernel of one direction as an equation of JAX, its operands' shapes, and what the choice knows."""
    import jax

    from torch_sinkhorn_attn.engines.tpu.method import choice
    from torch_sinkhorn_attn.engines.tpu.method.lowering import Lowering
    from torch_sinkhorn_attn.engines.tpu.resident import adjoint as resident_adjoint, launch, passes
    from torch_sinkhorn_attn.engines.tpu.resident.strip import strip_of

    inputs, constants, options = problem(c)
    options = replace(options, **statics)
    if options.dropout_p:
        constants = constants._replace(dropout_seed=jax.ShapeDtypeStruct((2,), "uint32"))
    asked = Lowering("resident", base_dtype=base_dtype, generation=generation)
    known: dict[str, Any] = {}

    def posed(inputs: Any, constants: Any) -> tuple[Any, Any]:
        found, lowering = choice.posed(inputs, constants, options, asked)
        strip = strip_of(found.length, found.size, options)
        known.update(estimate=choice.vmem(found, lowering, adjoint), width=strip.width)
        return found, lowering

    def forward(inputs: Any, constants: Any, *_: Any) -> Any:
        with launch.without_streaming():
            return passes.forward(*posed(inputs, constants), True)

    def backward(inputs: Any, constants: Any, output: Any, duals: Any, bins: Any) -> Any:
        with launch.without_streaming():
            found, lowering = posed(inputs, constants)
            return resident_adjoint.backward(found, lowering, output, duals, output, bins)

    def floats(*shape: int) -> Any:
        return jax.ShapeDtypeStruct((c.batch, c.heads, *shape), "float32")

    bins = constants.num_dustbins
    stacks = (floats(c.length + bins), floats(c.keys + bins))
    duals = tuple(jax.ShapeDtypeStruct((options.kept + 1, *x.shape), x.dtype) for x in stacks)
    masses = (floats(c.length), floats(c.keys)) if bins else (None, None)
    arguments = inputs, constants, floats(c.length, c.value_features), duals, masses
    (kernel,) = _kernels(jax.make_jaxpr(backward if adjoint else forward)(*arguments).jaxpr)
    return kernel, [jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype) for x in kernel.invars], known


def _kernels(jaxpr: Any) -> Iterator[Any]:
    """The Pallas calls in a program, at any depth."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation
            continue
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _kernels(inner)


def _function(kernel: Any) -> Callable[..., Any]:
    from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun

    function: Callable[..., Any] = jaxpr_as_fun(ClosedJaxpr(Jaxpr((), kernel.invars, kernel.outvars, [kernel]), ()))
    return function
