"""The one way kernels are launched, so that launches can be recorded instead of made.

Under `recording` a schedule runs on tensors of the device "meta", without a GPU, and every launch it would make is
noted: what the compiler is given (`Launch.source`) is then exactly what a GPU would run. Since "meta" tensors hold no
data, such a run also shows that nothing is looked at on the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

KIB = 1024
MOST_PROGRAMS = (2**31 - 1, 65535, 65535)  # along each axis of a grid
OPTIONS = ("num_warps", "num_stages", "num_ctas", "waves_per_eu", "matrix_instr_nonkdim", "maxnreg")


class Chip(NamedTuple):
    """What kernels are shaped by.

    backend: "cuda" or "hip".
    arch: compute capability, 90 for 9.0; the name of the architecture with "hip".
    shared: bytes of shared memory that one program may take.
    processors: multiprocessors (compute units).
    """

    backend: str
    arch: int | str
    shared: int
    processors: int


CHIPS = {
    "sm_80": Chip("cuda", 80, 163 * KIB, 108),
    "sm_89": Chip("cuda", 89, 99 * KIB, 128),
    "sm_90": Chip("cuda", 90, 227 * KIB, 132),
    "sm_100": Chip("cuda", 100, 227 * KIB, 148),
    "gfx942": Chip("hip", "gfx942", 64 * KIB, 304),
}
INTERPRETED = CHIPS["sm_90"]  # what CPU and "meta" tensors stand for


class Launch(NamedTuple):
    """One launch: `kernel[grid](*args, **meta)`; `meta` holds the keyword arguments, the compiler's options too."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    meta: dict[str, Any]

    @property
    def options(self) -> dict[str, int]:
        """Those of the compiler: warps, stages."""
        return {name: x for name, x in self.meta.items() if name in OPTIONS}

    def source(self) -> dict[str, Any]:
        """The arguments of `triton.compiler.ASTSource`, made as triton's own launch makes them: a number that is 1, and
        None, are constants; numbers and addresses that 16 divides are known to be so."""
        names = self.kernel.arg_names
        given = dict(zip(names, self.args)) | {name: x for name, x in self.meta.items() if name not in OPTIONS}
        constants: dict[tuple[int, ...], Any] = {}
        attributes: dict[tuple[int, ...], list[Any]] = {}

        def described(x: Any, path: tuple[int, ...], constant: bool, plain: bool) -> Any:
            if constant or x is None or (type(x) is int and x == 1 and not plain):
                constants[path] = x
                words = [i for i, part in enumerate(x) if isinstance(part, str)] if isinstance(x, tuple) else []
                attributes.update({(*path, i): [] for i in words})  # they mean nothing, and are in the cache's key
                return "constexpr"
            if isinstance(x, tuple):
                parts = [described(part, (*path, i), False, plain) for i, part in enumerate(x)]
                return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
            start = x.storage_offset() * x.element_size() if isinstance(x, Tensor) else x
            if type(start) is int and not plain:
                attributes[path] = [["tt.divisibility", 16]] if start % 16 == 0 else []
            return _type(x)

        signature = {
            parameter.name: described(
                given.get(parameter.name, parameter.default), (i,), parameter.is_constexpr, parameter.do_not_specialize
            )
            for i, parameter in enumerate(self.kernel.params)
        }
        return {"fn": self.kernel, "signature": signature, "constexprs": constants, "attrs": attributes}


class Recording(NamedTuple):
    chip: Chip
    launches: list[Launch]


_recording: ContextVar[Recording | None] = ContextVar("recording", default=None)


@contextmanager
def recording(chip: Chip) -> Iterator[list[Launch]]:
    """Notes launches, as they are made for `chip`, and makes none."""
    found = Recording(chip, [])
    token = _recording.set(found)
    try:
        yield found.launches
    finally:
        _recording.reset(token)


def chip_of(device: torch.device) -> Chip:
    """The chip that kernels for tensors of `device` run on."""
    if (found := _recording.get()) is not None:
        return found.chip
    return _properties(device) if device.type == "cuda" else INTERPRETED


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """`kernel[grid](*args, **meta)`, on the device of the tensors among `args`; a grid without programs is nothing.

    Raises:
        ValueError: the grid is larger than a launch can be.
    """
    if 0 in grid:
        return
    if any(n > most for n, most in zip(grid, MOST_PROGRAMS)):
        raise ValueError(
            f"engine='triton' would launch a grid of {grid} programs, more than {MOST_PROGRAMS}: split the batch."
        )
    if (found := _recording.get()) is not None:
        found.launches.append(Launch(kernel, grid, args, meta))
        return
    device = next(x.device for x in args if isinstance(x, Tensor))
    if device.type == "cuda" and device.index != torch.cuda.current_device():  # where triton would launch
        with torch.cuda.device(device):
            kernel[grid](*args, **meta)
    else:
        kernel[grid](*args, **meta)


@cache
def _properties(device: torch.device) -> Chip:
    found = torch.cuda.get_device_properties(device)
    shared = getattr(found, "shared_memory_per_block_optin", 64 * KIB)
    if torch.version.hip is not None:
        return Chip("hip", found.gcnArchName.split(":")[0], 64 * KIB, found.multi_processor_count)
    return Chip("cuda", 10 * found.major + found.minor, shared, found.multi_processor_count)


_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bool: "u1",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
}


def _type(x: Any) -> str:
    """The type of an argument in the compiler's words."""
    if isinstance(x, Tensor):
        return f"*{_TYPES[x.dtype]}"
    if isinstance(x, bool):
        return "u1"
    if isinstance(x, int):
        return "i32" if -(2**31) <= x < 2**31 else "i64"
    if isinstance(x, float):
        return "fp32"
    raise TypeError(f"a kernel cannot be given {x!r}")
