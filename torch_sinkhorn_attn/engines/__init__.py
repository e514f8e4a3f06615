"""The engines, in modules of the same names; `registry` says which there are and chooses. Nothing is imported before it
is asked for: `engines.tpu`, the JAX half, needs no torch."""

from typing import TYPE_CHECKING

from torch_sinkhorn_attn.compat import lazy

if TYPE_CHECKING:
    from torch_sinkhorn_attn.engines.registry import ENGINES, REFERENCE, check_name, choose, engine_of

__all__ = ["ENGINES", "REFERENCE", "check_name", "choose", "engine_of"]
__getattr__, __dir__ = lazy.names(__name__, dict.fromkeys(__all__, "registry"))
