"""What is timed: the engines, their dense definition, softmax attention, and the rivals of `rivals.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_sinkhorn_attn.engines import ENGINES

from .cases import Case, attend

Outcome = tuple[Tensor, Tensor | None]  # of the first head: the output and the query's gradient, [1, 1, L, E]
Attention = Callable[[Case, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Function:
    """One line of the tables.

    `prepare(case, backward)` allocates the inputs, compiles what is compiled, and returns what is timed.
    """

    name: str
    gives: str  # for the legend
    prepare: Callable[[Case, bool], Callable[[], Outcome]]
    gradient: str | None  # the float64 gradient it should equal: "tail", "unrolled", "implicit"; None has no backward
    limited: bool = True  # left out where it would take long or much memory
    iterates: bool = True  # time grows with T + R
    keeps: bool = False  # memory grows with T + R
    same: bool = True  # it aims at the definition's output, so that an error means something
    masks: bool = True  # can do a band


def in_torch(attention: Attention) -> Callable[[Case, bool], Callable[[], Outcome]]:
    """`prepare` for an attention that autograd differentiates."""

    def prepare(case: Case, backward: bool) -> Callable[[], Outcome]:
        inputs = case.inputs()

        def run() -> Outcome:
            with torch.set_grad_enabled(backward):
                out = attention(case, *inputs)
                grad = torch.autograd.grad(out.sin().sum(), inputs)[0][:1, :1] if backward else None
            return out.detach()[:1, :1], grad

        return run

    return prepare


def engine(name: str, gradient: str = "tail") -> Callable[[Case, bool], Callable[[], Outcome]]:
    return in_torch(lambda case, *x: attend(case, x, name, gradient))


def ours() -> list[Function]:
    """The engines there are, the definition, and softmax attention."""
    found = [Function(name, "an engine of this package", engine(name), "tail", limited=False) for name in ENGINES]
    found += [
        Function("dense", "the same surrogate written densely, by autograd", engine("reference"), "tail"),
        Function(
            "unrolled", "densely, autograd through every iteration", engine("reference", "unrolled"), "unrolled",
            keeps=True,
        ),
        Function(
            "softmax", "F.scaled_dot_product_attention: softmax over the full length, no window, another result",
            in_torch(lambda case, *x: F.scaled_dot_product_attention(*x)), "tail",
            limited=False, iterates=False, same=False,
        ),
    ]  # fmt: skip
    return found


SUBJECT = "cpu" if "cpu" in ENGINES else next(iter(ENGINES))  # what ratios are to
