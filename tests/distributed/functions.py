"""The functions beside attention on one rank of a group: plan, its logarithm, band, matches and certificate of random
problems, against one device. Which function, and whether scores are given in place of tokens, the seed says."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import conformance
import problems
import torch
import torch.distributed as dist
from torch import Tensor

from torch_sinkhorn_attn import certify, sinkhorn_matches, sinkhorn_plan, sinkhorn_plan_band
from torch_sinkhorn_attn.matches import Matches

FUNCTIONS = ("plan", "log", "band", "matches", "certify")
K = 2  # partners
OF_RATE = 1e-6  # the power iteration stops at such a relative change, and rounding may decide when


def function_of(call: problems.Call) -> str:
    kind = FUNCTIONS[call.seed % len(FUNCTIONS)]
    window = call.options.get("window")
    return "plan" if kind == "band" and (window is None or min(window) < 0) else kind


def of_scores(call: problems.Call) -> problems.Call:
    """The call with the products of its tokens as scores."""
    key = call.key.repeat_interleave(call.query.shape[-3] // call.key.shape[-3], -3)
    scores = (call.query @ key.mT).detach().requires_grad_()
    leaves = [scores, *(x for x in call.leaves if x is not call.query and x is not call.key)]
    return replace(call, query=scores, key=None, leaves=leaves)  # type: ignore[arg-type]


def _numbers(kind: str, call: problems.Call, tokens: list[Any], options: dict[str, Any], group: Any) -> Any:
    """What the function finds, of whole tokens or of a rank's."""
    query, key, value, mask = tokens
    given = {**options, "sequence_group": group}
    if kind in ("plan", "log"):
        return sinkhorn_plan(query, key, mask, log=kind == "log", **given)
    if kind == "band":
        return sinkhorn_plan_band(query, key, mask, **given)
    if kind == "matches":
        return sinkhorn_matches(query, key, mask, k=K + 1, **given)  # one more, to see ties
    quick = call.seed // len(FUNCTIONS) % 2 == 1
    extra: dict[str, Any] = {"mode": "quick"} if quick else {"exact_diameter": call.seed % 4 == 0}
    if call.seed % 3 == 0 and not quick:
        extra["value"] = value.detach()
    return certify(query, key, mask, advise=call.seed % 2 == 0, **extra, **given)


_OF_PARTNERS = ("row_index", "row_plan", "col_index", "col_plan")
_INDICES = ("row_index", "col_index", "row_match", "col_match", "probability")


def _tied(found: Matches, group: Any) -> bool:
    """Whether two of the largest entries of some line, here or on another rank, are equal but for rounding."""
    tied = torch.zeros((), dtype=torch.int32)
    for plan in (found.row_plan, found.col_plan):
        more, less = plan[..., :-1], plan[..., 1:]
        tied += bool(((more - less <= 1e-9 * more) & (less > 0)).any())
    if group is not None:
        dist.all_reduce(tied, dist.ReduceOp.MAX, group)
    return bool(tied)


def results(
    call: problems.Call, tokens: list[Any], options: dict[str, Any], group: Any, share: float, rows: tuple[int, int]
) -> dict[str, Any]:
    """Found things by name; `share`: of the loss on what all ranks have alike, `rows`: the rank's."""
    kind = function_of(call)
    options = {name: x for name, x in options.items() if name != "dropout_p"}
    found = _numbers(kind, call, tokens, options, group)
    if kind == "matches":
        first = {name: x[..., :K] for name, x in found._asdict().items() if name in _OF_PARTNERS}
        others = {name: x for name, x in found._asdict().items() if x is not None and name not in _OF_PARTNERS}
        decided_by_rounding = _INDICES if _tied(found, group) else ()
        return {name: x for name, x in (first | others).items() if name not in decided_by_rounding}
    if kind == "certify":
        numbers = {name: x for name, x in vars(found).items() if isinstance(x, Tensor)}
        if "query_segment_ids" in options:  # of a segment with one key rounding alone decides the rate
            return {name: x for name, x in numbers.items() if name != "rate"} | {"words": found.mode}
        return numbers | {"words": (found.reasons, found.advice, found.mode)}
    length, bins = call.query.shape[-2], int(options.get("dustbin") is not None)
    size = call.query.shape[-1] if call.key is None else call.key.shape[-2]
    loss: Tensor
    if kind == "band":
        named = {name: x for name, x in found._asdict().items() if x is not None}
        whole = found.values.new_zeros(*found.values.shape[:-2], length, found.values.shape[-1])
        loss = (found.values * conformance.weights(whole)[..., slice(*rows), :]).sum()
        if bins:
            loss = loss + (found.row_dustbin**2).sum() + (found.col_dustbin**3).sum()
    else:
        named = {"rows": found[..., : found.shape[-2] - bins, :], "bins": found[..., found.shape[-2] - bins :, :]}
        weights = conformance.weights(found.new_zeros(*found.shape[:-2], length + bins, size + bins))
        finite = found.masked_fill(found == -torch.inf, 0.0)
        loss = (finite[..., : finite.shape[-2] - bins, :] * weights[..., slice(*rows), :]).sum()
        loss = loss + share * (finite[..., finite.shape[-2] - bins :, :] * weights[..., length:, :]).sum()
    conformance._add_gradients(named, "", loss, call)
    return {name: x.detach() for name, x in named.items()}


def joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The whole call's."""
    found: dict[str, Any] = {}
    for name in parts[0]:
        every = [x[name] for x in parts]
        if "gradient" in name:
            found[name] = torch.stack(every).sum(0)
        elif name in ("rows", "values"):
            found[name] = torch.cat(every, -2)
        elif name in ("first_column", "row_dustbin", "col_dustbin", "row_match", "col_match", "probability"):
            found[name] = torch.cat(every, -1)
        elif name in ("row_index", "row_plan", "col_index", "col_plan"):
            found[name] = torch.cat(every, -2)
        else:  # alike on every rank
            same = [
                x == every[0] if not isinstance(x, Tensor) else torch.equal(*map(_bits, (x, every[0]))) for x in every
            ]
            assert all(same), name
            found[name] = every[0]
    return found


def _bits(x: Tensor) -> Tensor:
    return x.nan_to_num(-123.0) if x.is_floating_point() else x


def difference(name: str, x: Any, y: Any) -> float:
    if not isinstance(y, Tensor):
        return 0.0 if _alike(repr(x), repr(y)) else 1.0
    if x.shape != y.shape or x.dtype != y.dtype:
        return torch.inf
    if not y.is_floating_point():
        return 0.0 if torch.equal(x, y) else 1.0
    if not torch.equal(x.isfinite(), y.isfinite()) or not torch.equal(_sign(x), _sign(y)):
        return torch.inf
    x, y = (z.masked_fill(~z.isfinite(), 0.0) for z in (x, y))
    if name == "rate":
        return conformance.relative_error(x, y, floor=1e-3) * 1e-10 / OF_RATE
    return conformance.relative_error(x, y, floor=1.0 if "residual" in name else 1e-3)


_NUMBER = re.compile(r"\d+\.\d+")


def _alike(x: str, y: str) -> bool:
    """The same words; fractions among them but for the last of the digits that are shown, which rounding may decide.

    >>> _alike("contraction=0.1199", "contraction=0.12"), _alike("contraction=0.13", "contraction=0.12")
    (True, False)
    """
    pairs = zip(_NUMBER.findall(x), _NUMBER.findall(y), strict=False)
    return _NUMBER.sub("", x) == _NUMBER.sub("", y) and all(
        abs(float(a) - float(b)) <= 2e-3 * abs(float(b)) for a, b in pairs
    )


def _sign(x: Tensor) -> Tensor:
    return torch.where(x.isfinite(), 0.0, x.nan_to_num(2.0, 1.0, -1.0))


def gather(mine: Any, group: Any) -> list[Any]:
    every: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, mine, group=group)
    return every
