"""Sinkhorn attention as an `attn_implementation` of Hugging Face transformers, imported only when it is asked for."""

from __future__ import annotations

from torch_sinkhorn_attn.integrations.transformers.layers import choose_layers
from torch_sinkhorn_attn.integrations.transformers.registration import register_transformers
from torch_sinkhorn_attn.integrations.transformers.report import TransformersReport, transformers_report

__all__ = ["TransformersReport", "choose_layers", "register_transformers", "transformers_report"]
