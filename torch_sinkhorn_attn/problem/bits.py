"""Boolean matrices as Python integers, one a row: bit j of row i is entry (i, j)."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

_GATHER_BITS = 0x0102040810204080  # times eight bytes of 0 or 1, as one integer: their bits are in the highest byte


def packed(matrix: Tensor) -> tuple[int, bytes]:
    """A boolean CPU matrix `[n, m]` as bytes, eight entries in each, behind the number of bytes of a row."""
    rows, columns = matrix.shape
    width = max(1, -(-columns // 8))  # so that rows without columns can be counted too
    eights = torch.zeros(rows, width, dtype=torch.int64, device="cpu")  # a view of any strides can't be read by eights
    eights.view(torch.bool)[:, :columns] = matrix
    found = ((eights * _GATHER_BITS) >> 56).to(torch.uint8)
    return width, raw(found)


def integers(width: int, data: bytes) -> list[int]:
    """The rows of a packed matrix."""
    return [int.from_bytes(data[at : at + width], "little") for at in range(0, len(data), width)]


def transposed(rows: Sequence[int], num_cols: int) -> list[int]:
    """The columns of the matrix that has these rows.

    >>> transposed([0b01, 0b11, 0b10], 2)
    [3, 6]
    """
    width = -(-num_cols // 8)
    data = bytearray().join(row.to_bytes(width, "little") for row in rows)
    shift = torch.arange(8, dtype=torch.uint8, device="cpu")
    eights = torch.frombuffer(data, dtype=torch.uint8).view(len(rows), width, 1)
    matrix = (eights >> shift).bitwise_and_(1).view(len(rows), 8 * width)[:, :num_cols]
    return integers(*packed(matrix.t().contiguous().view(torch.bool)))


def members(x: int) -> Iterator[int]:
    """The places of the bits of x that are set, in order.

    >>> list(members(0b1010))
    [1, 3]
    """
    digits = f"{x:b}"[::-1]
    place = digits.find("1")
    while place >= 0:
        yield place
        place = digits.find("1", place + 1)


def from_members(places: Sequence[int]) -> int:
    """The integer whose bits at these places are set."""
    if not places:
        return 0
    data = bytearray(max(places) // 8 + 1)
    for place in places:
        data[place >> 3] |= 1 << (place & 7)
    return int.from_bytes(data, "little")


def raw(x: Tensor) -> bytes:
    """The memory of a CPU tensor."""
    x = x.contiguous()
    return ctypes.string_at(x.data_ptr(), x.numel() * x.element_size())
