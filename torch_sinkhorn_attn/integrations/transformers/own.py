"""Models that keep their own attention, whatever their config says: they are told apart when they are built."""

from __future__ import annotations

import functools
import sys
import warnings
from typing import Any

from torch import nn

_NAMES: set[str] = set()  # what was registered
_HOOKED = "_asks_torch_sinkhorn_attn"


def watch(name: str) -> None:
    """From now on a model built with this attention that never calls it says so, and computes its default instead.

    transformers itself warns in `set_attn_implementation` and leaves such a model as it is, but builds one without a
    word (or ends in a KeyError, where the model looks in a table of its own attention classes). It has no hook for
    that, so the one method through which every model gets the name of its attention is wrapped, once; for names that
    were not registered here it is as before.
    """
    from transformers import PreTrainedModel

    _NAMES.add(name)
    original = PreTrainedModel.get_correct_attn_implementation
    if hasattr(original, _HOOKED):
        return

    @functools.wraps(original)
    def get_correct_attn_implementation(self: Any, requested_attention: str | None, *args: Any, **kwargs: Any) -> str:
        if requested_attention not in _NAMES:
            found: str = original(self, requested_attention, *args, **kwargs)
            return found
        default: str = original(self, None, *args, **kwargs)
        cls = type(self)
        if not cls._can_set_attn_implementation():
            warnings.warn(
                f"{cls.__name__} keeps its own attention: it cannot use {requested_attention!r} and computes "
                f"{default!r} attention. transformers_report(model) tells which layers call what.",
                stacklevel=2,
            )
            return default
        _complete_tables(cls, requested_attention, default)
        found = original(self, requested_attention, *args, **kwargs)
        return found

    setattr(get_correct_attn_implementation, _HOOKED, True)
    PreTrainedModel.get_correct_attn_implementation = get_correct_attn_implementation  # type: ignore[method-assign]


def _complete_tables(cls: type, name: str, default: str) -> None:
    """Tables like SAM_VISION_ATTENTION_CLASSES choose a class by the attention's name: ours is the default one."""
    for table_name, table in list(vars(sys.modules[cls.__module__]).items()):
        if not isinstance(table, dict) or "eager" not in table or not all(map(_is_module_class, table.values())):
            continue
        kept: Any = table.setdefault(name, table.get(default, table["eager"]))
        warnings.warn(
            f"{cls.__module__.rpartition('.')[2]}.{table_name} has no class for {name!r}: layers built from it keep "
            f"their own attention, {kept.__name__}. transformers_report(model) tells which.",
            stacklevel=3,
        )


def _is_module_class(x: object) -> bool:
    return isinstance(x, type) and issubclass(x, nn.Module)
