"""What is prepared once for many calls: the same to the bit, bounded, and nobody's but the package's own."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Iterator
from typing import Any

import conformance
import problems
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from torch_sinkhorn_attn import SinkhornMultiheadAttention, set_checks, sinkhorn_attention, sinkhorn_plan
from torch_sinkhorn_attn.engines import cpu, missing
from torch_sinkhorn_attn.problem import remembered

compiled = pytest.mark.skipif(cpu.unavailable() is not None, reason="the C++ kernels were not built")


@pytest.fixture(autouse=True)
def _nothing_remembered() -> Iterator[None]:
    remembered.forget()
    yield
    remembered.forget()


@pytest.fixture
def plainly(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function called as if nothing were ever remembered."""

    def called(function: Any, *args: Any, **kwargs: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(remembered, "_signature", lambda *_: None)
            return function(*args, **kwargs)

    return called


def qkv(seed: int = 0, shape: tuple[int, ...] = (2, 3, 6, 4), **kind: Any) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=g).to(kind.get("dtype")).requires_grad_(kind.get("grad", False)) for _ in "qkv"
    ]


def assert_same(x: dict[str, Tensor], y: dict[str, Tensor], what: object) -> None:
    assert x.keys() == y.keys(), what
    for name in x:
        assert x[name].dtype == y[name].dtype and torch.equal(x[name], y[name]), (name, what)


def keepable(seed: int, dtype: torch.dtype) -> problems.Call:
    """A random problem without what is never remembered."""
    call = problems.make(seed, dtype)
    for name in ("row_mass", "col_mass", "initial_potentials", "window_centers"):
        call.options.pop(name, None)
    if call.options.pop("dustbin", None) is not None:
        call.options["window"] = None
        call.leaves = [x for x in (call.query, call.key, call.value, call.mask) if x is not None and x.requires_grad]
    return call


def test_tensors_in_tuples_are_data(plainly: Any) -> None:
    """A warm start whose buffers are written to between calls."""
    q, k, v = qkv()
    for shape, kind in (((2, 3, 6), torch.float32), ((2, 3, 6), torch.float64), ((6,), torch.float32)):
        u, w = torch.zeros(shape, dtype=kind), torch.zeros(shape, dtype=kind)
        for value in (0.0, 3.0, -2.0):
            u.copy_(torch.linspace(-value, value, 6)), w.copy_(torch.linspace(value, 0, 6))
            options: dict[str, Any] = {"initial_potentials": (u, w), "base_iters": 1}
            found = sinkhorn_attention(q, k, v, **options)
            assert torch.equal(found, plainly(sinkhorn_attention, q, k, v, **options))
        w.fill_(torch.nan)
        with pytest.raises(ValueError, match="initial_potentials"):
            sinkhorn_attention(q, k, v, **options)
    assert len(remembered._entries) == 0


@pytest.mark.parametrize("engine", conformance.ENGINES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_scores_given_bit_for_bit(engine: str, dtype: torch.dtype, plainly: Any) -> None:
    scores, value = torch.randn(2, 3, 5, 6, dtype=dtype), torch.randn(2, 3, 6, 4, dtype=dtype)
    cut = scores.masked_fill(torch.rand(scores.shape) < 0.1, -torch.inf)
    low = scores - torch.tensor([0, 0, 0, 0, 1e4, 0]).to(dtype)  # a score, however low, is no padding
    for given in (scores, cut, low, scores.mT.contiguous().mT):
        for options in ({}, {"epsilon": 0.3}, {"scale": 0.2, "epsilon": 2}, {"relaxation": 1.0, "dropout_p": 0.3}):
            leaf = given.clone().requires_grad_()

            def call(x: Tensor = leaf, o: dict[str, Any] = options) -> dict[str, Tensor]:
                torch.manual_seed(0)
                out, aux = sinkhorn_attention(x, None, value, engine=engine, return_aux=True, **{"relaxation": 2.0} | o)
                grads = torch.autograd.grad(out.sin().sum(), x)
                return {"output": out, "gradient": grads[0], "row": aux.row_potential, "col": aux.col_residual}

            truth = plainly(call)
            for _ in range(2):
                assert_same(call(), truth, options)
    assert len(remembered._entries) == 8  # what forbids no pair is one, and what does by its contents
    for wrong, words in (
        (scores.masked_fill(scores > 1, torch.nan), "NaN"),
        (scores.masked_fill(scores > 1, torch.inf), "inf"),
    ):
        for _ in range(2):
            with pytest.raises(ValueError, match=words):
                sinkhorn_plan(wrong, engine=engine)
    with pytest.raises(ValueError, match="epsilon"):
        sinkhorn_plan(scores, epsilon=0.0)


@pytest.mark.parametrize("seeds", [range(6), pytest.param(range(6, 60), marks=pytest.mark.slow)], ids=["few", "many"])
@pytest.mark.parametrize("engine", conformance.ENGINES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_bit_for_bit_over_random_problems(engine: str, dtype: torch.dtype, seeds: range, plainly: Any) -> None:
    kept = 0
    for seed in seeds:
        call = keepable(seed, dtype)
        try:
            expected = plainly(conformance.results, call, engine)
        except ValueError as error:
            for _ in range(2):
                with pytest.raises(ValueError) as found:
                    conformance.results(call, engine)
                assert str(found.value) == str(error)
            continue
        before = len(remembered._entries)
        for _ in range(2):
            assert_same(conformance.results(call, engine), expected, call)
        kept += len(remembered._entries) > before
        query = (call.query.detach() * 0.5).requires_grad_()  # other numbers, the same signature
        other = problems.Call(
            seed, query, call.key.detach() + 0.25, call.value, call.mask, call.options, [query, call.value]
        )
        before = len(remembered._entries)
        assert_same(conformance.results(other, engine), plainly(conformance.results, other, engine), call)
        assert len(remembered._entries) == before
    assert 2 * kept > len(seeds)


MASKS = {
    "free": torch.ones(6, 6, dtype=torch.bool),
    "bias": torch.linspace(-1, 1, 36).view(6, 6),
    "keys": torch.tensor([True] * 5 + [False]).expand(2, 1, 1, 6),
    "low keys": torch.tensor([0.0] * 5 + [-1e4]).expand(6, 6),
    "-inf": torch.zeros(2, 1, 6, 6).masked_fill(torch.arange(6) > 3, -torch.inf),
    "pairs": (torch.arange(6) - torch.arange(6)[:, None]).abs() < 4,
    "half": torch.linspace(-1, 1, 36).view(6, 6).half(),
    "heads": (torch.rand(2, 3, 1, 6, generator=torch.Generator().manual_seed(1)) < 0.7),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("mode", ["auto", "never"])
@pytest.mark.parametrize("key_heads", [3, 1])
def test_masks_of_every_kind(name: str, mode: str, key_heads: int, plainly: Any) -> None:
    set_checks(mode)
    q, k, v = qkv(grad=True)
    k, v = (x[:, :key_heads].detach().requires_grad_() for x in (k, v))
    mask = MASKS[name].clone()
    if mask.is_floating_point():
        mask.requires_grad_()
    leaves = [x for x in (q, k, v, mask) if x.requires_grad]

    def run() -> dict[str, Tensor]:
        out, aux = sinkhorn_attention(q, k, v, mask, enable_gqa=True, return_aux=True)
        grads = torch.autograd.grad(out.sin().sum(), leaves)
        parts = {"output": out, "status": aux.status(), "row": aux.row_potential, "col": aux.col_residual}
        return parts | {str(i): x for i, x in enumerate(grads)}

    expected = plainly(run)
    for _ in range(3):
        assert_same(run(), expected, name)
    assert len(remembered._entries) == 1


def test_masks_that_forbid_nothing_are_one() -> None:
    for seed in range(5):
        sinkhorn_attention(*qkv(), torch.randn(6, 6, generator=torch.Generator().manual_seed(seed)))
    assert len(remembered._entries) == 1


@pytest.mark.parametrize("which", ["bool", "float", "lengths"])
@pytest.mark.parametrize("by", ["torch", "memory"])
def test_what_a_tensor_holds_now_counts_and_not_which_it_is(which: str, by: str, plainly: Any) -> None:
    made = {"bool": torch.ones(6, 6, dtype=torch.bool), "float": torch.zeros(6, 6), "lengths": torch.tensor([6, 6])}
    options = {"key_lengths" if which == "lengths" else "attn_mask": made[which]}
    seen = []
    for step in range(3):
        seen.append(sinkhorn_attention(*qkv(), **options))
        assert torch.equal(seen[-1], plainly(sinkhorn_attention, *qkv(), **options)), step
        changed = made[which] if by == "torch" else made[which].numpy()  # whose changes torch does not count
        if which == "lengths":
            changed[step % 2] -= 1
        else:
            changed[:, step] = False if which == "bool" else -float("inf")
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


@pytest.mark.parametrize("engine", conformance.ENGINES)
def test_nan_in_inactive_tokens_stays_there(engine: str) -> None:
    q, k, v = qkv()
    options = {"attn_mask": MASKS["keys"], "engine": engine}
    expected = sinkhorn_attention(q, k, v, **options)
    k[:, :, -1], v[:, :, -1] = torch.nan, torch.nan
    for _ in range(2):
        assert torch.equal(sinkhorn_attention(q, k, v, **options), expected)


def test_lengths_of_each_head(plainly: Any) -> None:
    inputs, lengths = qkv(shape=(2, 3, 6, 4), grad=True), torch.tensor([[6, 5, 4], [3, 6, 2]])
    expected = plainly(sinkhorn_attention, *inputs, key_lengths=lengths)
    for _ in range(2):
        found = sinkhorn_attention(*inputs, key_lengths=lengths)
        assert found.requires_grad and torch.equal(found, expected)


def test_errors_are_raised_every_time() -> None:
    inputs, bias = qkv(), torch.zeros(6, 6)
    sinkhorn_attention(*inputs, bias)
    for x in (torch.nan, torch.inf):
        bias[2, 3] = x
        for _ in range(2):
            with pytest.raises(ValueError, match="attn_mask"):
                sinkhorn_attention(*inputs, bias)
    sinkhorn_attention(*inputs, base_iters=20, window=(1, 2), is_causal=False, key_lengths=torch.tensor([6, 6]))
    for wrong, error in (
        ({"base_iters": 20.0}, TypeError),
        ({"is_causal": 0}, TypeError),
        ({"window": (True, 2)}, TypeError),
        ({"key_lengths": torch.tensor([6.0, 6.0])}, TypeError),
        ({"key_lengths": torch.tensor([6, 7])}, ValueError),
        ({"scale": torch.tensor(1.0)}, TypeError),
    ):
        given = {"base_iters": 20, "window": (1, 2), "is_causal": False, "key_lengths": torch.tensor([6, 6])} | wrong
        with pytest.raises(error):
            sinkhorn_attention(*inputs, **given)
    with pytest.raises(TypeError, match="dtype"):
        sinkhorn_attention(inputs[0], inputs[1].double(), inputs[2])


def test_the_mode_of_the_checks_is_heard() -> None:
    inputs, identity = qkv(), torch.ones(6, 6, dtype=torch.bool).tril()
    for _ in range(2):
        set_checks("never")
        sinkhorn_attention(*inputs, identity)
        set_checks("auto")
        with pytest.raises(ValueError, match="attn_mask"):
            sinkhorn_attention(*inputs, identity)


def test_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = remembered._Entries(4, 1 << 20)
    monkeypatch.setattr(remembered, "_entries", entries)
    for length in range(1, 30):
        sinkhorn_attention(*qkv(shape=(1, 1, length, 4)))
        assert len(entries.young) <= 4 and len(entries) <= 8
    entries.most_entries, entries.most_bytes = 1000, 20_000
    entries.forget()
    for length in range(1, 200, 5):
        sinkhorn_attention(*qkv(shape=(1, 1, length, 4)))
        kept = [*entries.young.values(), *entries.old.values()]
        assert remembered.num_bytes(kept) <= 40_000
    assert 0 < len(kept) < 40
    entries.most_entries, entries.most_bytes = 4, 1 << 20
    entries.forget()
    used = qkv(shape=(1, 1, 3, 4))
    for length in range(4, 12):  # what is used stays
        sinkhorn_attention(*used)
        signature = next(iter(k for k, e in entries.young.items() if e.problem.sizes == (1, 1, 3, 3)))
        assert entries.find(signature) is not None
        sinkhorn_attention(*qkv(shape=(1, 1, length, 4)))


def storages(tree: Any) -> set[int]:
    return {x.untyped_storage().data_ptr() for x in remembered.tensors_of(tree) if x.numel()}


@pytest.mark.parametrize("engine", conformance.ENGINES)
def test_nothing_of_the_callers_is_kept_and_nothing_kept_is_handed_out(engine: str) -> None:
    inputs = qkv(grad=True)
    lengths, ids = torch.tensor([6, 5]), torch.zeros(2, 6, dtype=torch.int64)
    given = {
        "lengths": {"query_lengths": lengths, "key_lengths": lengths},
        "ids": {"query_segment_ids": ids, "key_segment_ids": ids},
        **{name: {"attn_mask": mask.clone()} for name, mask in MASKS.items()},
    }
    for name, options in given.items():
        for _ in range(2):
            out, aux = sinkhorn_attention(*inputs, engine=engine, return_aux=True, **options)
            plan = sinkhorn_plan(*inputs[:2], engine=engine, **options)
            grads = torch.autograd.grad(out.sum() + plan.sum(), inputs)
            own = storages([e for e in (*remembered._entries.young.values(), *remembered._entries.old.values())])
            theirs = storages([*inputs, *options.values(), out, plan, *grads, *aux[:4], aux.existence])
            assert own and not own & theirs, name
            expected = out.detach().clone()
            for x in (out.detach(), plan.detach(), *grads, *aux[:4], *remembered.tensors_of(aux.existence.support)):
                if 0 not in x.stride():
                    x.zero_()
            assert torch.equal(sinkhorn_attention(*inputs, engine=engine, **options), expected), name


def test_inference_mode_first_and_training_after(plainly: Any) -> None:
    mask = MASKS["keys"].clone()
    with torch.inference_mode():
        inferred = sinkhorn_attention(*qkv(), mask)
        assert inferred.is_inference()
        on_inference_tensors = sinkhorn_attention(*(x.clone() for x in qkv()), mask.clone())
    assert torch.equal(inferred, on_inference_tensors)
    for engine in conformance.ENGINES:
        with torch.inference_mode():
            sinkhorn_attention(*qkv(), mask, engine=engine)
        inputs = qkv(grad=True)
        out = sinkhorn_attention(*inputs, mask, engine=engine)
        grads = torch.autograd.grad(out.sin().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.sin().sum() for g in grads), inputs)
        reference = plainly(sinkhorn_attention, *inputs, mask, engine=engine)
        assert torch.equal(out, reference) and torch.equal(out, inferred) == (engine == "cpu")
        assert all(torch.isfinite(x).all() for x in second)
    assert not any(x.is_inference() for x in remembered.tensors_of(list(remembered._entries.young.values())))


def test_dropout_draws_as_ever(plainly: Any) -> None:
    inputs = qkv()

    def three() -> list[Tensor]:
        torch.manual_seed(3)
        return [sinkhorn_attention(*inputs, dropout_p=0.4) for _ in range(3)]

    expected = plainly(three)
    for _ in range(2):
        found = three()
        assert all(map(torch.equal, found, expected))
        assert not torch.equal(found[0], found[1])


@compiled
def test_engine_capability_and_budget_are_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = qkv(shape=(1, 2, 40, 8))
    expected, capability, budget = sinkhorn_attention(*inputs), cpu.capability(), cpu.workspace_budget()
    seen: list[list[int]] = []
    run = cpu.run
    monkeypatch.setattr(cpu, "run", lambda op, *args: (seen.append(args[2]), run(op, *args))[1])
    try:
        for name in cpu.capabilities():
            cpu.set_capability(name)
            torch.testing.assert_close(sinkhorn_attention(*inputs), expected)
        cpu.set_capability(capability)
        cpu.set_workspace_budget(12345)
        assert torch.equal(sinkhorn_attention(*inputs), expected)
        assert seen[-1][4] == 12345
        monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
        torch.use_deterministic_algorithms(True)
        sinkhorn_attention(*inputs)
        assert seen[-1][5] == 1
    finally:
        torch.use_deterministic_algorithms(False)
        cpu.set_capability(capability)
        cpu.set_workspace_budget(budget)
    count = len(seen)
    for engine in ("tiled", "reference"):
        torch.testing.assert_close(sinkhorn_attention(*inputs, engine=engine), expected)
    assert len(seen) == count
    monkeypatch.setattr(cpu, "_unavailable", "it was taken away")
    monkeypatch.setattr(missing, "warn_once", lambda *_: None)
    torch.testing.assert_close(sinkhorn_attention(*inputs), expected)
    assert len(seen) == count


class Sub(Tensor):
    pass


def _tangent(inputs: list[Tensor]) -> Tensor:
    with torch.autograd.forward_ad.dual_level():
        q = torch.autograd.forward_ad.make_dual(inputs[0], torch.ones_like(inputs[0]))
        return torch.autograd.forward_ad.unpack_dual(sinkhorn_attention(q, *inputs[1:])).tangent


def _within(mode: Any) -> Any:
    def call(inputs: list[Tensor]) -> object:
        with mode:
            return sinkhorn_attention(*inputs)

    return call


OTHERS: dict[str, Any] = {
    "vmap": lambda inputs: torch.func.vmap(sinkhorn_attention)(*inputs),
    "grad": lambda inputs: torch.func.grad(lambda q: sinkhorn_attention(q, *inputs[1:]).sum())(inputs[0]),
    "jvp": _tangent,
    "autocast": _within(torch.autocast("cpu", torch.bfloat16)),
    "flops": _within(FlopCounterMode(display=False)),
    "default device": _within(torch.device("cpu")),
    "trace": lambda inputs: torch.jit.trace(lambda *x: sinkhorn_attention(*x), inputs, check_trace=False),
    "negative": lambda inputs: sinkhorn_attention(torch._neg_view(inputs[0]), *inputs[1:]),
}


@pytest.mark.parametrize("how", OTHERS)
@pytest.mark.filterwarnings("ignore")
def test_calls_that_are_not_plain_are_not_remembered(how: str) -> None:
    inputs = qkv()
    OTHERS[how](inputs)
    assert len(remembered._entries) == 0
    sinkhorn_attention(*inputs)
    assert len(remembered._entries) == 1
    OTHERS[how](inputs)
    assert len(remembered._entries) == 1


def test_fake_tensors_and_subclasses_are_not_remembered() -> None:
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in qkv()]
        assert sinkhorn_attention(*fakes).shape == fakes[0].shape
    with pytest.raises(TypeError, match="Sub"):
        sinkhorn_attention(*(x.as_subclass(Sub) for x in qkv()))
    assert len(remembered._entries) == 0


@pytest.mark.parametrize("plan", [False, True])
def test_derivatives_of_every_kind(plan: bool, plainly: Any) -> None:
    q, k, v, bias = *qkv(grad=True, dtype=torch.float64), torch.randn(6, 6, dtype=torch.float64, requires_grad=True)

    def call(*x: Tensor) -> Tensor:
        return sinkhorn_plan(*x[:2], x[3]) if plan else sinkhorn_attention(*x)

    def run() -> dict[str, Tensor]:
        leaves = [q, k, bias] if plan else [q, k, v, bias]
        out = call(q, k, v, bias)
        first = torch.autograd.grad(out.sin().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum((x**2).sum() for x in first), leaves)
        out = call(q, k, v, bias)
        batched = torch.autograd.grad(out, leaves, torch.stack([out.cos(), out.sin()]).detach(), is_grads_batched=True)
        recomputed = checkpoint(call, q, k, v, bias, use_reentrant=False)
        kept = torch.autograd.grad(recomputed.sin().sum(), leaves)
        one = torch.autograd.grad(call(q, k.detach(), v.detach(), bias.detach()).sum(), q)
        named = {"first": first, "second": second, "batched": batched, "checkpoint": kept, "one": one}
        return {f"{name} {i}": x for name, xs in named.items() for i, x in enumerate(xs)}

    expected = plainly(run)
    for _ in range(2):
        assert_same(run(), expected, plan)


@compiled
def test_saved_tensors_are_guarded() -> None:
    inputs = qkv(grad=True)
    out = sinkhorn_attention(*inputs)
    out.detach().mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_threads_agree() -> None:
    remembered._entries.most_entries, before = 3, remembered._entries.most_entries
    calls = [(qkv(i, (1, 2, 3 + i, 4)), torch.arange(3 + i).expand(3 + i, -1) < 2 + i) for i in range(8)]
    expected = [sinkhorn_attention(*inputs, mask) for inputs, mask in calls]
    wrong: list[object] = []

    def work(first: int) -> None:
        try:
            for step in range(60):
                i = (first + step) % len(calls)
                inputs, mask = calls[i]
                if not torch.equal(sinkhorn_attention(*inputs, mask), expected[i]):
                    wrong.append(i)
        except BaseException as error:
            wrong.append(error)

    try:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        remembered._entries.most_entries = before
    assert not wrong


def test_modules_copy_and_pickle_after_calls() -> None:
    module, x = SinkhornMultiheadAttention(8, 2, batch_first=True), torch.randn(2, 5, 8)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    expected = module(x, x, x, padding)[0]
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(module), torch.load(buffer, weights_only=False), nn.Sequential(module)[0]):
        assert torch.equal(other(x, x, x, padding)[0], expected)
    out = sinkhorn_attention(*qkv(), return_aux=True)
    assert copy.deepcopy(out[1]).status().equal(out[1].status())
