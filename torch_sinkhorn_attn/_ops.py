"""The namespace of the ops: the name by which the package was imported, so that two copies of it do not collide.

Hugging Face's kernel-builder puts a file of its own, with these two names, in this one's place; see `hub/`.
"""

from __future__ import annotations

import torch

_NAMESPACE = __name__.partition(".")[0]

ops = getattr(torch.ops, _NAMESPACE)


def add_op_namespace_prefix(op_name: str) -> str:
    """The op's full name."""
    return f"{_NAMESPACE}::{op_name}"
