"""What a model's layer calls: Sinkhorn attention, or softmax where that was asked for."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torch_sinkhorn_attn.functional import sinkhorn_attention, sinkhorn_plan
from torch_sinkhorn_attn.integrations.transformers import layers, masks, recorder
from torch_sinkhorn_attn.integrations.transformers.settings import Settings

# What some models pass beside the mask: Sinkhorn attention and SDPA do not compute it, the model's eager function does.
_BESIDE_SOFTMAX = ("softcap", "s_aux", "sinks", "head_mask", "cache", "block_indices", "indices")


class _Call(NamedTuple):
    """One call of a layer: `(B, H, L, E)`, `(B, Hk, S, E)`, `(B, Hk, S, Ev)` and what came with them."""

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    bias: Tensor | None
    dropout: float
    scaling: float | None
    flag: bool  # is_causal, as given or as the module has it
    causal: bool  # what it is
    others: dict[str, Any]


def attention_forward(
    settings: Settings,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """`(B, H, L, E)`, `(B, Hk, S, E)`, `(B, Hk, S, Ev)` to `(B, L, H, Ev)` and the weights `(B, H, L, S)` or None."""
    flag = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
    causal = layers.is_causal_call(module, flag, attention_mask, query, key.shape[-2], settings.options["mask_floor"])
    call = _Call(module, query, key, value, attention_mask, position_bias, dropout, scaling, flag, causal, kwargs)
    reason = _reason_for_softmax(settings, call)
    if reason is not None:
        recorder.note(module, recorder.SOFTMAX, reason)
        return _softmax(call)
    if not recorder.active():
        return _sinkhorn(settings, call)
    try:
        result = _sinkhorn(settings, call)
    except (TypeError, ValueError) as error:  # a report tells of it and goes on
        recorder.note(module, recorder.REFUSED, str(error))
        return _softmax(call)
    recorder.note(module, recorder.SINKHORN, "")
    return result


def _lengths(call: _Call) -> tuple[int, int]:
    return call.query.shape[-2], call.key.shape[-2]


def _reason_for_softmax(settings: Settings, call: _Call) -> str | None:
    module = call.module
    chosen = layers.chosen(module)
    if chosen is False:
        return "not chosen by choose_layers"
    if chosen is None and settings.layers is not None and not settings.layers(module):
        return "layers says no"
    if settings.causal == "softmax" and (call.causal or (call.flag and _lengths(call) == (1, 1))):
        return "causal"
    if settings.cross_attention == "softmax" and not call.causal and _is_cross(call):
        return "cross-attention"
    return None


def _is_cross(call: _Call) -> bool:
    """Whether queries and keys come from different tokens. In doubt, numbers that differ decide; where there is none
    they do not: SegFormer's keys are fewer, but made of the queries' tokens."""
    length, size = _lengths(call)
    same = layers.is_self_attention(call.module)
    return not call.flag and (same is False or (same is None and length != size))


def _sinkhorn(settings: Settings, call: _Call) -> tuple[Tensor, Tensor | None]:
    module, (length, size) = call.module, _lengths(call)
    for name in _BESIDE_SOFTMAX:
        if call.others.get(name) is not None:
            raise ValueError(f"{type(module).__name__} asks for {name}, which Sinkhorn attention does not compute.")
    same, low = False, None if settings.is_softmax else settings.options["mask_floor"]
    if not settings.is_softmax:
        _refuse_without_plan(settings, call)
        if length == size:
            known = True if call.flag else layers.is_self_attention(module)
            if known is None and call.mask is not None:
                layers.warn_in_doubt(module)
            same = bool(known)
    mask, ids = masks.for_sinkhorn(call.mask, call.bias, call.query, call.key, call.causal, same, low)
    given = settings.options | ids | {"scale": call.scaling, "enable_gqa": call.key.shape[1] != call.query.shape[1]}
    output = sinkhorn_attention(call.query, call.key, call.value, mask, dropout_p=call.dropout, **given)
    assert isinstance(output, Tensor)
    weights = None
    if call.others.get("output_attentions"):
        weights = sinkhorn_plan(call.query, call.key, mask, **given)[..., :length, :size]
    return output.transpose(1, 2).contiguous(), weights


def _refuse_without_plan(settings: Settings, call: _Call) -> None:
    kind, (length, size) = type(call.module).__name__, _lengths(call)
    if call.causal and settings.balanced:
        raise ValueError(
            f"{kind} is causal: the only balanced causal plan is the identity (each query can only take its own key). "
            'Use a bidirectional model, register_transformers with causal="softmax", dustbin=Dustbin(...) or '
            "relaxation=tau, or base_iters=0, tail_iters=0 (softmax)."
        )
    if call.causal and length != size:
        raise ValueError(
            f"{kind} has {length} queries for {size} keys: a plan needs all queries of a causal problem at once. Pass "
            'use_cache=False, or register_transformers with causal="softmax".'
        )
    if not call.causal and length == 1 < size and getattr(call.module, "is_decoder", False) and _is_cross(call):
        raise ValueError(
            f"{kind} has one query of a decoder for {size} keys: a plan needs all its queries at once. Pass "
            'use_cache=False, or register_transformers with cross_attention="softmax".'
        )


def _softmax(call: _Call) -> tuple[Tensor, Tensor | None]:
    """What transformers computes with attn_implementation="sdpa"; or the model's own eager function, where the layer
    asks for what SDPA does not compute: weights, or one of `_BESIDE_SOFTMAX`."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    module, query, kwargs = call.module, call.query, dict(call.others)
    asked = [name for name in _BESIDE_SOFTMAX if kwargs.get(name) is not None]
    if call.bias is not None:
        kwargs["position_bias"] = call.bias
    if asked or kwargs.get("output_attentions"):
        eager = getattr(sys.modules.get(type(module).__module__), "eager_attention_forward", None)
        if eager is not None:
            mask = call.mask
            if mask is None and call.causal:
                mask = torch.ones(*_lengths(call), dtype=torch.bool, device=query.device).tril()
            if mask is not None and mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
            if mask is not None:  # eager functions take the softmax in float32, where a row of float64's lowest is NaN
                mask = mask.clamp_min(max(torch.finfo(mask.dtype).min, torch.finfo(torch.float32).min))
            scaling = query.shape[-1] ** -0.5 if call.scaling is None else call.scaling
            given = {"scaling": scaling, "dropout": call.dropout} | kwargs
            result: tuple[Tensor, Tensor | None] = eager(module, query, call.key, call.value, mask, **given)
            return result
        if asked:
            raise ValueError(f"{type(module).__name__} asks for {asked[0]}, which softmax by SDPA does not compute.")
    result = ALL_ATTENTION_FUNCTIONS["sdpa"](
        module, query, call.key, call.value, masks.for_softmax(call.mask, query.dtype),
        dropout=call.dropout, scaling=call.scaling, is_causal=call.flag, **kwargs,
    )  # fmt: skip
    return result
