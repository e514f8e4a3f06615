"""Sinkhorn attention as an `attn_implementation` of Hugging Face transformers, imported only when it is asked for."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torch_sinkhorn_attn import data_checks
from torch_sinkhorn_attn.argument_checks import floor, is_softmax, plain_relaxation, solver
from torch_sinkhorn_attn.dustbin import Dustbin
from torch_sinkhorn_attn.functional import sinkhorn_attention, sinkhorn_plan
from torch_sinkhorn_attn.module_masks import as_float, both, forbidding
from torch_sinkhorn_attn.problem import compute_dtype

_OPTIONS = (
    "epsilon", "window", "relaxation", "dustbin", "base_iters", "tail_iters", "tolerance", "over_relaxation",
    "gradient", "mask_floor", "engine",
)  # fmt: skip
_OWN = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4")
# What some models pass beside the mask, and this attention does not compute.
_UNSUPPORTED = ("softcap", "s_aux", "sinks", "head_mask", "cache", "block_indices", "indices")
# Arguments of a module's forward that bring tokens of their own to attend to.
_OTHER_TOKENS = {
    "key",
    "key_value_states",
    "context",
    "latents",
    "encoder_hidden_states",
    "context_hidden_states",
    "key_hidden_states",
}


def register_transformers(name: str = "sinkhorn", **options: Any) -> None:
    r"""Register Sinkhorn attention with Hugging Face transformers: `attn_implementation=name` then selects it.

    Both the attention function and its mask function are registered, globally, for models built or switched
    (`model.set_attn_implementation(name)`) from then on. Registering a name again replaces its options.

    Padded tokens leave the problem: in self-attention a key that no query may see is also an inactive query, and its
    output is zero. (Where a module does not show whether it is self-attention, its padded queries stay active, with a
    warning.) Grouped-query attention, sliding windows and position biases work, and packed sequences, which are
    separate but for a dustbin, which they share. `output_attentions=True` returns the weights P/a.

    Args:
        name: any but those of transformers itself.
        options: epsilon, window, relaxation, dustbin, base_iters, tail_iters, tolerance, over_relaxation, gradient,
            mask_floor, engine, as `sinkhorn_attention`; the same for every layer of every model. A `Dustbin` may hold
            parameters, `(H, 1)` or scalars: give them to the optimizer.

    Models that do not go through transformers' AttentionInterface (DeBERTa, XLNet, Longformer, ...) silently keep their
    own attention, whatever `attn_implementation` says; `model._can_set_attn_implementation()` is False for them.

    Causal decoders have no balanced plan but the identity: their attention raises ValueError, unless there is a
    `dustbin` or `relaxation`, or it is softmax (`base_iters=0, tail_iters=0`). With a dustbin or relaxation a query
    still takes nothing from later keys, but later queries compete with it for earlier ones: outputs depend on later
    tokens, so there is no generation token by token: pass `use_cache=False`, a step with a cache is refused.

    Raises:
        ImportError: transformers is not installed, or older than 5.
        TypeError, ValueError: for a wrong name or option, before anything is registered; and from the model, where it
            asks for what this attention does not compute (soft-capping, attention sinks).

    >>> register_transformers("sinkhorn", epsilon=0.5)
    >>> from transformers import ViTConfig, ViTModel
    >>> config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
    ...                    image_size=16, patch_size=4, attn_implementation="sinkhorn")
    >>> ViTModel(config)(torch.randn(1, 3, 16, 16)).last_hidden_state.shape
    torch.Size([1, 17, 32])
    """
    if not isinstance(name, str) or not name or "|" in name or "/" in name:
        raise TypeError(f"register_transformers needs a name without '|' and '/', got {name!r}.")
    if name in _OWN or "flash" in name.lower() or "paged" in name.lower():
        raise ValueError(f"name={name!r} is an attention of transformers itself; choose another, such as 'sinkhorn'.")
    unknown = sorted(set(options) - set(_OPTIONS))
    if unknown:
        raise TypeError(f"register_transformers() got unknown option {unknown[0]!r}; it takes {', '.join(_OPTIONS)}.")
    chosen = _checked(options)

    def attend(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        return sinkhorn_attention_forward(chosen, module, *args, **kwargs)

    try:
        from transformers import AttentionInterface, __version__
        from transformers.masking_utils import AttentionMaskInterface
    except ImportError as error:
        raise ImportError("register_transformers needs Hugging Face transformers: pip install transformers") from error
    if int(__version__.split(".")[0]) < 5:
        raise ImportError(
            f"register_transformers needs transformers 5 or newer, found {__version__}: in older ones BERT, T5 and "
            "others do not ask which attention to use. pip install --upgrade transformers"
        )
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, sinkhorn_mask)


def _checked(options: dict[str, Any]) -> dict[str, Any]:
    dustbin = options.get("dustbin")
    if dustbin is not None and not isinstance(dustbin, Dustbin):
        raise TypeError(f"dustbin must be a Dustbin or None, got {dustbin!r}; pass Dustbin(row_score, col_score).")
    defaults = {name: inspect.signature(sinkhorn_attention).parameters[name].default for name in _OPTIONS}
    given = defaults | options
    solver(
        1, torch.float32, None, given["epsilon"], given["window"], given["relaxation"], given["base_iters"],
        given["tail_iters"], given["tolerance"], given["over_relaxation"], given["gradient"], given["engine"],
    )  # fmt: skip
    data_checks.check_dustbin_scores(dustbin)
    given["mask_floor"] = floor(given["mask_floor"])
    given["relaxation"] = plain_relaxation(given["relaxation"])
    return given


def sinkhorn_mask(*, allow_is_bidirectional_skip: bool = False, **kwargs: Any) -> Tensor | None:
    """The mask as transformers makes it for SDPA, bool, True = keep, `(B, 1, L, S)`; but never left out in favour of an
    is_causal flag, and `(B, 1, 1, S)` where it is nothing but padding. None where nothing is masked."""
    from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

    kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": allow_is_bidirectional_skip}
    mask: Tensor | None = sdpa_mask(**kwargs)
    only_padding = kwargs.get("mask_function") is bidirectional_mask_function and allow_is_bidirectional_skip
    return mask[:, :, :1] if mask is not None and only_padding else mask


def sinkhorn_attention_forward(
    options: dict[str, Any],
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
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ValueError(f"{type(module).__name__} asks for {name}, which Sinkhorn attention does not compute.")
    causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
    length, size = query.shape[-2], key.shape[-2]
    softmax = is_softmax(*(options[name] for name in ("base_iters", "tail_iters", "relaxation", "dustbin")))
    if causal and not softmax:
        _refuse_causal(options, module, length, size)
    same = not softmax and length == size and (causal or _is_self_attention(module, attention_mask is not None))
    low = None if softmax else options["mask_floor"]
    mask, ids = _mask_and_ids(attention_mask, position_bias, query, key, causal, same, low)
    given = options | ids | {"scale": scaling, "enable_gqa": key.shape[1] != query.shape[1]}
    output = sinkhorn_attention(query, key, value, mask, dropout_p=dropout, **given)
    assert isinstance(output, Tensor)
    weights = None
    if kwargs.get("output_attentions"):
        weights = sinkhorn_plan(query, key, mask, **given)[..., :length, :size]
    return output.transpose(1, 2).contiguous(), weights


def _refuse_causal(options: dict[str, Any], module: nn.Module, length: int, size: int) -> None:
    if options["relaxation"] is None and options["dustbin"] is None:
        raise ValueError(
            f"{type(module).__name__} is causal: the only balanced causal plan is the identity (each query can only "
            "take its own key). Use a bidirectional model, register_transformers with dustbin=Dustbin(...) or "
            "relaxation=tau, or base_iters=0, tail_iters=0 (softmax)."
        )
    if length != size:
        raise ValueError(
            f"{type(module).__name__} has {length} queries for {size} keys: a plan needs all queries of a causal "
            "problem at once. Pass use_cache=False."
        )


def _mask_and_ids(
    mask: Tensor | None,
    bias: Tensor | None,
    query: Tensor,
    key: Tensor,
    causal: bool,
    same: bool,
    low: float | None,
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """The mask of the scores, and padding as inactive ids where the mask is nothing else, which takes no L x S memory.
    In self-attention (`same`) padded keys are padded queries."""
    num, length, size = query.shape[0], query.shape[-2], key.shape[-2]
    ids = {}
    if mask is None and causal and length > 1:  # a model that leaves it to the flag; sinkhorn_mask never does
        mask = torch.ones(length, size, dtype=torch.bool, device=query.device).tril()
    if mask is not None and mask.dtype != torch.bool:
        mask = as_float(mask, mask.dtype, compute_dtype(query.dtype))
        mask = forbidding(mask, low)  # now -inf is all that forbids
    if mask is not None and mask.dtype == torch.bool and mask.shape[1:3] == (1, 1) and length > 1:
        key_ids = mask[:, 0, 0].expand(num, size).long() - 1
        ids = {"key_segment_ids": key_ids, "query_segment_ids": key_ids if same else key_ids.new_zeros(num, length)}
        mask = None
    elif mask is not None and same:
        keep = (mask if mask.dtype == torch.bool else mask > -torch.inf).any(-2, keepdim=True).transpose(-1, -2)
        mask = both(keep, mask)
    if bias is not None:
        mask = bias if mask is None else both(mask, bias) if mask.dtype == torch.bool else mask + bias
    return mask, ids


def _is_self_attention(module: nn.Module, masked: bool) -> bool:
    """Whether the queries of a bidirectional module are the tokens of its keys. Modules do not say so, but what they
    are does. In doubt they are not, which is said if there is a mask: padded queries then stay active, but no real
    query is ever taken for padding."""
    kind = type(module)
    if "cross" in kind.__name__.lower():
        return False
    if hasattr(module, "is_cross_attention"):
        return not module.is_cross_attention
    if not _forward_parameters(kind) & _OTHER_TOKENS:
        return True
    if hasattr(module, "is_decoder"):  # one class for all attentions of an encoder-decoder; a causal one is not asked
        return not module.is_decoder
    if masked and not torch.compiler.is_compiling():
        warnings.warn(
            f"{kind.__name__} may be self-attention or not, so its padded queries take part in its transport plan.",
            stacklevel=2,
        )
    return False


def _forward_parameters(cls: type[nn.Module]) -> frozenset[str]:
    if cls not in _PARAMETERS:
        forward: Callable[..., Any] = cls.forward
        _PARAMETERS[cls] = frozenset(inspect.signature(forward).parameters)
    return _PARAMETERS[cls]


_PARAMETERS: dict[type[nn.Module], frozenset[str]] = {}
