"""The dustbin: one extra row and column where queries and keys without a partner send their mass."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.fx import Proxy

from torch_sinkhorn_attn.problem.tensor_kinds import check_kind


@dataclass(frozen=True)
class Dustbin:
    """Scores, capacities and value of the dustbin; gradients flow to the scores and the value.

    The augmented problem has score `row_score_i / epsilon` for "query i unmatched", `col_score_j / epsilon` for "key j
    unmatched" and `corner_score / epsilon` where dustbin row and column meet. With a dustbin every real row and column
    has mass 1 unless masses are given, and the dustbin row and column have the masses `row_capacity` and
    `col_capacity`.

    Args:
        row_score: score of leaving a query unmatched, broadcasting to `(..., H, L)`: a number, `(H, 1)` per head,
            `(L,)` or `(..., H, L)` per token. In score units, as `scale * q.k`.
        col_score: score of leaving a key unmatched, broadcasting to `(..., H, S)`.
        corner_score: number, or tensor broadcasting to `(..., H)`. Default 0.
        row_capacity: mass of the dustbin row, which takes the unmatched keys: a positive number, or a tensor
            broadcasting to `(..., H, L)` and constant within each problem: `(H, 1)` per head, `(..., H, L)` to give
            each packed segment its own. Default: the total mass of the active keys (SuperGlue's), or what balance
            leaves if the other capacity is given.
        col_capacity: mass of the dustbin column, which takes the unmatched queries, likewise, to `(..., H, S)`.
        value: `(..., H, Ev)`-broadcastable value vector that mass sent to the dustbin reads. Default zero.

    The corner is 0 where SuperGlue has its one learned score a third time: `Dustbin.superglue(score)`.

    Sources: Sarlin et al., SuperGlue, CVPR 2020 (dustbin, default capacities); arXiv:2605.08123 (one active dustbin).

    >>> import torch
    >>> from torch_sinkhorn_attn import Dustbin, sinkhorn_plan
    >>> q = torch.eye(3)[None] * 8
    >>> plan = sinkhorn_plan(q, q[:, :2], dustbin=Dustbin(1.0, 1.0))
    >>> plan.shape
    torch.Size([1, 4, 3])
    >>> plan[0, 2].argmax().item()  # the third query has no partner: it goes to the dustbin column
    2
    """

    row_score: Tensor | float
    col_score: Tensor | float
    corner_score: Tensor | float = 0.0
    row_capacity: Tensor | float | None = None
    col_capacity: Tensor | float | None = None
    value: Tensor | None = None

    def __init__(
        self,
        row_score: Tensor | float,
        col_score: Tensor | float,
        corner_score: Tensor | float = 0.0,
        *,
        row_capacity: Tensor | float | None = None,
        col_capacity: Tensor | float | None = None,
        value: Tensor | None = None,
    ) -> None:
        fields = {
            "row_score": row_score,
            "col_score": col_score,
            "corner_score": corner_score,
            "row_capacity": row_capacity,
            "col_capacity": col_capacity,
            "value": value,
        }
        for name, given in fields.items():
            optional = name in ("row_capacity", "col_capacity", "value")
            if given is None and optional:
                continue
            if isinstance(given, Proxy):  # torch.fx is recording: it is checked when the graph runs
                object.__setattr__(self, name, given)
                continue
            if isinstance(given, bool) or not isinstance(given, (int, float, Tensor)):
                raise TypeError(f"Dustbin {name} must be a number or a tensor, got {type(given).__name__}: {given!r}.")
            if name == "value" and not isinstance(given, Tensor):
                raise TypeError(f"Dustbin value must be a tensor broadcasting to (..., H, Ev), got {given!r}.")
            if not isinstance(given, Tensor) and not -float("inf") < given < float("inf"):
                raise ValueError(f"Dustbin {name} must be finite, got {given!r}; for no dustbin pass dustbin=None.")
            if isinstance(given, Tensor):
                check_kind(f"Dustbin {name}", given)
            if isinstance(given, Tensor) and not given.is_floating_point():
                raise TypeError(f"Dustbin {name} must be a floating-point tensor, got {given.dtype}; use .float().")
            if not isinstance(given, Tensor) and name.endswith("capacity") and given <= 0:
                raise ValueError(f"Dustbin {name} must be positive, got {given!r}; leave it None for the default.")
            if isinstance(given, Tensor) and name.endswith("capacity") and given.requires_grad:
                raise ValueError(f"Dustbin {name} is a constant and cannot require grad; pass {name}.detach().")
            object.__setattr__(self, name, given)
        for name in ("row_capacity", "col_capacity", "value"):
            if fields[name] is None:
                object.__setattr__(self, name, None)

    @classmethod
    def superglue(cls, score: Tensor | float, *, value: Tensor | None = None) -> Dustbin:
        """SuperGlue's dustbin: row, column and corner all have the one learned score, and the capacities are default.

        So its gradient arrives summed. The plan is SuperGlue's own, `exp(Z + u + v - norm)`, once both have converged:
        there too every real row and column has mass 1, and the dustbin's row and column the number of keypoints of the
        other image.

        Args:
            score: a number, a tensor of one element, or `(..., H, 1)` per head, in score units as everywhere.
            value: as in `Dustbin`.

        Raises:
            TypeError: score is neither number nor floating-point tensor.
            ValueError: score is not finite, or a tensor with a score for each token.

        Source: Sarlin et al., SuperGlue, CVPR 2020, section 3.2.

        >>> import torch
        >>> score = torch.tensor(1.0, requires_grad=True)  # SuperGlue's bin_score
        >>> Dustbin.superglue(score).corner_score is score
        True
        """
        if not isinstance(score, Tensor) or score.ndim == 0:
            return cls(score, score, score, value=value)
        if score.shape[-1] != 1:
            raise ValueError(
                f"Dustbin.superglue takes one score for each problem, a number, a scalar or (..., H, 1), got shape "
                f"{tuple(score.shape)}; scores per token are Dustbin(row_score, col_score)."
            )
        return cls(score, score, score.squeeze(-1), value=value)
