"""A computation that is another one where it is lowered for a TPU.

For what platform a function is traced is not known before it is lowered, and tracing kernels takes seconds: so a
primitive stands for both computations, and only the one that is lowered is traced. Batching and derivatives are settled
around it (`batching`, `front.api`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import mlir

from torch_sinkhorn_attn.engines.tpu.method.manual import vary_together
from torch_sinkhorn_attn.engines.tpu.releases import abstract_result

_primitive = Primitive("sinkhorn_by_platform")
_primitive.multiple_results = True


def by_platform(elsewhere: Callable[..., Any], on_tpu: Callable[..., Any], *arguments: Any) -> Any:
    """`on_tpu(*arguments)` where it is lowered for a TPU, else `elsewhere(*arguments)`.

    Args:
        elsewhere, on_tpu: of trees of arrays, with results of the same shapes and dtypes; hashable, and equal where
            they compute the same.
    """
    leaves, structure = jax.tree.flatten(vary_together(arguments))
    shapes = jax.eval_shape(elsewhere, *arguments)
    outputs = tuple((x.shape, x.dtype) for x in jax.tree.leaves(shapes))
    found = _primitive.bind(*leaves, elsewhere=elsewhere, on_tpu=on_tpu, structure=structure, outputs=outputs)
    return jax.tree.unflatten(jax.tree.structure(shapes), found)


def _lowered(which: str) -> Any:
    def compute(*leaves: Any, structure: Any, **functions: Any) -> Any:
        found = functions[which](*jax.tree.unflatten(structure, leaves))
        return jax.tree.leaves(vary_together(found))

    return mlir.lower_fun(compute, multiple_results=True)


@_primitive.def_impl
@partial(jax.jit, static_argnames=("elsewhere", "on_tpu", "structure", "outputs"))
def _at_once(*leaves: Any, **functions: Any) -> Any:
    return _primitive.bind(*leaves, **functions)


@_primitive.def_abstract_eval
def _types(*operands: Any, outputs: Any, **_: Any) -> Any:
    return [abstract_result(shape, dtype, operands) for shape, dtype in outputs]


mlir.register_lowering(_primitive, _lowered("elsewhere"))
mlir.register_lowering(_primitive, _lowered("on_tpu"), platform="tpu")
