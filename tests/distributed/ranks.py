"""One rank of a group: random problems of `problems.make`, their sequence in ragged blocks, against one device.

Every rank makes the whole problem and takes its shards out of the whole leaves, so that the leaves' gradients, summed
over ranks, are those of the whole call. Rank seed % size compares.
"""

from __future__ import annotations

import os
from dataclasses import fields, replace
from datetime import timedelta
from itertools import pairwise
from typing import Any

import conformance
import functions
import problems
import torch
import torch.distributed as dist
from torch import Tensor

from torch_sinkhorn_attn import Dustbin, sinkhorn_attention
from torch_sinkhorn_attn.distributed.columns import blocks

TOLERANCE = 1e-10
OF_ROWS = ("query_segment_ids", "window_centers", "row_mass")
OF_COLS = ("key_segment_ids", "col_mass")


def start(rank: int, size: int, store: str, seconds: float = 20) -> None:
    """Join the group."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    timeout = timedelta(seconds=seconds)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timeout)


def split(total: int, parts: int, seed: int) -> list[int]:
    """Ragged blocks, some empty; even ones for every third seed.

    >>> sum(split(16, 3, 1))
    16
    """
    if seed % 3 == 0:
        return [total * (r + 1) // parts - total * r // parts for r in range(parts)]
    g = torch.Generator().manual_seed(seed)
    ends = [0, *torch.randint(0, total + 1, (parts - 1,), generator=g).sort().values.tolist(), total]
    return [b - a for a, b in pairwise(ends)]


def _cut(x: Any, total: int, at: tuple[int, int], dim: int = -1) -> Any:
    """The lines `at` of a tensor that has all of them along `dim`; anything else as it is."""
    if not isinstance(x, Tensor) or x.ndim < -dim or x.shape[dim] != total:
        return x
    return x.narrow(dim, at[0], at[1] - at[0])


def shard(call: problems.Call, rows: tuple[int, int], cols: tuple[int, int]) -> tuple[list[Any], dict[str, Any]]:
    """Query, key, value and mask of a rank, and its options."""
    length, size = sizes(call)
    options = dict(call.options)
    for names, total, at in ((OF_ROWS, length, rows), (OF_COLS, size, cols)):
        options |= {name: _cut(options[name], total, at) for name in names if name in options}
    if "initial_potentials" in options:
        pair = zip(options["initial_potentials"], (length, size), (rows, cols), strict=True)
        options["initial_potentials"] = tuple(torch.cat([x[..., slice(*at)], x[..., n:]], -1) for x, n, at in pair)
    if options.get("dustbin") is not None:
        bins = {x.name: getattr(options["dustbin"], x.name) for x in fields(Dustbin)}
        for side, total, at in (("row", length, rows), ("col", size, cols)):
            bins |= {f"{side}_{x}": _cut(bins[f"{side}_{x}"], total, at) for x in ("score", "capacity")}
        options["dustbin"] = Dustbin(bins.pop("row_score"), bins.pop("col_score"), bins.pop("corner_score"), **bins)
    tokens = [
        _cut(x, n, at, -2)
        for x, n, at in ((call.query, length, rows), (call.key, size, cols), (call.value, size, cols))
    ]
    return [*tokens, _cut(call.mask, length, rows, -2)], options


def sizes(call: problems.Call) -> tuple[int, int]:
    """All queries and keys."""
    return call.query.shape[-2], call.value.shape[-2]


def results(call: problems.Call, group: Any, counts: tuple[list[int], list[int]]) -> dict[str, Tensor]:
    """As `conformance.results`, of the parts of this rank; gradients are of its part of the loss."""
    rank = dist.get_rank(group)
    rows, cols = (blocks(x)[rank] for x in counts)
    arguments, options = shard(call, rows, cols)
    torch.manual_seed(call.seed)
    output, aux = sinkhorn_attention(*arguments, return_aux=True, sequence_group=group, **options)
    found = {"output": output} | {k: v for k, v in aux._asdict().items() if v is not None}

    whole = output.new_zeros(*call.query.shape[:-1], call.value.shape[-1])
    loss = (output * conformance.weights(whole)[..., slice(*rows), :]).sum()
    if aux.row_dustbin is not None:
        weights = conformance.weights(call.query[..., 0].detach())
        loss = loss + (aux.row_dustbin * weights[..., slice(*rows)]).sum() + (aux.col_dustbin**2).sum()
    conformance._add_gradients(found, "", loss, call)
    return {name: x.detach() for name, x in found.items()}


def joined(parts: list[dict[str, Tensor]], bins: bool) -> dict[str, Tensor]:
    """The whole call's results."""
    found: dict[str, Tensor] = {}
    for name in parts[0]:
        every = [x[name] for x in parts]
        if "gradient" in name:
            found[name] = torch.stack(every).sum(0)
        elif "residual" in name:
            assert all(torch.equal(x, every[0]) for x in every), name
            found[name] = every[0]
        elif "potential" in name and bins:
            found[name] = every
        else:
            found[name] = torch.cat(every, -2 if name == "output" else -1)
    return found


def disagreement(call: problems.Call, group: Any, compare: bool) -> str | None:
    """What differs between the group and one device; "refused" where both refuse."""
    parts = dist.get_world_size(group)
    length, size = sizes(call)
    counts = split(length, parts, call.seed), split(size, parts, call.seed + 1)
    try:
        mine: Any = results(call, group, counts)
    except ValueError as error:
        mine = str(error)
    every = functions.gather(mine, group)
    if not compare:
        return None
    try:
        options = {name: x for name, x in call.options.items() if name != "engine"}
        expected = conformance.results(replace(call, options=options), "tiled", plan=False)
    except ValueError as error:
        return "refused" if all(isinstance(x, str) for x in every) or _unseen(call, error) else f"one refuses: {error}"
    if any(isinstance(x, str) for x in every):
        return f"refused: {every}"
    dustbins = call.options.get("dustbin") is not None
    found = joined(every, dustbins)
    for name, y in expected.items():
        x = found[name]
        if isinstance(x, list):
            total = length if name.startswith("row") else size
            own = counts[0] if name.startswith("row") else counts[1]
            x = torch.cat([*(z[..., :n] for z, n in zip(x, own, strict=True)), x[0][..., own[0] :]], -1)
            assert x.shape[-1] > total
        if x.shape != y.shape or x.dtype != y.dtype:
            return f"{name}: {x.dtype} {tuple(x.shape)}, not {y.dtype} {tuple(y.shape)}"
        error = conformance.relative_error(x, y, floor=1.0 if "residual" in name else 1e-3)
        if not error < TOLERANCE:
            return f"{name}: {error:.1e}"
    return None


def disagreement_of_functions(call: problems.Call, group: Any, compare: bool) -> str | None:
    """Likewise, of the function that the seed says."""
    parts, rank = dist.get_world_size(group), dist.get_rank(group)
    length, size = sizes(call)
    counts = split(length, parts, call.seed), split(size, parts, call.seed + 1)
    if call.key is None and not _told(call, size):
        counts = counts[0], [size // parts + (r < size % parts) for r in range(parts)]
    rows, cols = (blocks(x)[rank] for x in counts)
    share = (rank + 1) / (parts * (parts + 1) / 2)
    arguments, options = shard(call, rows, cols)
    try:
        mine: Any = functions.results(call, arguments, options, group, share, rows)
    except ValueError as error:
        mine = str(error)
    every = functions.gather(mine, group)
    if not compare:
        return None
    whole = [call.query, call.key, call.value, call.mask]
    try:
        expected = functions.results(call, whole, call.options | {"engine": "tiled"}, None, 1.0, (0, length))
    except ValueError as error:
        return "refused" if all(isinstance(x, str) for x in every) or _unseen(call, error) else f"one refuses: {error}"
    if any(isinstance(x, str) for x in every):
        return f"refused: {every}"
    found = functions.joined(every)
    for name, y in expected.items():
        error = functions.difference(name, found[name], y)
        if not error < TOLERANCE:
            return f"{functions.function_of(call)} {name}: {error:.1e}"
    return None


def _unseen(call: problems.Call, error: ValueError) -> bool:
    """Whether one device refuses for what a dense mask leaves, which no rank has whole."""
    dense = call.key is None or (call.mask is not None and 1 not in call.mask.shape[-2:])
    return dense and ("attn_mask" in str(error) or "scores" in str(error))


def _told(call: problems.Call, size: int) -> bool:
    """Whether something beside the value tells which keys are a rank's."""
    given = [call.options.get(name) for name in OF_COLS]
    given += [getattr(call.options.get("dustbin"), name, None) for name in ("col_score", "col_capacity")]
    return any(isinstance(x, Tensor) and x.ndim > 0 and x.shape[-1] == size for x in given)


def disagreements_of_kernels(rank: int, size: int, first: int, count: int) -> tuple[list[str], int]:
    """As below, of attention, plan and band of smaller problems without dropout, whose half-steps Triton's kernels
    make, interpreted."""
    wrong, refused = [], 0
    for seed in range(first, first + count):
        call = problems.make(seed, dropout=False, largest=7)
        call.options |= {"engine": "triton", "base_iters": min(call.options["base_iters"], 5)}
        checks = [disagreement, disagreement_of_functions][: 1 + (functions.function_of(call) in ("log", "band"))]
        for check in checks:
            found = check(call, dist.group.WORLD, compare=seed % size == rank)
            refused += found == "refused"
            if found not in (None, "refused"):
                wrong.append(f"{found} in {call}")
    return wrong, refused


def disagreements(rank: int, size: int, first: int, count: int) -> tuple[list[str], int]:
    """What differs in problems `first`, ...; and how many both refuse."""
    wrong, refused = [], 0
    for seed in range(first, first + count):
        call = problems.make(seed, largest=20)
        call.options["engine"] = ("tiled", "cpu")[seed % 3 > 0]
        if seed // 2 % 3 == 0:
            call = functions.of_scores(call)
        for check in (disagreement, disagreement_of_functions):
            found = check(call, dist.group.WORLD, compare=seed % size == rank)
            refused += found == "refused"
            if found not in (None, "refused"):
                wrong.append(f"{found} in {call}")
    return wrong, refused
