"""What the public functions call where the sequence is sharded: DTensors are opened, the shards prepared, and what is
found given back as the functions give it on one device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_sinkhorn_attn import matches
from torch_sinkhorn_attn.bands import PlanBand
from torch_sinkhorn_attn.compat.releases import takes_unknown_sizes
from torch_sinkhorn_attn.distributed import attention, compiled, partners, plans
from torch_sinkhorn_attn.distributed.dtensors import Sharding, local, sharding_of, wrapped
from torch_sinkhorn_attn.distributed.preparation import Call, Sharded, prepare_shard
from torch_sinkhorn_attn.distributed.wire import Wire
from torch_sinkhorn_attn.matches import Matches
from torch_sinkhorn_attn.problem.arguments import Keywords
from torch_sinkhorn_attn.problem.problem import without_autocast
from torch_sinkhorn_attn.problem.status import SinkhornAux


def opened(
    function: str, group: Any, query: Any, key: Any, value: Any, mask: Any, keywords: Keywords
) -> tuple[Call, Sharding | None]:
    """A call of local tensors, and how DTensors lay on their mesh."""
    sharding = sharding_of(query, group)
    if sharding is not None:
        query, key, value = (local(name, x, sharding) for name, x in (("query", query), ("key", key), ("value", value)))
    return Call(function, query, key, value, mask, keywords), sharding


def sharded_attention(
    group: Any, query: Tensor, key: Tensor | None, value: Tensor, mask: Tensor | None, keywords: Keywords, aux: bool
) -> Tensor | tuple[Tensor, SinkhornAux]:
    """`sinkhorn_attention` of this rank's shards; residuals and status are those of the whole problem."""
    if torch.compiler.is_compiling():
        hidden = keywords.get("dustbin") is not None and keywords.get("query_segment_ids") is not None
        if hidden and not takes_unknown_sizes():
            return _attention(group, query, key, value, mask, keywords, aux)
    call, sharding = opened(f"sinkhorn_attention(return_aux={aux})", group, query, key, value, mask, keywords)
    if torch.compiler.is_compiling():
        found = compiled.attention(group, call, aux)
    else:
        found = attention.attention(prepare_shard(Wire(group), call), aux)
    if sharding is None:
        return found
    if isinstance(found, Tensor):
        return wrapped(found, sharding)
    return wrapped(found[0], sharding), found[1]


def sharded_plan(
    group: Any, query: Tensor, key: Tensor | None, mask: Tensor | None, keywords: Keywords, log: bool
) -> Tensor:
    """`sinkhorn_plan`: the rows here of all columns; with a dustbin its row, alike on all ranks, last."""
    if torch.compiler.is_compiling() and not takes_unknown_sizes():
        return _plan(group, query, key, mask, keywords, log)
    call, sharding = opened(f"sinkhorn_plan(log={log})", group, query, key, None, mask, keywords)
    if sharding is not None and keywords.get("dustbin") is not None:
        raise ValueError(
            "query is a DTensor and the plan has a dustbin: its row lies behind the rows of every rank, so the plan is "
            "no DTensor. Pass the local tensors with sequence_group."
        )
    if torch.compiler.is_compiling():
        found = compiled.plan(group, call, log)
    else:
        found, _ = plans.returned_plan(_prepared(group, call, log), log)
    return found if sharding is None else wrapped(found, sharding)


def sharded_band(
    group: Any, query: Tensor, key: Tensor | None, mask: Tensor | None, keywords: Keywords, log: bool
) -> PlanBand:
    """`sinkhorn_plan_band`: the rows here, `first_column` counted in all columns, `col_dustbin` of the keys here."""
    if torch.compiler.is_compiling() and not takes_unknown_sizes():
        return _band(group, query, key, mask, keywords, log)
    call, _ = opened(f"sinkhorn_plan_band(log={log})", group, query, key, None, mask, keywords)
    if torch.compiler.is_compiling():
        return compiled.band(group, call, log)
    return plans.returned_band(prepare_shard(Wire(group), call), log, keywords.get("window"))[0]


# Where a program breaks, because it was not told to take results whose sizes it does not know

_attention = torch.compiler.disable(sharded_attention)
_plan = torch.compiler.disable(sharded_plan)
_band = torch.compiler.disable(sharded_band)


def _prepared(group: Any, call: Call, log: bool) -> Sharded:
    with without_autocast(call.query if log else None):
        return prepare_shard(Wire(group), call)


@torch.compiler.disable
def sharded_matches(
    group: Any, query: Tensor, key: Tensor | None, mask: Tensor | None, keywords: Keywords, k: int
) -> Matches:
    """`sinkhorn_matches`: of the queries and of the keys here, in indices of the whole sequence."""
    call, _ = opened(f"sinkhorn_matches(k={k})", group, query, key, None, mask, keywords)
    sharded = prepare_shard(Wire(group), call)
    share = sharded.share
    found = partners.found_partners(sharded, k)
    whole = matches.mutual(*partners.best_of_all(share, found))
    here = share.local_of(whole[0]), share.owned_of(whole[1])
    return matches.of_partners(share.owned_only(sharded.prepared), found, *here)
