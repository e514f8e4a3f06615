"""One launch of a resident kernel: a grid step for each batch element and head, everything by name."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from torch_sinkhorn_attn.engines.tpu.method import dropout
from torch_sinkhorn_attn.engines.tpu.method.lowering import Lowering
from torch_sinkhorn_attn.engines.tpu.method.manual import vary_together
from torch_sinkhorn_attn.engines.tpu.method.sinkhorn import Augmented
from torch_sinkhorn_attn.engines.tpu.method.unfit import of_unfit_data
from torch_sinkhorn_attn.engines.tpu.releases import kernel_body, result_type
from torch_sinkhorn_attn.engines.tpu.resident.neighbours import Neighbours

OWN_DTYPE = {
    "query",
    "key",
    "head_key",
    "value",
    "grad",
    "col_lo",
    "col_hi",
}  # the other operands are in the compute dtype
_BY_KEY_HEAD = {"key", "value"}
_BY_BATCH = {"col_lo", "col_hi"}
_COLLECTIVE_ID = 17  # of the semaphore by which kernels of several devices meet, one kernel after another

Shapes = dict[str, tuple[int, ...]]
Scratch = dict[str, tuple[tuple[int, ...], Any]]


def launch(
    name: str,
    body: Callable[..., None],
    problem: Augmented,
    lowering: Lowering,
    first: Array,
    operands: dict[str, Array],
    results: Shapes,
    scratch: Scratch,
    neighbours: Neighbours | None = None,
) -> dict[str, Array]:
    """Run `body(names, *refs)` over all heads.

    Args:
        first: `[N, rows]`, the strip's first column blocks.
        operands: `[N, H, ...]`, `[N, Hk, ...]` or `[N, ...]` by name, the last two dimensions in VMEM at once.
        results: shapes of one head's results, which come back as `[N, H, *shape]` in the compute dtype.
        scratch: shape and dtype of a head's workspace.
        neighbours: devices whose kernels this one waits for: then heads are taken in one order on all.
    """
    num, heads = problem.constants.log_row_mass.shape[:2]
    group = np.int32(heads // problem.inputs.key.shape[1])
    prefetched = {"first": first}
    if problem.constants.dropout_seed is not None:
        prefetched["stream"] = dropout.head_streams(problem.constants)
    operands = {key: x if key in OWN_DTYPE else x.astype(problem.dtype) for key, x in operands.items()}

    def block_of(key: str, shape: tuple[int, ...]) -> pl.BlockSpec:
        if key in _BY_KEY_HEAD:
            return pl.BlockSpec((1, 1, *shape), lambda n, h, *_: (n, lax.div(h, group), 0, 0))
        if key in _BY_BATCH:
            return pl.BlockSpec((1, *shape), lambda n, h, *_: (n, 0, 0))
        return pl.BlockSpec((1, 1, *shape), lambda n, h, *_: (n, h, 0, 0))

    workspace = {name: pltpu.VMEM(*x) for name, x in scratch.items()}
    together: dict[str, Any] = {"dimension_semantics": ("parallel", "parallel")}
    if neighbours is not None:
        workspace |= neighbours.scratch(problem.dtype)
        together = {"dimension_semantics": ("arbitrary", "arbitrary"), "collective_id": _COLLECTIVE_ID}
    given = vary_together([*prefetched.values(), *operands.values()])
    run = pl.pallas_call(
        kernel_body(functools.partial(body, (*prefetched, *operands, *results, *workspace))),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetched),
            grid=(num, heads),
            in_specs=[block_of(key, x.shape[-2:]) for key, x in operands.items()],
            out_specs=[block_of(key, shape) for key, shape in results.items()],
            scratch_shapes=list(workspace.values()),
        ),
        out_shape=[result_type((num, heads, *shape), problem.dtype, given) for shape in results.values()],
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=lowering.vmem_limit, **together),
        interpret=lowering.interpret,
        name=name,
    )
    with jax.named_scope(name):  # by which the compiler's listings call it
        found = run(*given)
    return dict(zip(results, found, strict=True))


_streams = True  # what does not suit the resident kernel


def resident_or_streamed(suited: Array, resident: Callable[[], Any], streamed: Callable[[], Any]) -> Any:
    """The branch the data want: `suited` says whether they fit the strip and stay in range."""
    if not _streams:
        return resident()
    return lax.cond(suited, lambda: vary_together(resident()), lambda: vary_together(of_unfit_data(streamed)()))


@contextlib.contextmanager
def without_streaming() -> Iterator[None]:
    """Trace the resident kernels alone, to look at what is compiled. Results are wrong for data that do not suit."""
    global _streams
    before, _streams = _streams, False
    try:
        yield
    finally:
        _streams = before
