"""One launch of a wavefront kernel: operands and results block by block, each at the stage that reads or writes it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from torch_sinkhorn_attn.engines.tpu.method import dropout
from torch_sinkhorn_attn.engines.tpu.method.lowering import Lowering
from torch_sinkhorn_attn.engines.tpu.method.manual import vary_together
from torch_sinkhorn_attn.engines.tpu.method.sinkhorn import Augmented
from torch_sinkhorn_attn.engines.tpu.releases import kernel_body, result_type
from torch_sinkhorn_attn.engines.tpu.resident.strip import BLOCK
from torch_sinkhorn_attn.engines.tpu.wavefront.path import Entries, Path

ROWS, COLS, PAIRS = "rows", "cols", "pairs"


class Operand(NamedTuple):
    """An array that a kernel reads a block at a time.

    `array`: `[N or 1, H, Hk or 1, F, tokens]`, tokens in whole blocks, columns with their padding; or of pairs, `[N or
    1, H or 1, L or 1, S or 1]`, as it is. `side`: which tokens those are. `lag`: steps that the stage which reads it is
    behind. `column`: of pairs, the column block of the strip.
    """

    name: str
    array: Array
    side: str
    lag: int = 0
    column: int = 0


class Result(NamedTuple):
    """Likewise one that it writes, `shape` without `[N, H]`: `[F, tokens]`."""

    name: str
    shape: tuple[int, int]
    side: str | None  # None: one block for the head
    lag: int = 0


Scratch = dict[str, tuple[tuple[int, ...], Any]]


def launch(
    name: str,
    body: Callable[..., None],
    problem: Augmented,
    lowering: Lowering,
    entries: Entries,
    path: Path,
    before: int,
    operands: list[Operand],
    results: list[Result],
    scratch: Scratch,
    scalars: Mapping[str, Array] | None = None,
) -> list[Array]:
    """Run `body(names, *refs)` over all steps of all heads; results come back as `[N, H, *shape]`. `scalars`: vectors
    that the kernel reads number by number."""
    num, heads = problem.constants.log_row_mass.shape[:2]
    length = entries.row.shape[1]
    per_batch = np.int32(length if entries.row.shape[0] > 1 else 0)
    prefetched = {"row": entries.row.reshape(-1), "front": entries.front.reshape(-1)}
    if problem.constants.dropout_seed is not None:
        prefetched["stream"] = dropout.head_streams(problem.constants)
    prefetched |= scalars or {}

    def block_at(side: str | None, lag: int) -> Callable[..., Any]:
        def at(n: Any, s: Any, row: Any, front: Any) -> Any:
            if side is None:
                return 0
            place = n * per_batch + s + np.int32(before - lag)
            if side == COLS:
                return front[place] - 1
            block = row[place]
            return jnp.where(block < 0, ~block, block)

        return at

    def pairs(x: Operand) -> pl.BlockSpec:
        own_n, own_h, own_l, own_s = x.array.shape
        row_at, col_at = (block_at(side, x.lag) for side in (ROWS, COLS))
        last = np.int32(-(-own_s // BLOCK) - 1)

        def index(n: Any, h: Any, s: Any, row: Any, front: Any, *_: Any) -> tuple[Any, ...]:
            column = col_at(n, s, row, front) + np.int32(1 - 2 * path.width + x.column)
            return (
                n if own_n > 1 else 0,
                h if own_h > 1 else 0,
                row_at(n, s, row, front) if own_l > 1 else 0,
                jnp.clip(column, 0, last) if own_s > 1 else 0,
            )

        return pl.BlockSpec((1, 1, BLOCK if own_l > 1 else 1, BLOCK if own_s > 1 else 1), index)

    def operand(x: Operand) -> pl.BlockSpec:
        if x.side == PAIRS:
            return pairs(x)
        at, (own_n, own_h) = block_at(x.side, x.lag), x.array.shape[:2]
        group = np.int32(heads // own_h)
        shape = (1, 1, x.array.shape[2], BLOCK)
        return pl.BlockSpec(
            shape,
            lambda n, h, s, row, front, *_: (n if own_n > 1 else 0, lax.div(h, group), 0, at(n, s, row, front)),
        )

    def result(x: Result) -> pl.BlockSpec:
        at = block_at(x.side, x.lag)
        return pl.BlockSpec((1, 1, x.shape[0], BLOCK), lambda n, h, s, row, front, *_: (n, h, 0, at(n, s, row, front)))

    names = (*prefetched, *(x.name for x in operands), *(x.name for x in results), *scratch)
    given = vary_together([*prefetched.values(), *(x.array for x in operands)])
    run = pl.pallas_call(
        kernel_body(functools.partial(body, names)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetched),
            grid=(num, heads, length - before),
            in_specs=[operand(x) for x in operands],
            out_specs=[result(x) for x in results],
            scratch_shapes=[pltpu.VMEM(*x) for x in scratch.values()],
        ),
        out_shape=[result_type((num, heads, *x.shape), problem.dtype, given) for x in results],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=lowering.vmem_limit
        ),
        interpret=lowering.interpret,
        name=name,
    )
    with jax.named_scope(name):  # by which the compiler's listings call it
        return list(run(*given))
