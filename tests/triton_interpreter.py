"""Triton's interpreter, at half its price: at every call of a helper it prepares triton's modules anew, which once in a
process is enough."""

from __future__ import annotations

from typing import Any


def quicken() -> None:
    """Prepare them once for each function. For the whole process; where nothing is interpreted it changes nothing."""
    from triton.runtime import interpreter

    prepare, prepared = interpreter._patch_lang, set()

    def once(function: Any) -> None:
        if function not in prepared:
            prepared.add(function)
            prepare(function)

    if not hasattr(interpreter, "_LangPatchScope"):  # later releases undo it after each kernel
        interpreter._patch_lang = once
