"""What a layer is, and which layers of a model are to be Sinkhorn attention."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from torch_sinkhorn_attn.integrations.transformers.masks import can_decide, same_for_all_queries, visible

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
_CHOSEN = "_sinkhorn_layer"  # on a module: what choose_layers said of it
_PARAMETERS: dict[type[nn.Module], frozenset[str]] = {}


def choose_layers(model: nn.Module, layers: str | Callable[[str, nn.Module], object] | None) -> tuple[str, ...]:
    """Say which attention layers of one model are Sinkhorn attention; the others are softmax, as transformers' "sdpa".

    It decides before the `layers` of `register_transformers`, and holds for whichever name registered there the model
    uses. The choice stays with the modules (copies have it too), but is not part of a checkpoint: after
    `from_pretrained` choose again.

    Args:
        model: any model of transformers, with `attn_implementation="sinkhorn"`, now or later.
        layers: a regular expression, searched for in the names of `model.named_modules()`; or `layers(name, module)`;
            or None, to forget the choice.

    Returns:
        The names of the modules chosen whose class is an attention. `transformers_report` measures which layers call
        it indeed.

    Raises:
        TypeError: for another kind of `model` or `layers`.
        ValueError: no attention of the model is chosen, or the pattern is no regular expression.

    >>> from transformers import BertConfig, BertModel
    >>> model = BertModel(BertConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64))
    >>> choose_layers(model, r"layer\\.[12]\\..*self$")
    ('encoder.layer.1.attention.self', 'encoder.layer.2.attention.self')
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"choose_layers needs a model, got {type(model).__name__}.")
    if layers is not None and not isinstance(layers, str) and not callable(layers):
        raise TypeError(f"layers must be a regular expression, a function of (name, module) or None, got {layers!r}.")
    if layers is None:
        for module in model.modules():
            module.__dict__.pop(_CHOSEN, None)
        return ()
    if isinstance(layers, str):
        try:
            pattern = re.compile(layers)
        except re.error as error:
            raise ValueError(f"layers={layers!r} is no regular expression: {error}.") from error
        says: Callable[[str, nn.Module], object] = lambda name, _: pattern.search(name)  # noqa: E731
    else:
        says = layers
    named = list(model.named_modules(remove_duplicate=False))
    answers: dict[int, bool] = {}
    for name, module in named:
        answers[id(module)] = answers.get(id(module), False) or bool(says(name, module))
    chosen = tuple(name for name, module in named if answers[id(module)] and is_attention(module))
    if not chosen:
        raise ValueError(
            f"layers={layers!r} chooses no attention of {type(model).__name__}; transformers_report(model) lists them."
        )
    for _, module in named:
        module.__dict__[_CHOSEN] = answers[id(module)]
    return chosen


def is_attention(module: nn.Module) -> bool:
    """Whether the class says so, and none of its parts does."""
    return _named_so(module) and not any(_named_so(part) for part in module.modules() if part is not module)


def _named_so(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    return "attention" in name or "attn" in name


def chosen(module: nn.Module) -> bool | None:
    """What `choose_layers` said of the module; None: nothing."""
    answer: bool | None = getattr(module, _CHOSEN, None)
    return answer


def is_causal_call(
    module: nn.Module, flag: bool, mask: Tensor | None, query: Tensor, size: int, low: float | None
) -> bool:
    """Whether earlier queries of this call may see less than later ones, as decoders have it.

    The flag tells what the module is for; the mask, where its data may decide, what it does in this call: a decoder
    whose mask shows everything to everyone is none, one query beside a cache of earlier keys is a step of one.
    """
    length = query.shape[-2]
    if mask is None:
        return flag and (length > 1 or size > 1)
    if flag and length == 1:
        return size > 1 and not _is_cross_attention(module)
    if same_for_all_queries(mask):
        return False
    if not can_decide(mask):
        return flag
    seen = visible(mask, query.dtype, low)
    if length != size:
        return flag and bool((seen != seen[..., :1, :]).any())
    seen = seen & seen.any(-2, keepdim=True).transpose(-1, -2)  # padding on both sides: not seen is not there
    asymmetric = bool((seen != seen.transpose(-1, -2)).any())
    return asymmetric and (flag or not bool(seen.triu(1).any()))


def _is_cross_attention(module: nn.Module) -> bool:
    return "cross" in type(module).__name__.lower() or bool(getattr(module, "is_cross_attention", False))


def is_self_attention(module: nn.Module) -> bool | None:
    """Whether the queries of a bidirectional module are the tokens of its keys. Modules do not say so, but what they
    are does, mostly: else None."""
    if _is_cross_attention(module):
        return False
    if hasattr(module, "is_cross_attention") or not _forward_parameters(type(module)) & _OTHER_TOKENS:
        return True
    if hasattr(module, "is_decoder"):  # one class for all attentions of an encoder-decoder; a causal one is not asked
        return not module.is_decoder
    return None


def warn_in_doubt(module: nn.Module) -> None:
    """In doubt queries are not keys: padded queries then stay active, but no real query is ever taken for padding."""
    if not torch.compiler.is_compiling():
        warnings.warn(
            f"{type(module).__name__} may be self-attention or not, so its padded queries take part in its transport "
            "plan.",
            stacklevel=2,
        )


def _forward_parameters(cls: type[nn.Module]) -> frozenset[str]:
    if cls not in _PARAMETERS:
        forward: Callable[..., object] = cls.forward
        _PARAMETERS[cls] = frozenset(inspect.signature(forward).parameters)
    return _PARAMETERS[cls]
