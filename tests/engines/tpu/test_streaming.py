"""The streaming TPU kernels, interpreted: every pass against dense formulas, over what a problem can hold."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
from marks import slow_after

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
from tpu_interpreter import RACING, watch_races  # noqa: E402

from torch_sinkhorn_attn.engines.tpu.method import dropout  # noqa: E402
from torch_sinkhorn_attn.engines.tpu.method.lowering import Lowering  # noqa: E402
from torch_sinkhorn_attn.engines.tpu.method.problem import Constants, Field, Inputs, Statics  # noqa: E402
from torch_sinkhorn_attn.engines.tpu.releases import enable_x64  # noqa: E402
from torch_sinkhorn_attn.engines.tpu.streaming import passes as streaming, walk as streaming_walk  # noqa: E402
from torch_sinkhorn_attn.engines.tpu.streaming.passes import StreamingPasses  # noqa: E402
from torch_sinkhorn_attn.engines.tpu.streaming.spans import most_tiles, spans, window_intervals  # noqa: E402


@pytest.fixture(autouse=True)
def float64():
    with enable_x64():
        yield


@pytest.fixture
def small_blocks(monkeypatch):
    """One vector of lanes a block and a tile: many tiles in small problems."""
    for name in ("BLOCK", "TILE", "WIDE_TILE", "SMALLEST_TILE"):
        monkeypatch.setattr(streaming, name, 128)


class Case:
    """A random problem and its dense scores."""

    def __init__(
        self,
        seed,
        num=2,
        heads=2,
        groups=None,
        length=150,
        size=130,
        width=5,
        value_width=3,
        window=None,
        lengths=None,
        mask=None,
        mask_dtype=np.float64,
        dead=0.1,
        dropout_p=0.0,
        terms=3,
        gap=0.0,
        scale=0.7,
        dtype="float64",
    ):
        rng = np.random.default_rng(seed)

        def normal(*shape):
            return rng.normal(size=shape)

        self.shape = num, heads, length, size
        groups = groups or heads
        left, right = window or (-1, -1)
        uniform = lengths is None
        lo, hi = np.zeros((num, length), np.int32), np.zeros((num, length), np.int32)
        col_lo, col_hi = np.zeros((num, size), np.int32), np.zeros((num, size), np.int32)
        active = np.ones((num, 1, length), bool), np.ones((num, 1, size), bool)
        for n, (rows, cols) in enumerate(lengths or [(length, size)] * num):
            lo[n, :rows], hi[n, :rows] = window_intervals(rows, cols, left, right, False)
            col_lo[n, :cols], col_hi[n, :cols] = window_intervals(rows, cols, left, right, True)
            active[0][n, :, rows:], active[1][n, :, cols:] = False, False
        masses = [np.where(a & (rng.random((num, heads, a.shape[-1])) >= dead), 0.0, -np.inf) for a in active]
        support = (np.arange(size) >= lo[..., None]) & (np.arange(size) < hi[..., None])
        query, key = normal(num, heads, length, width), normal(num, groups, size, width)
        self.value = normal(num, groups, size, value_width)
        self.scale = scale
        query, key, self.value = (np.asarray(jnp.asarray(x, dtype), np.float64) for x in (query, key, self.value))
        scores = self.scale * np.einsum("nhie,nhje->nhij", query, self.per_head(key))
        keep = support[:, None] & (masses[0] == 0)[..., None] & (masses[1] == 0)[..., None, :]
        self.mask = None
        if mask is not None:
            shape = [full if axis else 1 for full, axis in zip(self.shape, mask)]
            kept = rng.random(shape) < 0.7
            if mask_dtype is bool:
                self.mask = kept
            else:
                self.mask = np.where(kept, normal(*shape), -np.inf).astype(mask_dtype)
                scores = scores + np.where(kept, self.mask, 0.0)
            keep = keep & kept
        self.scores = np.where(keep, scores, -np.inf)
        self.query, self.key, self.keep_rows, self.keep_cols = query, key, masses[0] == 0, masses[1] == 0
        seed_words = np.array([12345, 678901234], np.uint32) if dropout_p else None
        self.dropped = np.ones(self.shape)
        if dropout_p:
            stream = dropout.streams(jnp.asarray(seed_words), jnp.arange(num * heads).reshape(num, heads, 1, 1))
            kept = dropout.keep(stream, jnp.arange(length)[:, None], jnp.arange(size), dropout_p)
            self.dropped = np.asarray(kept) / (1 - dropout_p)
        self.inputs = Inputs(
            *(jnp.asarray(x, dtype) for x in (query, key, self.value)),
            None if self.mask is None else jnp.asarray(self.mask),
        )
        self.constants = Constants(
            *(jnp.asarray(x) for x in (lo, hi, col_lo, col_hi, *masses)),
            dropout_seed=None if seed_words is None else jnp.asarray(seed_words),
        )
        self.statics = Statics(
            scale=self.scale,
            dropout_p=dropout_p,
            banded=window is not None,
            window_left=left,
            window_right=right,
            uniform=uniform,
        )
        self.u, self.p = normal(num, heads, length), normal(terms, num, heads, length)
        self.v, self.q = normal(num, heads, size), normal(terms, num, heads, size)
        self.p, self.q = self.p + gap, self.q - gap  # as beside a large difference: P is far below its factors
        self.x, self.y = normal(terms, num, heads, length), normal(terms, num, heads, size)
        self.row_weight, self.col_weight = normal(num, heads, length), normal(num, heads, size)
        self.grad = normal(num, heads, length, value_width)

    def per_head(self, x):
        return np.repeat(x, self.shape[1] // x.shape[1], 1)

    def matrix(self, p, q):
        return np.exp(self.scores + p[..., :, None] + q[..., None, :])

    @functools.cached_property
    def cotangent(self):
        d = np.einsum("nhie,nhje->nhij", self.grad, self.per_head(self.value)) * self.dropped
        found = self.matrix(self.u, self.v) * d
        for p, q, x, y in zip(self.p, self.q, self.x, self.y):
            found = found - self.matrix(p, q) * x[..., None] * y[..., None, :]
        return found


def lse(x, axis):
    with np.errstate(divide="ignore"):
        return np.log(np.exp(x).sum(axis))


def expected(case):
    u, v, grad = case.u, case.v, case.grad
    plan = case.matrix(u, v)
    dropped = plan * case.dropped
    out = {
        "row_lse": np.where(case.keep_rows, lse(case.scores + v[..., None, :], -1), 0),
        "column_lse": np.where(case.keep_cols, lse(case.scores + u[..., :, None], -2), 0),
        "rows": (plan * case.col_weight[..., None, :]).sum(-1),
        "columns": (plan * case.row_weight[..., None]).sum(-2),
        "values": np.einsum("nhij,nhje->nhie", dropped, case.per_head(case.value)),
        "sums": plan.sum(-1),
        "value_cotangent": np.einsum("nhij,nhie->nhje", dropped, grad),
        "query_cotangent": np.einsum("nhij,nhje->nhie", case.cotangent, case.per_head(case.key)),
        "key_cotangent": np.einsum("nhij,nhie->nhje", case.cotangent, case.query),
    }
    if case.mask is not None and case.mask.dtype != bool:
        axes = tuple(a for a, (have, want) in enumerate(zip(case.shape, case.mask.shape)) if have != want)
        out["mask"] = case.cotangent.sum(axes, keepdims=True)
    return out


def found(case, interpret=True, names=None):
    """The passes' results, of those in `names` or of all."""
    mask_grad = case.mask is not None and case.mask.dtype != bool

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def run(inputs, constants, u, v, field, grad, x, y):
        passes = StreamingPasses(inputs, constants, case.statics, Lowering("streaming", interpret))
        methods = {
            "row_lse": lambda: jnp.where(case.keep_rows, passes.row_lse(v), 0),
            "column_lse": lambda: jnp.where(case.keep_cols, passes.column_lse(u), 0),
            "rows": lambda: passes.rows(u, v, y),
            "columns": lambda: passes.columns(u, v, x),
            "values": lambda: passes.values(u, v),
            "value_cotangent": lambda: passes.value_cotangent(u, v, grad),
            "query_cotangent": lambda: passes.query_cotangent(u, v, grad, field, mask_grad),
            "key_cotangent": lambda: passes.key_cotangent(u, v, grad, field),
        }
        results = {name: methods[name]() for name in names or methods}
        for name, other in (("values", "sums"), ("query_cotangent", "mask")):
            if name in results:
                results[name], results[other] = results[name]
        return results

    field = Field(*(jnp.asarray(z) for z in (case.p, case.q, case.x, case.y)))
    vectors = (jnp.asarray(z) for z in (case.row_weight, case.col_weight))
    results = run(
        case.inputs, case.constants, jnp.asarray(case.u), jnp.asarray(case.v), field, jnp.asarray(case.grad), *vectors
    )
    return {name: np.asarray(x) for name, x in results.items() if x is not None}


SOME = ("row_lse", "column_lse", "values", "query_cotangent")  # one of each kernel, and both directions
CASES = {
    "one": dict(length=1, size=1, dead=0.0),
    "full": dict(length=150, size=270),
    "aligned": dict(length=256, size=128),
    "one query": dict(length=1, size=140, mask=(1, 1, 1, 1)),
    "grouped": dict(heads=4, groups=2, length=10),
    "wide": dict(length=40, size=200, width=130, value_width=129),
    "window": dict(length=410, size=410, window=(20, 30)),
    "window of a rectangle": dict(length=700, size=150, window=(150, 150)),
    "wide window": dict(length=400, size=500, window=(300, 10)),
    "half window": dict(length=200, size=400, window=(-1, 9)),
    "lengths": dict(length=300, size=350, heads=1, lengths=[(17, 350), (300, 5)]),
    "lengths and window": dict(length=400, size=300, heads=1, lengths=[(70, 300), (399, 250)], window=(40, 40)),
    "nothing": dict(lengths=[(0, 0), (3, 3)], window=(1, 1)),
    "dropout": dict(dropout_p=0.4, groups=1),
    "many terms": dict(terms=11),
    "terms far apart": dict(terms=2, gap=301.0),
    "bool mask": dict(mask=(1, 1, 1, 1), mask_dtype=bool),
    "float mask": dict(mask=(1, 0, 1, 1)),
    "half mask": dict(mask=(1, 0, 1, 1), mask_dtype=np.float16),
    "one float mask": dict(mask=(0, 0, 1, 1), heads=3),
    "mask per head": dict(mask=(0, 1, 1, 1), length=300, window=(30, 50)),
    "mask of keys": dict(mask=(1, 0, 0, 1)),
    "bool mask of keys": dict(mask=(1, 0, 0, 1), mask_dtype=bool),
    "mask of queries": dict(mask=(0, 1, 1, 0)),
    "mask of heads": dict(mask=(1, 1, 0, 0)),
}


def assert_close(have, want, tolerance):
    for name, x in have.items():
        y = want[name]
        assert x.shape == y.shape, name
        scale = max(1, np.abs(y).max(initial=0, where=np.isfinite(y)))
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * scale, err_msg=name)


ELSEWHERE = {
    "aligned", "one query", "grouped", "wide", "window", "window of a rectangle", "wide window", "half window",
    "lengths", "nothing", "many terms", "terms far apart", "bool mask", "half mask", "one float mask",
    "bool mask of keys", "mask of queries", "mask of heads", "dropout", "full", "one", "mask of keys",
}  # fmt: skip


@pytest.mark.parametrize("name", slow_after(0, CASES, ELSEWHERE))
def test_equals_the_dense_formulas(name, small_blocks):
    case = Case(len(name), **CASES[name])
    have, want = found(case, names=SOME if "mask of" in name else None), expected(case)
    assert "mask of" in name or have.keys() == want.keys()
    assert_close(have, want, 1e-12)


@pytest.mark.slow
def test_large_tiles():
    case = Case(
        0, num=1, heads=1, length=530, size=600, terms=1, lengths=[(530, 580)], window=(900, 400), mask=(0, 0, 1, 1)
    )
    assert_close(found(case, names=SOME), expected(case), 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_dtypes(dtype, small_blocks):
    """Float32 throughout, but that bfloat16 rounds the plan and dS before they multiply matrices."""
    with enable_x64(False):
        case = Case(3, num=1, heads=1, length=150, size=140, dtype=dtype, dropout_p=0.2)
        have, want = found(case), expected(case)
    matrices = {"values", "value_cotangent", "query_cotangent", "key_cotangent"}
    assert_close({name: x for name, x in have.items() if name not in matrices}, want, 2e-5)
    assert_close({name: have[name] for name in matrices}, want, 2e-2 if dtype == "bfloat16" else 2e-5)


def test_large_scores():
    """Scores of a line tens of thousands apart."""
    case = Case(5, length=20, size=300, scale=1e4)
    assert np.abs(case.scores[np.isfinite(case.scores)]).max() > 2e4
    have = found(case, names=("row_lse",))["row_lse"]
    x = case.scores + case.v[..., None, :]
    top = np.where(np.isfinite(x.max(-1)), x.max(-1), 0)
    want = np.where(case.keep_rows, top + lse(x - top[..., None], -1), 0)
    np.testing.assert_allclose(have, want, rtol=1e-12)


# Which tiles are visited


def test_a_band_costs_its_width(small_blocks):
    """The number of tile steps does not grow with the length, and is known before the data where lengths are full."""
    steps = []
    for length in (2048, 131072):
        case = Case(0, num=1, heads=1, length=2, size=2)
        statics = dataclasses.replace(case.statics, banded=True, window_left=60, window_right=60)
        lo, hi = (jnp.asarray(x[None], jnp.int32) for x in window_intervals(length, length, 60, 60, False))
        for transposed in (False, True):
            found = spans(lo, hi, 128, 128)
            most = most_tiles(found, statics, length, length, 128, 128, transposed)
            assert isinstance(most, int) and most == int((found.end - found.first).max())
            traced = most_tiles(
                found, dataclasses.replace(statics, uniform=False), length, length, 128, 128, transposed
            )
            assert int(traced) == most
            steps.append(most)
    assert set(steps) == {3}


def test_inner_tiles_are_those_every_line_covers():
    lo, hi = (jnp.asarray(x[None], jnp.int32) for x in window_intervals(600, 600, 200, 300, False))
    found = spans(lo, hi, 64, 32)
    for block in range(-(-600 // 64)):
        lows, highs = np.asarray(lo)[0, block * 64 : block * 64 + 64], np.asarray(hi)[0, block * 64 : block * 64 + 64]
        tiles = range(-(-600 // 32))
        touched = [t for t in tiles if (np.maximum(lows, t * 32) < np.minimum(highs, t * 32 + 32)).any()]
        covered = [t for t in tiles if (lows <= t * 32).all() and (highs >= t * 32 + 32).all()]
        assert touched == list(range(int(found.first[block]), int(found.end[block])))
        assert covered == list(range(int(found.inner_first[block]), int(found.inner_end[block])))


# Races


@pytest.fixture
def race_states(monkeypatch):
    states = watch_races(monkeypatch)
    with enable_x64(False):  # of one thread, and the interpreter's cores are threads
        yield states


@pytest.mark.slow
@pytest.mark.exhaustive
def test_no_races(small_blocks, race_states):
    case = Case(
        7, length=140, size=150, num=1, heads=1, window=(100, 20), mask=(0, 0, 1, 1), mask_dtype=np.float32,
        dropout_p=0.2, terms=1, dtype="float32",
    )  # fmt: skip
    have = found(case, RACING, SOME)
    assert len(race_states) == len(SOME) + 1  # and the mask's cotangent
    assert not any(state.races_found for state in race_states)
    assert_close(have, expected(case), 2e-5)


@pytest.mark.slow
def test_a_race_would_be_seen(small_blocks, race_states, monkeypatch):
    """Tiles of one block of lines on two cores at once."""
    monkeypatch.setattr(streaming_walk.TilesOfLines, "order", ("parallel",) * 4)
    case = Case(7, dtype="float32", length=100, size=200, num=1, heads=1)
    passes = StreamingPasses(case.inputs, case.constants, case.statics, Lowering("streaming", RACING))
    jax.block_until_ready(passes.row_lse(jnp.asarray(case.v)))
    assert race_states[0].races_found
