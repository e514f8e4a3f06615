"""Optimal-transport attention for PyTorch: balanced, banded, exactly differentiable; for JAX in `engines.tpu`.

Nothing is imported before it is asked for, so the JAX half needs no torch.
"""

from typing import TYPE_CHECKING

from torch_sinkhorn_attn.compat import lazy, registration

if TYPE_CHECKING:
    from torch_sinkhorn_attn.bands import PlanBand, sinkhorn_plan_band
    from torch_sinkhorn_attn.certificates import Certificate, certify
    from torch_sinkhorn_attn.choosing import Settings, choose_settings
    from torch_sinkhorn_attn.convergence import iterations_used, residual_history
    from torch_sinkhorn_attn.cost import TransportCost, sinkhorn_cost
    from torch_sinkhorn_attn.divergence import sinkhorn_divergence, squared_distance_features
    from torch_sinkhorn_attn.dustbin import Dustbin
    from torch_sinkhorn_attn.functional import sinkhorn_attention, sinkhorn_plan
    from torch_sinkhorn_attn.integrations.replace import ReplacementReport, replace_attention, restore_attention
    from torch_sinkhorn_attn.integrations.superglue import replace_superglue, restore_superglue
    from torch_sinkhorn_attn.integrations.transformers import (
        TransformersReport,
        choose_layers,
        register_transformers,
        transformers_report,
    )
    from torch_sinkhorn_attn.matches import Matches, sinkhorn_matches
    from torch_sinkhorn_attn.modules import SinkhornMultiheadAttention
    from torch_sinkhorn_attn.problem.looking import set_checks
    from torch_sinkhorn_attn.problem.status import SinkhornAux, Status
    from torch_sinkhorn_attn.scout import scout_centers

__version__ = "0.1.0"

__all__ = [
    "Certificate", "Dustbin", "Matches", "PlanBand", "ReplacementReport", "Settings", "SinkhornAux",
    "SinkhornMultiheadAttention", "Status", "TransformersReport", "TransportCost", "certify", "choose_layers",
    "choose_settings", "iterations_used", "register_transformers", "replace_attention", "replace_superglue",
    "residual_history", "restore_attention", "restore_superglue", "scout_centers", "set_checks", "sinkhorn_attention",
    "sinkhorn_cost", "sinkhorn_divergence", "sinkhorn_matches", "sinkhorn_plan", "sinkhorn_plan_band",
    "squared_distance_features", "transformers_report",
]  # fmt: skip

_HOMES = {
    "bands": ("PlanBand", "sinkhorn_plan_band"),
    "certificates": ("Certificate", "certify"),
    "choosing": ("Settings", "choose_settings"),
    "convergence": ("iterations_used", "residual_history"),
    "cost": ("TransportCost", "sinkhorn_cost"),
    "divergence": ("sinkhorn_divergence", "squared_distance_features"),
    "dustbin": ("Dustbin",),
    "functional": ("sinkhorn_attention", "sinkhorn_plan"),
    "integrations.replace": ("ReplacementReport", "replace_attention", "restore_attention"),
    "integrations.superglue": ("replace_superglue", "restore_superglue"),
    "integrations.transformers": (
        "TransformersReport", "choose_layers", "register_transformers", "transformers_report",
    ),
    "matches": ("Matches", "sinkhorn_matches"),
    "modules": ("SinkhornMultiheadAttention",),
    "problem.looking": ("set_checks",),
    "problem.status": ("SinkhornAux", "Status"),
    "scout": ("scout_centers",),
}  # fmt: skip
__getattr__, __dir__ = lazy.names(__name__, {name: home for home, names in _HOMES.items() for name in names})
registration.register_beside_torch()
