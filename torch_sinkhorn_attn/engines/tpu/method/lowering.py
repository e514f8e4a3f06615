"""How a problem is lowered: which kernels, and with which numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SHAPES = ("auto", "resident", "wavefront", "streaming", "blockwise")
VMEM = {"v4": 16 << 20, "v5e": 128 << 20, "v5p": 64 << 20, "v6e": 128 << 20, "tpu7x": 64 << 20}  # bytes of a core
USABLE = 15 / 16  # of it; the rest is the compiler's


@dataclass(frozen=True)
class Lowering:
    """The choice of kernels, part of the compiled program.

    Attributes:
        shape: "resident" (a Pallas kernel that keeps the plan's band in VMEM for the whole solve), "streaming" (Pallas
            kernels of any size, tiles computed again in each pass), "auto" (resident where `choice.refusal` finds
            nothing against it, else streaming) or "blockwise" (plain XLA, any device).
        interpret: run a Pallas kernel by its interpreter: True, or what `releases.interpreter` makes.
        base_dtype: of the products of the stopped base, "float32" or "bfloat16"; the resident kernel's only.
        generation: of the TPU, a key of `VMEM`.

    >>> Lowering("resident", base_dtype="bfloat16").vmem_limit >> 20
    120
    """

    shape: str = "blockwise"
    interpret: Any = False
    base_dtype: str = "float32"
    generation: str = "v6e"

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ValueError(f"shape={self.shape!r} is unknown; choose one of {', '.join(map(repr, SHAPES))}.")
        if self.base_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"base_dtype={self.base_dtype!r} is unknown; choose 'float32' or 'bfloat16'.")
        if self.generation not in VMEM:
            raise ValueError(f"generation={self.generation!r} is unknown; choose one of {', '.join(VMEM)}.")

    @property
    def vmem_limit(self) -> int:
        """Bytes of VMEM a kernel may take."""
        return int(VMEM[self.generation] * USABLE)
