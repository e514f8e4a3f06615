"""`python -m torch_sinkhorn_attn.aot`: what the TPU's compiler says, on a machine without a TPU."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from marks import slow_after

import torch_sinkhorn_attn
from examples.pfam.aot import main as step_of_pfam
from torch_sinkhorn_attn.aot import attention, cli, environment, loops, report, slices
from torch_sinkhorn_attn.aot.attention import Configuration, disagreements
from torch_sinkhorn_attn.aot.child import CompileError, call
from torch_sinkhorn_attn.aot.chips import GIB, parse_topology
from torch_sinkhorn_attn.aot.cli import main
from torch_sinkhorn_attn.aot.failures import explain
from torch_sinkhorn_attn.aot.loops import Loop, weighted
from torch_sinkhorn_attn.aot.program import instructions
from torch_sinkhorn_attn.aot.report import capacity, memory
from torch_sinkhorn_attn.engines.tpu.resident.spills import spilled

ROOT = Path(__file__).parents[2]
needs_libtpu = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("jax", "libtpu")), reason="needs jax and libtpu"
)


def loop(depth: int, bundles: int, trips: int | None, skippable: int = 0) -> Loop:
    return Loop(0, 0, depth, bundles, bundles // 2, skippable, skippable // 2, trips, False, {})


def test_names_of_topologies() -> None:
    assert [parse_topology(name).name for name in ("v4", "v5e", "v5p", "V6e", "tpu7x", "v7x")] == [
        "v4:2x2x1", "v5e:2x4", "v5p:2x2x1", "v6e:2x4", "tpu7x:2x2x1", "tpu7x:2x2x1",
    ]  # fmt: skip
    assert parse_topology("v6e:16x16").chips == 256
    for wrong in ("v3", "v6e:2", "v6e:2x0", "v4:2x2", "v6e:axb", ""):
        with pytest.raises(ValueError, match="topology"):
            parse_topology(wrong)


def test_a_device_may_be_half_a_chip() -> None:
    assert capacity(parse_topology("v6e"), 8) == 32 * GIB
    assert capacity(parse_topology("tpu7x"), 8) == 96 * GIB


def test_weights_multiply_along_the_nest() -> None:
    loops = [loop(1, 100, 4), loop(2, 10, 20), loop(3, 3, 64), loop(3, 5, None), loop(2, 7, 7, skippable=4)]
    outer = 4 * (100 + 20 * (10 + 64 * 3) + 7 * 7)
    assert weighted(loops, {3: 2}) == outer + 4 * 20 * 2 * 5
    assert weighted(loops, {3: 0, 0: 1}) == outer / 4
    assert weighted(loops, {3: 0}, skipped={4: 0.5}) == outer - 4 * 7 * 0.5 * 4
    assert weighted(loops[:1], filled=True) == 4 * 50
    with pytest.raises(ValueError, match="the trips of loop 3"):
        weighted(loops)


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize("ended_by", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_a_compilation_ends_with_whoever_wants_it(ended_by: signal.Signals, tmp_path: Path) -> None:
    """The process that compiles does not outlive the one that was stopped."""
    (tmp_path / "waiting.py").write_text("""
import os, time
def wait(folder):
    print(os.getpid(), file=open(folder + "/pid", "w"), flush=True)
    time.sleep(600)
""")
    started = f"""
from torch_sinkhorn_attn.aot.child import call
call("waiting:wait", {{"folder": {str(tmp_path)!r}}}, environment={{"PYTHONPATH": {str(tmp_path)!r}}})
"""
    parent = subprocess.Popen([sys.executable, "-c", started], cwd=ROOT, stderr=subprocess.DEVNULL)
    told = tmp_path / "pid"
    wait_until(lambda: told.exists() and told.read_text().endswith("\n"))
    parent.send_signal(ended_by)
    parent.wait(30)
    wait_until(lambda: not is_running(int(told.read_text())))


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    """Whether a process is there and has not ended; one that nobody has asked for its exit status has."""
    if (stat := Path(f"/proc/{pid}/stat")).exists():
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return not Path("/proc/self/stat").exists()


PROGRAM = """HloModule test

%fused (p: f32[8]) -> f32[8] {
  ROOT %tanh.1 = f32[8]{0} tanh(f32[8]{0} %p)
}

%body (a: (s32[], f32[8])) -> (s32[], f32[8]) {
  %x.1 = f32[8]{0:T(256)} fusion(%gte.1), kind=kLoop, calls=%fused
  %inner = (s32[], f32[8]) while(%t.1), condition=%until, body=%deep
  ROOT %t.2 = (s32[], f32[8]) tuple(%c, %x.1)
}

%deep (a: (s32[], f32[8])) -> (s32[], f32[8]) {
  %k.1 = f32[8]{0} custom-call(%gte.2), custom_call_target="tpu_custom_call"
}

%few (a: (s32[], f32[8])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(20)
  ROOT %lt = pred[] compare(%gte.3, %constant.1), direction=LT
}

%until (a: (s32[], f32[8])) -> pred[] {
  ROOT %lt.2 = pred[] compare(%gte.4, %gte.5), direction=LT
}

%rare (a: f32[8]) -> f32[8] {
  %r.1 = f32[8]{0} negate(%a), metadata={op_name="jit(f)/cond/sinkhorn_of_unfit_data/neg"}
  %r.2 = (s32[], f32[8]) while(%t.4), condition=%few, body=%deeper
}

%deeper (a: (s32[], f32[8])) -> (s32[], f32[8]) {
  %r.3 = f32[8]{0} custom-call(%gte.7), custom_call_target="tpu_custom_call"
}

%usual (a: f32[8]) -> f32[8] {
  %s.1 = f32[8]{0} abs(%a)
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]) while(%t.3), condition=%few, body=%body
  %d = f32[8]{0} conditional(%p, %x, %x), branch_computations={%rare, %usual}
  ROOT %y = f32[8]{0} copy(%gte.6)
}
"""


def test_executions_follow_the_loops_of_a_program() -> None:
    found = instructions(PROGRAM)
    assert {name: found[name].times for name in ("w", "y", "x.1", "k.1")} == {"w": 1, "y": 1, "x.1": 20, "k.1": None}
    assert "tanh.1" not in found
    assert {name: found[name].unfit for name in ("d", "r.1", "r.3", "s.1", "k.1")} == {
        "d": False, "r.1": True, "r.3": True, "s.1": False, "k.1": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    "text, reason",
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem while allocating on stack for %big.1 = f32[8] "
            "custom-call(). Scoped allocation with size 128.00M and limit 32.00M exceeded scoped vmem limit by 96.00M.",
            "VMEM overflow: kernel big.1 needs 128.00M, its limit is 32.00M",
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space vmem. Used 256.00M "
            "of 127.94M vmem. Exceeded vmem capacity by 128.06M.\n\nProgram",
            "VMEM overflow: the program needs 256.00M, the chip offers 127.94M",
        ),
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (83.83G) exceeds available HBM (31.24G). HLO module: jit_call.",
            "HBM overflow: the program's temporaries need 83.83G, the chip offers 31.24G",
        ),
        (
            "INTERNAL: Mosaic failed to compile TPU kernel: infer-vector-layout: unsupported shape cast\n\nThe MLIR",
            "the kernel compiler refuses the kernel: infer-vector-layout: unsupported shape cast",
        ),
        (
            "INTERNAL: RET_CHECK failure (external/xla/xla/hlo/ir/hlo_instruction.cc:390) proto.operand_ids_size() == "
            "*arity async-update instruction should have 1 operands but sees 3",
            "this jaxlib cannot read what so new a libtpu compiled: install the pair that belongs together, "
            "pip install 'jax[tpu]'",
        ),
        ("INVALID_ARGUMENT: Topology layout 3x5 is odd\nmore", "Topology layout 3x5 is odd"),
        ("", "the compiler gave no reason"),
    ],
)
def test_reasons_are_one_line(text: str, reason: str) -> None:
    assert explain(text) == reason


def test_memory_beyond_the_chip_does_not_fit() -> None:
    held = dict(arguments=20 * GIB, outputs=20 * GIB, aliased=0, temporaries=0, code=0)
    found = {"memory": held, "devices": 8}
    assert memory(found, parse_topology("v6e")).startswith("does not fit: HBM overflow: 40,960.0 of 32,768 MiB")
    assert memory({**found, "memory": {**held, "aliased": 20 * GIB}}, parse_topology("v6e")).startswith("fits: ")


def test_a_configuration_is_completed_and_checked() -> None:
    c = Configuration.of({"heads": 4, "key_heads": 2, "length": 64, "window": [3, -1]})
    assert (c.keys, c.value_features, c.window) == (64, 64, (3, -1))
    with pytest.raises(ValueError, match="multiple of --key-heads"):
        Configuration.of({"heads": 3, "key_heads": 2})
    with pytest.raises(ValueError, match="--batch must be at least 1"):
        Configuration.of({"batch": 0})
    with pytest.raises(ValueError, match="pass acceleration='chebyshev' too"):
        Configuration.of({"contraction": 0.9})
    full, band = (Configuration.of({"length": 100, "window": w}).visited for w in (None, (2, 2)))
    assert full == 100 * 100 and band == pytest.approx(5 * 100 - 2 * (2 + 1))


def test_every_option_of_an_attention_is_one_of_the_command() -> None:
    options = cli._parser().parse_args(["attention", "--window", "3", "4", "--dustbin"])
    assert set(attention.Configuration.__dataclass_fields__) <= set(vars(options))
    assert options.window == [3, 4] and options.dustbin and options.topology == "v6e"
    options = cli._parser().parse_args(["attention", "--acceleration", "chebyshev", "--contraction", "0.9"])
    assert (options.acceleration, options.contraction) == ("chebyshev", 0.9)
    statics = attention.problem(Configuration.of({"acceleration": "chebyshev", "contraction": 0.9}))[2]
    assert (statics.acceleration, statics.contraction) == ("chebyshev", 0.9)


def test_plain_errors(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["attention", "--topology", "v9"]) == 1
    assert capsys.readouterr().err.startswith("error: topology 'v9' is unknown; choose v4, v5e")
    there, hidden = importlib.util.find_spec, ("torch_xla", "jax", "libtpu")
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: None if name in hidden else there(name))
    for run, module in (
        (lambda: main(["attention"]), "jax and libtpu are"),
        (lambda: step_of_pfam([]), "torch_xla and jax and libtpu are"),
    ):
        assert run() == 1
        error = capsys.readouterr().err
        assert f"{module} not installed: pip install 'torch_sinkhorn_attn[tpu]'" in error and error.count("\n") == 1


def test_the_package_and_its_help_need_no_jax() -> None:
    program = "import sys; from torch_sinkhorn_attn.aot import cli, bundles, flash; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_a_process_that_dies_gives_its_last_words() -> None:
    with pytest.raises(CompileError, match="the compiler ended with SIGABRT: F0000 Check failed: something"):
        call("tests.aot.programs:aborts", {})


def compiled(target: str, **arguments: Any) -> dict[str, Any]:
    return call(f"tests.aot.programs:{target}", {"topology": "v6e:2x4", **arguments})


@pytest.mark.slow
@needs_libtpu
def test_loops_of_a_kernel(tmp_path: Path) -> None:
    found = call("tests.aot.programs:loops", {"topology": "v6e:2x4"}, keep=str(tmp_path / "kept"))
    (kernel,) = found["kernels"]
    assert kernel["name"] == "nested" and kernel["executions"] == 3
    assert [(x["depth"], x["trips"], x["grid"]) for x in kernel["loops"]] == [
        (1, 4, True), (2, 20, False), (3, 64, False), (3, None, False), (2, 7, False),
    ]  # fmt: skip
    assert all(0 < x["filled"] <= x["bundles"] for x in kernel["loops"])
    assert 0 <= sum(x["bundles"] for x in kernel["loops"]) < kernel["bundles"]
    none, one, ten = found["weighted"]
    assert one - none == 4 * 20 * kernel["loops"][3]["bundles"] == (ten - none) / 10
    assert 2 * 512 * 128 * 4 * 2 <= kernel["vmem"] < 2**21 and found["memory"]["arguments"] >= 2**20
    assert any(path.name.endswith("original.txt") for path in (tmp_path / "kept").iterdir())


@pytest.mark.slow
@needs_libtpu
def test_a_kernel_of_a_long_name_is_read() -> None:
    """Names of the listings' files are cut, each at another place."""
    name = "_".join(f"block_of_number_{n}" for n in range(14))
    (kernel,) = compiled("long_name", name=name)["kernels"]
    assert len(name) > 200 and name in kernel["name"] and kernel["bundles"] > 0


def test_a_table_that_the_compiler_contradicts_is_reported() -> None:
    Choice = pytest.importorskip("torch_sinkhorn_attn.engines.tpu.method.choice", exc_type=ImportError).Choice
    kernel = loops.Kernel("sinkhorn_resident_forward", "x", True, 1, (), 9 << 20, 1 << 20, None)
    taken, refused = Choice("resident", "", 8 << 20), Choice("streaming", "", 70 << 20)
    forward, backward = disagreements([taken, refused], [kernel], {1: {"vmem": 50 << 20}})
    assert forward.startswith("forward: the table says 8.0 MiB of VMEM, and the kernel takes 9.0 MiB")
    assert "backward: the table says 70.0 MiB of VMEM and refuses the resident kernel, which compiles" in backward
    assert disagreements([taken._replace(vmem=9 << 20), refused], [kernel], {1: {"error": "VMEM overflow"}}) == []
    assert disagreements([refused._replace(vmem=None)] * 2, [], {}) == []


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("adjoint", slow_after(0, [True, False], {False}))
def test_the_compiler_takes_no_more_than_the_estimate(adjoint: bool, tmp_path: Path) -> None:
    """One of the kernels that benchmarks/vmem.py asks about; the answer is kept."""
    configuration = {"length": 11 * 128, "heads": 4, "window": [128, 128], "features": 16}
    point = {"configuration": configuration, "generation": "v6e", "adjoint": adjoint}
    once, again = (
        call("torch_sinkhorn_attn.aot.vmem:measure", {"points": [point]}, environment={"XDG_CACHE_HOME": str(tmp_path)})
        for _ in range(2)
    )
    (answer,) = once["answers"]
    assert once == again and len(list(tmp_path.rglob("*.json"))) == 1
    assert answer["width"] == 3 and 0 < answer["spills"] <= spilled(3, adjoint)
    assert answer["spills"] < answer["vmem"] <= answer["estimate"] <= answer["limit"]


@pytest.mark.slow
@pytest.mark.exhaustive
@needs_libtpu
def test_what_only_unfit_data_need_stands_apart() -> None:
    """Every loop of the resident kernel has its trips, also where a loop begins with another; what it falls back to
    does not count."""
    found = compiled("resident")
    kernel = next(k for k in found["kernels"] if "sinkhorn_resident" in k["name"])
    assert (kernel["executions"], kernel["unfit"]) == (1, 0)
    trips = [(loop["depth"], loop["trips"]) for loop in kernel["loops"]]
    assert (1, 3) in trips and (2, 53) in trips and all(count is not None for _, count in trips)
    others = [k for k in found["kernels"] if k is not kernel]
    assert others and all(k["executions"] == 0 and k["unfit"] != 0 for k in others)
    own, complete = report.cost(found["kernels"])
    assert complete and own == report.cost([kernel])[0] > kernel["bundles"]
    table = report.kernels(found, parse_topology("v6e"))
    assert table.index("sinkhorn_resident") < table.index("only if the data do not fit")
    assert kernel["spills"] % 4096 == 0 and 0 < kernel["spills"] < kernel["vmem"]


@pytest.mark.slow
@pytest.mark.exhaustive
@needs_libtpu
def test_a_kernel_that_is_too_large() -> None:
    with pytest.raises(CompileError, match=r"VMEM overflow: (kernel|the program)"):
        compiled("too_large")


@pytest.mark.slow
@needs_libtpu
def test_the_command_from_end_to_end(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--length=1024", "--window", "64", "64", "--base-iters=2", "--tail-iters=1", "--features=32"]
    assert main(["attention", *small, "--shape=streaming"]) == 0
    text = capsys.readouterr().out
    for words in (
        "for v6e:2x4: 8 chips (TPU v6 lite)", "fits: ", "HBM of one device", "kernel", "grid at 0x", "VMEM MiB",
        "JAX's flash attention, forward", "projection, nothing was run", "1.75 GHz",
        "shape: streaming",
    ):  # fmt: skip
        assert words in text
    assert "Traceback" not in text


@pytest.mark.slow
@needs_libtpu
def test_generations_that_libtpu_lacks_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    if importlib.metadata.version("libtpu") != "0.0.21":
        pytest.skip("a newer libtpu knows them all")
    assert main(["attention", "--topology", "tpu7x", "--length", "256"]) == cli.DOES_NOT_FIT
    assert "does not compile: this libtpu does not know the generation" in capsys.readouterr().out


def test_the_package_looks_for_no_example() -> None:
    """It knows none of them, so that their commands are their own."""
    package = Path(torch_sinkhorn_attn.__file__).parent
    assert not [path for path in package.rglob("*.py") if re.search(r"\bexamples\.", path.read_text())]


def test_what_is_missing_is_named_whether_or_not_its_package_is_there() -> None:
    for name in ("no_such_module", "no_such_package.module", "json.no_such_module", "json.decoder.not_a_package"):
        assert f"{name} is not installed" in (environment.missing(name) or "")
    assert environment.missing("json", "json.decoder") is None


def test_what_a_device_sends_is_counted_from_the_program() -> None:
    text = """HloModule step
%more (p: (s32[])) -> pred[] {
  %limit = s32[]{:T(128)} constant(20)
}
%body (p: (s32[])) -> (s32[]) {
  %sent = (f32[1,1,1024]{2,1,0:T(1,128)}, f32[1,1,1024]{2,1,0}, u32[], u32[]) collective-permute-start(%x), channel_id=1
  %done = f32[1,1,1024]{2,1,0} collective-permute-done(%sent)
}
ENTRY %main (p: bf16[4,64]) -> f32[4] {
  %all = bf16[32,64]{1,0} all-gather(%p), replica_groups={}
  %sums = f32[4]{0} all-reduce(%q), to_apply=%more
  %own = f32[4]{0} reduce-scatter(%r), to_apply=%more
  %loop = (s32[]) while(%t), condition=%more, body=%body
}
"""
    found = {x.operation: (x.array, x.times, x.bytes) for x in slices.wire(text, shards=8)}
    assert found == {
        "collective-permute": ("f32[1,1,1024]", 20, 4096.0),
        "all-gather": ("bf16[32,64]", 1, 7 / 8 * 4096),
        "all-reduce": ("f32[4]", 1, 2 * 7 / 8 * 16),
        "reduce-scatter": ("f32[4]", 1, 7 * 16.0),
    }
    table = report.wire({"wire": [vars(x) for x in slices.wire(text, shards=8)]}, half_steps=40)
    assert "in all 85,644 bytes a step" in table, table


@pytest.mark.slow
@pytest.mark.exhaustive
@needs_libtpu
def test_a_sequence_over_a_slice(capsys: pytest.CaptureFixture[str]) -> None:
    """The resident strips of eight devices, which exchange their columns by remote copies, compile."""
    command = "attention --shards 8 --topology v6e:2x4 --length 4096 --window 128 128 --base-iters 3 --features 16"
    assert main(command.split()) == 0
    printed = capsys.readouterr().out
    assert "shape: resident" in printed and "copies of the kernel" in printed and "collective-permute" in printed
    assert main(["attention", "--shards", "3"]) == 3 and "--length 8192 is not divided" in capsys.readouterr().out
