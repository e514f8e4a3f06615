"""SinkhornMultiheadAttention: nn.MultiheadAttention with the softmax replaced by a transport plan."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_sinkhorn_attn.bands import PlanBand, sinkhorn_plan_band
from torch_sinkhorn_attn.compat.nested import pad, unpad
from torch_sinkhorn_attn.compat.releases import same_memory
from torch_sinkhorn_attn.compat.tracing import call_module, tracer_of
from torch_sinkhorn_attn.distributed import context
from torch_sinkhorn_attn.dustbin import Dustbin
from torch_sinkhorn_attn.functional import sinkhorn_attention, sinkhorn_plan
from torch_sinkhorn_attn.options import OF_A_LAYER, Options, Relaxation, is_softmax
from torch_sinkhorn_attn.problem.argument_checks import options
from torch_sinkhorn_attn.problem.looking import can_look, has_data
from torch_sinkhorn_attn.problem.masks.module import Masks, convert, with_extra_keys
from torch_sinkhorn_attn.problem.tensor_kinds import check_kind

DUSTBIN_PARAMETERS = ("dustbin_row_score", "dustbin_col_score")
_SAVED = "_sinkhorn_options"  # in a pickled state: the options of the version that pickled it


class ModuleOptions(NamedTuple):
    """The options of `SinkhornMultiheadAttention` that `nn.MultiheadAttention` does not have, and their defaults."""

    epsilon: float = Options.epsilon
    window: tuple[int, int] | None = Options.window
    base_iters: int = Options.base_iters
    tail_iters: int = Options.tail_iters
    tolerance: float | None = Options.tolerance
    over_relaxation: float = Options.over_relaxation
    acceleration: str | None = Options.acceleration
    contraction: float | None = Options.contraction
    dustbin: bool = False
    relaxation: Relaxation = Options.relaxation
    gradient: str = Options.gradient
    mask_floor: float | None = Options.mask_floor
    engine: str | None = Options.engine

    def checked(self, module: nn.MultiheadAttention) -> ModuleOptions:
        """The options in their plainest form.

        Raises:
            TypeError, ValueError: for what cannot work on this module, now rather than at the first call.
        """
        if not isinstance(self.dustbin, bool):
            raise TypeError(f"dustbin must be True or False, got {self.dustbin!r}: the module learns its own scores.")
        if self.dustbin and not module.out_proj.weight.is_floating_point():
            raise TypeError(
                f"dustbin=True needs floating-point parameters, but out_proj is {module.out_proj.weight.dtype}."
            )
        if not 0 <= module.dropout < 1:
            raise ValueError(f"dropout={module.dropout} must lie in [0, 1).")
        chosen = options(self._asdict())
        chosen.solver(module.head_dim, "float32")
        softmax = is_softmax(chosen.base_iters, chosen.tail_iters, chosen.relaxation, self.dustbin)
        if self.window is not None and not softmax and (module.bias_k is not None or module.add_zero_attn):
            raise ValueError(
                f"window={self.window} cannot be combined with add_bias_kv or add_zero_attn: the extra keys have no "
                "place on the diagonal. Drop one of them."
            )
        return self._replace(**{name: getattr(chosen, name) for name in OF_A_LAYER})


_SCALARS = tuple(name for name in ModuleOptions._fields if name != "dustbin")


class SinkhornMultiheadAttention(nn.MultiheadAttention):
    r"""Multi-head optimal-transport attention, called and parametrised as `torch.nn.MultiheadAttention`.

    The weights of head h are P/a, P the transport plan of `sinkhorn_attention`: rows are averages as with softmax, and
    columns are balanced as well, so that no key is ignored and none takes it all.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype: as
            `torch.nn.MultiheadAttention`. The keys added by `add_bias_kv` and `add_zero_attn` are keys like any other:
            visible to every query, with a share of the mass, and left to the dustbin at the head's
            `dustbin_col_score` where there is one. Outside softmax mode they cannot be combined with a window.
        epsilon, window, base_iters, tail_iters, tolerance, over_relaxation: as `sinkhorn_attention`.
        acceleration, contraction, relaxation, gradient, mask_floor, engine: as `sinkhorn_attention`.
        dustbin: give every head a learnable dustbin: parameters `dustbin_row_score` and `dustbin_col_score`,
            `[num_heads, 1]`, zeros at first. A state_dict without them (of `torch.nn.MultiheadAttention`, say) loads
            strictly and leaves them as they are.

    Masks have the module's polarity: in a bool mask True means *ignore*. In self-attention (`query is key`) a padded
    key is also an inactive query: it gives no mass and its output is `out_proj.bias`. In softmax mode
    (`base_iters=0, tail_iters=0`) rows stay active, as in `torch.nn.MultiheadAttention`.

    `torch.nn.TransformerEncoderLayer` never takes its fused softmax path with this module. torch.fx records it as one
    node. `torch.onnx.export` gets the dense definition. `torch.jit.script` is refused; use `torch.compile` or
    `torch.export`.

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
        epsilon: float = Options.epsilon,
        window: tuple[int, int] | None = Options.window,
        base_iters: int = Options.base_iters,
        tail_iters: int = Options.tail_iters,
        tolerance: float | None = Options.tolerance,
        over_relaxation: float = Options.over_relaxation,
        acceleration: str | None = Options.acceleration,
        contraction: float | None = Options.contraction,
        dustbin: bool = False,
        relaxation: Relaxation = Options.relaxation,
        gradient: str = Options.gradient,
        mask_floor: float | None = Options.mask_floor,
        engine: str | None = Options.engine,
    ) -> None:
        if embed_dim <= 0 or num_heads <= 0 or embed_dim % num_heads:
            raise ValueError(f"embed_dim={embed_dim} must be a positive multiple of num_heads={num_heads}.")
        super().__init__(
            embed_dim, num_heads, dropout=dropout, bias=bias, add_bias_kv=add_bias_kv, add_zero_attn=add_zero_attn,
            kdim=kdim, vdim=vdim, batch_first=batch_first, device=device, dtype=dtype,
        )  # fmt: skip
        self._configure(ModuleOptions(
            epsilon, window, base_iters, tail_iters, tolerance, over_relaxation, acceleration, contraction,
            dustbin, relaxation, gradient, mask_floor, engine,
        ))  # fmt: skip

    base_iters: int  # nn.Module says of its attributes that they are tensors or modules
    tail_iters: int
    window: tuple[int, int] | None
    mask_floor: float | None

    def _configure(self, options: ModuleOptions) -> None:
        """Add to what nn.MultiheadAttention's constructor made what this class has more: options and dustbin scores.
        `replace_attention` does it to modules that exist."""
        for name, option in options.checked(self)._asdict().items():
            if name != "dustbin":
                setattr(self, name, option)
        like = self.out_proj.weight
        for name in DUSTBIN_PARAMETERS:
            with torch.inference_mode(False):  # parameters made in inference mode could not be trained
                score = (
                    torch.zeros(self.num_heads, 1, device=like.device, dtype=like.dtype) if options.dustbin else None
                )
                self.register_parameter(name, None if score is None else nn.Parameter(score))

    @property
    def options(self) -> ModuleOptions:
        """What was chosen at construction beside nn.MultiheadAttention's arguments."""
        return ModuleOptions(**{name: getattr(self, name) for name in ModuleOptions._fields})

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
        for name in DUSTBIN_PARAMETERS:
            score = getattr(self, name, None)
            if score is not None:
                nn.init.zeros_(score)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        *rest: Any,
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *rest)
        if not self.dustbin or self.dustbin_row_score.is_meta:
            return
        own = {prefix + name for name in DUSTBIN_PARAMETERS}
        present = any(key.startswith(f"{prefix}out_proj.") for key in state_dict)
        if present and not own & state_dict.keys():  # made without a dustbin
            missing_keys[:] = [key for key in missing_keys if key not in own]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, _SAVED: ModuleOptions._fields}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Modules pickled by other versions: options that did not exist get their defaults, under which nothing has
        changed; those of a newer version are kept, and named in a warning."""
        state = {"_qkv_same_embed_dim": state["_parameters"].get("in_proj_weight") is not None, **state}
        saved = state.pop(_SAVED, ())
        defaults = {name: x for name, x in ModuleOptions._field_defaults.items() if name != "dustbin"}
        for name in DUSTBIN_PARAMETERS:
            state["_parameters"].setdefault(name, None)
        super().__setstate__({**defaults, **state})
        unknown = sorted(set(saved) - set(ModuleOptions._fields))
        if unknown:
            warnings.warn(
                f"SinkhornMultiheadAttention was saved by a newer version of torch_sinkhorn_attn, with "
                f"{', '.join(f'{name}={state.get(name)!r}' for name in unknown)}, which this version does not know: it "
                "computes without.",
                stacklevel=2,
            )

    def __prepare_scriptable__(self) -> nn.Module:
        raise TypeError(
            "torch.jit.script cannot compile SinkhornMultiheadAttention; use torch.compile or torch.export."
        )

    def extra_repr(self) -> str:
        shown = (f"{name}={option!r}" for name, option in self.options._asdict().items() if option is not None)
        return ", ".join([f"{self.embed_dim}, {self.num_heads}", *shown])

    @property
    def dustbin(self) -> bool:
        """Whether the heads have a dustbin."""
        return self.dustbin_row_score is not None

    @property
    def softmax_mode(self) -> bool:
        """T = R = 0, balanced, no dustbin: softmax attention."""
        return is_softmax(self.base_iters, self.tail_iters, self.relaxation, self.dustbin)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return super().__call__(*args, **kwargs)
        return call_module(self, args, kwargs)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool | str = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        query_padding_mask: Tensor | None = None,
        sequence_group: Any = None,
    ) -> tuple[Tensor, Any]:
        """Attend; arguments and results as `torch.nn.MultiheadAttention.forward`.

        Args:
            query: `(L, E)`, `(L, N, E)`, or `(N, L, E)` with `batch_first`; key and value likewise with S tokens. All
                three may be nested tensors (`batch_first`, no masks); the output is then nested like the query.
            key_padding_mask: `(N, S)` or `(S)`; bool, True = ignore, or float added to the scores, -inf and anything at
                or below `mask_floor` (such as -1e4) = ignore. Padded keys leave the problem: positions, counts and
                masses are those of the others.
            need_weights: also return the weights (this materialises L x S); or "band", with a window of two sides: as a
                `PlanBand`, its values `(N, L, W)`, or `(N, H, L, W)` unaveraged, in O(L W) memory, before dropout.
            attn_mask: `(L, S)` or `(N * num_heads, L, S)`; bool, True = ignore, or float added to the scores.
            average_attn_weights: average the weights over heads.
            is_causal: hint that `attn_mask` is causal. A causal plan exists only with a dustbin or relaxation.
            query_padding_mask: `(N, L)` or `(L)` bool, True = inactive query. Default: the key padding in
                self-attention outside softmax mode, else none. Self-attention is seen by `query is key`, or in eager
                mode by both being the same memory; pass this where a wrapper copies its arguments (FSDP with input
                casts around this very module, say).
            sequence_group: as in `sinkhorn_attention`: tokens and their padding are local shards along the sequence,
                and `attn_mask` and the weights have local rows and all keys; weights are those before dropout. None:
                that of `distributed.sequence_parallel`, if any.

        Returns:
            The output, shaped as the query with `embed_dim` features, and the weights `(N, L, S)`, `(N, H, L, S)`
            unaveraged, or None. Weights leave the dustbin out: rows then sum below 1.

        Raises:
            TypeError, ValueError: for inputs or masks of the wrong type, shape or value.
        """
        if isinstance(need_weights, str) and need_weights != "band":
            raise ValueError(f"need_weights={need_weights!r} must be True, False or 'band'.")
        if not torch.compiler.is_compiling() and tracer_of((query, key, value)) is not None:
            raise TypeError(
                "torch.fx records SinkhornMultiheadAttention as one node, as nn.MultiheadAttention, and does not trace "
                "into it: call it in a module of yours, not by its forward, and trace that."
            )
        group = context.group_of(sequence_group)
        nested = [isinstance(x, Tensor) and x.is_nested for x in (query, key, value)]
        if group is not None:
            context.check_module(self, any(nested))
        if not any(nested):
            return self._attend_dense(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal,
                query_padding_mask, group,
            )  # fmt: skip
        if not all(nested) or not self.batch_first:
            raise TypeError(
                "nested tensors: query, key and value must all be nested, and the module batch_first; else pad them "
                "and pass key_padding_mask (nn.TransformerEncoder makes them unless enable_nested_tensor=False)."
            )
        if not (key_padding_mask is attn_mask is query_padding_mask is None):
            raise ValueError("nested tensors say themselves which tokens there are: pass no mask with them.")
        padded = {id(x): pad(x) for x in (query, key, value)}
        q, k, v = (padded[id(x)] for x in (query, key, value))
        if can_look(k.lengths) and not (len(k.lengths) == len(v.lengths) and torch.equal(k.lengths, v.lengths)):
            raise ValueError(f"nested key and value must have equal lengths, got {k.lengths} and {v.lengths}.")
        output, weights = self._attend_dense(
            q.dense, k.dense, v.dense, k.padding, need_weights, None, average_attn_weights, is_causal, q.padding
        )
        return unpad(output, q, query), weights

    def _attend_dense(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool | str,
        attn_mask: Tensor | None,
        average_attn_weights: bool,
        is_causal: bool,
        query_padding_mask: Tensor | None,
        group: Any = None,
    ) -> tuple[Tensor, Tensor | PlanBand | None]:
        batch_first, softmax_mode = self.batch_first, self.softmax_mode
        unbatched = self._check_inputs(query, key, value)
        if is_causal and attn_mask is None:
            raise ValueError("is_causal=True is a hint about attn_mask: pass attn_mask too.")
        if is_causal and not softmax_mode and self.relaxation is None and not self.dustbin:
            raise ValueError(
                "is_causal=True: the only balanced causal plan is the identity (each query can only take its own key). "
                "Give the module dustbin=True or relaxation=tau, or use base_iters=0, tail_iters=0 (softmax)."
            )
        q, k, v = self._project(query, key, value)  # with the heads apart: [N, L, H, D], [N, S, H, D]
        if unbatched:
            q, k, v = q[None], k[None], v[None]
        elif not batch_first:
            q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        masks = convert(
            attn_mask, key_padding_mask, query_padding_mask, (q.shape[0], self.num_heads, q.shape[1], k.shape[1]),
            q, queries_as_keys=not softmax_mode and _same_tokens(query, key),
            floor=None if softmax_mode else self.mask_floor, all_keys=group is not None,
        )  # fmt: skip
        k, v, masks = self._extra_keys(k, v, masks, q.shape[1])
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        output, weights = self._attend(q, k, v, masks, need_weights, group)
        output = output.transpose(1, 2).flatten(-2)
        output = F.linear(output, self.out_proj.weight, self.out_proj.bias)
        if unbatched:
            output = output[0]
        elif not batch_first:
            output = output.transpose(0, 1)
        if weights is None:
            return output, None
        if isinstance(weights, PlanBand):
            return output, _averaged(weights, average_attn_weights, unbatched)
        weights = weights.mean(1) if average_attn_weights else weights
        return output, weights[0] if unbatched else weights

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, masks: Masks, need_weights: bool | str, group: Any
    ) -> tuple[Tensor, Tensor | PlanBand | None]:
        """Per-head attention: output `[N, H, L, D]` and weights `[N, H, L, S]`, as a band or None."""
        dustbin = None
        row_score, col_score = self.dustbin_row_score, self.dustbin_col_score
        if isinstance(row_score, Tensor) and isinstance(col_score, Tensor):
            dustbin = Dustbin(row_score, col_score)
        extra_keys = self.bias_k is not None or self.add_zero_attn  # then the window is part of the mask
        options: dict[str, Any] = {name: getattr(self, name) for name in _SCALARS}
        options |= {"dustbin": dustbin, "query_segment_ids": masks.query_ids, "key_segment_ids": masks.key_ids}
        if extra_keys:
            options["window"] = None
        dropout = self.dropout if self.training else 0.0
        if not need_weights or need_weights == "band" or group is not None:
            shared = {"sequence_group": group, **options}
            output = sinkhorn_attention(q, k, v, masks.scores, dropout_p=dropout, **shared)
            assert isinstance(output, Tensor)
            if not need_weights:
                return output, None
            if need_weights == "band":
                return output, sinkhorn_plan_band(q, k, masks.scores, **shared)  # masses are 1
            return output, _without_dustbin(sinkhorn_plan(q, k, masks.scores, **shared), dustbin)
        plan = sinkhorn_plan(q, k, masks.scores, **options)
        weights = F.dropout(plan[..., : q.shape[-2], : k.shape[-2]], dropout)  # masses are 1, so P/a = P
        return weights @ v.to(weights.dtype), weights

    def _check_inputs(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Shapes; returns whether the inputs are unbatched."""
        widths = {"query": self.embed_dim, "key": self.kdim, "value": self.vdim}
        for (name, width), x in zip(widths.items(), (query, key, value), strict=True):
            if not isinstance(x, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(x).__name__}.")
            check_kind(name, x)
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
        """The three `[..., H, D]`."""
        packed, heads = self.in_proj_weight, (self.num_heads, self.head_dim)
        if packed is not None and query is key and key is value:
            projected = F.linear(query, packed, self.in_proj_bias)
            q, k, v = projected.view(*projected.shape[:-1], 3, *heads).unbind(-3)
            return q, k, v
        weights = (
            packed.chunk(3) if packed is not None else (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        )
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        found = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
        q, k, v = (x.view(*x.shape[:-1], *heads) for x in found)
        return q, k, v

    def _extra_keys(self, k: Tensor, v: Tensor, masks: Masks, length: int) -> tuple[Tensor, Tensor, Masks]:
        """Append the learned key of add_bias_kv and the zero key of add_zero_attn."""
        extra = []
        if self.bias_k is not None and self.bias_v is not None:
            extra.append((self.bias_k, self.bias_v))
        if self.add_zero_attn:
            extra.append((k.new_zeros(1, 1, self.embed_dim), v.new_zeros(1, 1, self.embed_dim)))
        if not extra:
            return k, v, masks
        num, size = k.shape[:2]
        masks = with_extra_keys(masks, len(extra), self.window, length, size, k.device)
        heads = (self.num_heads, self.head_dim)
        k = torch.cat([k, *(x.to(k.dtype).view(1, 1, *heads).expand(num, -1, -1, -1) for x, _ in extra)], 1)
        v = torch.cat([v, *(x.to(v.dtype).view(1, 1, *heads).expand(num, -1, -1, -1) for _, x in extra)], 1)
        return k, v, masks


def _averaged(band: PlanBand, average: bool, unbatched: bool) -> PlanBand:
    """As weights are returned: averaged over heads, without a batch where there was none, and without the dustbin."""
    values, first = band.values.mean(1) if average else band.values, band.first_column
    return PlanBand(values[0], first[0]) if unbatched else PlanBand(values, first)


def _without_dustbin(plan: Tensor, dustbin: Dustbin | None) -> Tensor:
    return plan if dustbin is None else plan[..., :-1, :-1]


def _same_tokens(query: Tensor, key: Tensor) -> bool:
    """Whether key is query: the same object or, where that can be seen, another one over the same memory, as reentrant
    checkpointing makes."""
    if query is key:
        return True
    if not has_data(query, key):
        return False
    layouts = [(x.shape, x.stride(), x.dtype, x.device, x.storage_offset()) for x in (query, key)]
    return layouts[0] == layouts[1] and same_memory(query, key)
