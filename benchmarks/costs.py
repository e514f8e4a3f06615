"""What a call costs on each engine of this machine, in softmax attention over all pairs: what to expect of a setting.

    python benchmarks/costs.py [--tokens 1024] [--features 64] [--epsilon 1] [--repeat 5]

Forward and backward, one thread, processor time, float32, 4 heads; 1 is torch's scaled_dot_product_attention over all
pairs. `default` is T = 20, R = 2; `+ 10` what ten more iterations add, `+ 1 tail` what a tail iteration more adds, and
`implicit` the call with gradient="implicit". Engines take turns. docs/choosing.md shows it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from lib.measure import best_times, print_rows, step
from torch import Tensor

from torch_sinkhorn_attn import Dustbin, sinkhorn_attention

ENGINES = ("cpu", "tiled", "reference")
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "+ 10": {"base_iters": 30},
    "+ 1 tail": {"tail_iters": 6},
    "implicit": {"gradient": "implicit"},
}
HEAD = ("kind", "engine", *SETTINGS)
WIDTHS = (-30, -10, 8, 8, 9, 9)


def kinds(tokens: int) -> dict[str, tuple[Tensor | None, dict[str, Any]]]:
    """Mask and options."""
    g = torch.Generator().manual_seed(1)
    half, mass = torch.full((1,), tokens // 2), torch.rand(tokens, generator=g).mul(2).exp()
    return {
        "dense": (None, {}),
        "window, an eighth to each side": (None, {"window": (tokens // 8, tokens // 8)}),
        "padded to twice its length": (None, {"query_lengths": half, "key_lengths": half}),
        "unequal masses": (None, {"row_mass": mass / mass.mean()}),
        "dustbin": (None, {"dustbin": Dustbin(torch.zeros(4, 1), torch.zeros(4, 1))}),
        "float mask": (torch.randn(tokens, tokens, generator=g), {}),
    }


def call(engine: str, mask: Tensor | None, options: dict[str, Any]) -> Callable[..., Tensor]:
    def attention(*tokens: Tensor) -> Tensor:
        output = sinkhorn_attention(*tokens, mask, engine=engine, **options)
        assert isinstance(output, Tensor)
        return output

    return attention


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--features", type=int, default=64)
    parser.add_argument("--epsilon", type=float, default=1.0)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--engines", nargs="+", default=ENGINES)
    arguments, _ = parser.parse_known_args()
    torch.set_num_threads(1)
    g = torch.Generator().manual_seed(0)
    shape = (1, 4, arguments.tokens, arguments.features)
    tokens = [torch.randn(shape, generator=g).requires_grad_() for _ in range(3)]
    print_rows([HEAD], WIDTHS)
    for kind, (mask, options) in kinds(arguments.tokens).items():
        runs = {"softmax": lambda: step(tokens, torch.nn.functional.scaled_dot_product_attention)}
        for engine in arguments.engines:
            for name, setting in SETTINGS.items():
                function = call(engine, mask, {"epsilon": arguments.epsilon, **options, **setting})
                runs[f"{engine} {name}"] = lambda function=function: step(tokens, function)  # type: ignore[misc]
        seconds = best_times(runs, arguments.repeat, clock=time.process_time)
        for engine in arguments.engines:
            default, more, tail, implicit = (seconds[f"{engine} {x}"] / seconds["softmax"] for x in SETTINGS)
            found = default, more - default, (tail - default) / 4, implicit
            print_rows([[kind, engine, *(f"{x:.2f}" for x in found)]], WIDTHS)


if __name__ == "__main__":
    main()
