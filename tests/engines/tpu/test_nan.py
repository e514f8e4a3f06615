"""NaN in a float mask, in the JAX engines: it shows on the support, and off it is nobody's."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
from marks import slow_after

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402

from torch_sinkhorn_attn.engines.tpu import Dustbin, Lowering, sinkhorn_attention  # noqa: E402

LOWERINGS = {"blockwise": Lowering("blockwise"), "streaming": Lowering("streaming", interpret=True)}


def tokens(size: int, heads: int = 2) -> list[jax.Array]:
    draw = np.random.default_rng(size)
    return [jnp.asarray(draw.standard_normal((1, heads, size, 5)), jnp.float32) for _ in range(3)]


def attention(lowering: str, size: int, mask: np.ndarray) -> jax.Array:
    compute = jax.jit(partial(sinkhorn_attention, lowering=LOWERINGS[lowering]))
    return compute(*tokens(size), jnp.asarray(mask, jnp.float32))


@pytest.mark.slow
@pytest.mark.parametrize("lowering", slow_after(1, LOWERINGS))
def test_a_nan_on_the_support_shows(lowering: str) -> None:
    for size in (2, 130):
        mask = np.zeros((size, size))
        mask[-1, 0] = np.nan
        one_head = np.stack([mask, np.zeros_like(mask)])
        output = attention(lowering, size, one_head)
        assert jnp.isnan(output[0, 0]).all() and jnp.isfinite(output[0, 1]).all(), size


@pytest.mark.parametrize("lowering", slow_after(0, LOWERINGS, {"streaming"}))
@pytest.mark.parametrize("shape", slow_after(0, [(9, 9), (1, 9), (9, 1)], {(1, 9), (9, 1)}))
def test_a_line_of_nan_is_no_padding(shape: tuple[int, int], lowering: str) -> None:
    """NaN lies neither above nor below `mask_floor`: where a key or query has no other entry it stays active."""
    for place in ((..., -1), (-1, slice(None))):
        mask = np.zeros(shape)
        mask[place] = np.nan
        assert jnp.isnan(attention(lowering, 9, mask)).all(), place


@pytest.mark.slow
@pytest.mark.parametrize("lowering", slow_after(1, LOWERINGS, {"streaming"}))
def test_a_nan_amid_padding(lowering: str) -> None:
    mask = np.zeros((9, 9))
    mask[:, 0] = -1e4
    assert jnp.isfinite(attention(lowering, 9, mask)).all()
    mask[-1, 0] = np.nan
    assert jnp.isnan(attention(lowering, 9, mask)).all()


def off_the_support(n: int) -> dict[str, tuple[np.ndarray, dict[str, Any]]]:
    """Where a mask belongs to no pair of the problem, and what makes it so."""
    half, none, last = np.arange(n) // (n // 2), np.zeros(n, int), n - 2
    hole = none.copy()
    hole[n // 2] = -1
    rows, cols = np.zeros((2, n, n), bool)
    rows[last:], cols[:, last:] = True, True
    amid_rows, amid_cols = (np.broadcast_to(x, (n, n)) for x in ((hole < 0)[:, None], hole < 0))
    distance, lengths = np.abs(np.arange(n)[:, None] - np.arange(n)), jnp.asarray([last])
    half, none, hole = (jnp.asarray(x) for x in (half, none, hole))
    return {
        "padded keys": (cols, {"key_lengths": lengths}),
        "padded queries": (rows, {"query_lengths": lengths}),
        "one row": (cols[:1], {"key_lengths": lengths}),
        "one column": (rows[:, :1], {"query_lengths": lengths}),
        "hole in the keys": (amid_cols, {"query_segment_ids": none, "key_segment_ids": hole}),
        "hole in the queries": (amid_rows, {"query_segment_ids": hole, "key_segment_ids": none}),
        "other segments": (np.asarray(half[:, None] != half), {"query_segment_ids": half, "key_segment_ids": half}),
        "beyond a window": (distance > 2, {"window": (2, 2)}),
        "holes beside a window": (
            amid_cols | (distance > 4), {"window": (2, 2), "query_segment_ids": none, "key_segment_ids": hole}
        ),
    }  # fmt: skip


def values_and_gradients(masks: list[np.ndarray], lowering: str, options: dict[str, Any]) -> list[list[jax.Array]]:
    """For each of the masks, which are of one shape."""

    def loss(*leaves: jax.Array) -> tuple[jax.Array, jax.Array]:
        output = sinkhorn_attention(*leaves, lowering=LOWERINGS[lowering], **options)
        return jnp.sin(output).sum(), output

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True))
    found = (compiled(*tokens(max(mask.shape)), jnp.asarray(mask, jnp.float32)) for mask in masks)
    return [[output, *gradients] for gradients, output in found]


MORE = ({}, {"dustbin": Dustbin(0.2, 0.1)}, {"gradient": "implicit", "base_iters": 60})


@pytest.mark.parametrize("lowering", slow_after(1, LOWERINGS, {"streaming"}))
@pytest.mark.parametrize("case", slow_after(0, range(9), set(range(8))))
def test_what_a_mask_holds_off_the_support_is_nobodys(case: int, lowering: str) -> None:
    name, (marked, options) = list(off_the_support(20).items())[case]
    masks = [np.where(marked, value, 0.0) for value in (0.0, np.nan, np.inf)]
    truth, *others = values_and_gradients(masks, lowering, options | MORE[case % 3])
    for other in others:
        for x, y in zip(other, truth, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_kernels_of_several_tiles_read_past_no_edge() -> None:
    """Blocks and tiles that stick out over the edge, where an interpreter reads NaN."""
    size, lengths = 530, {"query_lengths": jnp.asarray([515]), "key_lengths": jnp.asarray([520])}
    mask = np.zeros((size, size))
    mask[515:], mask[:, 520:] = np.nan, np.nan
    (found,) = values_and_gradients([mask], "streaming", lengths)
    (truth,) = values_and_gradients([np.zeros((size, size))], "blockwise", lengths)
    for x, y in zip(found, truth, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5)


@pytest.mark.parametrize("which", slow_after(1, [1, 2]))
@pytest.mark.parametrize("lowering", slow_after(1, LOWERINGS))
def test_a_grouped_key_that_one_head_alone_sees(lowering: str, which: int) -> None:
    """NaN in a key, or its value, that the mask keeps for one of the two query heads that read it, is that head's."""
    leaves = tokens(9, heads=4)
    leaves = [leaves[0], *(x[:, :2] for x in leaves[1:])]
    leaves[which] = leaves[which].at[0, 0, 8, 0].set(jnp.nan)
    mask = np.ones((1, 4, 1, 9), bool)
    mask[0, 1:, 0, 8] = False
    compute = jax.jit(partial(sinkhorn_attention, enable_gqa=True, lowering=LOWERINGS[lowering], base_iters=3))
    output = compute(*leaves, jnp.asarray(mask))
    assert jnp.isnan(output[0, 0]).any() and jnp.isfinite(output[0, 1:]).all()
