"""Every model of transformers that can be built small, with Sinkhorn attention: writes docs/transformers.md.

    python -m benchmarks.transformers_sweep [--rows FILE] [--only REGEX] [--fresh] [--seconds N] [--output FILE]

Each model is judged in a child process with a time and a memory limit, so that a crash or a hang costs one row. Rows
are kept in a file, and a second run goes on where the first ended.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import selectors
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "USE_TORCH_XLA": "0", "TOKENIZERS_PARALLELISM": "false"}

import torch
import transformers
from transformers.models.auto import configuration_auto, modeling_auto

from benchmarks.transformers_sweep import judge, table
from benchmarks.transformers_sweep.shrink import small

_MEMORY = 16 << 30


def models() -> Iterator[tuple[str, str, str]]:
    """(model type, config class, model class), by name, each model class once."""
    seen = set()
    for mapping in (modeling_auto.MODEL_MAPPING_NAMES, modeling_auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES):
        for kind, names in mapping.items():
            for name in (names,) if isinstance(names, str) else names:
                if kind in configuration_auto.CONFIG_MAPPING_NAMES and name not in seen:
                    seen.add(name)
                    yield kind, configuration_auto.CONFIG_MAPPING_NAMES[kind], name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=Path("build/transformers_sweep.jsonl"))
    parser.add_argument("--output", type=Path, default=Path("docs/transformers.md"))
    parser.add_argument("--only", default="", help="regular expression, searched for in the model's class and type")
    parser.add_argument("--fresh", action="store_true", help="judge again what has a row")
    parser.add_argument("--seconds", type=float, default=60.0, help="time limit of one model")
    given = parser.parse_args()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    torch.set_num_threads(1)
    judge.register()
    given.rows.parent.mkdir(parents=True, exist_ok=True)
    rows = (
        {row["model"]: row for row in map(json.loads, given.rows.read_text().splitlines())}
        if given.rows.exists()
        else {}
    )
    for kind, config, model in models():
        if not re.search(given.only, f"{model} {kind}") or (model in rows and not given.fresh):
            continue
        start = time.perf_counter()
        row = _in_child(config, model, given.seconds) | {"type": kind}
        rows[model] = row
        with given.rows.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{time.perf_counter() - start:5.1f} s  {model}  {table.verdict(row)}", flush=True)
    if not given.only:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(table.page(list(rows.values()), transformers.__version__))


def _in_child(config: str, model: str, seconds: float) -> dict[str, Any]:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        with os.fdopen(writing, "w") as pipe:
            pipe.write(json.dumps(_row(config, model)))
        os._exit(0)
    os.close(writing)
    data = _read(reading, time.monotonic() + seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not data:
        ended = "took too long" if os.WTERMSIG(status) == signal.SIGKILL else f"ended by signal {os.WTERMSIG(status)}"
        return {"model": model, "error": ended}
    row: dict[str, Any] = json.loads(data)
    return row


def _read(pipe: int, until: float) -> bytes:
    """Everything up to the end of the pipe, or nothing once the time is up."""
    data = b""
    with os.fdopen(pipe, "rb", buffering=0) as file, selectors.DefaultSelector() as selector:
        selector.register(file, selectors.EVENT_READ)
        while selector.select(max(0.0, until - time.monotonic())):
            chunk = file.read(1 << 16)
            if not chunk:
                return data
            data += chunk
    return b""


def _row(config: str, model: str) -> dict[str, Any]:
    try:
        model_class, config_class = getattr(transformers, model), getattr(transformers, config)
        return judge.judge(model_class, lambda: small(config_class))
    except BaseException as error:
        return {"model": model, "error": f"{type(error).__name__}: {str(error)[:200]}"}


if __name__ == "__main__":
    main()
