"""Every scalar option of the package, once: its default, its check and its meaning.

`Options` is the table. The torch function, its module, the Hugging Face integration, the JAX function and the planner
take names, defaults and checks from it, and the tests hold their documentation to its words. `Solver` is what the table
comes to for one problem. Neither torch nor JAX is imported: numbers are Python's here, and what is no number of theirs
the callers refuse before.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

WIDEST_WINDOW = 1 << 24  # wider sides mean the same, and the window's integers stay far from overflow
CONVERGED_WITHIN = 1e-2  # of a token's mean mass
GRADIENTS = ("tail", "implicit", "unrolled")
ACCELERATIONS = ("chebyshev",)
Relaxation = float | tuple[float | None, float | None] | None
_LARGEST = {"float32": 3.4028234663852886e38, "float64": 1.7976931348623157e308}


def number(name: str, x: Any) -> float:
    try:
        value = float(x) if not isinstance(x, (bool, str)) else None
    except (TypeError, ValueError):
        value = None
    if value is None:
        raise TypeError(f"{name} must be a number, got {x!r}.")
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name}={value} must be finite.")
    return value


def positive(name: str, x: Any) -> float:
    value = number(name, x)
    if value <= 0:
        raise ValueError(f"{name}={value} must be positive.")
    return value


def count(name: str, x: Any) -> int:
    try:
        value = operator.index(x) if not isinstance(x, bool) else None
    except TypeError:
        value = None
    if value is None:
        raise TypeError(f"{name} must be an integer, got {x!r}.")
    if value < 0:
        raise ValueError(f"{name}={value} must be 0 or more.")
    return value


def window_sides(name: str, window: Any) -> tuple[int, int]:
    try:
        sides = [operator.index(x) for x in window if not isinstance(x, bool)]
    except TypeError:
        sides = []
    if len(sides) != 2 or len(window) != 2:
        raise TypeError(f"{name} must be a pair of integers (left, right), got {window!r}; -1 lifts a side.")
    if min(sides) < -1:
        raise ValueError(f"{name}={tuple(sides)} must have sides of 0 or more, or -1 for unlimited.")
    return min(sides[0], WIDEST_WINDOW), min(sides[1], WIDEST_WINDOW)


def _option(default: Any, check: Callable[[str, Any], Any], meaning: str, per_call: bool = False) -> Any:
    return field(default=default, metadata={"check": check, "meaning": meaning, "per_call": per_call})


def _as_given(name: str, x: Any) -> Any:
    return x


def _or_none(check: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    return lambda name, x: None if x is None else check(name, x)


def _threshold(name: str, x: Any) -> float | None:
    value = 0.0 if x is None else number(name, x)
    if value < 0:
        raise ValueError(f"{name}={value} must be 0 or more; None and 0 never stop early.")
    return value or None


def _omega(name: str, x: Any) -> float:
    value = number(name, x)
    if not 0 < value < 2:
        raise ValueError(f"{name}={value} must lie between 0 and 2, both excluded; 1 is the plain iteration.")
    return value


def _acceleration(name: str, x: Any) -> str | None:
    if x is not None and not (isinstance(x, str) and x in ACCELERATIONS):
        raise ValueError(f"{name}={x!r} is unknown; choose {' or '.join(map(repr, ACCELERATIONS))}, or None.")
    return x


def _contraction(name: str, x: Any) -> float | None:
    value = None if x is None else number(name, x)
    if value is not None and not 0 < value < 1:
        raise ValueError(f"{name}={value} must lie between 0 and 1, both excluded; None measures it.")
    return value


def _gradient(name: str, x: Any) -> str:
    if x not in GRADIENTS:
        raise ValueError(f"{name}={x!r} is unknown; choose one of {', '.join(map(repr, GRADIENTS))}.")
    return str(x)


def _probability(name: str, x: Any) -> float:
    value = number(name, x)
    if not 0 <= value < 1:
        raise ValueError(f"{name}={value} must lie in [0, 1).")
    return value


def _floor(name: str, x: Any) -> float | None:
    value = None if x is None else number(name, x)
    if value is not None and value >= 0:
        raise ValueError(f"{name}={value} must be negative, as -1e3, or None to keep every finite mask entry.")
    return value


def flag(name: str, x: Any) -> bool:
    if not isinstance(x, bool):
        raise TypeError(f"{name} must be True or False, got {x!r}.")
    return x


def _engine(name: str, x: Any) -> str | None:
    if x is not None and not isinstance(x, str):
        raise TypeError(f"{name} must be a name or None, got {x!r}.")
    return x


def relaxation_pair(relaxation: Any) -> tuple[float, float]:
    """(row tau, column tau), inf where balanced."""
    pair = relaxation if isinstance(relaxation, (tuple, list)) else (relaxation, relaxation)
    if len(pair) != 2:
        raise TypeError(f"relaxation must be a number, a pair (row tau, column tau) or None, got {relaxation!r}.")
    taus = []
    for tau in pair:
        if tau is None or (isinstance(tau, (int, float)) and not isinstance(tau, bool) and tau == math.inf):
            taus.append(math.inf)
        else:
            taus.append(positive("relaxation", tau))
    return taus[0], taus[1]


def _relaxation(name: str, x: Any) -> Relaxation:
    """Its shortest form: None where balanced, one number for two equal ones."""
    row, col = (None if tau == math.inf else tau for tau in relaxation_pair(x))
    return row if row == col else (row, col)


@dataclass(frozen=True)
class Options:
    """The scalar options of `sinkhorn_attention` in canonical form, as `of` makes them."""

    dropout_p: float = _option(
        0.0, _probability, "probability of dropping real entries of P/a after the solve, in [0, 1)", per_call=True
    )
    is_causal: bool = _option(
        False,
        flag,
        "support the pairs j <= i alone, counted from the first active token on both sides (with segment ids: of each "
        "segment)",
        per_call=True,
    )
    scale: float | None = _option(None, _or_none(number), "default 1/sqrt(E).", per_call=True)
    epsilon: float = _option(
        1.0,
        positive,
        "entropic regularisation, positive, in score units; small is sharp and slow to converge. Default 1.",
    )
    window: tuple[int, int] | None = _option(
        None,
        _or_none(window_sides),
        "`(left, right)` tokens around the diagonal, -1 for unlimited; the diagonal joins the first with the first and "
        "the last with the last *active* tokens.",
    )
    relaxation: Relaxation = _option(  # noqa: RUF009, a number
        None,
        _relaxation,
        "KL penalty strength tau > 0 for both marginals, or `(row tau, column tau)`, in score units; None keeps a side "
        "balanced. rho = tau / (tau + epsilon).",
    )
    base_iters: int = _option(20, count, "T, stopped iterations. Default 20.")
    tail_iters: int = _option(2, count, "R, differentiated iterations. Default 2. T = R = 0 is softmax attention.")
    tolerance: float | None = _option(
        None,
        _threshold,
        "0 or more; None and 0 always run all T. Each problem (batch element, head and, when packed, segment) ends its "
        "T iterations early, after one or more of them, once the next column half-step would move none of its v_j by "
        "more",
    )
    over_relaxation: float = _option(
        1.0,
        _omega,
        "omega between 0 and 2: each half-step of the T iterations gives (1 - omega) * old + omega * new potential",
    )
    acceleration: str | None = _option(
        None,
        _acceleration,
        '"chebyshev" or None: column potentials of the T iterations gather momentum, after the first or the first '
        "three",
    )
    contraction: float | None = _option(
        None,
        _contraction,
        "between 0 and 1: the largest factor by which a plain iteration shrinks the error, for acceleration",
    )
    gradient: str = _option(
        "tail",
        _gradient,
        '"tail" differentiates the R last iterations, "unrolled" all T + R, "implicit" the fixed point (exact if '
        "converged), by conjugate gradients",
    )
    enable_gqa: bool = _option(
        False,
        _as_given,
        "allow grouped queries: query head h reads key head h // (H / Hk).",
        per_call=True,
    )
    mask_floor: float | None = _option(
        -1e3,
        _floor,
        "negative, in the units of a float mask",
    )
    engine: str | None = _option(None, _engine, "None takes the fastest that can")

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Options:
        """Those given, checked one by one and together, and the defaults of the others.

        Raises:
            TypeError, ValueError: with the name of the option, its value and the way out.
        """
        checked = cls(**{name: CHECKS[name](name, x) for name, x in given.items() if x is not DEFAULTS[name]})
        checked._check_base(given.get("tolerance"))
        return checked

    def _check_base(self, tolerance: Any) -> None:
        """What the options of the stopped base rule out of each other; `tolerance` as it was given."""
        omega, kind = self.over_relaxation, self.acceleration
        if self.contraction is not None and kind is None:
            raise ValueError(
                f"contraction={self.contraction} is read by acceleration alone, which is None: pass "
                "acceleration='chebyshev' too, or leave contraction=None."
            )
        if kind is not None and omega != 1:
            raise ValueError(
                f"acceleration={kind!r} and over_relaxation={omega} both change the steps of the stopped iterations: "
                "leave over_relaxation=1, or acceleration=None."
            )
        chosen: dict[str, Any] = {"tolerance": None if tolerance is None else float(tolerance)}
        chosen |= {"over_relaxation": None if omega == 1 else omega, "acceleration": kind}
        named = [f"{name}={x!r}" for name, x in chosen.items() if x is not None]
        if self.gradient == "unrolled" and named:
            raise ValueError(
                f"{named[0]} needs a stopped base, and gradient='unrolled' has none: it differentiates every "
                "iteration. Use gradient='tail' or 'implicit', or leave tolerance=None, over_relaxation=1 and "
                "acceleration=None."
            )

    def solver(self, features: int, compute_dtype: str) -> Solver:
        """The numbers of the iteration for queries of E `features`; `compute_dtype` is "float32" or "float64".

        Raises:
            ValueError: scores or damping would leave the range of numbers.
        """
        scale = 1 / math.sqrt(int(features)) if self.scale is None else self.scale
        if not abs(scale) / self.epsilon < _LARGEST[compute_dtype]:
            raise ValueError(
                f"epsilon={self.epsilon} is too small: scale / epsilon overflows {compute_dtype}; the plan needs "
                "epsilon > 0."
            )
        rho_row, rho_col = (_damping(tau, self.epsilon) for tau in relaxation_pair(self.relaxation))
        return Solver(
            scale, self.epsilon, rho_row, rho_col, self.base_iters, self.tail_iters, self.tolerance or 0.0,
            self.over_relaxation, self.gradient, self.dropout_p, self.acceleration, self.contraction or 0.0,
        )  # fmt: skip


DEFAULTS: dict[str, Any] = {x.name: x.default for x in fields(Options)}
CHECKS: dict[str, Callable[[str, Any], Any]] = {x.name: x.metadata["check"] for x in fields(Options)}
MEANINGS: dict[str, str] = {x.name: x.metadata["meaning"] for x in fields(Options)}
OF_A_LAYER = tuple(x.name for x in fields(Options) if not x.metadata["per_call"])  # chosen once, not in every call


@dataclass(frozen=True)
class Solver:
    """The numbers of the iteration, in the order in which the ops take them.

    scale, epsilon: scores are `scale * q.k / epsilon + mask`.
    rho_row, rho_col: damping of the half-steps, `tau / (tau + epsilon)`; 1 is balanced.
    base_iters, tail_iters: T and R.
    tolerance: a problem's base ends early once the next plain column half-step would move no v_j by more; 0: never.
    over_relaxation: omega; a half-step of the base gives (1 - omega) * old + omega * plain.
    gradient: "tail", "implicit" or "unrolled".
    dropout_p: probability of dropping a real entry of P/a.
    acceleration: "chebyshev" or None: how the base is accelerated.
    contraction: the largest factor by which a plain iteration shrinks the error; 0: measured.

    What has a default here the ops did not have at first: they take it last.
    """

    scale: float
    epsilon: float
    rho_row: float
    rho_col: float
    base_iters: int
    tail_iters: int
    tolerance: float
    over_relaxation: float
    gradient: str
    dropout_p: float
    acceleration: str | None = None
    contraction: float = 0.0

    @property
    def balanced(self) -> bool:
        return self.rho_row == 1.0 and self.rho_col == 1.0

    @property
    def stopped(self) -> int:
        """Iterations that are not differentiated: T, or none when unrolled."""
        return 0 if self.gradient == "unrolled" else self.base_iters

    @property
    def plain_base(self) -> bool:
        """Whether no half-step of the base is over-relaxed or accelerated."""
        accelerated = self.acceleration is not None and self.stopped > plain_iterations(self.contraction)
        return self.stopped == 0 or (self.over_relaxation == 1 and not accelerated)

    @property
    def kept(self) -> int:
        """Iterations that are differentiated: R, or all T + R when unrolled."""
        return self.base_iters + self.tail_iters if self.gradient == "unrolled" else self.tail_iters


def plain_iterations(contraction: float) -> int:
    """Iterations before acceleration sets in: three where it measures the contraction (0), else one."""
    return 1 if contraction else 3


def _damping(tau: float, epsilon: float) -> float:
    """rho; of halves, whose sum does not overflow."""
    rho = (tau / 2) / (tau / 2 + epsilon / 2) if tau < math.inf else 1.0
    if not rho > 0:
        raise ValueError(
            f"relaxation={tau} is too small beside epsilon={epsilon}: tau / (tau + epsilon) is 0 in float64; "
            "a larger one is needed, or None for exact marginals."
        )
    return rho


def is_softmax(base_iters: int, tail_iters: int, relaxation: Any, dustbin: Any) -> bool:
    """T = R = 0, balanced, no dustbin: softmax attention (unless masses are given)."""
    return base_iters == tail_iters == 0 and relaxation is None and not dustbin
