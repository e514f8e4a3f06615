"""How long something took."""

from __future__ import annotations

import os
import time
from typing import NamedTuple


class Seconds(NamedTuple):
    """Of time as it passes, and of processors at work: those of this process and of the programs that it ran."""

    wall: float = 0.0
    cpu: float = 0.0

    @classmethod
    def now(cls) -> Seconds:
        return cls(time.perf_counter(), sum(os.times()[:4]))

    def since(self, start: Seconds) -> Seconds:
        """This and what has passed since ``start``."""
        now = Seconds.now()
        return Seconds(self.wall + now.wall - start.wall, self.cpu + now.cpu - start.cpu)
