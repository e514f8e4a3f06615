"""`is_causal` of `torch.nn.functional.scaled_dot_product_attention`: the support j <= i, from the upper left.

Shared by torch and JAX, so it imports neither.
"""

from __future__ import annotations


def checked_causal(is_causal: object, mask: object) -> bool:
    """`is_causal`, a bool that excludes `attn_mask`, as in torch.

    Raises:
        TypeError, ValueError: otherwise.
    """
    if not isinstance(is_causal, bool):
        raise TypeError(f"is_causal must be True or False, got {is_causal!r}.")
    if is_causal and mask is not None:
        raise ValueError(
            "attn_mask and is_causal=True exclude each other, as in scaled_dot_product_attention: leave is_causal out, "
            "and forbid the pairs above the diagonal in attn_mask."
        )
    return is_causal


def refuse_balanced_causal(length: int, size: int, window: tuple[int, int] | None, softmax_mode: bool) -> None:
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
