"""What an engine is: the verbs that the ops call, and what it does with the tensors of its own device.

A new engine is a module with a subclass of `Engine` and one object of it, `ENGINE`, which `registry` lists.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from torch_sinkhorn_attn.engines.tiled.partners import partners
from torch_sinkhorn_attn.engines.tiled.tiles import Tiles
from torch_sinkhorn_attn.method import reference, staircase
from torch_sinkhorn_attn.problem.problem import Gradients, Inputs, OutputGrads, Partners, Potentials, Problem, Result

if TYPE_CHECKING:
    from torch_sinkhorn_attn.distributed.share import Share
    from torch_sinkhorn_attn.distributed.tiles import OfRank

T = TypeVar("T")


class Engine(ABC):
    """A way to compute problems and their adjoints. The generic code asks `engines.engine_of(device)` for what is
    particular about a device, and names no engine that is bound to another library; what is not overridden is that of a
    plain eager device.

    Attributes:
        name: what users call it by, `engine=name`.
        device: the type of the `torch.device` whose tensors are its own; None for an engine that has none.
        compiles: every new computation is compiled there, so what data hold must not decide what is computed, and
            loops in Python are unrolled.
        wrappers: packages of the subclasses of Tensor that stand for plain tensors there.
        of_ranks: it has kernels for the half-steps of one rank, where the sequence is sharded over a process group:
            `rank_plan` and `rank_gradients`. Where none has, they are made in tiles of plain PyTorch.
    """

    name: str
    device: str | None = None
    compiles: bool = False
    wrappers: tuple[str, ...] = ()
    of_ranks: bool = False

    @abstractmethod
    def status(self) -> str:
        """Whether it can run, and how; or why not."""

    @abstractmethod
    def refusal(self, inputs: Inputs, problem: Problem) -> str | None:
        """Why it cannot run the problem; None if it can."""

    @abstractmethod
    def solve(self, inputs: Inputs, problem: Problem) -> Potentials:
        """T stopped and R kept iterations: the stacked duals."""

    @abstractmethod
    def forward(self, inputs: Inputs, problem: Problem, residuals: bool = True) -> Result:
        """Output, duals and (unless `residuals` is False: NaN) the marginal residuals."""

    @abstractmethod
    def backward(
        self, inputs: Inputs, problem: Problem, output: Tensor, potentials: Potentials, grads: OutputGrads
    ) -> Gradients:
        """The adjoint of `forward`, of whose result it is given the output and the duals."""

    def plan(self, inputs: Inputs, problem: Problem, log: bool = False) -> tuple[Tensor, Potentials]:
        """The plan `[N, H, L, S]`, or `[N, H, L+1, S+1]` with a dustbin, or its logarithm; and the stacked duals."""
        potentials = self.solve(inputs._replace(value=None), problem)
        full = reference.log_plan_of(reference.dense_problem(inputs, problem), potentials.row[-1], potentials.col[-1])
        return reference.fold_dustbins(full if log else full.exp(), problem, log), potentials

    def plan_backward(
        self,
        inputs: Inputs,
        problem: Problem,
        potentials: Potentials,
        grad_plan: Tensor,
        mask_grad: bool,
        log: bool = False,
    ) -> Gradients:
        """The adjoint of `plan`: the dense staircase."""
        dense = reference.dense_problem(inputs, problem)
        log_plan = reference.log_plan_of(dense, potentials.row[-1], potentials.col[-1])
        grad = reference.unfold_dustbins(grad_plan, problem, log_plan if log else None)
        cotangent, dropped = staircase.adjoint(log_plan, grad, potentials, problem, log)
        return Gradients(staircase.score_gradients(cotangent, inputs, problem, mask_grad), dropped)

    def matches(self, inputs: Inputs, problem: Problem, k: int) -> Partners:
        """The k largest entries of each row and column of the plan, from one pass over its tiles."""
        inputs = inputs._replace(value=None)
        potentials = self.solve(inputs, problem)
        return partners(Tiles(inputs, problem).at(potentials.row[-1], potentials.col[-1]), k)

    # The rows of one rank, where the sequence is sharded over a process group

    def rank_missing(self) -> str | None:
        """Why no problem can have its half-steps in this process; None if some can. Asked where `of_ranks`: all ranks
        must be alike in it, for their messages are."""
        return None

    def rank_refusal(self, inputs: Inputs, problem: Problem) -> str | None:
        """As `refusal`, of the half-steps of a rank; asked where `of_ranks`."""
        return self.refusal(inputs, problem)

    def rank_plan(self, inputs: Inputs, share: Share) -> OfRank:
        """The plan of the rows and columns of one rank, as `distributed.tiles.SharedTiles` has it."""
        raise NotImplementedError

    def rank_gradients(self, plan: OfRank, output: Tensor, potentials: Potentials, grads: OutputGrads) -> Inputs:
        """The adjoint of attention with such a plan, of the inputs of its tiles."""
        raise NotImplementedError

    # What it does with tensors of its own device

    def call(self, function: Callable[..., tuple[Tensor, ...]], args: Sequence[Any]) -> tuple[Tensor, ...]:
        """`function(*args)`: the body of an op, run on its tensors."""
        return function(*args)

    def over_ranks(self) -> Callable[..., Any] | None:
        """The attention of tokens that lie on several ranks, where its library was told that they do: a function of
        query, key, value, attn_mask, the other options and return_aux."""
        return None

    def placed(self, x: Tensor, source: Tensor) -> Tensor:
        """x `[N, H, L, E]`, made from the user's `source`, lying on the devices that source lies on."""
        return x

    def unsplit(self, *vectors: Tensor) -> tuple[Tensor, ...]:
        """Vectors `[..., n]` as sorts and scatters along n can take them: those that lie on several devices, and would
        not be taken so, whole on each."""
        return vectors

    def fetched(self, tree: T) -> T:
        """A tuple, NamedTuple or dataclass with tensors that may be looked at without compiling for it."""
        return tree


def each_tensor(tree: Any, function: Callable[[Tensor], Any]) -> Any:
    """A tuple, NamedTuple or dataclass with `function` of each tensor in its place."""
    if isinstance(tree, Tensor):
        return function(tree)
    if is_dataclass(tree) and not isinstance(tree, type):
        return replace(tree, **{name: each_tensor(x, function) for name, x in vars(tree).items()})
    if isinstance(tree, tuple):
        parts = [each_tensor(x, function) for x in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    return tree
