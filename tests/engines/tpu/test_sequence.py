"""A sequence over several devices inside `jax.shard_map`: the numbers are those of one device (`tests/tpu_sequence.py`
has the cases), in a process of its own, which has that many; refusals, and what is sent."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from marks import FAST, slow_after

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
import tpu_sequence  # noqa: E402
from jax.sharding import AxisType, PartitionSpec as P  # noqa: E402

from torch_sinkhorn_attn.engines.tpu import Dustbin, Lowering, sinkhorn_attention  # noqa: E402
from torch_sinkhorn_attn.engines.tpu.front.shards import Outline, banded  # noqa: E402
from torch_sinkhorn_attn.engines.tpu.method.problem import Statics  # noqa: E402
from torch_sinkhorn_attn.engines.tpu.method.sequence import Sequence  # noqa: E402
from torch_sinkhorn_attn.engines.tpu.resident.neighbours import refusal  # noqa: E402

IN_MAKE_TEST = {(2, "full"), (3, "band, dustbin, dropout"), (8, "band, segments"), (4, "a row each")}
TOKENS = P(None, None, "cp")
SEED = jax.random.key(0)


def in_a_process(script: str, *arguments: str, devices: int = 8) -> str:
    """What it prints, with so many virtual devices."""
    tests = Path(tpu_sequence.__file__).parent
    flags = f"--xla_force_host_platform_device_count={devices} {FAST}"
    path = f"{tests.parent}{os.pathsep}{tests}"
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": path, "NPROC": "16"}  # threads that kernels wait in
    command = [sys.executable, str(tests / script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def cases() -> list[Any]:
    """Not slow: the first of all on two devices. In `make test`: `IN_MAKE_TEST`."""
    found = []
    for devices in (2, 3, 4, 8):
        for name in (*tpu_sequence.CASES, "a row each"):
            slow = [pytest.mark.slow] * ((devices, name) != (2, "full"))
            rest = [pytest.mark.exhaustive] * ((devices, name) not in IN_MAKE_TEST)
            found.append(pytest.param(devices, name, marks=slow + rest))
    return found


@pytest.mark.parametrize(("devices", "name"), cases())
def test_several_devices_are_one(devices: int, name: str) -> None:
    """Output, aux and all gradients, float64, 1e-10."""
    in_a_process("tpu_sequence.py", str(devices), name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "count", "devices"),
    [
        (1, 1, ["3"]),
        *[pytest.param(n, 20, ["2,8", "3,4"], marks=pytest.mark.exhaustive) for n in range(0, 200, 20)],
    ],
)
def test_random_problems(first: int, count: int, devices: list[str]) -> None:
    """Over all options (`tests/tpu_sequence_random.py`): output, aux and all gradients, float64, 1e-10."""
    in_a_process("tpu_sequence_random.py", str(first), str(count), *devices)


@pytest.mark.slow
def test_blocks_are_even() -> None:
    mesh = jax.sharding.AbstractMesh((3,), ("cp",), axis_types=(AxisType.Auto,))
    x = jax.ShapeDtypeStruct((1, 1, 10, 4), jnp.float32)
    call = partial(sinkhorn_attention, sequence_axis="cp")
    with pytest.raises(ValueError, match="evenly divi"):
        jax.eval_shape(jax.shard_map(call, mesh=mesh, in_specs=(TOKENS,) * 3, out_specs=TOKENS), x, x, x)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("shape", ["resident", "streaming"])
def test_kernels_are_interpreted_over_three_devices(shape: str) -> None:
    """The resident strips exchange columns by remote copies; float32."""
    in_a_process("tpu_sequence_kernels.py", shape, devices=3)


def test_halos_are_for_bands_that_are_narrower_than_all() -> None:
    whole = Sequence("cp", 8, 16, 16)

    def halo(window: Any, aligned: bool = True, sequence: Sequence = whole) -> Any:
        return banded(sequence, Outline(window, aligned, True)).halo

    assert halo((3, 5)) == (3, 5) and halo((30, 20)) == (30, 20)
    assert halo(None) is halo((-1, 3)) is halo((3, 5), aligned=False) is halo((40, 40)) is None
    assert halo((1, 1), sequence=Sequence("cp", 1, 16, 16)) is None
    assert banded(whole, Outline((3, 5), True, True)).joined and not banded(whole, Outline((0, 0), True, True)).joined


@pytest.mark.parametrize("lies", slow_after(1, [(5, 3, (4, 2)), (4, 4, (2, 3)), (3, 4, (0, 4)), (4, 3, None)]))
def test_what_devices_hold_and_complete(lies: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Halos within a block, over several, on one side alone, and all columns; the devices are a mapped axis, over which
    JAX has only permutations that leave nobody out."""

    def permuted(x: jax.Array, axis: str, pairs: list[tuple[int, int]]) -> jax.Array:
        source = np.full(size, -1)
        source[[there for _, there in pairs]] = [here for here, _ in pairs]
        mine = jnp.asarray(source)[jax.lax.axis_index(axis)]
        return jnp.where(mine < 0, 0, jax.lax.all_gather(x, axis)[mine])

    monkeypatch.setattr(jax.lax, "ppermute", permuted)
    size, cols, halo = lies
    sequence, total = Sequence("cp", size, cols, cols, halo), size * cols
    before, after = halo or (0, 0)
    places = [range(r * cols - before, (r + 1) * cols + after) if halo else range(total) for r in range(size)]
    whole = np.random.default_rng(0).normal(size=total)
    partial = np.random.default_rng(1).normal(size=(size, sequence.held_count))

    def at(vector: np.ndarray, fill: float) -> np.ndarray:
        return np.array([[vector[j] if 0 <= j < total else fill for j in place] for place in places])

    def over_devices(function: Any, x: np.ndarray) -> np.ndarray:
        return np.asarray(jax.jit(jax.vmap(function, axis_name="cp"))(x))

    own = whole.reshape(size, cols)
    np.testing.assert_allclose(over_devices(lambda x: sequence.held(x, fill=-7), own), at(whole, -7), rtol=1e-6)
    np.testing.assert_allclose(over_devices(lambda x: sequence.owned(sequence.held(x)), own), own, rtol=1e-6)
    known = at(np.ones(total), 0)
    sums, exponentials = np.zeros(total), np.zeros(total)
    for place, row, real in zip(places, partial, known, strict=True):
        for j, x, there in zip(place, row, real, strict=True):
            if there:
                sums[j] += x
                exponentials[j] += np.exp(x)
    real, empty = np.where(known, partial, 0), np.where(known, partial, -np.inf)
    np.testing.assert_allclose(over_devices(sequence.complete_sums, real), at(sums, 0), rtol=1e-5, atol=1e-6)
    lse = over_devices(sequence.complete_lse, empty)
    np.testing.assert_allclose(lse, at(np.log(exponentials), -np.inf), rtol=1e-5, atol=1e-6)
    home = over_devices(lambda x: sequence.home(x[:, None])[:, 0], real)
    np.testing.assert_allclose(home, sums.reshape(size, cols), rtol=1e-5, atol=1e-6)
    spread = over_devices(lambda x: sequence.all_of_held(x), real).sum(0)
    np.testing.assert_allclose(spread, sums, rtol=1e-5, atol=1e-6)
    every = np.broadcast_to(whole, (size, total))
    np.testing.assert_allclose(over_devices(lambda x: sequence.held_of_all(x, fill=2), every), at(whole, 2), rtol=1e-6)


def sent(call: Any, devices: int) -> list[tuple[str, tuple[int, ...]]]:
    """The collectives in the jaxpr of a call on so many devices, each once, with their operand's shape."""
    mesh = jax.sharding.AbstractMesh((devices,), ("cp",), axis_types=(AxisType.Auto,))
    x = jax.ShapeDtypeStruct((1, 1, 16 * devices, 4), jnp.float32)
    found: list[tuple[str, tuple[int, ...]]] = []

    def walk(jaxpr: Any) -> None:
        for equation in jaxpr.eqns:
            if equation.primitive.name in ("ppermute", "all_gather", "all_to_all", "psum_invariant", "psum", "pmax"):
                found.append((equation.primitive.name, equation.invars[0].aval.shape))
            for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    walk(getattr(inner, "jaxpr", inner))

    walk(jax.make_jaxpr(jax.shard_map(call, mesh=mesh, in_specs=(TOKENS,) * 3, out_specs=TOKENS))(x, x, x).jaxpr)
    return found


@pytest.mark.slow
def test_a_band_sends_vectors_of_its_width_to_neighbours_whatever_their_number() -> None:
    call = partial(sinkhorn_attention, window=(3, 5), sequence_axis="cp", lowering=Lowering("blockwise"))
    four, many = sent(call, 4), sent(call, 64)
    assert four == many and {name for name, _ in four} <= {"ppermute", "psum", "psum_invariant", "pmax"}
    vectors = [shape for name, shape in four if name == "ppermute" and len(shape) == 3]
    assert set(vectors) == {(1, 1, 3), (1, 1, 5), (1, 1, 8)}  # halos of b, and what two neighbours share of a sum
    assert vectors.count((1, 1, 8)) == 4  # both ways, once in the loop of the base and once in that of the tail
    assert all(len(shape) <= 3 and max(shape, default=1) == 1 for name, shape in four if name != "ppermute")


def on_one(**options: Any) -> Any:
    """Traced on a mesh of one device."""
    mesh = jax.make_mesh((1,), ("cp",), axis_types=(AxisType.Auto,))
    x = jax.ShapeDtypeStruct((1, 1, 8, 4), jnp.float32)

    def call(x: Any) -> Any:
        return sinkhorn_attention(x, options.pop("key", x), x, **options)

    return jax.eval_shape(jax.shard_map(call, mesh=mesh, in_specs=TOKENS, out_specs=TOKENS), x)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sequence_axis": "tokens"}, "sequence_axis='tokens' is no axis of a surrounding jax.shard_map"),
        ({"sequence_axis": "cp", "key": None}, "key=None is not taken with sequence_axis"),
        ({"sequence_axis": "cp", "attn_mask": jnp.ones((8, 9), bool)}, r"\(8, 9\), which does not broadcast"),
        ({"sequence_axis": "cp", "lowering": Lowering("wavefront")}, "shape='wavefront' cannot take this problem: it"),
        ({"sequence_axis": "cp", "lowering": Lowering("resident")}, "shape='resident' cannot take this problem: e"),
        (
            {"sequence_axis": "cp", "lowering": Lowering("streaming"), "dropout_p": 0.5, "dropout_seed": SEED},
            "shape='streaming' cannot take this problem: with",
        ),
    ],
)  # fmt: skip
def test_what_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        on_one(**options)


def test_an_axis_is_a_name_inside_shard_map() -> None:
    x = jnp.ones((1, 1, 8, 4))
    with pytest.raises(TypeError, match="sequence_axis must be the name of a mesh axis, got 0"):
        on_one(sequence_axis=0)
    with pytest.raises(ValueError, match="sequence_axis='cp' is no axis"):
        sinkhorn_attention(x, x, x, sequence_axis="cp")
    with pytest.raises(ValueError, match="the only balanced causal plan"):
        on_one(sequence_axis="cp", is_causal=True)
    on_one(sequence_axis="cp", is_causal=True, dustbin=Dustbin(0.0, 0.0), base_iters=0, tail_iters=1)


def test_what_resident_strips_cannot_exchange_is_told() -> None:
    def why(halo: Any = (128, 128), dustbin: bool = False, rows: int = 512, **options: Any) -> Any:
        return refusal(Statics(1.0, sequence=Sequence("cp", 8, rows, rows, halo), **options), dustbin)

    assert why() is None and refusal(Statics(1.0), True) is None
    assert "tell their neighbours alone" in why(halo=None)
    assert "a number of all devices" in why(dustbin=True) and "a number of all devices" in why(tolerance=0.1)
    assert "not in whole blocks of 128" in why(halo=(100, 128)) and "not in whole blocks" in why(rows=500)
    assert "beyond the neighbours' blocks" in why(halo=(384, 384))
