"""The package's operators exist as soon as both it and torch are imported, in whatever order: `torch.export.load`,
`torch.jit.load` and `torch.ops.torch_sinkhorn_attn` find them, though nothing else of the package was asked for.

Without torch nothing is done, and torch is not imported for their sake. Where a module of the package is the first to
import torch, they wait for the name that was asked for: they need that module whole.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_PACKAGE = __name__.partition(".compat")[0]
_DEFINING = ("boundary.autograd", "boundary.bands", "problem.masks.scan")  # operators and their derivatives


def register_beside_torch() -> None:
    """Now, if torch is there; else right after it is imported."""
    if _being_imported(f"{_PACKAGE}."):
        return  # and `lazy` comes back
    if sys.modules.get("torch") is not None:
        for module in _DEFINING:
            importlib.import_module(f"{_PACKAGE}.{module}")
    elif not any(isinstance(x, _WhenTorchIsImported) for x in sys.meta_path):
        sys.meta_path.insert(0, _WhenTorchIsImported())


def _being_imported(prefix: str) -> bool:
    specs = (getattr(module, "__spec__", None) for name, module in [*sys.modules.items()] if name.startswith(prefix))
    return any(getattr(spec, "_initializing", False) for spec in specs)


class _WhenTorchIsImported(MetaPathFinder):
    """Finds torch as usual, and steps aside."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(Loader):
    """torch's own loader, which the module gets back."""

    def __init__(self, loader: Loader):
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        register_beside_torch()
