"""Packages whose names are imported when they are first asked for (PEP 562)."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping

from torch_sinkhorn_attn.compat import registration


def names(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package: `homes` says which of its modules each name comes from. Its modules are
    names too, as if they had been imported with it."""

    def getattribute(name: str) -> object:
        module = sys.modules[package]
        if name in homes:
            found: object = getattr(importlib.import_module(f"{package}.{homes[name]}"), name)
            setattr(module, name, found)
        elif not name.startswith("_") and importlib.util.find_spec(f"{package}.{name}") is not None:
            found = importlib.import_module(f"{package}.{name}")
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if "torch" in sys.modules:
            registration.register_beside_torch()
        return found

    def directory() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return getattribute, directory
