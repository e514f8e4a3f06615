"""JAX's interpreter of TPU kernels, on two cores, and what it finds of unordered accesses."""

from __future__ import annotations

import importlib
from typing import Any

from torch_sinkhorn_attn.engines.tpu.releases import interpreter

RACING = interpreter(cores=2, detect_races=True)
_HOMES = ("interpret_pallas_call", "interpret")  # of the interpreter, which 0.10 made a package


def watch_races(monkeypatch: Any) -> list[Any]:
    """Its states, one a call, each with `races_found`."""
    package = importlib.import_module("jax._src.pallas.mosaic.interpret")
    found = [package, *(getattr(package, name) for name in _HOMES if hasattr(package, name))]
    module = next(x for x in found if hasattr(x, "RaceDetectionState"))
    states: list[Any] = []
    make = module.RaceDetectionState
    monkeypatch.setattr(module, "RaceDetectionState", lambda **k: states.append(make(**k)) or states[-1])
    return states
