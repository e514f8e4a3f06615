"""What a call's residuals and potentials tell after the fact, in NumPy on the host: nothing is traced here."""

from __future__ import annotations

from typing import Any

import numpy as np

WORDS = ("converged", "not converged", "no plan")
_ROUNDING = 2.0**-46


def judged(aux: Any, within: float, mask: Any, row_mass: Any, col_mass: Any) -> np.ndarray:
    """`(..., H)` places in WORDS, for the balanced problems of a mask and masses, those of the call."""
    u, v, *residuals = (np.asarray(x, np.float64) for x in aux[:4])
    length, size = (
        x.shape[-1] if bins is None else bins.shape[-1] for x, bins in ((u, aux.row_dustbin), (v, aux.col_dustbin))
    )
    shape = (*u.shape[:-1], length, size)
    keep = np.broadcast_to(np.ones((), bool) if mask is None else _kept(np.asarray(mask)), shape)
    masses = (row_mass, col_mass)
    given = [None if x is None else np.asarray(x, np.float64) for x in masses]
    found = np.zeros(u.shape[:-1], np.int8)
    for at in np.ndindex(found.shape):
        pairs = keep[at]
        rows, cols = pairs.any(1), pairs.any(0)
        own = zip(given, shape[-2:], strict=True)
        a, b = (None if x is None else np.broadcast_to(x, (*u.shape[:-1], n))[at] for x, n in own)
        a, b = _defaults(a, b, rows, cols, aux.row_dustbin is not None)
        errors = [float(x[at]) for x in residuals]
        limits = [within * x[on].mean() if on.any() else 0.0 for x, on in ((a, rows), (b, cols))]
        met = all(error <= limit for error, limit in zip(errors, limits, strict=True))
        found[at] = 0 if met else 1
        if aux.row_dustbin is None and has_blocking_cut(u[at], v[at], pairs, a, b):
            found[at] = 2
    return found


def has_blocking_cut(u: np.ndarray, v: np.ndarray, pairs: np.ndarray, a: np.ndarray, b: np.ndarray) -> bool:
    """Whether the order of the potentials shows queries that hold as much as all keys they reach, or more, though
    others reach these too: a proof that no plan is positive on the support. Without a plan u grows on such queries, and
    v falls on their keys, without end; so after some iterations they are the first ones in either order."""
    rows, cols = pairs.any(axis=1).reshape(-1), pairs.any(axis=0).reshape(-1)
    pairs, u, v, a, b = pairs[rows][:, cols], u[: len(rows)][rows], v[: len(cols)][cols], a[rows], b[cols]
    if not pairs.size:
        return False
    a, b = a / a.sum(), b / b.sum()
    last_key = np.where(pairs, _ranks(v), -1).max(1)  # queries are in as soon as all of their keys are
    orders = np.argsort(-u, kind="stable"), np.argsort(last_key, kind="stable")
    return any(_blocks(order, pairs, a, b) for order in orders)


def _blocks(order: np.ndarray, pairs: np.ndarray, a: np.ndarray, b: np.ndarray) -> bool:
    pairs, held = pairs[order], np.cumsum(a[order])
    count = np.arange(1, len(order))  # rows on the one side of each cut
    first, last = pairs.argmax(0), len(order) - 1 - pairs[::-1].argmax(0)
    room = np.zeros(len(order) + 1)
    np.add.at(room, first + 1, b)
    shared = np.zeros(len(order) + 2, int)  # keys that rows of both sides reach
    np.add.at(shared, first + 1, 1)
    np.add.at(shared, last + 1, -1)
    slack = np.cumsum(room)[count] - held[count - 1]
    inside = np.cumsum(room)[count] + held[count - 1]
    tight = slack <= np.maximum(_ROUNDING, 1e-15 * len(order)) * np.minimum(inside, 2 - inside)
    return bool((tight & (np.cumsum(shared)[count] > 0)).any())


def _ranks(x: np.ndarray) -> np.ndarray:
    ranks = np.empty(len(x), int)
    ranks[np.argsort(x, kind="stable")] = np.arange(len(x))
    return ranks


def _kept(mask: np.ndarray) -> np.ndarray:
    """As the engine keeps pairs: not -inf, nor anything at or below half of the lowest float32."""
    return mask if mask.dtype == bool else ~(mask.astype(np.float64) <= float(np.finfo(np.float32).min) / 2)


def _defaults(
    a: np.ndarray | None, b: np.ndarray | None, rows: np.ndarray, cols: np.ndarray, has_dustbin: bool
) -> tuple[np.ndarray, np.ndarray]:
    if has_dustbin:
        return (rows * 1.0 if a is None else a * rows), (cols * 1.0 if b is None else b * cols)
    a = None if a is None else a * rows
    b = None if b is None else b * cols
    if a is None:
        a = rows * (1.0 if b is None else b.sum() / max(1, rows.sum()))
    if b is None:
        b = cols * (a.sum() / max(1, cols.sum()))
    return a, b
