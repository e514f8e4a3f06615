"""SuperGlue's loop swapped for ours in models of every build that calls it, and back. That of transformers:
transformers/test_superglue.py."""

from __future__ import annotations

import copy
import functools
import pickle
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.lib import superglue
from benchmarks.lib.superglue import log_optimal_transport
from torch_sinkhorn_attn.integrations.superglue import SuperGlueLoop, replace_superglue, restore_superglue

D = torch.float64
ROOT = ("(the model itself)",)
SCORES = torch.randn(2, 5, 7, dtype=D, generator=torch.Generator().manual_seed(0))


class Global(nn.Module):
    """As in SuperGlue's own code and in transformers: a function of the module."""

    def __init__(self) -> None:
        super().__init__()
        self.bin_score = nn.Parameter(torch.tensor(0.5, dtype=D))

    def forward(self, scores: Tensor, iters: int = 4) -> Tensor:
        return log_optimal_transport(scores, self.bin_score, iterations=iters)


class Below(Global):
    """A user's subclass."""

    def forward(self, scores: Tensor, iters: int = 5) -> Tensor:
        return super().forward(scores, iters) + 1


class Attribute(Global):
    """As in LoFTR: the function is an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.log_optimal_transport = superglue.log_optimal_transport

    def forward(self, scores: Tensor, iters: int = 4) -> Tensor:
        return self.log_optimal_transport(scores, self.bin_score, iters)


class Method(Global):
    def log_optimal_transport(self, scores: Tensor, alpha: Tensor, iters: int) -> Tensor:
        return superglue.log_optimal_transport(scores, alpha, iters)

    def forward(self, scores: Tensor, iters: int = 4) -> Tensor:
        return self.log_optimal_transport(scores, alpha=self.bin_score, iters=iters)


class Inside(Global):
    """Called by a function within the method, with a keyword-only default."""

    def forward(self, scores: Tensor, iters: int = 4, *, factor: float = 2.0) -> Tensor:
        return torch.cat([log_optimal_transport(x[None], self.bin_score, iters) * factor for x in scores])


KINDS = [Global, Below, Attribute, Method, Inside]


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Global(), Attribute()


def outcome(model: nn.Module, **options: Any) -> list[Tensor]:
    out = model(SCORES, **options)
    return [out.detach(), *torch.autograd.grad(out.cos().sum(), model.parameters())]


def close(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(torch.allclose(x, y, rtol=1e-10, atol=1e-12) for x, y in zip(found, wanted, strict=True))


@pytest.mark.parametrize("iters", [1, 2, 4, 50])
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_and_gradients_stay_at_any_number_of_iterations(kind: type[Global], iters: int, calls: Any) -> None:
    model = kind()
    before = outcome(model, iters=iters)
    assert replace_superglue(model) == ROOT
    calls.clear()
    assert close(outcome(model, iters=iters), before) and calls
    assert replace_superglue(model) == ()
    assert restore_superglue(model) == ROOT and restore_superglue(model) == ()
    calls.clear()
    assert all(map(torch.equal, outcome(model, iters=iters), before)) and not calls
    assert type(model) is kind and set(vars(model)) == set(vars(kind()))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each call of ours."""
    found: list[int] = []
    real = SuperGlueLoop.__call__
    monkeypatch.setattr(SuperGlueLoop, "__call__", lambda self, *a, **k: found.append(1) or real(self, *a, **k))  # type: ignore[func-returns-value]
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_copies_and_pickles_are_replaced_too_and_apart(
    kind: type[Global], copied: Callable[[Any], Any], calls: Any
) -> None:
    model = kind()
    replace_superglue(model, engine="tiled")
    other = copied(model)
    calls.clear()
    assert close(outcome(other), outcome(kind())) and calls
    assert type(other) is type(model) and type(other).__name__ == kind.__name__ and isinstance(other, kind)
    assert replace_superglue(other, engine="tiled") == ()
    assert restore_superglue(other) == ROOT and type(other) is kind
    assert restore_superglue(model) == ROOT  # was replaced still


def test_parameters_hooks_and_state_are_kept() -> None:
    model = Below().requires_grad_(False).eval()
    parameter, seen = model.bin_score, []
    model.register_forward_hook(lambda *_: seen.append(1))
    state = list(model.state_dict())
    replace_superglue(model)
    model(SCORES)
    assert model.bin_score is parameter and not parameter.requires_grad and not model.training and seen == [1]
    assert list(model.state_dict()) == state
    model.load_state_dict(Below().state_dict())


def test_only_the_one_model_changes_in_other_threads_too(calls: Any) -> None:
    before = superglue.log_optimal_transport, Global.forward, sys.modules[__name__].__dict__["log_optimal_transport"]
    model, other = Global(), Global()
    replace_superglue(model)
    calls.clear()
    results: list[list[Tensor]] = []
    threads = [threading.Thread(target=lambda: results.append(outcome(other))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not calls and len(results) == 3
    assert before == (superglue.log_optimal_transport, Global.forward, log_optimal_transport)


def test_every_loop_of_a_model_is_replaced_and_named() -> None:
    model = Pair()
    assert replace_superglue(model) == ("one", "two")
    assert replace_superglue(model) == ()
    model.one = Global()
    assert replace_superglue(model) == ("one",)
    assert restore_superglue(model) == ("one", "two")


def test_models_of_different_options_stand_side_by_side() -> None:
    plain, quick = Global(), Global()
    replace_superglue(plain)
    replace_superglue(quick, gradient="implicit", base_iters=200, tolerance=1e-13)
    found, wanted = outcome(quick), outcome(plain, iters=300)
    assert close(found, wanted) and not close(outcome(plain), wanted)
    with pytest.raises(ValueError, match=r"replaced before with other options.*restore_superglue"):
        replace_superglue(quick)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_dtype_is_that_of_the_scores(dtype: torch.dtype) -> None:
    model = Global().to(dtype)
    replace_superglue(model)
    found = model(SCORES.to(dtype), iters=50)
    truth = log_optimal_transport(SCORES.to(dtype).double(), model.bin_score.double(), 50)
    assert found.dtype == dtype and torch.allclose(found.double(), truth, rtol=torch.finfo(dtype).eps * 4, atol=1e-5)


@pytest.mark.parametrize("low", ["-inf", "-1e9", "lowest"])
@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_padding_is_as_in_the_loop(low: str, dtype: torch.dtype) -> None:
    """Padded keypoints stay in the problem there: their mass goes to the dustbins, which hold it too."""
    number = {"-inf": -torch.inf, "-1e9": -1e9, "lowest": torch.finfo(dtype).min}[low]
    model = Global().to(dtype)
    real = torch.zeros(SCORES.shape, dtype=torch.bool)
    real[0, :4, :5] = real[1, :5, :3] = True
    scores = SCORES.to(dtype).masked_fill(~real, number)
    shown = nn.functional.pad(real, (0, 1, 0, 1), value=True)
    for iters in (3, 60):
        truth = model(scores, iters=iters)
        replace_superglue(model)
        found = model(scores, iters=iters)
        restore_superglue(model)
        bound = 1e-10 if dtype == D else 1e-4
        assert torch.allclose(found[shown], truth[shown], atol=bound)
        assert (found[~shown] < -1e8).all() and torch.equal(found.exp() == 0, truth.exp() == 0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Global, Attribute])
def test_torch_compile_takes_it(kind: type[Global]) -> None:
    model = kind()
    truth = model(SCORES)
    replace_superglue(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(SCORES), truth, atol=1e-10)


def log_other(scores: Tensor, alpha: Tensor, iters: int) -> Tensor:
    """One dustbin, the columns', as in SALAD."""
    return log_optimal_transport(scores, alpha, iters)[:, :, :-1]


def log_softer(scores: Tensor, alpha: Tensor, iters: int) -> Tensor:
    return log_optimal_transport(scores / 2, alpha / 2, iters)


@pytest.mark.parametrize("function", [log_other, log_softer])
def test_what_only_bears_the_name_is_refused(function: Any) -> None:
    model = nn.Sequential(Attribute(), Attribute())
    model[1].log_optimal_transport = function
    with pytest.raises(ValueError, match=r"1: its log_optimal_transport computes something else"):
        replace_superglue(model)
    assert restore_superglue(model) == ()  # nothing was changed


def test_what_takes_other_arguments_is_refused() -> None:
    model = Attribute()
    model.log_optimal_transport = lambda scores: scores
    with pytest.raises(ValueError, match=r"does not take \(scores, bin_score, iterations\)"):
        replace_superglue(model)


def decorated(function: Any) -> Any:
    @functools.wraps(function)
    def inner(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return inner


class Decorated(Global):
    forward = decorated(Global.forward)


def test_a_decorated_method_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match=r"Global.forward calls log_optimal_transport within a decorator"):
        replace_superglue(Decorated())


def test_other_refusals() -> None:
    with pytest.raises(ValueError, match=r"Linear has no SuperGlue loop.*Dustbin.superglue\(score\)"):
        replace_superglue(nn.Linear(2, 2))
    for function in (replace_superglue, restore_superglue):
        with pytest.raises(TypeError, match=r"needs an nn\.Module, got str"):
            function("model")  # type: ignore[arg-type]
    model = Global()
    with pytest.raises(TypeError, match="unknown option 'epsilon'; it takes gradient"):
        replace_superglue(model, epsilon=0.5)
    with pytest.raises(ValueError, match="engine='nonsense'"):
        replace_superglue(model, engine="nonsense")
    with pytest.raises(ValueError, match="tolerance"):
        replace_superglue(model, tolerance=1e-3)  # beside gradient="unrolled", the default
    assert type(model) is Global


def test_a_class_made_since_is_refused() -> None:
    model = Global()
    replace_superglue(model)
    model.__class__ = type("Sharded", (type(model),), {})
    with pytest.raises(ValueError, match="a class made since"):
        restore_superglue(model)
