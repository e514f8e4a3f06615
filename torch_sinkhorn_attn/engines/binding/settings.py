"""Which kernels the bindings use: what the user asks for, in code or by TORCH_SINKHORN_ATTN_XLA_LOWERING."""

from __future__ import annotations

import os
from dataclasses import dataclass

SHAPES = ("auto", "resident", "wavefront", "streaming", "blockwise")
BASE_DTYPES = ("float32", "bfloat16")
_VARIABLE = "TORCH_SINKHORN_ATTN_XLA_LOWERING"


@dataclass(frozen=True)
class Settings:
    """What the user asks for; the fields are the arguments of `set_lowering`."""

    shape: str | None = None
    interpret: bool = False
    base_dtype: str = "float32"


_settings = Settings()


def set_lowering(shape: str | None = None, *, interpret: bool = False, base_dtype: str = "float32") -> None:
    """Choose how problems are lowered from now on in this process.

    Args:
        shape: None (default) takes "auto" on a TPU and "blockwise" elsewhere. "resident": a Pallas kernel that keeps
            the plan's band in VMEM for the whole solve; "wavefront": one that takes all iterations over a window's band
            at once, for any length; "streaming": Pallas kernels of any size; "auto": the first of these that can take
            the problem; "blockwise": plain XLA.
        interpret: run the Pallas kernels by their interpreter, on any device: to check them, for it is slow.
        base_dtype: "float32" or "bfloat16": of the products of the iterations that are not differentiated, in the
            resident kernel. Where float32 is computed all the same (v4, v5e and v5p have no bfloat16 vector unit;
            relaxation, over-relaxation and a tolerance need float32), a warning says why, once for each reason.

    TORCH_SINKHORN_ATTN_XLA_LOWERING sets the same at import, its words separated by commas: "streaming,interpret",
    "resident,bfloat16", "bfloat16".

    Raises:
        ValueError: for any other value.

    >>> set_lowering("streaming", interpret=True)
    >>> lowering()
    Settings(shape='streaming', interpret=True, base_dtype='float32')
    >>> set_lowering()
    """
    global _settings
    if shape is not None and shape not in SHAPES:
        raise ValueError(f"shape={shape!r} is unknown; choose one of {', '.join(map(repr, SHAPES))}, or None.")
    if base_dtype not in BASE_DTYPES:
        raise ValueError(f"base_dtype={base_dtype!r} is unknown; choose one of {', '.join(map(repr, BASE_DTYPES))}.")
    if interpret and shape in (None, "blockwise"):
        raise ValueError(
            f"interpret={interpret!r} runs a Pallas kernel by its interpreter, and shape={shape!r} names none; "
            "choose shape='auto', 'resident', 'wavefront' or 'streaming'."
        )
    _settings = Settings(shape, bool(interpret), base_dtype)


def lowering() -> Settings:
    """What `set_lowering` or the environment asked for."""
    return _settings


def _from_environment() -> None:
    text = os.environ.get(_VARIABLE, "")
    words = [word.strip() for word in text.split(",") if word.strip()]
    shapes = [word for word in words if word in SHAPES]
    dtypes = [word for word in words if word in BASE_DTYPES]
    if len(shapes) > 1 or len(dtypes) > 1 or set(words) - {*SHAPES, *BASE_DTYPES, "interpret"}:
        raise ValueError(
            f"{_VARIABLE}={text!r} must be words separated by commas: at most one of {', '.join(SHAPES)}, at most one "
            f"of {', '.join(BASE_DTYPES)}, and interpret."
        )
    try:
        set_lowering(*shapes, interpret="interpret" in words, **({"base_dtype": dtypes[0]} if dtypes else {}))
    except ValueError as error:
        raise ValueError(f"{_VARIABLE}={text!r}: {error}") from None


_from_environment()
