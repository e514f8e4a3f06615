"""Sinkhorn attention in pure JAX: Pallas kernels for TPUs, and plain XLA for every other device.

`sinkhorn_attention`, `Dustbin`, `SinkhornAux` and `Lowering` are loaded when first asked for.
"""

from __future__ import annotations

import importlib

_HOMES = {"sinkhorn_attention": "api", "SinkhornAux": "api", "Dustbin": "prepare", "Lowering": "lowering"}
__all__ = ["Dustbin", "Lowering", "SinkhornAux", "sinkhorn_attention"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
