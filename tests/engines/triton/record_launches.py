"""Notes what the engine would launch for each case of `benchmarks/lib/gpu_warm.py`, which fails where it would wait for
the device, and compares what the compiler would be given with what triton's own launch gives it. Prints a count each.

A process of its own, as `compile_kernels.py`.
"""

from __future__ import annotations

from benchmarks.lib.gpu_launches import distinct, launches
from benchmarks.lib.gpu_warm import cases
from torch_sinkhorn_attn.engines.triton.launch import CHIPS, Launch


def own_source(launch: Launch) -> dict[str, object] | None:
    """What triton makes of it; None in releases that have other names for it."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime import jit

    if not hasattr(jit, "create_function_from_signature") or not hasattr(launch.kernel, "_pack_args"):
        return None
    backend, meta = make_backend(GPUTarget("cuda", 90, 32)), {**launch.meta, "debug": False}
    binder = jit.create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    bound, found, options = binder(*launch.args, **meta)
    _, signature, constants, attributes = launch.kernel._pack_args(backend, meta, bound, found, options)
    return {"fn": launch.kernel, "signature": signature, "constexprs": constants, "attrs": attributes}


def main() -> None:
    noted = compared = 0
    for case in cases():
        found = launches(case, CHIPS["sm_90"])
        assert found, case.name
        noted += len(found)
        for launch in distinct(found):
            own = own_source(launch)
            assert own is None or own == launch.source(), (case.name, launch.kernel.__name__, own, launch.source())
            compared += own is not None
    print(noted, compared)


if __name__ == "__main__":
    main()
