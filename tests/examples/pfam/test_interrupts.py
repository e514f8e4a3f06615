"""Ctrl-C at every moment of a run: nothing is lost, and what to do is said."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from examples.pfam.cli import main
from examples.pfam.commands.options import command_line
from examples.pfam.train import Trainer

ROOT = Path(__file__).resolve().parents[3]
SMALL_FLAGS = "--batch-size=2 --cap=32 --eval-cap=95 --eval-pairs=1 --dim=24 --threads=1"


def start(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "examples.pfam", *arguments],
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_training(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """A process in the middle of training, its first checkpoint written."""
    process = start("train", "--steps=100000", "--save-every=1", "--out", str(folder), *SMALL_FLAGS.split(), *arguments)
    deadline = time.monotonic() + 50
    while not (folder / "checkpoint.pt").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    return process


def test_a_closed_stream_does_not_give_its_number_to_a_file(tmp_path: Path) -> None:
    """What a program prints after >&- would else be written into the file that it opened next."""
    folder = tmp_path / "program"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "cli.py").write_text(
        "import os, sys\n"
        "def main():\n"
        "    with open('kept', 'w') as file:\n"
        "        print('lost', flush=True); print('lost', file=sys.stderr, flush=True); os.write(1, b'lost')\n"
        "        file.write(f'{sys.stdin.read()!r} {file.fileno() > 2}')\n"
    )
    code = "from examples.common.start import start; start('program')"
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} <&- >&- 2>&-"
    path = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    subprocess.run(["/bin/sh", "-c", command], cwd=tmp_path, env=path, check=True, timeout=50)
    assert (tmp_path / "kept").read_text() == "'' True"


@pytest.mark.slow
def test_ctrl_c_loses_nothing(tmp_path: Path) -> None:
    process = start_training(tmp_path)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=50)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "stopping after this step; Ctrl-C again stops now\n" in err
    assert "Sinkhorn aligner" in out and "evaluated at step 0" in out
    assert f" -m examples.pfam train --resume {tmp_path}" in out
    resumed = Trainer.resume(tmp_path)
    assert resumed.step == len(resumed.history.loss) >= 1
    assert f"stopped at step {resumed.step};" in out


@pytest.mark.slow
def test_a_second_ctrl_c_still_says_how_to_go_on(tmp_path: Path) -> None:
    # Steps so long that the second signal cannot come too late.
    process = start_training(tmp_path, "--base-iters=3000")
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    while "stopping after this step" not in (line := process.stderr.readline()) and line:
        pass
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=50)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert f"stopped; from the last checkpoint: {command_line()} train --resume {tmp_path}\n" in out


@pytest.mark.parametrize("saved", [True, False])
def test_a_run_cut_short_says_what_is_left(
    saved: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(trainer: Trainer, progress: bool) -> bool:
        if saved:
            trainer.save()
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "run", stop)
    assert main(["train", "--out", str(tmp_path), "--quiet"]) == 130
    hint = f"stopped; from the last checkpoint: {command_line()} train --resume {tmp_path}\n"
    assert capsys.readouterr().out.endswith(hint if saved else "stopped before the first checkpoint\n")


def test_ctrl_c_during_the_imports(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("print('importing', flush=True)\nimport time\ntime.sleep(50)\n")
    process = start(environment={"PYTHONPATH": str(tmp_path)})
    assert process.stdout is not None and process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=50)
    assert (process.returncode, err) == (130, "stopped\n")
