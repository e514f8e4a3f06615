"""The VMEM that a resident kernel really takes: compiled alone, without the kernels that its data may fall back to.

    python -c "from torch_sinkhorn_attn.aot.vmem import ..."   see benchmarks/vmem.py, which makes the shipped table
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch_sinkhorn_attn.aot.attention import Configuration, problem
from torch_sinkhorn_attn.aot.bundles import compile_and_read
from torch_sinkhorn_attn.aot.chips import CHIPS
from torch_sinkhorn_attn.aot.failures import explain


def program(
    configuration: Configuration, statics: Mapping[str, Any], generation: str, base_dtype: str, adjoint: bool
) -> tuple[Any, list[Any], dict[str, Any]]:
    """A function of the resident kernel of one direction, its arguments, and what the choice knows of it."""
    import jax

    from torch_sinkhorn_attn.engines.tpu.method import choice
    from torch_sinkhorn_attn.engines.tpu.method.lowering import Lowering
    from torch_sinkhorn_attn.engines.tpu.method.sinkhorn import Augmented
    from torch_sinkhorn_attn.engines.tpu.resident import adjoint as resident_adjoint, launch, passes
    from torch_sinkhorn_attn.engines.tpu.resident.strip import strip_of
    from torch_sinkhorn_attn.engines.tpu.streaming.passes import StreamingPasses

    c = configuration
    inputs, constants, options = problem(c)
    options = replace(options, **statics)
    if options.dropout_p:
        constants = constants._replace(dropout_seed=jax.ShapeDtypeStruct((2,), "uint32"))
    lowering = Lowering("resident", base_dtype=base_dtype, generation=generation)

    def posed(inputs: Any, constants: Any) -> Any:
        return Augmented(inputs, constants, options, StreamingPasses(inputs, constants, options, lowering))

    def forward(inputs: Any, constants: Any, *_: Any) -> Any:
        with launch.without_streaming():
            return passes.forward(posed(inputs, constants), lowering, True)

    def backward(inputs: Any, constants: Any, output: Any, duals: Any, bins: Any) -> Any:
        with launch.without_streaming():
            return resident_adjoint.backward(posed(inputs, constants), lowering, output, duals, output, bins)

    def floats(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, "float32")

    kept, bins = options.kept + 1, constants.num_dustbins
    duals = floats(kept, c.batch, c.heads, c.length + bins), floats(kept, c.batch, c.heads, c.keys + bins)
    masses = (floats(c.batch, c.heads, c.length), floats(c.batch, c.heads, c.keys)) if bins else (None, None)
    output = floats(c.batch, c.heads, c.length, c.value_features)
    known: dict[str, Any] = {}

    def look(inputs: Any, constants: Any) -> None:
        posed_ = posed(inputs, constants)
        strip = strip_of(c.length, c.keys, options)
        known.update(known=choice.vmem(posed_, lowering, adjoint) - choice.SPILLS, width=strip.width, rows=strip.rows, unroll=strip.unroll)

    jax.eval_shape(look, inputs, constants)
    fn, args = alone(backward if adjoint else forward, [inputs, constants, output, duals, masses])
    return fn, args, known


def alone(fn: Any, args: list[Any]) -> tuple[Any, list[Any]]:
    """The only kernel of a function, by itself: nothing else is compiled."""
    import jax
    from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun

    def kernels(jaxpr: Any) -> Any:
        for equation in jaxpr.eqns:
            if equation.primitive.name == "pallas_call":
                yield equation
                continue
            for value in equation.params.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    yield from kernels(inner)

    (kernel,) = kernels(jax.make_jaxpr(fn)(*args).jaxpr)
    closed = ClosedJaxpr(Jaxpr((), kernel.invars, kernel.outvars, [kernel]), ())
    return jaxpr_as_fun(closed), [jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype) for x in kernel.invars]


def measure(points: Sequence[Mapping[str, Any]], topology: str = "") -> dict[str, Any]:
    import time
    found = []
    for point in points:
        c = Configuration.of(point["configuration"])
        generation = point["generation"]
        t = time.time()
        try:
            fn, args, known = program(c, point.get("statics", {}), generation, point.get("base_dtype", "float32"), point["adjoint"])
            report = compile_and_read(fn, args, topology or CHIPS[generation].topology)
            (kernel,) = [k for k in report.kernels if "sinkhorn_resident" in k.name]
            found.append({**known, "vmem": kernel.vmem, "spills": kernel.spills, "limit": kernel.vmem_limit})
        except Exception as error:
            found.append({"error": explain(str(error)), "kind": type(error).__name__})
        found[-1]["seconds"] = round(time.time() - t, 1)
    return {"found": found}
