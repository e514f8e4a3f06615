"""The three pure JAX functions that bindings embed, on dictionaries of arrays by name.

`inputs` and `constants` are the fields of `engines.tpu.problem`'s `Inputs` and `Constants`; an absent one is None.
"""

from __future__ import annotations

from typing import Any

from torch_sinkhorn_attn.engines.tpu.method import problem as tpu, run

Arrays = dict[str, Any]


def solve(inputs: Arrays, constants: Arrays, **statics: Any) -> Arrays:
    """`run.solve`: row_potentials and col_potentials."""
    row, col = run.solve(tpu.Inputs(**inputs), tpu.Constants(**constants), **statics)
    return {"row_potentials": row, "col_potentials": col}


def forward(inputs: Arrays, constants: Arrays, **statics: Any) -> Arrays:
    """`run.forward`: the fields of its `Result`."""
    return run.forward(tpu.Inputs(**inputs), tpu.Constants(**constants), **statics)._asdict()


def backward(inputs: Arrays, constants: Arrays, given: Arrays, **statics: Any) -> Arrays:
    """`run.backward`: the fields of `Inputs`, and `dropped`. `given` is what it takes beside the problem, by name."""
    found, dropped = run.backward(tpu.Inputs(**inputs), tpu.Constants(**constants), **given, **statics)
    return {**found._asdict(), "dropped": dropped}
