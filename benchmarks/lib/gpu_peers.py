"""FlashSinkhorn's half-step, where flash_sinkhorn is installed (`pip install flash-sinkhorn`): its cost is a squared
distance, which is a product and biases, so the work of a half-step is ours."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from torch_sinkhorn_attn.engines.triton.launch import Launch

# Its own: what it takes without tuning, and two that it tunes among. Rows, columns, features at once, warps, stages.
SHAPES = ((128, 128, 32, 4, 2), (128, 64, 32, 4, 3), (64, 64, 32, 4, 3))


def installed() -> bool:
    return importlib.util.find_spec("flash_sinkhorn") is not None


def launches(points: int, width: int) -> list[tuple[Launch, int, int]]:
    """Of its half-step over `points` x `points` in float32, which it widens everything to: the launch, the scores of a
    turn of its loop, and the turns of the loop over features inside."""
    from flash_sinkhorn.kernels import sinkhorn_flashstyle_sqeuclid as flash

    kernel = flash._flashsinkhorn_lse_raw_kernel_impl.fn
    x, bias = (torch.empty(*shape, device="meta") for shape in ((points, width), (points,)))
    found = []
    for rows, cols, features, warps, stages in SHAPES:
        numbers = (points, points, width, 1, width, 1, 1, 1, 1.0, 0.1, 1.0, points // 32, points // 32)
        constants = {
            "D": width, "ALLOW_TF32": True, "DTYPE_ID": 2, "USE_EXP2": True, "BLOCK_M": rows, "BLOCK_N": cols,
            "BLOCK_K": features, "EVEN_N": points % cols == 0, "num_warps": warps, "num_stages": stages,
        }  # fmt: skip
        launch = Launch(kernel, (points // rows,), (x, x, bias, bias, *numbers), constants)
        found.append((launch, rows * cols, width // features))
    return found


def half_step(query: Tensor, key: Tensor) -> Callable[[], Tensor]:
    """One half-step of points `[n, d]` and `[m, d]`, as it tunes it itself."""
    from flash_sinkhorn.kernels.sinkhorn_flashstyle_sqeuclid import flashsinkhorn_lse

    bias = torch.zeros(len(key), device=key.device)
    return lambda: flashsinkhorn_lse(query, key, bias, 1.0, cost_scale=0.5)
