"""Writes values.json anew, of the peers that are installed; the others keep what the file has of them.

    pip install -r benchmarks/requirements.txt
    PYTHONPATH=tests python tests/peers/remake.py

It takes two minutes, most of them GeomLoss's slow annealing.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from peers.problems import PROBLEMS
from peers.solvers import SOLVERS

FILE = Path(__file__).parent / "values.json"
DIGITS = 12


def rounded(x: Any) -> Any:
    return [rounded(y) for y in x] if isinstance(x, list) else float(f"{x:.{DIGITS}g}")


def main() -> None:
    values: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {}
    for peer, (module, solve) in SOLVERS.items():
        try:
            version = importlib.import_module(module).__version__
        except ImportError:
            print(f"{peer} is not installed: its values stay as they are.")
            continue
        found = {name: solve(problem) for name, problem in PROBLEMS.items()}
        values[peer] = {"version": version} | {
            name: {what: rounded(x) for what, x in each.items()} for name, each in found.items() if each is not None
        }
        print(f"{peer} {version}: {len(values[peer]) - 1} problems")
    lines = [
        f"{json.dumps(peer)}: {{\n"
        + ",\n".join(f"  {json.dumps(name)}: {json.dumps(x)}" for name, x in each.items())
        + "\n}"
        for peer, each in values.items()
    ]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
