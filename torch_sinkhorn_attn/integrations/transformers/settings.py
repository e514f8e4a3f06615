"""What one registered name computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from torch_sinkhorn_attn.dustbin import Dustbin
from torch_sinkhorn_attn.options import OF_A_LAYER, is_softmax
from torch_sinkhorn_attn.problem import argument_checks, data_checks

OPTIONS = (*OF_A_LAYER, "dustbin")
_CAUSAL = ("error", "softmax")
_CROSS = ("sinkhorn", "softmax")


@dataclass(frozen=True)
class Settings:
    """`options` are those of `sinkhorn_attention`, all of `OPTIONS`, checked."""

    name: str
    causal: str
    cross_attention: str
    layers: Callable[[nn.Module], object] | None
    options: dict[str, Any]

    @property
    def is_softmax(self) -> bool:
        return is_softmax(*(self.options[name] for name in ("base_iters", "tail_iters", "relaxation", "dustbin")))

    @property
    def balanced(self) -> bool:
        """Nothing is free to stay unmatched."""
        return self.options["relaxation"] is None and self.options["dustbin"] is None


def checked(
    name: str,
    causal: str,
    cross_attention: str | None,
    layers: Callable[[nn.Module], object] | None,
    options: dict[str, Any],
) -> Settings:
    """Settings with every default filled in, or a TypeError or ValueError."""
    unknown = sorted(set(options) - set(OPTIONS))
    if unknown:
        takes = ", ".join(("causal", "cross_attention", "layers", *OPTIONS))
        raise TypeError(f"register_transformers() got unknown option {unknown[0]!r}; it takes {takes}.")
    if causal not in _CAUSAL:
        raise ValueError(f"causal={causal!r} is unknown; choose 'error' or 'softmax'.")
    if cross_attention is not None and cross_attention not in _CROSS:
        raise ValueError(f"cross_attention={cross_attention!r} is unknown; choose 'sinkhorn', 'softmax' or None.")
    if layers is not None and not callable(layers):
        raise TypeError(
            f"layers must be a function of the attention module, or None, got {layers!r}; to choose by name, "
            "choose_layers(model, pattern)."
        )
    dustbin = options.get("dustbin")
    if dustbin is not None and not isinstance(dustbin, Dustbin):
        raise TypeError(f"dustbin must be a Dustbin or None, got {dustbin!r}; pass Dustbin(row_score, col_score).")
    chosen = argument_checks.options(options)
    chosen.solver(1, "float32")
    data_checks.check_dustbin_scores(dustbin)
    given = {name: getattr(chosen, name) for name in OF_A_LAYER} | {"dustbin": dustbin}
    if cross_attention is None:
        cross_attention = "softmax" if causal == "softmax" else "sinkhorn"
    return Settings(name, causal, cross_attention, layers, given)
