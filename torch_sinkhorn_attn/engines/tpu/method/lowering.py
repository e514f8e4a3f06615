"""How a problem is lowered: which kernels, and with which numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SHAPES = ("device", "auto", "resident", "wavefront", "streaming", "blockwise")
VMEM = {"v4": 16 << 20, "v5e": 128 << 20, "v5p": 64 << 20, "v6e": 128 << 20, "tpu7x": 64 << 20}  # bytes of a core
USABLE = 15 / 16  # of it; the rest is the compiler's
BFLOAT16_VECTORS = {"v6e", "tpu7x"}  # the vector units of the others work in float32 alone
UNKNOWN = "v6e"  # stands for a TPU of which nothing says what it is
UNFIT = "sinkhorn_of_unfit_data"  # the scope of branches that only data take which do not suit the kernels
_KINDS = {
    "TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5litepod": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p",
    "TPU v5p": "v5p", "TPU v6 lite": "v6e", "TPU v6e": "v6e", "TPU7x": "tpu7x", "TPU tpu7x": "tpu7x",
    "TPU v7x": "tpu7x", "TPU v7": "tpu7x",
}  # fmt: skip


def generation_of(device_kind: str | None) -> str:
    """The generation of a TPU by what the device calls itself; `UNKNOWN` for a name that is not known.

    >>> generation_of("TPU v5 lite"), generation_of("TPU v5"), generation_of("TPU v9")
    ('v5e', 'v5p', 'v6e')
    """
    return _KINDS.get(device_kind or "", UNKNOWN)


@dataclass(frozen=True)
class Lowering:
    """The choice of kernels, part of the compiled program.

    Attributes:
        shape: "resident" (a Pallas kernel that keeps the plan's band in VMEM for the whole solve), "wavefront" (one
            that takes all iterations over a window's band at once, for any length), "streaming" (Pallas kernels of any
            size, tiles computed again in each pass), "auto" (the first of these that takes the problem), "blockwise"
            (plain XLA, any device) or "device" ("auto" where the program is lowered for a TPU, "blockwise" elsewhere).
        interpret: run a Pallas kernel by its interpreter: True, or what `releases.interpreter` makes.
        base_dtype: of the products of the stopped base, "float32" or "bfloat16"; `choice.not_in_bfloat16` says where
            the second is not followed.
        generation: of the TPU, a key of `VMEM`; None: that of the TPU in this process, or that a mesh is made of, and
            "v6e" where there is none.

    >>> Lowering("resident", base_dtype="bfloat16", generation="v6e").vmem_limit >> 20
    120
    """

    shape: str = "device"
    interpret: Any = False
    base_dtype: str = "float32"
    generation: str | None = None

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ValueError(f"shape={self.shape!r} is unknown; choose one of {', '.join(map(repr, SHAPES))}.")
        if self.base_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"base_dtype={self.base_dtype!r} is unknown; choose 'float32' or 'bfloat16'.")
        if self.generation is not None and self.generation not in VMEM:
            known = ", ".join(VMEM)
            raise ValueError(f"generation={self.generation!r} is unknown; choose one of {known}, or None.")
        if self.interpret and self.shape in ("device", "blockwise"):
            raise ValueError(
                f"interpret={self.interpret!r} runs a Pallas kernel by its interpreter, and shape={self.shape!r} names "
                "none; choose shape='auto', 'resident', 'wavefront' or 'streaming'."
            )

    @property
    def chip(self) -> str:
        """The generation, found out where it was not given."""
        if self.generation is not None:
            return self.generation
        from torch_sinkhorn_attn.engines.tpu.releases import tpu_kind

        return generation_of(tpu_kind())

    @property
    def vmem_limit(self) -> int:
        """Bytes of VMEM a kernel may take."""
        return int(VMEM[self.chip] * USABLE)
