"""Which problems the wavefront kernels take."""

from __future__ import annotations

from torch_sinkhorn_attn.engines.tpu.method import sinkhorn
from torch_sinkhorn_attn.engines.tpu.method.lowering import Lowering
from torch_sinkhorn_attn.engines.tpu.wavefront import adjoint, passes, products, stepwise
from torch_sinkhorn_attn.engines.tpu.wavefront.forward import PassStatics
from torch_sinkhorn_attn.engines.tpu.wavefront.path import path_of

WIDEST = 20  # column blocks of a row block: what one loop body may hold
SCALARS = 512 << 10  # bytes of scalar memory, of the 1 MiB a core has, that the way of all batch elements may take
SMALLEST_FACTOR = 1e-6  # of q.k: what is added to the scores is held divided by it


def refusal(problem: sinkhorn.Augmented, lowering: Lowering, backward: bool, mask_grad: bool = False) -> str | None:
    """Why the wavefront kernels cannot take a problem; None if they can."""
    statics, constants = problem.statics, problem.constants
    if 0 in (*constants.log_row_mass.shape, problem.size):
        return "it is empty"
    if not statics.banded or min(statics.window_left, statics.window_right) < 0:
        return "a wavefront needs a window on both sides"
    alone = None if backward else stepwise.coupled(problem, lowering)
    beside = alone or ("a tolerance" if statics.tolerance and statics.stopped else None)
    if not backward and beside is not None and (statics.over_relaxation != 1 or statics.acceleration):
        return f"beside {beside} its passes make plain iterations only"
    if not backward and statics.acceleration and not statics.contraction and constants.row_segment is not None:
        return "the contraction of packed problems is measured segment by segment"
    if statics.kept == 0 and not backward and (statics.stopped == 0 or statics.over_relaxation != 1):
        return "without tail iterations the last row half-step of the base must be there, and be plain"
    if statics.kept > adjoint.MOST_KEPT and not backward and alone is None:
        return f"a wavefront keeps at most {adjoint.MOST_KEPT} iterations, not {statics.kept}"
    if not statics.scale / statics.epsilon > SMALLEST_FACTOR:
        return f"scale/epsilon={statics.scale / statics.epsilon:.3g} is not above {SMALLEST_FACTOR}"
    path = path_of(problem.length, problem.size, statics)
    if path.width > WIDEST:
        return f"a block of 128 rows may reach {path.columns} columns, and {WIDEST * 128} are the most"
    found = None
    if not backward:
        found = passes.passes_of(problem, lowering, residuals=True) if alone is None else _alone(problem, lowering)
    apart = backward and adjoint.by_products(problem, mask_grad)
    if apart:
        ways = [products.options_of(problem, True, True).way]
    else:
        ways = [adjoint.options_of(problem).way] if backward else [o.way for o in found or []]
    batch = 1 if statics.uniform else constants.log_row_mass.shape[0]
    if (size := max((8 * batch * (way.before + way.steps) for way in ways), default=0)) > SCALARS:
        return f"the way of {batch} batch elements takes {size >> 10} KiB of scalar memory, of {SCALARS >> 10} KiB"
    if backward:
        size = products.vmem(problem) if apart else adjoint.vmem(problem)
        fits = size <= lowering.vmem_limit
    else:
        fits = found is not None
    return None if fits else f"{lowering.chip} has not the memory for an iteration of its row blocks in flight"


def _alone(problem: sinkhorn.Augmented, lowering: Lowering) -> list[PassStatics] | None:
    """The pass of one iteration, where it fits."""
    one = stepwise.pass_of(problem)
    return [one] if passes.vmem(problem, one) <= lowering.vmem_limit else None
