"""A branch that only data take which do not suit the kernels: marked, so that whoever counts a program can tell it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from torch_sinkhorn_attn.engines.tpu.method.lowering import UNFIT


def of_unfit_data(branch: Callable[[], Any]) -> Callable[[], Any]:
    """The branch in the scope `UNFIT`."""

    def marked() -> Any:
        with jax.named_scope(UNFIT):
            return branch()

    return marked
