"""Sinkhorn attention in pure JAX: Pallas kernels for TPUs, and plain XLA for every other device. Needs no torch.

    from torch_sinkhorn_attn.engines.tpu import sinkhorn_attention

Its names are loaded when first asked for.
"""

from typing import TYPE_CHECKING

from torch_sinkhorn_attn.compat import lazy

if TYPE_CHECKING:
    from torch_sinkhorn_attn.engines.tpu.front.api import SinkhornAux, sinkhorn_attention
    from torch_sinkhorn_attn.engines.tpu.front.prepare import Dustbin
    from torch_sinkhorn_attn.engines.tpu.method.lowering import Lowering

__all__ = ["Dustbin", "Lowering", "SinkhornAux", "sinkhorn_attention"]
_HOMES = {
    "sinkhorn_attention": "front.api",
    "SinkhornAux": "front.api",
    "Dustbin": "front.prepare",
    "Lowering": "method.lowering",
}
__getattr__, __dir__ = lazy.names(__name__, _HOMES)
