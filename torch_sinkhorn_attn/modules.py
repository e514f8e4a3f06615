"""SinkhornMultiheadAttention: nn.MultiheadAttention with the softmax replaced by a transport plan."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_sinkhorn_attn.argument_checks import solver, window_sides
from torch_sinkhorn_attn.checks import can_look
from torch_sinkhorn_attn.dustbin import Dustbin
from torch_sinkhorn_attn.functional import sinkhorn_attention, sinkhorn_plan
from torch_sinkhorn_attn.reference import kept
from torch_sinkhorn_attn.support import build_support


class SinkhornMultiheadAttention(nn.MultiheadAttention):
    r"""Multi-head optimal-transport attention, called and parametrised as `torch.nn.MultiheadAttention`.

    The weights of head h are P/a, P the transport plan of `sinkhorn_attention`: rows are averages as with softmax, and
    columns are balanced as well, so that no key is ignored and none takes it all.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype: as
            `torch.nn.MultiheadAttention`. The keys added by `add_bias_kv` and `add_zero_attn` are ordinary keys with
            their share of the mass, visible to every query.
        epsilon, window, base_iters, tail_iters, relaxation, gradient, engine: as `sinkhorn_attention`.
        dustbin: give every head a learnable dustbin: parameters `dustbin_row_score` and `dustbin_col_score`,
            `[num_heads, 1]`, zeros at first.

    Masks have the module's polarity: in a bool mask True means *ignore*. In self-attention (`query is key`) a padded
    key is also an inactive query: it gives no mass and its output is `out_proj.bias`. In softmax mode
    (`base_iters=0, tail_iters=0`) rows stay active, as in `torch.nn.MultiheadAttention`.

    Raises:
        ValueError: for options that contradict each other; see `sinkhorn_attention` for the rest.

    >>> import torch
    >>> attention = SinkhornMultiheadAttention(16, 4, batch_first=True)
    >>> x = torch.randn(2, 6, 16)
    >>> padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    >>> output, weights = attention(x, x, x, key_padding_mask=padding)
    >>> output.shape, weights.shape
    (torch.Size([2, 6, 16]), torch.Size([2, 6, 6]))
    >>> weights[1].sum(-1).round(decimals=4).tolist()  # padded queries carry no mass
    [1.0, 1.0, 1.0, 1.0, 0.0, 0.0]
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        epsilon: float = 1.0,
        window: tuple[int, int] | None = None,
        base_iters: int = 20,
        tail_iters: int = 2,
        dustbin: bool = False,
        relaxation: float | tuple[float | None, float | None] | None = None,
        gradient: str = "tail",
        engine: str | None = None,
    ) -> None:
        if embed_dim <= 0 or num_heads <= 0 or embed_dim % num_heads:
            raise ValueError(f"embed_dim={embed_dim} must be a positive multiple of num_heads={num_heads}.")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout} must lie in [0, 1).")
        if not isinstance(dustbin, bool):
            raise TypeError(f"dustbin must be True or False, got {dustbin!r}: the module learns its own scores.")
        super().__init__(
            embed_dim, num_heads, dropout=dropout, bias=bias, add_bias_kv=add_bias_kv, add_zero_attn=add_zero_attn,
            kdim=kdim, vdim=vdim, batch_first=batch_first, device=device, dtype=dtype,
        )  # fmt: skip
        solver(
            self.head_dim, torch.float32, None, epsilon, window, relaxation, base_iters, tail_iters, gradient, engine
        )  # refuses what cannot work now rather than at the first call
        self.epsilon, self.window, self.relaxation = epsilon, window, relaxation
        self.base_iters, self.tail_iters = base_iters, tail_iters
        self.gradient, self.engine = gradient, engine
        if window is not None and not self.softmax_mode and (add_bias_kv or add_zero_attn):
            raise ValueError(
                f"window={window} cannot be combined with add_bias_kv or add_zero_attn: the extra keys have no place "
                "on the diagonal. Drop one of them."
            )
        for name in ("dustbin_row_score", "dustbin_col_score"):
            score = nn.Parameter(torch.zeros(num_heads, 1, device=device, dtype=dtype)) if dustbin else None
            self.register_parameter(name, score)

    # nn.TransformerEncoderLayer's fused softmax path asks for this name and stays closed while it reads False. Only
    # nn.MultiheadAttention's constructor sees the value it wrote, to decide which projections to make.
    @property
    def _qkv_same_embed_dim(self) -> bool:
        return self.__dict__.get("_packed_in_construction", False)

    @_qkv_same_embed_dim.setter
    def _qkv_same_embed_dim(self, value: bool) -> None:
        self.__dict__["_packed_in_construction"] = value

    def _reset_parameters(self) -> None:
        """Draw all parameters again, as the constructor does: after `to_empty`, say."""
        self._qkv_same_embed_dim = self.in_proj_weight is not None
        super()._reset_parameters()
        self.__dict__.pop("_packed_in_construction")
        for score in (getattr(self, "dustbin_row_score", None), getattr(self, "dustbin_col_score", None)):
            if score is not None:
                nn.init.zeros_(score)

    @property
    def softmax_mode(self) -> bool:
        """T = R = 0, balanced, no dustbin: softmax attention."""
        no_dustbin = getattr(self, "dustbin_row_score", None) is None
        return self.base_iters == self.tail_iters == 0 and self.relaxation is None and no_dustbin

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        query_padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; arguments and results as `torch.nn.MultiheadAttention.forward`.

        Args:
            query: `(L, E)`, `(L, N, E)`, or `(N, L, E)` with `batch_first`; key and value likewise with S tokens.
            key_padding_mask: `(N, S)` or `(S)`; bool, True = ignore, or float added to the scores, -inf = ignore.
                Padded keys leave the problem: positions, counts and masses are those of the others.
            need_weights: also return the weights (this materialises L x S).
            attn_mask: `(L, S)` or `(N * num_heads, L, S)`; bool, True = ignore, or float added to the scores.
            average_attn_weights: average the weights over heads.
            is_causal: hint that `attn_mask` is causal. A causal plan exists only with a dustbin or relaxation.
            query_padding_mask: `(N, L)` or `(L)` bool, True = inactive query. Default: the key padding in
                self-attention outside softmax mode, else none. Pass it under reentrant activation checkpointing, where
                `query is key` is lost on recomputation.

        Returns:
            The output, shaped as the query with `embed_dim` features, and the weights `(N, L, S)`, `(N, H, L, S)`
            unaveraged, or None. Weights leave the dustbin out: rows then sum below 1.

        Raises:
            TypeError, ValueError: for inputs or masks of the wrong type, shape or value.
        """
        same = query is key
        batch_first = self.batch_first
        unbatched = self._check_inputs(query, key, value)
        if is_causal and attn_mask is None:
            raise ValueError("is_causal=True is a hint about attn_mask: pass attn_mask too.")
        if is_causal and not self.softmax_mode and self.relaxation is None and self.dustbin_row_score is None:
            raise ValueError(
                "is_causal=True: the only balanced causal plan is the identity (each query can only take its own key). "
                "Give the module dustbin=True or relaxation=tau, or use base_iters=0, tail_iters=0 (softmax)."
            )
        q, k, v = self._project(query, key, value)
        if unbatched:
            q, k, v = q[None], k[None], v[None]
        elif not batch_first:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        masks = self._masks(q, k, key_padding_mask, attn_mask, query_padding_mask, same)
        k, v, masks = self._extra_keys(k, v, masks, q.shape[1])
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        output, weights = self._attend(q, k, v, masks, need_weights)
        output = output.transpose(1, 2).flatten(-2)
        output = F.linear(output, self.out_proj.weight, self.out_proj.bias)
        if unbatched:
            output = output[0]
        elif not batch_first:
            output = output.transpose(0, 1)
        if weights is None:
            return output, None
        weights = weights.mean(1) if average_attn_weights else weights
        return output, weights[0] if unbatched else weights

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, masks: _Masks, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Per-head attention: output `[N, H, L, D]` and weights `[N, H, L, S]` or None."""
        dustbin = None
        row_score, col_score = self.dustbin_row_score, self.dustbin_col_score
        if isinstance(row_score, Tensor) and isinstance(col_score, Tensor):
            dustbin = Dustbin(row_score, col_score)
        extra_keys = self.bias_k is not None or self.add_zero_attn  # then the window is part of the mask
        options: dict[str, Any] = {
            "epsilon": self.epsilon, "window": None if extra_keys else self.window,
            "base_iters": self.base_iters, "tail_iters": self.tail_iters,
            "relaxation": self.relaxation, "gradient": self.gradient, "engine": self.engine, "dustbin": dustbin,
            "query_segment_ids": masks.query_ids, "key_segment_ids": masks.key_ids,
        }  # fmt: skip
        dropout = self.dropout if self.training else 0.0
        if not need_weights:
            output = sinkhorn_attention(q, k, v, masks.scores, dropout_p=dropout, **options)
            assert isinstance(output, Tensor)
            return output, None
        plan = sinkhorn_plan(q, k, masks.scores, **options)
        weights = F.dropout(plan[..., : q.shape[-2], : k.shape[-2]], dropout)  # masses are 1, so P/a = P
        return weights @ v.to(weights.dtype), weights

    def _check_inputs(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Shapes; returns whether the inputs are unbatched."""
        widths = {"query": self.embed_dim, "key": self.kdim, "value": self.vdim}
        for (name, width), x in zip(widths.items(), (query, key, value), strict=True):
            if not isinstance(x, Tensor) or x.is_nested:
                raise TypeError(
                    f"{name} must be a dense tensor. Pad nested tensors and pass key_padding_mask; "
                    "nn.TransformerEncoder makes them unless built with enable_nested_tensor=False."
                )
            if x.ndim not in (2, 3) or x.ndim != query.ndim:
                raise ValueError(
                    f"{name} has shape {tuple(x.shape)}; query, key and value must all be 2-D (unbatched) or 3-D."
                )
            if x.shape[-1] != width:
                raise ValueError(f"{name} has {x.shape[-1]} features; the module was built for {width}.")
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(
                f"key {tuple(key.shape)} and value {tuple(value.shape)} must agree but for their features."
            )
        batch = 0 if self.batch_first else 1
        if query.ndim == 3 and query.shape[batch] != key.shape[batch]:
            raise ValueError(f"query has batch size {query.shape[batch]} but key has {key.shape[batch]}.")
        return query.ndim == 2

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        packed = self.in_proj_weight
        if packed is not None and query is key and key is value:
            q, k, v = F.linear(query, packed, self.in_proj_bias).chunk(3, -1)
            return q, k, v
        weights = (
            packed.chunk(3) if packed is not None else (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        )
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
        return q, k, v

    def _masks(
        self,
        q: Tensor,
        k: Tensor,
        key_padding: Tensor | None,
        attn_mask: Tensor | None,
        query_padding: Tensor | None,
        same: bool,
    ) -> _Masks:
        """The module's masks in the functional's polarity, `[N, ...]`, with padding turned into inactive ids."""
        num, length, size = q.shape[0], q.shape[1], k.shape[1]
        scores = self._score_mask(attn_mask, num, length, size)
        key_off, added = _padding("key_padding_mask", key_padding, num, size)
        query_off, query_added = _padding("query_padding_mask", query_padding, num, length)
        if query_added is not None or (query_padding is not None and query_padding.dtype != torch.bool):
            raise TypeError("query_padding_mask must be a bool tensor, True = inactive.")
        if query_off is None and same and not self.softmax_mode:
            query_off = key_off
        if added is not None:
            scores = added[:, None, None, :] + (0.0 if scores is None else _as_float(scores, added.dtype))
        if key_off is None and query_off is None:
            return _Masks(None, None, scores)
        key_ids, query_ids = (
            torch.zeros(num, n, dtype=torch.int64, device=q.device) if off is None else -off.to(torch.int64)
            for off, n in ((key_off, size), (query_off, length))
        )
        return _Masks(query_ids, key_ids, scores)

    def _score_mask(self, mask: Tensor | None, num: int, length: int, size: int) -> Tensor | None:
        if mask is None:
            return None
        if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or mask.is_floating_point()):
            kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"attn_mask must be a bool (True = ignore) or float tensor, got {kind}.")
        shapes = [(length, size), (num * self.num_heads, length, size)]
        if tuple(mask.shape) not in shapes:
            raise ValueError(f"attn_mask has shape {tuple(mask.shape)}; {shapes[0]} or {shapes[1]} is needed.")
        mask = mask if mask.ndim == 2 else mask.view(num, self.num_heads, length, size)
        return ~mask if mask.dtype == torch.bool else mask

    def _window_mask(self, masks: _Masks, length: int, size: int, device: torch.device) -> Tensor:
        """The window as a bool mask `[N, 1, L, S]` or `[1, 1, L, S]`, for softmax mode with extra keys, which it must
        not hide."""
        ids = [torch.zeros(1, n, dtype=torch.int64, device=device) for n in (length, size)]
        if masks.query_ids is not None and masks.key_ids is not None:
            ids = [masks.query_ids, masks.key_ids]
        support = build_support(ids[0], ids[1], window_sides(self.window), packed=True)
        column = torch.arange(size, device=device)
        lo, hi = support.row_lo[:, None, :, None], support.row_hi[:, None, :, None]
        return (column >= lo) & (column < hi)

    def _extra_keys(self, k: Tensor, v: Tensor, masks: _Masks, length: int) -> tuple[Tensor, Tensor, _Masks]:
        """Append the learned key of add_bias_kv and the zero key of add_zero_attn, visible to every query."""
        extra = []
        if self.bias_k is not None and self.bias_v is not None:
            extra.append((self.bias_k, self.bias_v))
        if self.add_zero_attn:
            extra.append((k.new_zeros(1, 1, k.shape[-1]), v.new_zeros(1, 1, v.shape[-1])))
        if not extra:
            return k, v, masks
        if self.window is not None:
            band = self._window_mask(masks, length, k.shape[1], k.device)
            masks = masks._replace(scores=band if masks.scores is None else _both(band, masks.scores))
        num, count = k.shape[0], len(extra)
        k = torch.cat([k, *(x.to(k.dtype).expand(num, 1, -1) for x, _ in extra)], 1)
        v = torch.cat([v, *(x.to(v.dtype).expand(num, 1, -1) for _, x in extra)], 1)
        ids = None if masks.key_ids is None else F.pad(masks.key_ids, (0, count))
        scores = masks.scores
        if scores is not None:
            scores = F.pad(scores, (0, count), value=True if scores.dtype == torch.bool else 0.0)
        return k, v, _Masks(masks.query_ids, ids, scores)


class _Masks(NamedTuple):
    query_ids: Tensor | None  # [N, L], 0 active, -1 inactive
    key_ids: Tensor | None  # [N, S]
    scores: Tensor | None  # bool True = keep, or float; broadcasts to [N, H, L, S]


def _padding(name: str, mask: Any, num: int, length: int) -> tuple[Tensor | None, Tensor | None]:
    """(inactive `[N, n]` bool, what to add to the scores `[N, n]` or None) of a padding mask."""
    if mask is None:
        return None, None
    if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or mask.is_floating_point()):
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name} must be a bool (True = ignore) or float tensor, got {kind}.")
    if tuple(mask.shape) not in ((num, length), *([(length,)] if num == 1 else [])):
        raise ValueError(f"{name} has shape {tuple(mask.shape)}; {(num, length)} is needed.")
    mask = mask.view(num, length)
    if mask.dtype == torch.bool:
        return mask, None
    off = ~kept(mask, mask.dtype) & ~mask.isnan()
    added = mask.masked_fill(off, 0.0)
    if can_look(mask) and not added.any():  # nothing but -inf, what nn.TransformerEncoderLayer makes of a bool mask
        return off, None
    return off, added


def _both(keep: Tensor, mask: Tensor) -> Tensor:
    """A mask that keeps what a bool mask and another mask keep."""
    return keep & mask if mask.dtype == torch.bool else mask + _as_float(keep, mask.dtype)


def _as_float(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask to add to another of `dtype`: what it forbids becomes -inf, which no promotion of dtypes revives."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -torch.inf)
    return mask.masked_fill(~kept(mask, mask.dtype) & ~mask.isnan(), -torch.inf)
