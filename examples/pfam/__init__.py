"""A protein-pair aligner with optimal-transport attention, trained on real Pfam seed alignments.

``from examples.pfam import align, align_many, AlignedPair``: see ``library.py``. Nothing else is imported before that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .library import AlignedPair, align, align_many

__all__ = ["AlignedPair", "align", "align_many"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from . import library

        return getattr(library, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
