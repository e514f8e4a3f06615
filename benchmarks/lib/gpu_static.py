"""What the compiler makes of a launch, on a machine without a GPU: registers, spills, shared memory, tensor-core
instructions, and the instructions of the loop that matters, per score. It needs the triton wheel alone, whose ptxas,
cuobjdump and nvdisasm read NVIDIA's code; AMD's is read as assembly.

Instructions are those of one warp's stream, divided by the scores that each of its lanes owns. A multiprocessor issues
four warp instructions (128 lanes) a cycle and 16 exp2 (MUFU), so one MUFU a score takes as long as eight others.
"""

from __future__ import annotations

import collections
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from torch_sinkhorn_attn.engines.triton.launch import Chip, Launch

BIN = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
TENSOR = ("HMMA", "HGMMA", "UTCHMMA", "UTCQMMA", "DMMA", "v_mfma")  # tensor-core instructions of sm_80 to sm_100, AMD's
EXPONENTIAL = ("MUFU.EX2", "v_exp_f32")
ARITHMETIC = ("FFMA", "FADD", "FMUL", "FMNMX", "v_fma", "v_add_f32", "v_mul_f32", "v_pk")
LOCAL = ("LDL", "STL", "scratch_load", "scratch_store")
ENOUGH = 0.9  # of the work that the scores of one turn need; the shortest loop that has it is the one of a usual turn


@dataclass(frozen=True)
class Compiled:
    """What one kernel takes; `loop` holds the instructions of the loop that was chosen, one turn of which is `scores`
    scores."""

    name: str
    target: str
    registers: int
    spilled: int  # bytes of stack of a thread
    local: int  # instructions that read or write it
    shared: int
    warps: int
    lanes: int  # of a warp
    tensor: int  # tensor-core instructions in all the code
    scores: int
    loop: tuple[str, ...]

    @property
    def per_score(self) -> float:
        """Instructions of the loop for each score."""
        return len(self.loop) * self.warps * self.lanes / self.scores

    def opcodes(self, most: int = 8) -> dict[str, float]:
        """The most frequent instructions of the loop, each per score."""
        count = collections.Counter(x.split()[0].split(".")[0] for x in self.loop)
        return {name: round(n * self.warps * self.lanes / self.scores, 2) for name, n in count.most_common(most)}

    @property
    def products(self) -> float | None:
        """Multiply-adds of the loop's tensor-core instructions, for each score: 64 for each product over 64 features,
        so that an unrolled loop shows. None where the instructions do not say their shape (sm_100, AMD)."""
        total = 0
        for x in self.loop:
            if found := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", x):  # of a warp group, four warps
                total += int(found[1]) * int(found[2]) * int(found[3]) * self.warps // 4
            elif found := re.match(r"HMMA\.(16)(8)(16|8)\b", x):
                total += int(found[1]) * int(found[2]) * int(found[3]) * self.warps
            elif x.startswith(TENSOR):
                return None
        return total / self.scores if total else None


def compiled(launch: Launch, chip: Chip, scores: int, work: str = "exp2", trips: int = 1) -> Compiled:
    """Compiles a launch for a chip.

    `work` says which loop matters: "exp2", the one that makes tiles of the plan, `scores` scores a turn, or "vector",
    the one with the arithmetic, for kernels that hold the plan. Loops inside it are taken `trips` times a turn.
    """
    hip = chip.backend == "hip"
    target = GPUTarget(chip.backend, chip.arch, 64 if hip else 32)
    source = launch.source()
    built = triton.compile(ASTSource(**source), target=target, options=launch.options)
    text = built.asm["amdgcn"] if hip else _disassembled(built.asm["cubin"])
    code, labels = (_amd if hip else _nvidia)(text)
    if hip:
        registers, spilled = (
            _number(r"\.vgpr_count:\s+(\d+)", text),
            _number(r"\.private_segment_fixed_size:\s+(\d+)", text),
        )
    else:
        registers, spilled = _usage(built.asm["cubin"])
    return Compiled(
        name=launch.kernel.__name__,
        target=str(chip.arch) if hip else f"sm_{chip.arch}",
        registers=registers,
        spilled=spilled,
        local=sum(x.startswith(LOCAL) for x in code),
        shared=built.metadata.shared,
        warps=built.metadata.num_warps,
        lanes=target.warp_size,
        tensor=sum(x.startswith(TENSOR) for x in code),
        scores=scores,
        loop=tuple(
            _loop(code, labels, work == "vector", scores / (built.metadata.num_warps * target.warp_size), trips)
        ),
    )


def _loop(code: list[str], labels: dict[str, int], vector: bool, scores: float, trips: int) -> list[str]:
    """The shortest loop, by backward branches, that does the work of so many scores of a lane: a kernel may have others
    for what is rare."""
    ends: dict[int, int] = {}
    for end, instruction in enumerate(code):
        for label in re.findall(r"\.L\w+", instruction) if re.match(r"BRA|s_c?branch", instruction) else ():
            if labels.get(label, end) < end:
                ends[labels[label]] = max(end, ends.get(labels[label], 0))
    able = []
    for first, end in ends.items():
        loop = code[first : end + 1]
        others = vector and any(x.startswith((*EXPONENTIAL, *TENSOR)) for x in loop)
        if not others and sum(x.startswith(ARITHMETIC if vector else EXPONENTIAL) for x in loop) >= ENOUGH * scores:
            able.append((end - first, first, end))
    if not able:
        return []
    _, first, last = min(able)
    loop = code[first : last + 1]
    for start, end in ends.items():
        if first < start and end < last:
            loop += (trips - 1) * code[start : end + 1]
    return loop


def _nvidia(text: str) -> tuple[list[str], dict[str, int]]:
    labels, code = {}, []
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(code)
        elif found := re.search(r"/\*[0-9a-f]+\*/\s+(.*?)\s*;", line):
            code.append(re.sub(r"^@!?U?P\w+\s+", "", found[1]))
    return code, labels


def _amd(text: str) -> tuple[list[str], dict[str, int]]:
    labels, code = {}, []
    for line in text.splitlines():
        if label := re.match(r"(\.LBB\w+):", line):
            labels[label[1]] = len(code)
        elif found := re.match(r"\s+([a-z]\w+.*?)\s*(?:;.*)?$", line):
            code.append(found[1])
    return code, labels


def _disassembled(cubin: bytes) -> str:
    return _tool("nvdisasm", "-c", cubin)


def _usage(cubin: bytes) -> tuple[int, int]:
    found = re.search(r"REG:(\d+) STACK:(\d+)", _tool("cuobjdump", "-res-usage", cubin))
    assert found is not None
    return int(found[1]), int(found[2])


def _tool(name: str, flag: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([f"{BIN}/{name}", flag, file.name], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0
