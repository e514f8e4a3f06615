"""The JAX half against torch's reference: `sinkhorn_attention`, its supports and what it says of potentials."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from marks import slow_after

torch, jax = pytest.importorskip("torch"), pytest.importorskip("jax")

import cuts  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import problems  # noqa: E402
import tpu_kernels  # noqa: E402
from conformance import assert_agrees, relative_error, weights  # noqa: E402
from torch import Tensor  # noqa: E402
from tpu_kernels import to_jax, to_torch  # noqa: E402

from torch_sinkhorn_attn import Dustbin, sinkhorn_attention as torch_attention  # noqa: E402
from torch_sinkhorn_attn.engines import ENGINES, tpu  # noqa: E402
from torch_sinkhorn_attn.engines.tpu.front import support  # noqa: E402
from torch_sinkhorn_attn.engines.tpu.front.mask_scan import active_tokens  # noqa: E402
from torch_sinkhorn_attn.engines.tpu.method.lowering import Lowering  # noqa: E402
from torch_sinkhorn_attn.engines.tpu.releases import enable_x64  # noqa: E402
from torch_sinkhorn_attn.engines.tpu.streaming import passes as streaming  # noqa: E402
from torch_sinkhorn_attn.problem.masks.scan import scan_mask  # noqa: E402
from torch_sinkhorn_attn.problem.support import build_support, token_ids  # noqa: E402


def as_jax(x: Any, leaves: dict[int, jax.Array]) -> Any:
    """An argument of the torch function as JAX's, its leaves replaced."""
    if isinstance(x, Tensor):
        return leaves.get(id(x), to_jax(x))
    if isinstance(x, Dustbin):
        return tpu.Dustbin(**{name: as_jax(y, leaves) for name, y in vars(x).items()})
    return tuple(as_jax(y, leaves) for y in x) if isinstance(x, tuple) else x


def of_torch(call: problems.Call) -> dict[str, Tensor]:
    """Output, aux and gradients by the reference; the two words it drew for dropout."""
    torch.manual_seed(call.seed)
    output, aux = torch_attention(
        call.query, call.key, call.value, call.mask, engine="reference", return_aux=True, **call.options
    )
    loss = (output * weights(output)).sum()
    if aux.row_dustbin is not None:
        loss = loss + (aux.row_dustbin * weights(aux.row_dustbin)).sum() + (aux.col_dustbin**2).sum()
    found = {"output": output} | {k: v for k, v in aux._asdict().items() if v is not None}
    gradients = torch.autograd.grad(loss, call.leaves, allow_unused=True)
    return found | {
        f"gradient {i}": torch.zeros_like(x) if g is None else g
        for i, (x, g) in enumerate(zip(call.leaves, gradients, strict=True))
    }


def of_jax(call: problems.Call) -> dict[str, Tensor]:
    torch.manual_seed(call.seed)
    words = torch.randint(0, 2**32, (2,), dtype=torch.int64)
    seed = jnp.asarray(words.numpy().astype("uint32")) if call.options.get("dropout_p") else None

    def run(leaves: list[jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        by_id = {id(x): y for x, y in zip(call.leaves, leaves, strict=True)}
        tensors = (as_jax(x, by_id) for x in (call.query, call.key, call.value, call.mask))
        options = {name: as_jax(x, by_id) for name, x in call.options.items()}
        output, aux = tpu.sinkhorn_attention(*tensors, dropout_seed=seed, return_aux=True, **options)
        loss = (output * wave(output)).sum()
        if aux.row_dustbin is not None:
            loss = loss + (aux.row_dustbin * wave(aux.row_dustbin)).sum() + (aux.col_dustbin**2).sum()
        return loss, {"output": output} | {k: v for k, v in aux._asdict().items() if v is not None}

    compiled = jax.jit(jax.grad(run, has_aux=True), compiler_options={"xla_backend_optimization_level": 0})
    gradients, found = compiled([to_jax(x) for x in call.leaves])
    return {k: to_torch(v) for k, v in (found | {f"gradient {i}": g for i, g in enumerate(gradients)}).items()}


def wave(x: jax.Array) -> jax.Array:
    """As `conformance.weights`."""
    return jnp.sin(jnp.linspace(-1, 2, x.size, dtype=x.dtype)).reshape(x.shape)


def assert_same(call: problems.Call) -> None:
    expected = of_torch(call)
    with enable_x64(True):
        found = of_jax(call)
    assert found.keys() == expected.keys()
    for name, y in expected.items():
        error = relative_error(found[name], y, floor=1.0 if "residual" in name else 1e-3)
        assert error < 1e-10, f"{name}: {error:.1e} in {call}"


@pytest.mark.parametrize("seed", slow_after(1, [3000, 3002, 3005, 3007, 3010], {3005, 3007, 3010}))
def test_values_and_gradients_are_torchs(seed: int) -> None:
    assert_same(problems.make(seed))


def of_scores(options: dict[str, Any], mask: Tensor | None = None) -> problems.Call:
    g = torch.Generator().manual_seed(4)
    scores, value = (torch.randn(2, 2, *n, generator=g, dtype=torch.float64).requires_grad_() for n in ((6, 7), (7, 3)))
    call = problems.Call(0, scores, None, value, mask, options, [scores, value])  # type: ignore[arg-type]
    if mask is not None and mask.dtype != torch.bool:
        call.leaves.append(mask.requires_grad_())
    return call


@pytest.mark.parametrize(
    "kind", slow_after(0, ["plain", "scaled, dustbin", "float mask", "bool mask"], {"plain", "float mask"})
)
def test_scores_given_are_torchs(kind: str) -> None:
    g = torch.Generator().manual_seed(5)
    if kind == "plain":
        assert_same(of_scores({}))
    elif kind == "scaled, dustbin":
        assert_same(of_scores({"scale": 0.6, "epsilon": 0.3, "dustbin": Dustbin(0.1, 0.3)}))
    elif kind == "bool mask":
        assert_same(of_scores({"relaxation": 2.0}, torch.rand(2, 1, 6, 7, generator=g) > 0.2))
    else:
        mask = torch.randn(6, 7, generator=g, dtype=torch.float64)
        mask[:, 2], mask[1, 1] = -1e4, -torch.inf
        assert_same(of_scores({"epsilon": 0.5, "relaxation": 2.0}, mask))


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_packed_dustbin_with_dropout_is_torchs() -> None:
    g = torch.Generator().manual_seed(0)
    leaves = [torch.randn(2, n, 4, generator=g, dtype=torch.float64).requires_grad_() for n in (9, 7, 7)]
    leaves += [torch.randn(2, 1, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2)]
    options = {
        "query_segment_ids": torch.tensor([3, 3, 3, -1, 5, 5, 5, 8, 8]),
        "key_segment_ids": torch.tensor([3, 3, 4, 5, 5, -1, 8]),
        "dustbin": Dustbin(leaves[3], leaves[4], 0.5), "dropout_p": 0.3, "window": (1, 2), "base_iters": 4,
    }  # fmt: skip
    assert_same(problems.Call(0, *leaves[:3], options=options, leaves=leaves))


@pytest.mark.parametrize("kind", slow_after(0, ["int32", "float32", "float64", "int8"], {"int32", "float64", "int8"}))
def test_windows_around_centres_are_torchs(kind: str) -> None:
    """NaN, falling and far centres too, which nobody looks at here; lengths, packing and causality beside them."""
    g = torch.Generator().manual_seed(0)
    centers = torch.randn(4, 12, generator=g, dtype=torch.float64) * 3 + torch.arange(12)
    if kind.startswith("float"):
        centers[0, 4], centers[1, 2], centers[1, 5], centers[2, 9] = torch.nan, torch.inf, -torch.inf, 1e30
    centers = centers.to(getattr(torch, kind))
    ids = [torch.randint(-1, 3, (4, n), generator=g).sort(-1).values for n in (12, 10)]
    lengths = [token_ids(4, n, torch.tensor([n, 7, 3, 0]), None, torch.device("cpu")) for n in (12, 10)]
    for packed, (rows, cols), causal in itertools.product((True, False), (ids, lengths), (False, True)):
        if packed or cols is lengths[1]:
            for window in ((2, 1), (-1, 3), (0, 0), (1 << 24, 1 << 24)):
                expected = build_support(rows, cols, window, packed, causal, centers)
                with enable_x64(kind == "float64"):
                    arrays = (jnp.asarray(x.numpy()) for x in (rows.int(), cols.int()))
                    found = support.build_support(*arrays, window, packed, causal, jnp.asarray(centers.numpy()))
                for x, y in zip(found[:4], expected[:4], strict=True):
                    assert (torch.from_numpy(np.array(x)) == y).all()


@pytest.mark.slow
def test_centres_are_torchs() -> None:
    g = torch.Generator().manual_seed(0)
    leaves = [torch.randn(2, 2, n, 4, generator=g, dtype=torch.float64).requires_grad_() for n in (12, 9, 9)]
    centers = torch.rand(2, 12, generator=g).sort(-1).values * 8
    options = {"window": (3, 2), "window_centers": centers, "relaxation": 1.0, "base_iters": 3, "tail_iters": 1}
    assert_same(problems.Call(0, *leaves, options=options, leaves=leaves))
    with pytest.raises(ValueError, match="window_centers is given without a window"):
        tpu.sinkhorn_attention(*(jnp.ones((1, 4, 2)),) * 3, window_centers=jnp.arange(4))
    for wrong in (jnp.ones(4, jnp.bfloat16), jnp.ones(4, bool), [0, 1, 2, 3]):
        with pytest.raises(TypeError, match="window_centers must hold float32, float64 or integers"):
            tpu.sinkhorn_attention(*(jnp.ones((1, 4, 2)),) * 3, window=(1, 1), window_centers=wrong)


@pytest.mark.parametrize("shape", slow_after(1, [(1, 1, 6, 1), (2, 1, 1, 7), (2, 3, 6, 7)]), ids=str)
def test_a_mask_leaves_the_tokens_that_it_leaves_in_torch(shape: tuple[int, ...]) -> None:
    for seed in range(6):
        g = torch.Generator().manual_seed(seed)
        ids = [torch.randint(-1, 2, (2, n), generator=g).sort(-1).values for n in (6, 7)]
        there = build_support(*ids, (2, 3), packed=True)
        mask = torch.randn(shape, generator=g).masked_fill(torch.rand(shape, generator=g) < 0.6, -1e4)
        mask = mask.masked_fill(torch.rand(*shape[:2], 1, shape[3], generator=g) < 0.3, [-1e4, -torch.inf][seed % 2])
        arrays = support.Support(*(jnp.asarray(x.numpy()) for x in there))
        for floor in (None, -1e3):
            found = active_tokens(jnp.asarray(mask.numpy()), arrays, True, jnp.dtype("float32"), floor)
            expected = scan_mask(mask, there, True, torch.float32, floor)
            for x, y in zip(found, expected[:2], strict=True):
                assert (torch.from_numpy(np.array(x)) == y).all()


@pytest.mark.parametrize("window", [(128, 128), (0, 5), None])
@pytest.mark.parametrize(
    "lengths", slow_after(0, [(200_000, 200_000), (199_999, 131_073), (70_001, 200_000)], {(200_000, 200_000)})
)
def test_supports_of_long_sequences_do_not_overflow(window: tuple[int, int] | None, lengths: tuple[int, int]) -> None:
    longest = 200_000
    ours = [support.token_ids(1, longest, jnp.array([n]), None) for n in lengths]
    theirs = [torch.where(torch.arange(longest) < n, 0, -1)[None] for n in lengths]
    found = support.build_support(*ours, window, packed=False)
    for name, expected in build_support(*theirs, window, packed=False)._asdict().items():
        assert torch.equal(to_torch(getattr(found, name)).to(expected.dtype), expected), name


@pytest.mark.slow
def test_the_order_of_the_potentials_shows_that_there_is_no_plan() -> None:
    """Against all cuts, on random masks: what it calls without a plan has none, and after some iterations it misses
    few."""
    rng = np.random.default_rng(0)
    keep = rng.random((60, 6, 6)) < rng.uniform(0.3, 0.9, (60, 1, 1))
    keep[0] = True
    keep[1] = True
    keep[1, :4, 2:] = False
    keep[1] = keep[1][rng.permutation(6)]
    x = jax.random.normal(jax.random.key(0), (60, 6, 4))
    aux = tpu.sinkhorn_attention(x, x, x, keep, base_iters=200, return_aux=True)[1]
    exists = []
    for pairs in keep:
        active = torch.from_numpy(pairs[pairs.any(1)][:, pairs.any(0)])
        n, m = active.shape
        exists.append(cuts.has_plan_by_enumeration(active, torch.ones(n).double(), torch.full((m,), n / m).double()))
    status, truth = aux.status(attn_mask=keep), np.array(exists)
    assert list(status[:2]) == [0, 2] and not (truth & (status == 2)).any()
    assert (~truth).sum() > 10 and (~truth & (status != 2)).sum() <= (~truth).sum() // 4
    verdict = aux.verdict(attn_mask=keep)
    assert f"no plan: {(status == 2).sum()} of 60" in verdict and verdict.startswith("converged")


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", [17])
def test_the_streaming_schedule_is_torchs(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One vector of lanes a block and a tile: many tiles in small problems."""
    for name in ("BLOCK", "TILE", "WIDE_TILE", "SMALLEST_TILE"):
        monkeypatch.setattr(streaming, name, 128)
    engine = tpu_kernels.Kernels(Lowering("streaming", True), "streaming", xla_backend_optimization_level=0)
    monkeypatch.setitem(ENGINES, "streaming", engine)
    assert_agrees(problems.make(seed), "streaming", plan=False)
