"""All that may differ between releases of torch: what one changed, with its number, and the private names in use.

No other file looks at the version of torch or calls what torch keeps private, but for engines/xla, whose torch_xla has
one torch alone. A release that is not known yet is tried.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor as FunctionalTensor
from torch.autograd import forward_ad
from torch.fx._symbolic_trace import is_fx_symbolic_tracing as is_fx_symbolic_tracing

F = TypeVar("F", bound=Callable[..., Any])

RELEASE = tuple(map(int, re.findall(r"\d+", torch.__version__)[:2]))  # (2, 9)


def among(text: str) -> bool:
    """Whether this is torch A.B, or for "A.B+" that or a later one: the C++ interface that is stable came with 2.10."""
    named = tuple(map(int, text.rstrip("+").split(".")))
    return named == RELEASE or (text.endswith("+") and named < RELEASE)


def forward_level() -> int:
    """The level of forward-mode differentiation, outside torch.func; -1 without."""
    level: int = forward_ad._current_level
    return level


def making_fx() -> bool:
    """Whether make_fx traces."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


def in_transform(x: Tensor) -> bool:
    """Whether the tensor is one inside a transform of torch.func."""
    return torch._C._functorch.is_functorch_wrapped_tensor(x)


def same_memory(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors share their memory."""
    return torch._C._is_alias_of(x, y)  # type: ignore[attr-defined]


def undisturbed() -> bool:
    """Whether nothing stands between a call of an op and the op: nothing is traced or compiled, and there is no
    transform of torch.func, no mode (fake tensors, counters, another default device), no autocast and no forward-mode
    differentiation."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or forward_ad._current_level >= 0
        or torch._C._is_any_autocast_enabled()
    )


def plain(x: Any) -> bool:
    """Whether it is a tensor of no subclass whose own numbers are in the memory of the CPU, as its strides say."""
    return (
        (type(x) is Tensor or type(x) is torch.nn.Parameter)
        and x.is_cpu
        and not x.is_nested
        and x.layout is torch.strided
        and not x.is_neg()
        and not x._is_zerotensor()
        and not torch._C._functorch.is_legacy_batchedtensor(x)  # as a backward with is_grads_batched=True has
    )


def constant_in_programs(function: F) -> F:
    """As torch.compiler.assume_constant_result, which imports all of the compiler: called while a program is compiled,
    and its result kept."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_in_programs
def takes_unknown_sizes() -> bool:
    """Whether torch.compile was told to take ops into its graphs whose results have sizes that it does not know."""
    from torch._dynamo import config

    return bool(config.capture_dynamic_output_shape_ops)


def functionalized(function: Callable[..., tuple[Tensor, ...]], args: Sequence[Any]) -> tuple[Tensor, ...]:
    """The function on tensors as they are outside of an op, where views are views: inside, the dispatcher has taken off
    the wrapper that makes them so."""
    outside = torch._C._dispatch_tls_local_exclude_set().remove(torch._C.DispatchKey.Functionalize)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), outside):
        wrapped = [torch._to_functional_tensor(x) if isinstance(x, Tensor) else x for x in args]
        results = function(*wrapped)
        for x in results:
            torch._sync(x)  # type: ignore[attr-defined]
        return tuple(torch._from_functional_tensor(x) for x in results)


@contextmanager
def recorded_inside() -> Iterator[None]:
    """Within the body of an op, autograd as it is outside, where it was taken off before the body was called."""
    left = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor", "ADInplaceOrView"):
        left = left.remove(getattr(torch._C.DispatchKey, key))
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), left), torch.enable_grad():
        yield


def group_named(name: str) -> Any:
    """The process group that is registered by a name, as ops are told it."""
    from torch.distributed import distributed_c10d

    resolve: Callable[[str], Any] = vars(distributed_c10d)["_resolve_process_group"]
    return resolve(name)


def poisons_memory() -> bool:
    """Whether torch.empty fills what it gives with NaN."""
    deterministic: Any = torch.utils.deterministic
    return torch.are_deterministic_algorithms_enabled() and bool(deterministic.fill_uninitialized_memory)


def nested_sizes(x: Any) -> Tensor:
    """The shapes of a nested tensor's components, one a row."""
    sizes: Tensor = x._nested_tensor_size()
    return sizes


def nested_of(dense: Tensor, keep: Tensor) -> Tensor:
    """The nested tensor of the entries of `dense` `[N, L, E]` that `keep` `[N, L]` has, the first of each row."""
    return torch._nested_tensor_from_mask(dense, keep, mask_check=False)


def materialized(bias: Any, device: torch.device) -> Tensor:
    """The bool mask of a torch.nn.attention.bias.CausalBias."""
    keep: Tensor = bias._materialize(device)
    return keep
