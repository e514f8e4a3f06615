"""Looking inside: which operators a forward pass runs, and the attention weights of one sequence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from .data import Batch, Crop, collate
from .model import FamilyClassifier
from .training import device_of

FloatArray = npt.NDArray[np.floating]
FUSED = "aten::_transformer_encoder_layer_fwd"
SINKHORN = "torch_sinkhorn_attn"


class _OperatorCounter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.counts[func.name().split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def operators(model: nn.Module, batch: Batch) -> tuple[int, int]:
    """How often evaluating a batch runs (a whole encoder layer fused with softmax, a Sinkhorn attention).

    Operators are counted below the modules: forward hooks would close the fused path, so they could not tell whether
    it is taken.
    """
    training = model.training
    model.eval()
    with _OperatorCounter() as counter:
        model(batch.tokens, batch.padding)
    model.train(training)
    sinkhorn = sum(count for name, count in counter.counts.items() if name.startswith(SINKHORN))
    return counter.counts[FUSED], sinkhorn


@torch.no_grad()
def attention_maps(model: FamilyClassifier, crop: Crop) -> list[FloatArray]:
    """The weights [n + 1, n + 1] of every layer, averaged over heads, for one crop of n residues and its `START`."""
    training = model.training
    model.eval()
    batch = collate([crop]).to(device_of(model))
    states, maps = model.embed(batch.tokens), []
    for layer in model.encoder.layers:
        assert isinstance(layer, nn.TransformerEncoderLayer)
        _, weights = layer.self_attn(states, states, states)  # post-norm: the attention sees the layer's input
        maps.append(weights[0].cpu().numpy())
        states = layer(states)
    model.train(training)
    return maps
