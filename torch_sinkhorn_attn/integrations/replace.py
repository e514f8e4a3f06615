"""Swap the nn.MultiheadAttention modules of a model for SinkhornMultiheadAttention, in place, and back.

A module keeps its identity and everything it holds; only its class changes, and its options and dustbin scores are
added. So parameters, hooks, flags, sharing and references from anywhere stay as they are, and going back is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from uuid import uuid4

import torch
from torch import nn
from torch.nn.utils import parametrize

from torch_sinkhorn_attn.modules import DUSTBIN_PARAMETERS, ModuleOptions, SinkhornMultiheadAttention

_REPLACED = "_replaced_by_sinkhorn"  # on a module whose class was changed here: by which call, and what it had before
_NESTED = "_nested_tensors_before_sinkhorn"  # on an nn.TransformerEncoder: use_nested_tensor was switched off here


@dataclass(frozen=True)
class ReplacementReport:
    """What `replace_attention` did; prints as a table.

    Attributes:
        replaced: names of the modules that are Sinkhorn attention now and were not before. A module that is shared is
            listed under each of its names.
        skipped: name -> reason, for every other attention module found.
        encoders: names of the `nn.TransformerEncoder` modules that no longer make nested tensors.
        new_parameters: name -> parameter, the dustbin scores that were added; give them to the optimizer.
        options: the options every replaced module has.
    """

    replaced: tuple[str, ...]
    skipped: dict[str, str]
    encoders: tuple[str, ...]
    new_parameters: dict[str, nn.Parameter] = field(repr=False)
    options: ModuleOptions
    model: nn.Module = field(repr=False)
    call: str = field(repr=False)

    def __str__(self) -> str:
        rows = [(name, "replaced") for name in self.replaced]
        rows += [(name, f"skipped: {reason}") for name, reason in self.skipped.items()]
        rows += [(name, "makes no nested tensors any more") for name in self.encoders]
        rows += [(name, "new parameter: add it to the optimizer") for name in self.new_parameters]
        width = max(len(name or _ROOT) for name, _ in rows)
        return "\n".join(f"{name or _ROOT:<{width}}  {what}" for name, what in rows)


_ROOT = "(the model itself)"


def replace_attention(
    model: nn.Module, *, filter: Callable[[str, nn.MultiheadAttention], object] | None = None, **options: object
) -> ReplacementReport:
    """Turn the `nn.MultiheadAttention` modules of a model into `SinkhornMultiheadAttention`, in place.

    The modules stay the same objects with the same parameters, so an optimizer goes on training them, and device,
    dtype, hooks, `requires_grad`, the training flag, sharing, parametrisations and LoRA adapters that work with
    `nn.MultiheadAttention` are kept. `nn.TransformerEncoder` modules stop making nested tensors. Do it after adding
    LoRA adapters, before `torch.jit.script` and `fully_shard`, and with `dustbin=True`, which adds parameters, before
    any wrapper that lists parameters (DistributedDataParallel).

    Args:
        model: the model, or an `nn.MultiheadAttention` itself.
        filter: `filter(name, module) -> bool`, which modules to replace. Default: all. A causal self-attention needs
            `dustbin=True` or `relaxation`, or is left out here.
        options: as `SinkhornMultiheadAttention`: epsilon, window, base_iters, tail_iters, tolerance, over_relaxation,
            acceleration, contraction, dustbin, relaxation, gradient, mask_floor, engine.

    Returns:
        A `ReplacementReport`. Modules replaced before with the same options are skipped, so repeating a call does
        nothing; `restore_attention` undoes it. Subclasses of `nn.MultiheadAttention` are skipped: their forward is
        their own.

    Raises:
        TypeError: model is no module, filter no function, or an option is unknown or of the wrong type.
        ValueError: an option has a wrong value or cannot work with one of the modules; a module was replaced before
            with other options; or there is no attention to replace. Nothing has then been changed.

    >>> from torch import nn
    >>> encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, batch_first=True), 2)
    >>> print(replace_attention(encoder, epsilon=0.5))
    layers.0.self_attn  replaced
    layers.1.self_attn  replaced
    (the model itself)  makes no nested tensors any more
    >>> restore_attention(encoder)
    ('layers.0.self_attn', 'layers.1.self_attn')
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"replace_attention needs an nn.Module, got {type(model).__name__}.")
    if filter is not None and not callable(filter):
        raise TypeError(f"filter must be a function of (name, module), got {filter!r}.")
    unknown = sorted(set(options) - set(ModuleOptions._fields))
    if unknown:
        raise TypeError(
            f"replace_attention() got unknown option {unknown[0]!r}; it takes {', '.join(ModuleOptions._fields)}."
        )
    chosen = ModuleOptions(**options)  # type: ignore[arg-type]
    wanted: dict[str, nn.MultiheadAttention] = {}
    skipped: dict[str, str] = {}
    for names, module in _attention_modules(model):
        reason = _reason_to_skip(names, module, filter, chosen)
        if reason is None:
            assert isinstance(module, nn.MultiheadAttention)
            wanted |= dict.fromkeys(names, module)
        else:
            skipped |= dict.fromkeys(names, reason)
    if not wanted and not skipped:
        raise ValueError(
            f"{type(model).__name__} holds no nn.MultiheadAttention. For models of Hugging Face transformers use "
            "register_transformers; elsewhere call sinkhorn_attention where the model calls its attention."
        )
    for name, module in wanted.items():
        _check(name, module, chosen, model)
    call = uuid4().hex
    for module in {id(module): module for module in wanted.values()}.values():
        before = {name: module.__dict__[name] for name in ModuleOptions._fields if name in module.__dict__}
        _change_class(module, SinkhornMultiheadAttention)
        module.__dict__[_REPLACED] = (call, before)
        SinkhornMultiheadAttention._configure(module, chosen)  # type: ignore[arg-type]
    new = {
        f"{name}.{score}".removeprefix("."): getattr(module, score)
        for name, module in wanted.items()
        for score in DUSTBIN_PARAMETERS
        if chosen.dustbin
    }
    return ReplacementReport(tuple(wanted), skipped, _without_nested_tensors(model), new, chosen, model, call)


def restore_attention(model_or_report: nn.Module | ReplacementReport) -> tuple[str, ...]:
    """Undo `replace_attention`: the modules are `nn.MultiheadAttention` again, with the parameters they have now.

    Weights that were trained with Sinkhorn attention have adapted to it: going back is exact for the modules, not free
    for the model. Dustbin scores are dropped. Modules that were built as `SinkhornMultiheadAttention` are left alone.

    Args:
        model_or_report: a model (or a copy of one), for everything that was replaced in it; or the report of one
            replacement, for what that one replaced.

    Returns:
        The names of the modules restored.

    Raises:
        TypeError: for anything else.
        ValueError: a module was wrapped by `fully_shard` since.
    """
    if isinstance(model_or_report, ReplacementReport):
        model, call = model_or_report.model, model_or_report.call
    elif isinstance(model_or_report, nn.Module):
        model, call = model_or_report, None
    else:
        raise TypeError(
            f"restore_attention needs a model or a ReplacementReport, got {type(model_or_report).__name__}."
        )
    found = [
        (names, module)
        for names, module in _attention_modules(model)
        if _REPLACED in module.__dict__ and call in (None, module.__dict__[_REPLACED][0])
    ]
    for names, module in found:
        if not _is_plain(module, SinkhornMultiheadAttention):
            raise ValueError(
                f"{names[0] or _ROOT} is a {type(module).__name__} now, a class made since (by fully_shard?); "
                "restore_attention before that."
            )
    for _, module in found:
        _change_class(module, nn.MultiheadAttention)
        _, before = module.__dict__.pop(_REPLACED)
        for name in ModuleOptions._fields:
            module.__dict__.pop(name, None)
        module.__dict__.update(before)
        for name in DUSTBIN_PARAMETERS:
            del module._parameters[name]
    for encoder in model.modules():
        if _NESTED in encoder.__dict__ and not any(_REPLACED in m.__dict__ for m in encoder.modules()):
            encoder.use_nested_tensor = encoder.__dict__.pop(_NESTED)
    return tuple(name for names, _ in found for name in names)


def _attention_modules(model: nn.Module) -> Iterator[tuple[tuple[str, ...], nn.Module]]:
    """Every attention module once, with all its names."""
    names: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        scripted = isinstance(module, torch.jit.ScriptModule) and module.original_name == "MultiheadAttention"
        if isinstance(module, nn.MultiheadAttention) or scripted:
            names.setdefault(id(module), []).append(name)
            modules[id(module)] = module
    for key, module in modules.items():
        yield tuple(names[key]), module


def _reason_to_skip(
    names: tuple[str, ...],
    module: nn.Module,
    filter: Callable[[str, nn.MultiheadAttention], object] | None,
    options: ModuleOptions,
) -> str | None:
    if not isinstance(module, nn.MultiheadAttention):
        return "scripted: replace before torch.jit.script"
    if filter is not None:
        answers = [bool(filter(name, module)) for name in names]
        if any(answers) != all(answers):
            raise ValueError(f"filter says both yes and no to one shared module, {', '.join(names)}; say one of them.")
        if not answers[0]:
            return "filter says no"
    if isinstance(module, SinkhornMultiheadAttention):
        if _REPLACED not in module.__dict__:
            return "was built as SinkhornMultiheadAttention"
        if module.options != options.checked(module):
            raise ValueError(
                f"{names[0] or _ROOT} was replaced before with other options: {module.options}. "
                "restore_attention(model) first, or leave it out with filter."
            )
        return "was replaced before, with these options"
    if not _is_plain(module, nn.MultiheadAttention):
        return f"{type(module).__name__} is a subclass of nn.MultiheadAttention: its forward may be its own"
    return None


def _is_plain(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Of this class itself, or of the one that torch.nn.utils.parametrize derives from it."""
    return type(module) is cls or (
        parametrize.is_parametrized(module)
        and type(module).__bases__ == (cls,)
        and type(module).__name__ == f"Parametrized{cls.__name__}"
    )


def _check(name: str, module: nn.MultiheadAttention, options: ModuleOptions, model: nn.Module) -> None:
    try:
        options.checked(module)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name or _ROOT}: {error} Or leave the module out with filter.") from error
    if options.dustbin and any(isinstance(m, nn.parallel.DistributedDataParallel) for m in model.modules()):
        raise ValueError(
            "dustbin=True adds parameters, which DistributedDataParallel would not synchronise: replace_attention "
            "first, then wrap the model."
        )


def _change_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Make the module an instance of `cls`, or of what torch.nn.utils.parametrize would derive from it."""
    if parametrize.is_parametrized(module):
        own = {k: v for k, v in vars(type(module)).items() if k not in ("__dict__", "__weakref__", "__doc__")}
        cls = type(f"Parametrized{cls.__name__}", (cls,), own)
    module.__class__ = cls


def _without_nested_tensors(model: nn.Module) -> tuple[str, ...]:
    """nn.TransformerEncoder hands nested tensors to its layers in evaluation, where their fused path is expected."""
    names = []
    for name, module in model.named_modules():
        holds = any(isinstance(m, SinkhornMultiheadAttention) for m in module.modules())
        if isinstance(module, nn.TransformerEncoder) and module.use_nested_tensor and holds:
            setattr(module, _NESTED, True)
            module.use_nested_tensor = False
            names.append(name)
    return tuple(names)
