"""The name under which transformers finds Sinkhorn attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from torch_sinkhorn_attn.integrations.transformers import own
from torch_sinkhorn_attn.integrations.transformers.attention import attention_forward
from torch_sinkhorn_attn.integrations.transformers.masks import sinkhorn_mask
from torch_sinkhorn_attn.integrations.transformers.settings import checked

_OWN = ("sdpa", "flash", "flex_attention", "paged")  # transformers takes any name with one of these for its own


def register_transformers(
    name: str = "sinkhorn",
    *,
    causal: str = "error",
    cross_attention: str | None = None,
    layers: Callable[[nn.Module], object] | None = None,
    **options: Any,
) -> None:
    r"""Register Sinkhorn attention with Hugging Face transformers: `attn_implementation=name` then selects it.

    Both the attention function and its mask function are registered, globally, for models built or switched
    (`model.set_attn_implementation(name)`) from then on. Registering a name again replaces what it computes.
    `transformers_report(model, **inputs)` measures which layers of a model call it; `docs/transformers.md` has the
    table of all models of transformers.

    Padded tokens leave the problem: in self-attention a key that no query may see is also an inactive query, and its
    output is zero. (Where a module does not show whether it is self-attention, its padded queries stay active, with a
    warning.) Cross-attention is told of padded keys alone: padded queries take part in its plan and change the outputs
    of real ones; give it none, or `cross_attention="softmax"`. Grouped-query attention, sliding windows and position
    biases work, and packed sequences, which are separate but for a dustbin, which they share. `output_attentions=True`
    returns the weights P/a.

    Args:
        name: any but those of transformers itself.
        causal: what a causal layer is. "error" (default): Sinkhorn attention if it has a plan, see below, else a
            ValueError. "softmax": what `attn_implementation="sdpa"` computes, with caches and generation. Whether a
            call is causal is read off its mask, and off the `is_causal` flag where there is no mask, or it must not be
            looked at (torch.compile, torch_xla), or there is one query: a decoder whose mask shows all tokens to all
            is bidirectional.
        cross_attention: "sinkhorn" or "softmax", for layers whose queries are other tokens than their keys. None
            (default): "softmax" if `causal` is, for a decoder generates token by token, else "sinkhorn".
        layers: `layers(module)`, with the attention module: whether it is Sinkhorn attention. The others are softmax.
            Default: all. `choose_layers(model, pattern)` chooses by name, for one model.
        options: epsilon, window, relaxation, dustbin, base_iters, tail_iters, tolerance, over_relaxation,
            acceleration, contraction, gradient, mask_floor, engine, as `sinkhorn_attention`; the same for every layer
            of every model. A `Dustbin` may hold parameters, `(H, 1)` or scalars: give them to the optimizer.

    Models that do not go through transformers' AttentionInterface (DeBERTa, XLNet, Longformer, MPNet, ...) keep their
    own attention, and compute what they compute without this registration. Building one with this name warns.

    Causal attention has no balanced plan but the identity: with `causal="error"` it raises ValueError, unless there is
    a `dustbin` or `relaxation`, or it is softmax (`base_iters=0, tail_iters=0`). With a dustbin or relaxation a query
    still takes nothing from later keys, but later queries compete with it for earlier ones: outputs depend on later
    tokens, so there is no generation token by token: pass `use_cache=False`, a step with a cache is refused.

    Raises:
        ImportError: transformers is not installed, or older than 5.
        TypeError, ValueError: for a wrong name or option, before anything is registered; and from the model, where it
            asks for what this attention does not compute (soft-capping, attention sinks).

    >>> import torch
    >>> register_transformers("sinkhorn", epsilon=0.5)
    >>> from transformers import ViTConfig, ViTModel
    >>> config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
    ...                    image_size=16, patch_size=4, attn_implementation="sinkhorn")
    >>> ViTModel(config)(torch.randn(1, 3, 16, 16)).last_hidden_state.shape
    torch.Size([1, 17, 32])
    """
    if not isinstance(name, str) or not name or "|" in name or "/" in name:
        raise TypeError(f"register_transformers needs a name without '|' and '/', got {name!r}.")
    if name == "eager" or any(word in name.lower() for word in _OWN):
        raise ValueError(f"name={name!r} is an attention of transformers itself; choose another, such as 'sinkhorn'.")
    settings = checked(name, causal, cross_attention, layers, options)

    def attend(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        return attention_forward(settings, module, *args, **kwargs)

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
    own.watch(name)
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, sinkhorn_mask)
