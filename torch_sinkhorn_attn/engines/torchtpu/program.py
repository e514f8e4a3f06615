"""What is registered: three JAX functions of a list of arrays and a program, which is text and says all the rest.

A program is static, and complete: whoever reads it, in this process or another, makes the same computation of it.
Nothing here imports torch.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax

from torch_sinkhorn_attn.engines.binding import functions
from torch_sinkhorn_attn.engines.tpu.method.lowering import Lowering
from torch_sinkhorn_attn.engines.tpu.method.problem import Statics

Shape = tuple[Any, ...]  # of numbers, or of what torch has for sizes that are not known yet


@dataclass(frozen=True)
class Program:
    """One of `functions`, with everything that is compiled in.

    Attributes:
        function: its name.
        present: the names of the arrays in each of its dictionaries, sorted; the leaves are in this order.
        statics, lowering: as of `engines.tpu.run`.
        options: its further keywords, booleans.
    """

    function: str
    present: tuple[tuple[str, ...], ...]
    statics: Statics
    lowering: Lowering
    options: tuple[tuple[str, bool], ...] = ()

    def text(self) -> str:
        """For `parse`."""
        return _text(self)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the leaves."""
        return tuple(name for tree in self.present for name in tree)

    def __call__(self, arrays: Sequence[jax.Array]) -> dict[str, jax.Array]:
        """The results that are there, by name, sorted."""
        given = iter(arrays)
        trees = [{name: next(given) for name in tree} for tree in self.present]
        found = getattr(functions, self.function)(
            *trees, statics=self.statics, lowering=self.lowering, **dict(self.options)
        )
        return {name: x for name, x in sorted(found.items()) if x is not None}

    def results(self, given: Mapping[str, Shape]) -> dict[str, Shape]:
        """The shapes of the results, by name, sorted, from those of the leaves. All are of the compute dtype."""
        (num, heads, length, _), size = given["query"], given["key"][2]
        bins = given["log_row_capacity"][2] if "log_row_capacity" in given else 0
        if self.function == "backward":
            mask_grad = dict(self.options)["mask_grad"]
            wanted = {name: given[name] for name in self.present[0] if name != "mask" or mask_grad}
            columns = self.statics.kept == 0 and not self.statics.implicit
            found = {**wanted, "dropped": (num, heads, (size if columns else length) + bins)}
        else:
            found = {
                "row_potentials": (self.statics.kept + 1, num, heads, length + bins),
                "col_potentials": (self.statics.kept + 1, num, heads, size + bins),
            }
        if self.function == "forward":
            found |= {"row_residual": (num, heads), "col_residual": (num, heads)}
            if "value" in given:
                found["output"] = (num, heads, length, given["value"][3])
            if "log_row_capacity" in given:
                found |= {"row_dustbin": (num, heads, length), "col_dustbin": (num, heads, size)}
        return dict(sorted(found.items()))


@functools.lru_cache(maxsize=4096)  # every step asks again
def _text(program: Program) -> str:
    return json.dumps(asdict(program), sort_keys=True)


@functools.lru_cache(maxsize=4096)
def parse(text: str) -> Program:
    """The program of `Program.text`."""
    read = json.loads(text)
    return Program(
        read["function"],
        tuple(map(tuple, read["present"])),
        Statics(**read["statics"]),
        Lowering(**read["lowering"]),
        tuple((name, value) for name, value in read["options"]),
    )


def record(function: str, trees: Sequence[Mapping[str, Any]], statics: Mapping[str, Any]) -> tuple[Program, list[Any]]:
    """The program of a call of one of `functions`, and its leaves."""
    kept = [{name: x for name, x in sorted(tree.items()) if x is not None} for tree in trees]
    options = tuple((name, value) for name, value in statics.items() if name not in ("statics", "lowering"))
    found = Program(function, tuple(map(tuple, kept)), statics["statics"], statics["lowering"], options)
    return found, [x for tree in kept for x in tree.values()]


def solve(leaves: list[jax.Array], program: str) -> list[jax.Array]:
    """`functions.solve`."""
    return list(parse(program)(leaves).values())


def forward(leaves: list[jax.Array], program: str) -> list[jax.Array]:
    """`functions.forward`."""
    return list(parse(program)(leaves).values())


def backward(leaves: list[jax.Array], program: str) -> list[jax.Array]:
    """`functions.backward`."""
    return list(parse(program)(leaves).values())
