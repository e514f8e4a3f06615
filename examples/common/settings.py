"""Settings of a run: fields of a dataclass, each with its default, what is allowed and what it means. Each is an option
of the command line, with the same check and help."""

from __future__ import annotations

import argparse
import math
from dataclasses import Field, dataclass, field, fields
from typing import Any

from examples.common.text import clip

_HUGE = 10**300
VAST = 10**9
VAST_AREA = VAST**2  # of plan entries, which are products of two lengths
"""Bounds that only those who exceed them are told of."""


@dataclass(frozen=True)
class Range:
    """The finite numbers from ``low`` to ``high``; ``ends`` says which of the two belong, as in [0, 1)."""

    low: float
    high: float = math.inf
    ends: str = "[]"

    def __contains__(self, value: float) -> bool:
        if isinstance(value, int):  # of hundreds of digits it is no float
            value = min(max(value, -_HUGE), _HUGE)
        above = self.low <= value if self.ends[0] == "[" else self.low < value
        below = value <= self.high if self.ends[1] == "]" else value < self.high
        return math.isfinite(value) and above and below

    def __str__(self) -> str:
        text = f"{'at least' if self.ends[0] == '[' else 'above'} {self.low}"
        return text + (
            f" and {'at most' if self.ends[1] == ']' else 'below'} {self.high}"
            if self.high not in (VAST, VAST_AREA, math.inf)
            else ""
        )

    def check(self, option: str, value: float) -> None:
        """Raise ValueError unless ``value`` belongs."""
        if value not in self:
            hidden = self.high in (VAST, VAST_AREA)
            allowed = f"{self} and at most {self.high}" if hidden and self.high < value else str(self)
            raise ValueError(f"{option} must be {allowed}, got {clip(str(value))}")


@dataclass(frozen=True)
class Choice:
    """One of several names."""

    names: tuple[str, ...]

    def check(self, option: str, value: str) -> None:
        """Raise ValueError unless ``value`` is one of them."""
        if value not in self.names:
            raise ValueError(f"{option} must be one of {', '.join(self.names)}, got {value!r}")


def option_name(name: str) -> str:
    """The command line's name of a setting."""
    return f"--{name.replace('_', '-')}"


_THREADS = Range(1, 1024)


def setting(default: Any, allowed: Range | Choice, meaning: str) -> Any:
    """A field that is a number or one of several names."""
    return field(default=default, metadata={"allowed": allowed, "meaning": meaning})


def settings_of(kind: type) -> dict[str, Field[Any]]:
    """The fields of a dataclass that ``setting`` made, by name."""
    return {field.name: field for field in fields(kind) if field.metadata}


def check_settings(values: Any) -> None:
    """Raise ValueError unless every such field of a dataclass is allowed, or None where that is its default."""
    for name, of in settings_of(type(values)).items():
        value = getattr(values, name)
        if value is not None or of.default is not None:
            of.metadata["allowed"].check(option_name(name), value)


def add_setting(parser: argparse.ArgumentParser, of: Field[Any], default: str | None = None) -> None:
    """The option of a setting, None unless it is given; ``default`` is what the help calls the field's default."""
    allowed, text = of.metadata["allowed"], of.metadata["meaning"]
    default = str(of.default) if default is None else default
    if isinstance(allowed, Choice):
        text = f"{text}: {', '.join(allowed.names)} (default: {default})"
        parser.add_argument(option_name(of.name), choices=allowed.names, metavar="NAME", help=text)
        return
    kind, metavar = (float, "X") if str(of.type).startswith("float") else (int, "N")
    parser.add_argument(option_name(of.name), type=kind, metavar=metavar, help=f"{text} (default: {default})")


def given(options: argparse.Namespace, kind: type) -> dict[str, Any]:
    """The settings of the dataclass that the command line names."""
    found = {name: getattr(options, name, None) for name in settings_of(kind)}
    return {name: value for name, value in found.items() if value is not None}


def add_threads(parser: argparse.ArgumentParser, default: int | None = None) -> None:
    """``--threads``."""
    shown = "PyTorch's choice" if default is None else default
    parser.add_argument(
        "--threads", type=int, default=default, metavar="N", help=f"threads for PyTorch (default: {shown})"
    )


def set_threads(options: argparse.Namespace) -> None:
    """Do as ``--threads`` says, where the subcommand has it.

    Raises:
        ValueError: it is out of range.
    """
    if getattr(options, "threads", None) is not None:
        _THREADS.check("--threads", options.threads)
        import torch  # settings alone do without

        torch.set_num_threads(options.threads)


def add_quiet(parser: argparse.ArgumentParser) -> None:
    """``--quiet``."""
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
