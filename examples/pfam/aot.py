"""``python -m examples.pfam.aot``: what a training step takes of a TPU slice, by the TPU's compiler, without a TPU."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from examples.common.settings import option_name
from torch_sinkhorn_attn.aot import cli
from torch_sinkhorn_attn.aot.chips import Topology
from torch_sinkhorn_attn.aot.step import compile_step

_NUMBERS = {
    "pairs": (4, "pairs per device and step"),
    "length": (1024, "residues of a side, padded"),
    "window": (256, "tokens to either side of the scaled diagonal; 0: none"),
    "base_iters": (20, "T"),
    "tail_iters": (2, "R"),
    "dim": (64, "width of the tokens"),
    "fsdp": (1, "devices that the parameters are spread over"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile the step; the exit status is that of ``python -m torch_sinkhorn_attn.aot``."""
    return cli.run(_parser().parse_args(arguments))


def _run(options: argparse.Namespace, topology: Topology) -> int:
    head = (
        f"training step of examples/pfam: {options.pairs} pairs per device of {options.length} residues a side, window "
        f"{options.window or 'none'}, T = {options.base_iters}, R = {options.tail_iters}"
    )
    settings = {name: getattr(options, name) for name in _NUMBERS}
    return cli.report_step(head, "examples.pfam.aot:compiled", settings, topology, options)


def compiled(
    *, pairs: int, length: int, window: int, fsdp: int, topology: str, shape: str, **others: Any
) -> dict[str, Any]:
    """The step, compiled in this process; ``others`` are settings of ``Config`` by its own names."""

    def record(count: int) -> tuple[bytes, str]:
        from .config import Config

        config = Config(
            batch_size=pairs * count, batch_cells=2**40, cap=length, window=window or None, gradient="tail",
            train_rounds=1, **others,
        )  # fmt: skip
        program, described = _record(config, fsdp)
        return program, f"{config.batch_size} pairs in {described}"

    return compile_step(record, topology, shape)


def _record(config: Any, fsdp: int) -> tuple[bytes, str]:
    """The program of a training step as an HLO module, and the devices it is for, in words."""
    from torch_xla import _XLAC  # type: ignore[attr-defined]

    from .device import XlaDevice
    from .train import Trainer

    class Recorder(XlaDevice):
        results: tuple[Any, ...] = ()
        program = b""

        def finish_step(self) -> None:
            if self.results:
                self.program = _XLAC._get_xla_tensors_hlo_proto([*trainer.losses_unread, *self.results])
            else:
                super().finish_step()

    device = Recorder(fsdp)
    trainer = Trainer(config, os.devnull, device=device)
    state = trainer.optimizer.state
    device.results = tuple(
        tensor for parameter in trainer.model.parameters() for tensor in (parameter, *state[parameter].values())
    )
    trainer.train_on(trainer.sampler.batch(0))
    return device.program, device.describe()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.pfam.aot",
        description="Compile the torch_xla training step of this example for all devices of a TPU slice, with the "
        "TPU's own compiler, and print whether it fits, what it takes and a projected time. No TPU is used or taken.",
    )
    parser.set_defaults(run=_run)
    for name, (number, meaning) in _NUMBERS.items():
        text = f"{meaning} (default: {number})"
        parser.add_argument(option_name(name), type=int, default=number, metavar="N", help=text)
    text = "no listings, so no cost of kernels and no projection; several times faster"
    parser.add_argument("--memory-only", action="store_true", help=text)
    cli.add_slice(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
