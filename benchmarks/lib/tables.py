"""One table per case: every function's time, memory and error, and which of them a case is too large for."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from .cases import Case, truth
from .functions import SUBJECT, Function, Outcome
from .measure import best_times, print_rows, relative
from .memory import Once, fresh

SECONDS, BYTES = 10.0, 6e9  # a limited function is left out where it is expected to take more
BLIND = 2**23  # score entries up to which one is tried that was not measured before
HEAD = ("function", "", "ms", f"x {SUBJECT}", "us/token", "peak MiB", "error", "error dQ", "")
WIDTHS = (-14, -18, 9, 8, 9, 9, 8, 8, -40)
TRAINING = {False: "forward", True: "forward + backward"}

Key = tuple[str, bool]  # function, with backward


@dataclass
class Cell:
    """What one function took for one case; seconds is None where it did not run, and `note` says why."""

    case: Case
    function: str
    backward: bool
    seconds: float | None = None
    ratio: float | None = None
    peak: int | None = None
    error: float | None = None
    error_dq: float | None = None
    note: str = ""

    @property
    def us_per_token(self) -> float | None:
        return None if self.seconds is None else 1e6 * self.seconds / self.case.tokens

    def row(self) -> list[str]:
        return [
            self.function, TRAINING[self.backward], cell(self.seconds, 1e3, ".1f"), cell(self.ratio, 1, ".2f"),
            cell(self.us_per_token, 1, ".2f"), cell(self.peak, 2**-20, ".1f"), cell(self.error, 1, ".1e"),
            cell(self.error_dq, 1, ".1e"), self.note,
        ]  # fmt: skip

    def record(self) -> dict[str, object]:
        case = self.case
        return {
            "support": case.support, "batch": case.batch, "heads": case.heads, "length": case.length,
            "width": case.width, "dtype": case.dtype, "base_iters": case.base_iters, "tail_iters": case.tail_iters,
            "function": self.function, "what": TRAINING[self.backward], "seconds": self.seconds,
            f"seconds_over_{SUBJECT}": self.ratio, "us_per_token": self.us_per_token, "peak_bytes": self.peak,
            "error_output": self.error, "error_dq": self.error_dq, "note": self.note,
        }  # fmt: skip


def cell(x: float | None, unit: float, form: str) -> str:
    return "" if x is None else format(x * unit, form)


@dataclass
class Tables:
    """Measures cases, each once, and remembers what the functions took to foresee what they will take."""

    functions: list[Function]
    repeat: int
    threads: int
    trial: bool = False  # measure each limited function once only, to see that it runs
    known: dict[Case, list[Cell]] = field(default_factory=dict)
    last: dict[Key, Cell] = field(default_factory=dict)

    def measure(self, case: Case, always: Iterable[str] = (), only: Iterable[str] = ()) -> list[Cell]:
        """The lines of `case`, of all functions or `only` those named; those in `always` are not left out for their
        size."""
        if case not in self.known:
            seen = {name for name, _ in self.last} - set(always) if self.trial else set()
            lines = [(f, b) for f, b in self._lines(case) if not (f.limited and f.name in seen)]
            lines = [(f, b) for f, b in lines if not only or f.name in only]
            self.known[case] = self._measure(case, lines, set(always))
        return self.known[case]

    def show(self, case: Case, always: Iterable[str] = ()) -> None:
        again = " (measured above)" if case in self.known else ""
        print(f"\n{case}{again}")
        if not again:
            print_rows([HEAD, *(x.row() for x in self.measure(case, always))], WIDTHS)

    def find(self, case: Case, function: str, backward: bool = True) -> Cell | None:
        """The line of a case that was measured."""
        for x in self.known.get(case, []):
            if (x.function, x.backward) == (function, backward) and x.seconds is not None:
                return x
        return None

    def _measure(self, case: Case, lines: list[tuple[Function, bool]], always: set[str]) -> list[Cell]:
        cells: list[Cell] = []
        runs: dict[Key, Callable[[], Outcome]] = {}
        for function, backward in lines:
            found = Cell(case, function.name, backward)
            cells.append(found)
            if function.limited and function.name not in always:
                found.note = self._too_large(function, found)
            if not found.note:
                once = self._once(function, found)
                if once is not None:
                    runs[function.name, backward] = function.prepare(case, backward)
                    self._errors(function, found, once)
                    found.peak = once.peak
        # The first round warms up, and counts only for what is too slow to have another.
        seconds = best_times({f"{name} {b}": run for (name, b), run in runs.items()}, self.repeat + 1, SECONDS)
        for x in cells:
            x.seconds = seconds.get(f"{x.function} {x.backward}")
        for x in cells:
            base = seconds.get(f"{SUBJECT} {x.backward}")
            if x.seconds is not None:
                x.ratio = x.seconds / base if base else None
                self.last[x.function, x.backward] = x
        return cells

    def _lines(self, case: Case) -> list[tuple[Function, bool]]:
        """Forward + backward of everything that has one, and forward alone of what hasn't and of what it is beside."""
        able = [f for f in self.functions if f.masks or case.window is None]
        if case.dtype != "float32":
            able = [f for f in able if f.name in (SUBJECT, "dense", "softmax") or not f.limited]
        forward = [f for f in able if f.gradient is None or f.name in (SUBJECT, "softmax")]
        return [(f, True) for f in able if f.gradient] + [(f, False) for f in forward]

    def _once(self, function: Function, found: Cell) -> Once | None:
        try:
            once = fresh(function.name, found.case, found.backward, self.threads)
        except (ValueError, TypeError, NotImplementedError) as refusal:
            found.note = f"refuses: {str(refusal).strip().splitlines()[0][:80]}"
            return None
        except Exception as error:  # a rival's own: a line in the table, not the end of it
            if not function.limited:
                raise
            found.note = f"fails: {type(error).__name__}"
            return None
        if once is None:
            found.note = "the process died (too much memory?)"
        return once

    def _errors(self, function: Function, found: Cell, once: Once) -> None:
        if function.same:
            output, grad = truth(found.case, function.gradient or "tail")
            found.error = relative(once.outcome[0], output)
            if once.outcome[1] is not None and grad is not None:
                found.error_dq = relative(once.outcome[1], grad)

    def _too_large(self, function: Function, found: Cell) -> str:
        """Why it is left out, or nothing: what it took the last time, in proportion to scores and iterations."""
        case, before = found.case, self.last.get((found.function, found.backward))
        if before is None or before.seconds is None:
            return "" if case.entries <= BLIND else "left out: too large to try first"
        entries, steps = case.entries / before.case.entries, case.iterations / before.case.iterations
        seconds = before.seconds * entries * (steps if function.iterates else 1)
        memory = (before.peak or 0) * entries * (steps if function.keeps else 1)
        if seconds <= SECONDS and memory <= BYTES:
            return ""
        return f"left out: would take about {seconds:.0f} s and {memory / 2**30:.1f} GiB"


def write_csv(path: Path, records: list[dict[str, object]]) -> None:
    if records:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(records[0]))
            writer.writeheader()
            writer.writerows(records)


def quiet() -> None:
    """Rivals warn of what was asked for, such as iterations that stop before convergence."""
    warnings.filterwarnings("ignore", module=r"(ot|geomloss|ott|jax|numpy)\b")
