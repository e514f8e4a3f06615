"""`is_causal` of `torch.nn.functional.scaled_dot_product_attention`: the support j <= i, from the upper left.

Shared by torch and JAX, so it imports neither.
"""

from __future__ import annotations

from torch_sinkhorn_attn.options import Options


def causal_window(
    options: Options, mask: object, length: int, size: int, whole: bool, uniform: bool, centered: bool
) -> tuple[tuple[int, int] | None, bool]:
    """(window, causal): the window of L queries and S keys, and whether the support is causal beside it. Where there
    are no lengths or segments (`whole`) and L = S, causality is a window, which engines know ahead of the data.

    `uniform`: balanced, with no masses given and no dustbin. `centered`: the window lies around centres given.

    Raises:
        ValueError: causal beside a mask, or where the only plan is the identity; centres without a window.
    """
    if centered and options.window is None:
        raise ValueError(
            "window_centers is given without a window: pass window=(left, right), the tokens on either side of the "
            "centres, or leave window_centers out."
        )
    if not options.is_causal:
        return options.window, False
    if mask is not None:
        raise ValueError(
            "attn_mask and is_causal=True exclude each other, as in scaled_dot_product_attention: leave is_causal out, "
            "and forbid the pairs above the diagonal in attn_mask."
        )
    if whole and uniform:
        _refuse_balanced(length, size, options.window, options.base_iters == options.tail_iters == 0)
    if centered or not (whole and length == size):
        return options.window, True
    return (-1 if options.window is None else options.window[0], 0), False


def _refuse_balanced(length: int, size: int, window: tuple[int, int] | None, softmax_mode: bool) -> None:
    """ValueError where masses are uniform and balanced and there are as many queries as keys they can see, which forces
    the identity. With more queries than keys there may be a plan, and with `window=(0, ...)` the identity is all that
    is asked for."""
    if softmax_mode or length > size or length <= 1 or (window is not None and window[0] == 0):
        return
    raise ValueError(
        f"is_causal=True over {length} queries and {size} keys: the only balanced causal plan is the identity (the "
        "first query can only take the first key, which leaves the second query the second, and so on). "
        "Give it a dustbin or relaxation=tau, or use base_iters=0, tail_iters=0 (softmax attention, causal as ever)."
    )
