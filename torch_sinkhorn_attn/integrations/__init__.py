"""Sinkhorn attention in models that exist: nn.MultiheadAttention swapped in place, and Hugging Face transformers."""
