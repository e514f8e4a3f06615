"""Settings for a user's own tensors, measured: how many iterations, whether to accelerate, which gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from torch_sinkhorn_attn.convergence import residual_history
from torch_sinkhorn_attn.functional import refuse_unknown, sinkhorn_attention
from torch_sinkhorn_attn.options import CONVERGED_WITHIN, positive
from torch_sinkhorn_attn.problem.arguments import Keywords

MOST = 320  # iterations that are tried
WORTH = 0.67  # what acceleration must save: a third of the iterations
TAILS = (2, 4, 8)
CHOSEN = ("base_iters", "tail_iters", "acceleration", "contraction", "tolerance", "over_relaxation", "gradient")


@dataclass(frozen=True)
class Settings:
    """What `choose_settings` found.

    Attributes:
        base_iters, tail_iters, acceleration, gradient: to be passed to `sinkhorn_attention`; `options` holds them.
        error: largest |log(column sum / b_j)| with them; about the largest relative error of a column.
        balanced: whether that is within the target.
        gradient_gap: ||tail - implicit|| / ||implicit|| of the gradients of query and key, for one random cotangent;
            0 where "implicit" was chosen, None where it was not measured (the plan is not balanced, so there is no
            fixed point near to differentiate).
    """

    base_iters: int
    tail_iters: int
    acceleration: str | None
    gradient: str
    error: float
    balanced: bool
    gradient_gap: float | None

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments."""
        return {name: getattr(self, name) for name in ("base_iters", "tail_iters", "acceleration", "gradient")}

    def __str__(self) -> str:
        given = ", ".join(f"{name}={x!r}" for name, x in self.options.items())
        if not self.balanced:
            return (
                f"{given}: columns are off by up to {self.error:.2g} of their share, and {MOST} iterations do not "
                "balance them. Use a larger epsilon, a wider window, or relaxation."
            )
        gap = "" if not self.gradient_gap else f"; the tail's gradient is {100 * self.gradient_gap:.2g} % off"
        return f"{given}: columns are within {self.error:.1g} of their share{gap}"


def choose_settings(
    query: Tensor,
    key: Tensor | None = None,
    attn_mask: Tensor | None = None,
    *,
    target: float = CONVERGED_WITHIN,
    gradient_within: float = 0.05,
    **options: Unpack[Keywords],
) -> Settings:
    """The fewest iterations that balance these tensors, with or without acceleration, and the cheapest gradient that is
    near enough to the converged plan's. `epsilon`, `window` and the rest of the model stay as given.

    Costs some thousand passes over the plan at worst: give it one batch, or a few heads of it.

    Args:
        query, key, attn_mask, options: as `sinkhorn_attention`, but for what is chosen here (base_iters, tail_iters,
            acceleration, contraction, tolerance, over_relaxation, gradient) and `dropout_p`, which changes nothing.
        target: largest |log(column sum / b_j)| to be reached. Default 0.01.
        gradient_within: how far the tail's gradient may be from the implicit one, relative. Default 0.05.

    Raises:
        TypeError, ValueError: as `sinkhorn_attention`; an option that is chosen here was given.

    >>> import torch
    >>> q, k = (torch.randn(1, 24, 8, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    >>> found = choose_settings(q, k)
    >>> found.balanced, found.base_iters <= 20, found.gradient
    (True, True, 'tail')
    """
    refuse_unknown("choose_settings", options)
    if given := [name for name in CHOSEN if name in options]:
        raise TypeError(f"choose_settings chooses {', '.join(given)} itself: leave it out.")
    target, gradient_within = positive("target", target), positive("gradient_within", gradient_within)
    call, kept = (query, key, attn_mask), {**options, "dropout_p": 0.0}
    count, acceleration = _needed(call, target, kept), None
    faster = _needed(call, target, {**kept, "acceleration": "chebyshev"})
    if faster <= WORTH * count:
        count, acceleration = faster, "chebyshev"
    enough: Settings | None = None  # with the fewest tail iterations
    for tail in TAILS:
        base = max(count - tail, 1)
        while True:  # the last iterations are plain, so accelerated ones may need a few more
            chosen = {**kept, "base_iters": base, "tail_iters": tail, "acceleration": acceleration}
            error = _worst(call, chosen)[-1].item()
            if error <= target or base >= MOST:
                break
            base += -(-base // 5)
        if error > target:
            return Settings(base, tail, acceleration, "tail", error, False, None)
        gap = gradient_gap(call, chosen)
        if gap <= gradient_within:
            return Settings(base, tail, acceleration, "tail", error, True, gap)
        enough = enough or Settings(base, tail, acceleration, "implicit", error, True, 0.0)
    assert enough is not None
    return enough


Call = tuple[Tensor, Tensor | None, Tensor | None]


def _needed(call: Call, target: float, options: dict[str, Any]) -> int:
    """The fewest iterations after which every problem is within the target; `MOST` if none are."""
    reached = (_worst(call, {**options, "base_iters": MOST - 2, "tail_iters": 2}) <= target).nonzero()
    return int(reached[0]) + 1 if len(reached) else MOST


def _worst(call: Call, options: dict[str, Any]) -> Tensor:
    """The error of the worst problem after each iteration."""
    history = residual_history(*call, **options)
    return history.flatten(0, -2).amax(0) if history.numel() else history.new_zeros(history.shape[-1])


def gradient_gap(call: Call, options: dict[str, Any]) -> float:
    """How far the tail's gradient is from the implicit one, for Gaussian values and cotangent."""
    query, key, mask = call
    lines = (*query.shape[:-2], query.shape[-1]) if key is None else key.shape[:-1]  # [..., S]
    value = torch.randn((*lines, 16), generator=torch.Generator().manual_seed(0)).to(query)
    found: list[Tensor] = []
    for gradient in ("tail", "implicit"):
        leaves = [x.detach().requires_grad_() for x in (query, key) if x is not None]
        output = sinkhorn_attention(
            leaves[0], None if key is None else leaves[1], value, mask, gradient=gradient, **options
        )
        assert isinstance(output, Tensor)
        grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
        found.append(torch.cat([x.flatten() for x in torch.autograd.grad(output, leaves, grad)]).double())
    tail, implicit = found
    return float((tail - implicit).norm() / implicit.norm().clamp(min=1e-30))
