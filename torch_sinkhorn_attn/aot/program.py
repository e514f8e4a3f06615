"""How often a compiled program runs each of its instructions, from its text."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch_sinkhorn_attn.engines.tpu.method.lowering import UNFIT

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) =(.*?) ([a-z][\w\-]*)\(")
_CALLED = re.compile(r"(?:body|to_apply|branch_computations|true_computation|false_computation)=(\{[^}]*\}|%?[\w.\-]+)")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_FUSED = re.compile(r"calls=%?([\w.\-]+)")
_BOUND = re.compile(r"= s32\[\]\S* constant\((\d+)\)")
_KERNEL = re.compile(r'"body": ?"([^"]*)"')
_NAME = re.compile(r"%[\w.\-]+")
_ANNOTATION = re.compile(r", (?:metadata|backend_config|frontend_attributes)=.*")


@dataclass(frozen=True)
class Instruction:
    """An instruction of a program.

    Attributes:
        times: how often it runs; None inside a loop whose bound is not a constant.
        content: what it computes: equal for instructions that the compiler lists only once.
        unfit: whether it is in a branch that only data take which do not suit the kernels (the scope `UNFIT`).
    """

    times: int | None
    content: str
    unfit: bool = False


def instructions(text: str) -> dict[str, Instruction]:
    """Those of a program, by name.

    A loop is taken to count from 0 to the constant that its condition compares with, and not to end early.
    """
    bodies: dict[str, list[str]] = {}
    entry, current = "", ""
    for line in text.splitlines():
        if not line.startswith(" "):
            if found := _COMPUTATION.match(line):
                current = found[2]
                bodies[current] = []
                entry = current if found[1] else entry
        elif current:
            bodies[current].append(line)
    listed: dict[str, Instruction] = {}
    stack: list[tuple[str, int | None, bool]] = [(entry, 1, False)]
    while stack:
        name, times, unfit = stack.pop()
        for line in bodies.get(name, ()):
            if not (found := _INSTRUCTION.match(line)):
                continue
            listed[found[1]] = Instruction(times, _content(line, found[2], found[3], bodies), unfit)
            if found[3] not in ("while", "call", "conditional"):
                continue
            inner = times
            if condition := _CONDITION.search(line):
                bounds = [int(x) for text in bodies.get(condition[1], ()) for x in _BOUND.findall(text)]
                inner = None if times is None or not bounds else times * max(bounds)
            for called in _CALLED.findall(line):
                for callee in (x.strip(" %{}") for x in called.split(",")):
                    branch = found[3] == "conditional" and any(UNFIT in x for x in bodies.get(callee, ()))
                    stack.append((callee, inner, unfit or branch))
    return listed


def _content(line: str, result: str, operation: str, bodies: dict[str, list[str]]) -> str:
    if kernel := _KERNEL.search(line):
        return f"{result} {kernel[1]}"
    if fused := _FUSED.search(line):
        body = "\n".join(_ANNOTATION.sub("", inner) for inner in bodies.get(fused[1], ()))
        return f"{result} {_NAME.sub('%', body)}"
    return _NAME.sub("%", _ANNOTATION.sub("", line)) if operation == "copy" else line
