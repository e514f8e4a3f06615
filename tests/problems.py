"""Random attention problems over every option together, each made from one seed: the fuzz of the suite.

`make(seed)` prints nothing; a failing test shows the seed, and `python tests/problems.py SEED` shows the problem.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torch_sinkhorn_attn import Dustbin

DTYPE = torch.float64


@dataclass
class Call:
    """Arguments of one `sinkhorn_attention` call, and the tensors its gradients are taken for."""

    seed: int
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)
    leaves: list[Tensor] = field(default_factory=list)

    def __repr__(self) -> str:
        shapes = [None if x is None else tuple(x.shape) for x in (self.query, self.key, self.value)]
        return f"problems.make({self.seed}): shapes={shapes} mask={_brief(self.mask)} {_brief(self.options)}"


def _brief(x: Any) -> Any:
    """Tensors by dtype and shape, so that a problem prints on one line."""
    if isinstance(x, Tensor):
        return f"{str(x.dtype)[6:]}{list(x.shape)}"
    if isinstance(x, Dustbin):
        return f"Dustbin({', '.join(f'{k}={_brief(v)}' for k, v in vars(x).items())})"
    if isinstance(x, dict):
        return " ".join(f"{k}={_brief(v)}" for k, v in x.items())
    return tuple(map(_brief, x)) if isinstance(x, tuple) else x


def _choice(g: torch.Generator, items: list) -> Any:
    return items[int(torch.randint(len(items), (1,), generator=g))]


def _uniform(g: torch.Generator, *shape: int) -> Tensor:
    return 0.5 + torch.rand(shape, generator=g, dtype=DTYPE)


def make(
    seed: int, dtype: torch.dtype = DTYPE, dropout: bool = True, largest: int = 12, base_options: bool = True
) -> Call:
    """A feasible problem drawn from `seed`. Without `base_options` nothing stops early, which rounding may decide."""
    g = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=g))

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=DTYPE).to(dtype).requires_grad_()

    batch = _choice(g, [(), (2,), (3,), (2, 2)])
    groups = _choice(g, [1, 1, 2, 3])
    kv_heads = _choice(g, [1, 2])
    length, size = draw(1, largest), draw(1, largest)
    width, value_width = draw(1, 6), draw(1, 5)
    heads = kv_heads * groups
    call = Call(
        seed,
        randn(*batch, heads, length, width),
        randn(*batch, kv_heads, size, width),
        randn(*batch, kv_heads, size, value_width),
    )
    o = call.options
    o["enable_gqa"] = groups > 1
    o["base_iters"], o["tail_iters"] = _choice(g, [0, 1, 5, 20]), _choice(g, [0, 1, 2, 3])
    o["gradient"] = _choice(g, ["tail", "tail", "implicit", "unrolled"])
    o["epsilon"] = _choice(g, [1.0, 0.5, 2.0])
    if draw(0, 1):
        o["scale"] = 0.7
    relaxation = _choice(g, [None, None, None, 1.5, (2.0, None), (None, 0.7), (0.5, 3.0)])
    both_relaxed = isinstance(relaxation, float) or relaxation == (0.5, 3.0)
    o["relaxation"] = relaxation
    use_dustbin = draw(0, 2) == 0
    free = use_dustbin or both_relaxed
    kind = _choice(g, ["full", "lengths", "segments", "window", "window+lengths", "window+segments"])
    if "lengths" in kind:
        o["query_lengths"] = torch.randint(0, length + 1, batch, generator=g)
        o["key_lengths"] = torch.randint(0, size + 1, batch, generator=g)
    if "segments" in kind:
        o["query_segment_ids"] = _segments(g, (*batch, length))
        o["key_segment_ids"] = _segments(g, (*batch, size))
    if "window" in kind:
        if free:
            o["window"] = (draw(-1, 3), draw(-1, 3))
        else:
            wide = size + 1 if size != length else draw(1, 3)
            o["window"] = (wide, wide) if kind == "window" else (size + 1, size + 1)
    mask_kind = _choice(g, ["none", "none", "bool", "float", "padding", "float -inf"])
    if mask_kind != "none" and not (o.get("window") and not free and kind == "window" and o["window"][0] <= size):
        call.mask = _mask(g, mask_kind, batch, heads, length, size, randn)
    if draw(0, 2) == 0:
        _masses(g, o, batch, heads, length, size, free or relaxation is not None, use_dustbin, call.mask is not None)
    if use_dustbin:
        call.leaves += _dustbin(g, o, batch, heads, length, size, value_width, kind, randn)
    if dropout and draw(0, 3) == 0:
        o["dropout_p"] = 0.3
    packed_bins = min(length, size) if "segments" in kind else 1
    if draw(0, 3) == 0:
        bins = packed_bins if use_dustbin else 0
        o["initial_potentials"] = (
            randn(*batch, heads, length + bins).detach(),
            randn(*batch, heads, size + bins).detach(),
        )
    if base_options and o["gradient"] != "unrolled":
        o["tolerance"] = _choice(g, [None, None, None, None, 1e-1, 1e-2])
        o["over_relaxation"] = _choice(g, [1.0, 1.0, 1.0, 1.0, 1.3, 0.8])
        if o["over_relaxation"] == 1:
            o["acceleration"] = _choice(g, [None, None, "chebyshev"])
        if o.get("acceleration"):
            o["contraction"] = _choice(g, [None, None, 0.5, 0.95])
    # Centres anywhere, where rows and columns may lack a partner, or where the window reaches everything from anywhere;
    # beside a dustbin some pair must be left.
    some_pair = kind == "window" and call.mask is None
    if "window" in o and draw(0, 2) == 0 and (both_relaxed or (use_dustbin and some_pair) or min(o["window"]) > size):
        places = (size + 2) * torch.rand(*batch, length, generator=g, dtype=DTYPE).sort(-1).values - 1.5
        whole = places.round().long().clamp(0, size - 1)
        o["window_centers"] = whole if use_dustbin or draw(0, 1) else places
    call.leaves += [x for x in (call.query, call.key, call.value, call.mask) if x is not None and x.requires_grad]
    return call


def _segments(g: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    """Sorted ids 0..3, some tokens inactive in between."""
    ids = torch.randint(0, 4, shape, generator=g).sort(-1).values * 7
    return torch.where(torch.rand(shape, generator=g) < 0.15, -3, ids)


def _mask(g: torch.Generator, kind: str, batch, heads: int, length: int, size: int, randn) -> Tensor:
    shapes = [
        (*batch, heads, length, size),
        (length, size),
        (heads, 1, size),
        (*batch, 1, length, size),
        (1, length, 1),
    ]
    shape = _choice(g, shapes)
    if kind == "padding":
        return torch.rand(*batch, 1, 1, size, generator=g) < 0.8
    if kind == "bool":  # a mask of blocks stays feasible: whole lines are dropped
        rows, cols = torch.rand(length, 1, generator=g) < 0.8, torch.rand(1, size, generator=g) < 0.8
        return (rows & cols).expand(*shape[:-2], length, size) if len(shape) > 2 else rows & cols
    mask = randn(*shape)
    if kind == "float -inf":
        dead = torch.rand(size, generator=g) < 0.2
        if shape[-1] == size:
            mask = mask.detach().masked_fill(dead, -torch.inf).requires_grad_()
    return mask


def _masses(g, o, batch, heads: int, length: int, size: int, unequal: bool, dustbin: bool, masked: bool) -> None:
    """Both, one, or per-head masses; equal totals where balance asks for them and tokens may be inactive."""
    side = _choice(g, ["row", "col", "both"])
    row, col = _uniform(g, *batch, heads, length), _uniform(g, heads, size)
    plain = not masked and not any("segment" in k or "length" in k for k in o)
    if side == "both" and not (unequal and not dustbin) and not dustbin:
        if not plain:
            side = "row"
        col = col.expand(*batch, heads, size)
        col = col * (row.sum(-1, keepdim=True) / col.sum(-1, keepdim=True))
    if "window" in o and not unequal and min(o["window"]) < size:
        return
    if side in ("row", "both"):
        o["row_mass"] = row
    if side in ("col", "both"):
        o["col_mass"] = col


def _dustbin(g, o, batch, heads: int, length: int, size: int, width: int, kind: str, randn) -> list[Tensor]:
    per_head, per_token = (randn(heads, 1), randn(heads, 1)), (randn(*batch, heads, length), randn(size))
    row, col = _choice(g, [(randn(), randn()), per_head, per_token])
    value = _choice(g, [None, randn(width), randn(heads, width)])
    corner = _choice(g, [0.0, randn(), randn(heads)])
    capacities: dict[str, Any] = {}
    if "row_mass" not in o and "col_mass" not in o:
        capacities = _choice(g, [{}, {}, {"row_capacity": 40.0}, {"col_capacity": torch.full((heads, 1), 35.0)}])
    o["dustbin"] = Dustbin(row, col, corner, value=value, **capacities)
    return [x for x in (row, col, value, corner) if isinstance(x, Tensor)]


if __name__ == "__main__":
    print(make(int(sys.argv[1])))
