"""What the fast part of the suite, `-m "not slow"`, and what `make test`, `-m "not exhaustive"`, leave out."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest

# For XLA in a process of its own: compiles fast rather than well.
FAST = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def slow_after(count: int, values: Iterable[Any], exhaustive: Collection[Any] = ()) -> list[Any]:
    """Values of one argument of a test, for `parametrize`: all but the first `count` are slow. Those in `exhaustive`
    hold what others hold too, in another combination, and are left to `make test-all`."""
    found: list[Any] = []
    for i, x in enumerate(values):
        marks = [pytest.mark.slow] * (i >= count) + [pytest.mark.exhaustive] * (x in exhaustive)
        found.append(pytest.param(x, marks=marks) if marks else x)
    return found
