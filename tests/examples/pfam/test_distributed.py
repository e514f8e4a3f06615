"""Two gloo processes share a run: one process's losses and gradients, an exact resumption, a stop they agree on."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples.pfam.checkpoint import load_checkpoint
from examples.pfam.distributed import Processes, join
from examples.pfam.train import Trainer

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = """
import dataclasses, sys, torch
from examples.pfam.config import Config
from examples.pfam.distributed import join
from examples.pfam.train import Trainer

torch.set_num_threads(1)
folder = sys.argv[1]
# Three pairs for two processes, in parts of one or two, and no dropout: what remains is the order of sums.
config = Config(
    steps=4, batch_size=3, batch_cells=1500, cap=40, pool=2, eval_cap=95, eval_pairs=1, eval_every=0, dim=24,
    dropout=0.0, base_iters=4,
)
with join("cpu") as processes:
    def trainer(name, config=config, **options):
        return Trainer(config, f"{folder}/{name}/{processes.rank}", processes=processes, **options)

    plain = trainer("plain")
    parts = plain.sampler.parts(plain.sampler.pairs(0))
    print("parts", *sorted(len(part.pairs) for part in parts))
    plain.train_on(*parts)
    gradients = torch.cat([p.grad.flatten() for p in plain.model.parameters() if p.grad is not None])
    if processes.first:
        torch.save(gradients, f"{folder}/gradients.pt")
    plain = trainer("plain")
    plain.run(progress=False)
    print("losses", *plain.history.loss)
    print("evaluations", len(plain.history.evaluations))
    if processes.world > 1:
        config = dataclasses.replace(config, dropout=0.2, hmm_steps=2)
        straight = trainer("straight", config)
        straight.run(progress=False)
        halves = trainer("halves", config)
        halves.run(until=3, progress=False)
        halves = Trainer.resume(f"{folder}/halves/0", processes=processes, workers=1)
        halves.run(progress=False)
        print("resumed", *halves.history.loss)
        print("straight", *straight.history.loss)
        states = zip(straight.model.state_dict().values(), halves.model.state_dict().values())
        print("same", all(torch.equal(a, b) for a, b in states))
        stopped = trainer("stopped")
        step = stopped._advance
        def advance(pairs):
            text = step(pairs)
            stopped.interrupted = processes.rank == 1 and stopped.step == 2
            return text
        stopped._advance = advance
        print("finished", stopped.run(progress=False), stopped.step)
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def run(folder: Path, world: int) -> list[dict[str, str]]:
    """What each process printed, by the first word of the line."""
    folder.mkdir()
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world),
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(folder)],
            env={**environment, "RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(error[-3000:] for _, error in outputs)
    return [dict(line.split(" ", 1) for line in out.splitlines()) for out, _ in outputs]


def numbers(text: str) -> torch.Tensor:
    return torch.tensor([float(word) for word in text.split()], dtype=torch.float64)


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    (one,) = run(tmp_path / "one", 1)
    two = run(tmp_path / "two", 2)
    assert sum(map(int, one["parts"].split())) == 3 and len(one["parts"].split()) > 1
    assert [sum(map(int, each["parts"].split())) for each in two] == [2, 1]
    gradients = [torch.load(tmp_path / name / "gradients.pt", weights_only=True) for name in ("one", "two")]
    assert gradients[0].abs().max() > 1e-3
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)
    assert two[0]["losses"] == two[1]["losses"]
    torch.testing.assert_close(numbers(two[0]["losses"]), numbers(one["losses"]), rtol=1e-4, atol=1e-5)

    assert [each["evaluations"] for each in two] == ["1", "0"]
    written = {path.parent.name for path in (tmp_path / "two").rglob("checkpoint.pt")}
    assert written == {"0"}, "the first process alone writes"

    for each in two:
        assert each["resumed"] == each["straight"] and each["same"] == "True"
        assert each["finished"] == "False 2"
    assert load_checkpoint(tmp_path / "two" / "stopped" / "0")["step"] == 2
    assert Trainer.resume(tmp_path / "two" / "halves" / "0").step == 4  # by one process


def test_one_process_joins_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with join("xla") as processes:
        assert processes == Processes() and processes.first
        assert processes.any(True) and not processes.any(False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="--device xla drives all chips of a host from one process"):
        with join("xla"):
            pass
