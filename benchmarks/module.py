"""What SinkhornMultiheadAttention costs beyond what it calls, and beside nn.MultiheadAttention, in one run.

    python benchmarks/module.py [--threads 2] [--repeat 7]

(B, L, E) tokens, float32, 8 heads, need_weights=False. "functional" is `sinkhorn_attention` on heads that are there
already; "by hand" adds the four projections, written out; the module is the drop-in. The overhead of the module is over
"by hand", without padding and with a padding mask (by hand: segment ids); the share of the projections is over
"functional". All take turns; ratios are medians over the rounds of each round's ratio, times are medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from lib.measure import print_rows
from torch import Tensor, nn

from torch_sinkhorn_attn import SinkhornMultiheadAttention, sinkhorn_attention

HEADS = 8


def by_hand(module: SinkhornMultiheadAttention, x: Tensor, **options: object) -> Tensor:
    """Projections and the functional, no checks of the module's own."""
    heads = (
        y.unflatten(-1, (HEADS, -1)).transpose(1, 2)
        for y in F.linear(x, module.in_proj_weight, module.in_proj_bias).chunk(3, -1)
    )
    out = sinkhorn_attention(*heads, **options).transpose(1, 2).flatten(-2)
    return F.linear(out, module.out_proj.weight, module.out_proj.bias)


def row(shape: tuple[int, int, int], window: tuple[int, int] | None, training: bool, repeat: int) -> list[str]:
    batch, length, width = shape
    torch.manual_seed(0)
    module = SinkhornMultiheadAttention(width, HEADS, batch_first=True, window=window)
    softmax = nn.MultiheadAttention(width, HEADS, batch_first=True)
    softmax.load_state_dict(module.state_dict())
    x = torch.randn(shape, requires_grad=training)
    heads = [torch.randn(batch, HEADS, length, width // HEADS, requires_grad=training) for _ in range(3)]
    padding = torch.arange(length) >= length - torch.arange(batch)[:, None]
    ids = {f"{side}_segment_ids": -padding.long() for side in ("query", "key")}
    outputs: dict[str, Callable[[], Tensor]] = {
        "functional": lambda: sinkhorn_attention(*heads, window=window),
        "by hand": lambda: by_hand(module, x, window=window),
        "module": lambda: module(x, x, x, need_weights=False)[0],
        "by hand, padded": lambda: by_hand(module, x, window=window, **ids),
        "module, padded": lambda: module(x, x, x, padding, need_weights=False)[0],
        "softmax": lambda: softmax(x, x, x, need_weights=False)[0],
    }

    def step(output: Callable[[], Tensor]) -> Callable[[], object]:
        def run() -> None:
            with torch.set_grad_enabled(training):
                out = output()
            if training:
                out.backward(torch.ones_like(out))

        return run

    seconds: dict[str, list[float]] = {name: [] for name in outputs}
    for _ in range(repeat + 1):  # the first round warms up
        for name, output in outputs.items():
            start = time.perf_counter()
            step(output)()
            seconds[name].append(time.perf_counter() - start)

    def ratio(a: str, b: str) -> float:
        return statistics.median(x / y for x, y in zip(seconds[a][1:], seconds[b][1:], strict=True))

    return [
        "x".join(map(str, shape)), "full" if window is None else f"band {window[0]}",
        "forward + backward" if training else "forward",
        *(f"{1e3 * statistics.median(seconds[name][1:]):.0f}" for name in ("functional", "module")),
        *(f"{100 * (ratio('module' + how, 'by hand' + how) - 1):+.1f} %" for how in ("", ", padded")),
        f"{100 * (ratio('by hand', 'functional') - 1):+.1f} %", f"{ratio('module', 'softmax'):.1f}x",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeat", type=int, default=7)
    arguments, _ = parser.parse_known_args()
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {arguments.threads} threads, T = 20, R = 2, {HEADS} heads")
    head = [
        "B x L x E",
        "support",
        "",
        "functional ms",
        "module ms",
        "overhead",
        "with padding",
        "projections",
        "softmax x",
    ]
    lines = [head]
    for shape, window in (((8, 512, 256), None), ((8, 512, 256), (32, 32)), ((32, 64, 128), None)):
        lines.append(row(shape, window, False, arguments.repeat))
        lines.append(row(shape, window, True, arguments.repeat))
    widths = [max(len(line[k]) for line in lines) for k in range(len(head))]
    print_rows(lines, widths)


if __name__ == "__main__":
    main()
