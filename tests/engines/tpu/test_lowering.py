"""Which kernels a program is made of: by the platform and the generation that it is lowered for, what was asked for and
is not followed, and what fits the VMEM."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from marks import FAST, slow_after

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
from jax import export  # noqa: E402

from torch_sinkhorn_attn.engines.tpu import Lowering, releases, sinkhorn_attention  # noqa: E402
from torch_sinkhorn_attn.engines.tpu.method import low_base  # noqa: E402
from torch_sinkhorn_attn.engines.tpu.method.choice import Choice, choose  # noqa: E402
from torch_sinkhorn_attn.engines.tpu.method.lowering import VMEM  # noqa: E402
from torch_sinkhorn_attn.engines.tpu.method.problem import Constants, Inputs, Statics  # noqa: E402
from torch_sinkhorn_attn.engines.tpu.resident.spills import BACKWARD, FORWARD, MARGIN, spilled  # noqa: E402


def qkv(length: int = 20) -> list[jax.Array]:
    return [jax.random.normal(jax.random.key(i), (1, 2, length, 8)) for i in range(3)]


def kernels(lowering: Lowering | None, platform: str) -> int:
    """Pallas calls of one function, differentiated and lowered for a platform."""
    run = partial(sinkhorn_attention, window=(6, 6), base_iters=2, tail_iters=1, lowering=lowering)
    step = jax.jit(jax.grad(lambda q, k, v: (run(q, k, v) ** 2).sum()))
    return export.export(step, platforms=[platform])(*qkv()).mlir_module().count("tpu_custom_call")


@pytest.mark.slow
@pytest.mark.parametrize("lowering", slow_after(0, [None, Lowering()], {None, Lowering()}))
def test_the_platform_decides_unless_a_shape_is_given(lowering: Lowering | None) -> None:
    assert kernels(lowering, "cpu") == kernels(Lowering("blockwise"), "tpu") == 0
    assert kernels(lowering, "tpu") == kernels(Lowering("auto"), "tpu") > 5


@pytest.mark.slow
def test_off_a_tpu_no_kernel_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values are plain XLA's, bit for bit, outside of jit too; under vmap a problem is one of a batch."""
    monkeypatch.setitem(sys.modules, "torch_sinkhorn_attn.engines.tpu.method.choice", None)
    run = partial(sinkhorn_attention, base_iters=2, tail_iters=1)
    q, k, v = qkv()
    found = run(q, k, v)
    assert (found == run(q, k, v, lowering=Lowering("blockwise"))).all()
    assert jnp.allclose(jax.vmap(lambda q: run(q, k, v))(jnp.stack([q, q]))[1], found, atol=1e-6)


def test_the_generation_is_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, generation in (("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU7x", "tpu7x"), (None, "v6e")):
        monkeypatch.setattr(releases, "tpu_kind", lambda kind=kind: kind)
        assert Lowering("auto").chip == generation
        assert Lowering("auto").vmem_limit == VMEM[generation] * 15 // 16
        assert Lowering("auto", generation="v4").chip == "v4"


def test_a_kind_is_read_from_the_mesh_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    assert releases.tpu_kind() is None
    device = type("Device", (), {"device_kind": "TPU v5p"})
    mesh = type("Mesh", (), {"abstract_device": device})
    monkeypatch.setattr(jax.sharding, "get_abstract_mesh", lambda: mesh)
    assert releases.tpu_kind() == "TPU v5p" and Lowering().chip == "v5p"


def test_an_interpreter_needs_a_kernel() -> None:
    with pytest.raises(ValueError, match=r"interpret=True runs a Pallas kernel.*shape='device' names none"):
        Lowering(interpret=True)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_inside_shard_map_and_on_explicit_axes() -> None:
    script = Path(__file__).with_name("kernels_in_shards.py")
    flags = f"--xla_force_host_platform_device_count=2 {FAST}"
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(script.parents[3]), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# What was asked for, and the choice


def choice_of(length: int, lowering: Lowering, adjoint: bool = False, dtype: str = "bfloat16", **more: Any) -> Choice:
    def array(*shape: int, dtype: str = "float32") -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    side, tokens = array(1, length, dtype="int32"), array(1, 4, length, 64, dtype=dtype)
    constants = Constants(side, side, side, side, array(1, 4, length), array(1, 4, length))
    band = {"banded": True, "window_left": 128, "window_right": 128}
    return choose(Inputs(tokens, tokens, tokens), constants, Statics(scale=0.125, **band, **more), lowering, adjoint)


LOW = Lowering("auto", base_dtype="bfloat16", generation="v6e")
NOT_LOW: dict[str, tuple[Lowering, dict[str, Any]]] = {
    "v5e has no bfloat16 vector unit: float32 is faster": (Lowering("auto", False, "bfloat16", "v5e"), {}),
    "with over_relaxation": (LOW, {"over_relaxation": 1.5}),
    "with relaxation": (LOW, {"rho_row": 0.5}),
    "with a tolerance": (LOW, {"tolerance": 0.1}),
    "base_iters=1 leaves no iteration": (LOW, {"stopped": 1}),
    "the resident kernel alone": (LOW, {"kept": 0}),
    "resident kernel alone": (Lowering("streaming", False, "bfloat16", "v6e"), {}),
}


@pytest.mark.parametrize("reason", NOT_LOW)
def test_a_base_that_stays_float32_is_explained(reason: str) -> None:
    lowering, options = NOT_LOW[reason]
    found = choice_of(1024, lowering, **options)
    assert "base_dtype='bfloat16' is not followed: " in found.reason and reason in found.reason


def test_a_base_in_bfloat16_takes_its_own_memory() -> None:
    plain, low, v5e = (
        choice_of(1024, Lowering("auto", False, dtype, chip))
        for dtype, chip in (("float32", "v6e"), ("bfloat16", "v6e"), ("bfloat16", "v5e"))
    )
    packed = 512 * (384 + 128) + 8 * 1024  # words: the strip and the row masses, two rows a word, and column scalings
    assert low.vmem - plain.vmem == 4 * packed and v5e.vmem == plain.vmem
    assert "not followed" not in low.reason + plain.reason


@pytest.mark.slow
@pytest.mark.exhaustive
def test_it_is_said_once_and_computed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a chip without a bfloat16 vector unit the same bits as for float32; on others, not."""
    monkeypatch.setattr(low_base, "_said", set())
    q, k, v = qkv(130)

    def run(dtype: str, generation: str) -> jax.Array:
        lowering = Lowering("resident", True, dtype, generation)
        return jax.jit(partial(sinkhorn_attention, base_iters=4, tail_iters=1, lowering=lowering))(q, k, v)

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = run("bfloat16", "v5e")
        again = jax.jit(partial(sinkhorn_attention, lowering=Lowering("resident", True, "bfloat16", "v5e")))
        again.trace(q, k, v)
        other = run("bfloat16", "v6e")
    (one,) = (x for x in told if x.category is low_base.Float32BaseWarning)
    assert "v5e has no bfloat16 vector unit" in str(one.message) and one.filename == __file__
    plain = run("float32", "v5e")
    assert (found == plain).all() and (other != plain).any()


@pytest.mark.slow
def test_what_compiles_is_not_refused() -> None:
    """8192 tokens on v5p and tpu7x, both directions: the compiler was asked (`benchmarks/vmem.py`)."""
    for generation in ("v5p", "tpu7x"):
        for adjoint in (False, True):
            found = choice_of(8192, Lowering("auto", generation=generation), adjoint)
            assert found.shape == "resident" and found.vmem is not None and found.vmem <= VMEM[generation] * 15 / 16
        assert choice_of(16384, Lowering("auto", generation=generation), True).shape == "wavefront"


def test_the_table_of_spills_rises() -> None:
    for adjoint, table in ((False, FORWARD), (True, BACKWARD)):
        sizes = [spilled(width, adjoint) for width in range(1, 40)]
        assert sizes == sorted(sizes)
        assert [spilled(width, adjoint) for width, _ in table] == [round(MARGIN * x * 2**20) for _, x in table]
