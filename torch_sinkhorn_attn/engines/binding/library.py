"""What is asked of a library of TPU tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from torch_sinkhorn_attn.engines.tpu.method.lowering import Lowering

Tensors = dict[str, Tensor | None]  # by name; an absent one is None


class Binding(Protocol):
    """What an engine asks of its library; a module can be one."""

    def platform(self) -> str:
        """JAX's name for the platform of its device."""

    def lowering(self) -> Lowering:
        """`program.lowering` of its device."""

    def run(
        self,
        function: Callable[..., dict[str, Any]],
        trees: tuple[Tensors, ...],
        statics: dict[str, Any],
        output: Tensor | None = None,
    ) -> Tensors:
        """`function(*trees, **statics)` of `functions`, with tensors in the places of arrays; `output`, where there is
        one already, lies where the results shall."""
