"""Sequence-parallel transport in real processes over gloo: equal to one device, agreeing, and told when a rank is
lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
SECONDS = 120  # until a rank gives up on the others


def run(
    size: int, folder: Path, *programs: str, seconds: float = SECONDS, interpreted: bool = False
) -> dict[str, list[Any]]:
    """What the ranks of one group of processes found, by program; `interpreted`: with Triton's interpreter."""
    paths = [HERE, HERE.parent, HERE.parent.parent]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, paths)), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": str(int(interpreted)),
    }  # fmt: skip
    command = [sys.executable, str(HERE / "programs.py")]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(size), str(folder / "store"), str(seconds), *programs],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(size)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=3600) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [x.returncode for x in ranks] == [0] * size, "\n".join(error[-1500:] for _, error in outputs)
    found: dict[str, list[Any]] = {}
    for out, _ in outputs:
        for name, data in (line.split(" ", 2)[1:] for line in out.splitlines() if line.startswith("FOUND ")):
            found.setdefault(name, []).append(json.loads(data))
    return found


@pytest.fixture(scope="module")
def of_three(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return run(3, tmp_path_factory.mktemp("three"), "problems:100:30", "disagreements", "module", "traffic", "compiled")


@pytest.fixture(scope="module")
def of_four(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return run(4, tmp_path_factory.mktemp("four"), "problems:200:20", "dtensors", "meshes", "traffic")


def check_problems(found: list[tuple[list[str], int]]) -> None:
    wrong = [line for lines, _ in found for line in lines]
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_random_problems_on_two_ranks(tmp_path: Path) -> None:
    check_problems(run(2, tmp_path, "problems:0:8")["problems"])


@pytest.mark.slow
def test_random_problems_on_three_ranks(of_three: dict[str, list[Any]]) -> None:
    check_problems(of_three["problems"])


@pytest.mark.slow
def test_random_problems_on_four_ranks(of_four: dict[str, list[Any]]) -> None:
    check_problems(of_four["problems"])


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_more_random_problems(size: int, tmp_path: Path) -> None:
    check_problems(run(size, tmp_path, f"problems:{1000 * size}:200")["problems"])


@pytest.mark.slow
def test_the_half_steps_of_kernels(tmp_path: Path) -> None:
    check_problems(run(2, tmp_path, "kernels:0:2", interpreted=True)["kernels"])


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("size", [2, 3])
def test_more_half_steps_of_kernels(size: int, tmp_path: Path) -> None:
    check_problems(run(size, tmp_path, "kernels:2:40", interpreted=True)["kernels"])


@pytest.mark.slow
def test_every_rank_is_told_both_values_of_what_they_disagree_on(of_three: dict[str, list[Any]]) -> None:
    for rank, found in enumerate(of_three["disagreements"]):
        assert "epsilon=1.0 on rank 0, epsilon=0.5 on rank 2" in found["option"]
        assert "relaxation=absent on rank 0, relaxation=2.0 on rank 2" in found["absent"]
        assert "query=float64[1, 2, tokens, 4] on rank 0, query=float32[1, 2, tokens, 4] on rank 2" in found["dtype"]
        assert "query=float64[1, 2, tokens, 4] on rank 0, query=float64[1, 1, tokens, 4] on rank 2" in found["heads"]
        assert "with grad on rank 2" in found["grad"]
        assert found["own"].startswith(
            "ValueError: " + ("key has 3" if rank == 2 else "Rank 2 of the sequence's group")
        )
        assert "a shard, a shard, one value" in found["mass"]
        assert "local rows by all 9 keys" in found["mask"]
        assert found["engine"].startswith("ValueError: engine='xla'")
        assert "kernels=cpu on rank 0, kernels=missing (engine='cpu'; engine='tiled' on all ranks" in found["kernels"]
        assert found["balance"].startswith("ValueError: window=(2, 0) has no balanced plan")
        assert "query holds scores of 3 keys but the ranks have [3, 3, 3] values" in found["scores"]
        assert "function=sinkhorn_plan(log=False) on rank 0, function=sinkhorn_plan(log=True)" in found["log"]
        assert "function=sinkhorn_matches(k=2) on rank 0, function=sinkhorn_matches(k=3) on rank 2" in found["k"]
        assert "grad_output has shape (1, 2, 3, 3)" in found["cotangent"]
        assert found["band"].startswith("ValueError: sinkhorn_plan_band got window=None")
        assert "local shard alone" in found["alone"]
        assert found["module"].startswith("ValueError: add_zero_attn does not go with a sequence sharded")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dead", pytest.param("absent", marks=pytest.mark.exhaustive)])
def test_a_lost_rank_ends_the_others_with_a_message(name: str, tmp_path: Path) -> None:
    found = run(2, tmp_path, name, seconds=5)[name]
    assert "rank 0 of 2 waited for the others in vain" in found[0]


@pytest.mark.slow
def test_the_module_in_the_context(of_three: dict[str, list[Any]]) -> None:
    for found in of_three["module"]:
        assert max(found.values()) < 1e-12


@pytest.mark.slow
def test_a_compiled_program_has_no_break_and_the_same_numbers(of_three: dict[str, list[Any]]) -> None:
    for found in of_three["compiled"]:
        assert max(found.values()) < 1e-12


@pytest.mark.slow
@pytest.mark.exhaustive
def test_other_compiled_programs(tmp_path: Path) -> None:
    for found in run(3, tmp_path, "compiled_others")["compiled_others"]:
        assert len(found) == 5 and max(found.values()) < 1e-12


@pytest.mark.slow
def test_dtensors_sharded_along_the_sequence(of_four: dict[str, list[Any]]) -> None:
    for found in of_four["dtensors"]:
        assert max(found) < 1e-12


@pytest.mark.slow
def test_ddp_and_fsdp_over_another_dimension(of_four: dict[str, list[Any]]) -> None:
    for found in of_four["meshes"]:
        assert found["ddp"] == pytest.approx(found["one"], rel=1e-12)
        assert found["fsdp"] == pytest.approx(found["one"], rel=1e-12)
        assert found["one"][-1] < found["one"][0]


@pytest.mark.slow
def test_a_half_step_sends_the_same_in_a_band_whatever_the_number_of_ranks(
    of_three: dict[str, list[Any]], of_four: dict[str, list[Any]]
) -> None:
    """An inner rank has two neighbours; each shares two halos of W columns with it, in both directions."""
    heads, tokens, window = (of_three["traffic"][0][x] for x in ("heads", "tokens", "window"))
    three, four = (max(found["band bytes"] for found in x["traffic"]) for x in (of_three, of_four))
    assert three == four == 2 * 2 * window * heads * 8
    assert all(found["band messages"] in (1, 2) for x in (of_three, of_four) for found in x["traffic"])
    for size, x in ((3, of_three), (4, of_four)):  # of an all-reduce of one number for each column
        expected = 2 * (size - 1) / size * heads * tokens * size * 8
        assert x["traffic"][0]["full bytes"] == pytest.approx(expected, rel=1e-9)
        assert x["traffic"][0]["full messages"] == 2
