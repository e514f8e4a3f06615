"""What the fast part of the suite, `-m "not slow"`, leaves out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow_after(count: int, values: Iterable[Any]) -> list[Any]:
    """Values of one argument of a test, for `parametrize`: all but the first `count` are slow."""
    return [x if i < count else pytest.param(x, marks=pytest.mark.slow) for i, x in enumerate(values)]
