"""Which layers of a model call Sinkhorn attention: measured, by running it once."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from torch_sinkhorn_attn.integrations.transformers import recorder
from torch_sinkhorn_attn.integrations.transformers.layers import is_attention

_ROOT = "(the model itself)"
_OWN_CALLS = {
    torch.nn.functional.scaled_dot_product_attention: "scaled_dot_product_attention",
    torch.nn.functional.multi_head_attention_forward: "nn.MultiheadAttention",
}
_SOFTMAX = {torch.softmax, torch.nn.functional.softmax, Tensor.softmax}


@dataclass(frozen=True)
class TransformersReport:
    """What the attention layers of a model did in one run; prints as a table.

    Every attention of the model is in one of these, by the name of its module; a module that is shared is listed under
    each of its names, and one that did several things in several.

    Attributes:
        sinkhorn: name -> calls, of the layers that were Sinkhorn attention.
        softmax: name -> reason, of those that asked for it and were given softmax, as registered.
        refused: name -> sentence, of those where the model would have ended with this error. The run went on with
            softmax.
        own: name -> what it computed, of those that never asked: they keep their own attention.
        idle: names of attention modules that computed nothing in this run.
    """

    sinkhorn: dict[str, int]
    softmax: dict[str, str]
    refused: dict[str, str]
    own: dict[str, str]
    idle: tuple[str, ...]
    model: str = field(repr=False)

    def __str__(self) -> str:
        rows = [(name, f"sinkhorn, {n} call{'s' if n > 1 else ''}") for name, n in self.sinkhorn.items()]
        rows += [(name, f"softmax: {reason}") for name, reason in self.softmax.items()]
        rows += [(name, f"refused: {sentence}") for name, sentence in self.refused.items()]
        rows += [(name, f"never calls it: {what}") for name, what in self.own.items()]
        rows += [(name, "not used in this run") for name in self.idle]
        if not rows:
            return f"{self.model} has no attention."
        width = max(len(name or _ROOT) for name, _ in rows)
        return "\n".join(f"{name or _ROOT:<{width}}  {what}" for name, what in rows)


def transformers_report(model: nn.Module, *args: Any, **inputs: Any) -> TransformersReport:
    """Run a model of transformers once and say which of its attention layers were Sinkhorn attention.

    The run is in evaluation mode, without gradients and uncompiled. Training flags, buffers and the state of the random
    numbers are put back afterwards. A layer that refuses (a causal one, say) does not end it: the report has its
    sentence.

    Args:
        model: the model, with whatever attention it has now.
        args, inputs: what its forward takes. Without any: `model.dummy_inputs`, or random images of the size its
            config names.

    Returns:
        A `TransformersReport`.

    Raises:
        TypeError: model is no module.
        ValueError: there are no inputs and none can be made up, or the model does not take them.

    >>> from torch_sinkhorn_attn import register_transformers
    >>> from transformers import BertConfig, BertModel
    >>> register_transformers("sinkhorn", causal="softmax")
    >>> config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
    ...                     attn_implementation="sinkhorn")
    >>> print(transformers_report(BertModel(config)))
    encoder.layer.0.attention.self  sinkhorn, 1 call
    encoder.layer.1.attention.self  sinkhorn, 1 call
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"transformers_report needs a model, got {type(model).__name__}.")
    original = getattr(model, "_orig_mod", None)  # of torch.compile
    model = original if isinstance(original, nn.Module) else model
    made_up = not args and not inputs
    if made_up:
        inputs = _made_up_inputs(model)
    own = _OwnAttention()
    with recorder.recording() as notes, _as_it_was(model), torch.no_grad(), _watched(model, own):
        try:
            model(*args, **inputs)
        except Exception as error:
            if not made_up:
                raise
            raise ValueError(
                f"{type(model).__name__} does not take {', '.join(inputs)} alone ({type(error).__name__}: {error}); "
                "give transformers_report the inputs of its forward."
            ) from error
    return _report(model, notes, own)


def _report(model: nn.Module, notes: recorder.Notes, own: _OwnAttention) -> TransformersReport:
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    found: dict[str, dict[str, Any]] = {recorder.SINKHORN: {}, recorder.SOFTMAX: {}, recorder.REFUSED: {}}
    for module, what, why in notes:
        for name in names.get(id(module), [f"a {type(module).__name__} outside the model"]):
            if what == recorder.SINKHORN:
                found[what][name] = found[what].get(name, 0) + 1
            else:
                found[what][name] = why
    asked = {id(module) for module, _, _ in notes}
    kept = {name: what for key, what in own.calls.items() if key not in asked for name in names.get(key, [])}
    busy = asked | own.calls.keys()
    quiet = [m for m in model.modules() if is_attention(m) and not any(id(part) in busy for part in m.modules())]
    for module in quiet:
        if id(module) in own.ran:
            kept |= dict.fromkeys(names[id(module)], "something else than softmax")
    idle = tuple(name for m in quiet if id(m) not in own.ran for name in names[id(m)])
    return TransformersReport(
        found[recorder.SINKHORN], found[recorder.SOFTMAX], found[recorder.REFUSED], kept, idle, type(model).__name__
    )


class _OwnAttention(TorchFunctionMode):
    """Notes the innermost module around each call of an attention or of a softmax over scores."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[nn.Module] = []
        self.calls: dict[int, str] = {}
        self.ran: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.stack:
            inner = self.stack[-1]
            if func in _OWN_CALLS:
                self.calls.setdefault(id(inner), _OWN_CALLS[func])
            elif func in _SOFTMAX and (is_attention(inner) or (args and args[0].ndim >= 4)):
                self.calls.setdefault(id(inner), "its own softmax")
        return func(*args, **(kwargs or {}))


@contextmanager
def _watched(model: nn.Module, own: _OwnAttention) -> Iterator[None]:
    def enter(module: nn.Module, _: Any) -> None:
        own.stack.append(module)
        own.ran.add(id(module))

    def leave(*_: Any) -> None:
        own.stack.pop()

    with ExitStack() as stack:
        for module in model.modules():
            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        stack.enter_context(own)
        yield


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Evaluation, eagerly; then everything the modules hold, and the random numbers, as before."""
    modules = list(model.modules())
    held = [(module, dict(module.__dict__), dict(module._buffers)) for module in modules]
    values = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.compiler.set_stance("force_eager"), torch.random.fork_rng(devices):
            model.eval()
            yield
    finally:
        for module, attributes, buffers in held:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)
        for buffer, value in values:
            if not buffer.is_meta and not torch.equal(buffer, value):
                buffer.copy_(value)


def _made_up_inputs(model: nn.Module) -> dict[str, Tensor]:
    config, name = getattr(model, "config", None), getattr(model, "main_input_name", None)
    first = next(iter(model.parameters()), torch.empty(0))
    if name == "input_ids" and hasattr(model, "dummy_inputs"):
        text = config.get_text_config() if config is not None else None
        vocabulary = getattr(text, "vocab_size", None) or 2
        dummies: Any = model.dummy_inputs
        given = {key: x.to(first.device) for key, x in dummies.items()}
        given = {k: x % vocabulary if k.endswith("input_ids") else x for k, x in given.items()}
        if (
            getattr(config, "is_encoder_decoder", False)
            and "decoder_input_ids" in inspect.signature(model.forward).parameters
        ):
            given.setdefault("decoder_input_ids", given["input_ids"])
        return given
    size = getattr(config, "image_size", None)
    if name == "pixel_values" and size is not None:
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        shape = (2, getattr(config, "num_channels", 3), height, width)
        return {name: torch.randn(shape, dtype=first.dtype, device=first.device)}
    raise ValueError(
        f"{type(model).__name__} needs inputs that cannot be made up: give transformers_report those of its forward"
        + (f", {name}=..." if name else "")
        + "."
    )
