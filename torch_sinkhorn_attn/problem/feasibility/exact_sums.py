"""Cumulative sums of masses without rounding, in integers: a difference of two of them is right to its last bit."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torch_sinkhorn_attn.problem.segments import segment_sum

_BITS = 60  # of an integer sum


class ExactSums:
    """Sums of row masses `[N, H, L]` and column masses `[N, H, S]`, float64 and not negative, before each token.

    A mass is kept in units of 2^-60 of its problem's power of two, and what is left of it in units 2^-38 or less of
    these (ten million tokens; fewer have finer ones): two int64 numbers, whose sums do not overflow. Masses of more
    than a dozen decades below the total are thus exact. Where the first number holds everything the second is left out.
    """

    def __init__(self, rows: Tensor, cols: Tensor):
        largest = torch.maximum(_largest(rows), _largest(cols))[..., None]
        unit = torch.frexp(largest).exponent  # in which the totals neither overflow nor vanish
        total = torch.maximum(*(_times_exp2(x, -unit).sum(-1, keepdim=True) for x in (rows, cols)))
        exponent = _BITS - 1 - torch.frexp(total).exponent - unit  # the sum itself may have been rounded up
        most = max(rows.shape[-1], cols.shape[-1], 1)
        rest_bits = _BITS - math.ceil(math.log2(most + 1))
        parts = [_split(x, exponent, rest_bits) for x in (rows, cols)]
        if not any(bool(rest.any()) for _, rest in parts):
            parts = [[whole] for whole, _ in parts]
        self.weights = [1.0, 2.0**-rest_bits]
        self.unit = _times_exp2(torch.ones_like(total), -exponent)  # of what is returned
        (self._row_terms, self.row), (self._col_terms, self.col) = (
            (terms, [_before(t) for t in terms]) for terms in parts
        )

    def by_segment(self, segments: tuple[Tensor | None, Tensor | None], count: int) -> tuple[Tensor, Tensor]:
        """Sums of each segment, `[N, H, G]`: of the rows, and of the rows less the columns."""
        row, col = (
            [segment_sum(t, index, count) for t in terms]
            for terms, index in zip((self._row_terms, self._col_terms), segments, strict=True)
        )
        return self._float(row), self._float([x - y for x, y in zip(row, col, strict=True)])

    def between(self, start: Tensor, end: Tensor, columns: bool = False) -> Tensor:
        """Mass of the tokens `[start, end)`."""
        return self._float(_spans(self.col if columns else self.row, start, end))

    def excess(self, rows: tuple[Tensor, Tensor], cols: tuple[Tensor, Tensor]) -> Tensor:
        """Mass of the rows `[start, end)` less that of the columns `[start, end)`."""
        pairs = zip(_spans(self.row, *rows), _spans(self.col, *cols), strict=True)
        return self._float([x - y for x, y in pairs])

    def _float(self, terms: list[Tensor]) -> Tensor:
        return sum(x.double() * w for x, w in zip(terms, self.weights, strict=False))  # type: ignore[return-value]


def _largest(x: Tensor) -> Tensor:
    return x.amax(-1) if x.shape[-1] else x.new_zeros(x.shape[:-1])


def _times_exp2(x: Tensor, exponent: Tensor) -> Tensor:
    """In two steps: 2 to an exponent that leads from the smallest numbers to 1 is itself no number."""
    half = exponent // 2
    return torch.ldexp(torch.ldexp(x, half), exponent - half)


def _split(x: Tensor, exponent: Tensor, rest_bits: int) -> list[Tensor]:
    scaled = _times_exp2(x, exponent)
    whole = scaled.floor()
    return [whole.to(torch.int64), ((scaled - whole) * 2.0**rest_bits).to(torch.int64)]


def _before(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x.cumsum(-1), (1, 0))


def _spans(sums: list[Tensor], start: Tensor, end: Tensor) -> list[Tensor]:
    return [x.gather(-1, end) - x.gather(-1, start) for x in sums]
