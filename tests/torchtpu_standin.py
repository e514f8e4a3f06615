"""A stand-in for `torch.tpu.pallas.jax_op`, which needs a TPU to compute: the op runs its JAX function on the CPU.

The contract is torch_tpu 0.2.0's, as far as it is used: the function is annotated in full, list[jax.Array] for
tensors and str for what is static; the result is a CustomOpDef with a schema of Tensor[] and str, whose own fake kernel
refuses symbolic sizes; the function is jitted with its static arguments static, and traced once for each of their
values and for each shape. The tensors are the CPU's: torch_tpu's device is not imitated.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import pytest
import torch
from torch import Tensor

from torch_sinkhorn_attn.engines import ENGINES
from torch_sinkhorn_attn.engines.torchtpu import binding
from torch_sinkhorn_attn.engines.tpu.releases import enable_x64

TRACED: list[str] = []  # the functions, each time that one is traced
_SCHEMA = {list[jax.Array]: "Tensor[]", str: "str"}


def jax_op(name: str, function: Callable[..., Any], **sharding: Any) -> Any:
    """The op of a JAX function. A mesh is of this one device: its specs are not looked at."""
    assert not sharding or sharding["mesh"].size == 1, "a stand-in of one rank"
    signature = inspect.signature(function, eval_str=True)
    assert signature.return_annotation == list[jax.Array], f"{name} must return list[jax.Array]: {signature}"
    parameters = signature.parameters
    assert all(x.annotation in _SCHEMA for x in parameters.values()), f"{name} is not annotated in full: {signature}"
    static = [x.name for x in parameters.values() if x.annotation is str]

    def traced(*args: Any) -> Any:
        TRACED.append(name)
        return function(*args)

    traced.__signature__ = signature  # type: ignore[attr-defined]
    compiled = jax.jit(traced, static_argnames=static, keep_unused=True)

    def impl(*args: Any) -> list[Tensor]:
        found = [x for group in args if isinstance(group, list) for x in group]
        with enable_x64(any(x.dtype == torch.float64 for x in found)):
            given = [[_array(x) for x in group] if isinstance(group, list) else group for group in args]
            return [torch.from_dlpack(x).clone() for x in compiled(*given)]

    def fake(*args: Any) -> list[Tensor]:
        sizes = [n for group in args if isinstance(group, list) for x in group for n in x.shape]
        assert not any(isinstance(n, torch.SymInt) for n in sizes), "symbolic dimensions: override this fake kernel"
        raise NotImplementedError("torch_tpu's own fake kernel traces the function; the binding's is used")

    schema = ", ".join(f"{_SCHEMA[x.annotation]} {x.name}" for x in parameters.values())
    op = torch.library.custom_op(name, impl, mutates_args=(), schema=f"({schema}) -> Tensor[]")
    op.register_fake(fake)
    return op


def _array(x: Tensor) -> jax.Array:
    if x.dtype == torch.bool:  # which DLPack does not hand over everywhere
        return jax.numpy.asarray(x.numpy())
    return jax.dlpack.from_dlpack(x.detach().contiguous())


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the tensors of the CPU the TorchTPU engine's own, and the stand-in its library."""
    monkeypatch.setattr(ENGINES["cpu"], "device", None)
    monkeypatch.setattr(ENGINES["torchtpu"], "device", "cpu")
    monkeypatch.setattr(ENGINES["torchtpu"], "missing", None)
    monkeypatch.setattr(binding, "platform", lambda: "cpu")
    monkeypatch.setattr(binding, "jax_op", jax_op)
    binding.op.cache_clear()
    binding.sharded_op.cache_clear()
