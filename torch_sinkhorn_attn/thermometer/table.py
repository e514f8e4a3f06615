"""A certificate in print."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from torch_sinkhorn_attn.problem.status import Status

if TYPE_CHECKING:
    from torch_sinkhorn_attn.certificates import Certificate

HEAD = ("index", "status", "row residual", "col residual", "contraction", "rate", "bias bound", "measured bias")


def table(c: Certificate, most_rows: int = 24) -> str:
    """One line for each problem, then what is wrong and what would mend it. What was not computed is -."""
    lines = [[*HEAD, "relative"]]
    places = torch.ones(c.rate.shape, dtype=torch.bool, device="cpu").nonzero().tolist()
    for index in places:
        at = tuple(index)
        status = Status(int(c.status[at]))
        line = [",".join(map(str, index)), status.words]
        line += [f"{c.row_residual_max[at]:.2e}", f"{c.col_residual_max[at]:.2e}"]
        exists, exact = status != Status.NO_PLAN, c.mode == "exact"
        kappa, bound = c.contraction[at].item(), c.bias_bound[at].item()
        line += [
            "-" if not exact else f"{kappa:.6f}" if kappa < 1 else "not certified",
            f"{c.rate[at]:.6f}" if exists else "-",
            "-" if not exact else f"{bound:.2e}" if bound < torch.inf else "not certified",
            f"{c.measured_bias[at]:.2e}" if exists and exact else "-",
            f"{100 * c.relative_bias[at]:.3g} %" if exists and exact else "-",
        ]
        lines.append(line)
    hidden = len(lines) - 1 - most_rows
    lines = lines[: most_rows + 1]
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    text = "\n".join("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in lines)
    text += f"\n... and {hidden} more" if hidden > 0 else ""
    counts = [(status, int((c.status == status).sum())) for status in (Status.NO_PLAN, Status.NOT_CONVERGED)]
    verdict = ", ".join(f"{status.words}: {count} of {c.status.numel()}" for status, count in counts if count)
    told = c.advice or (c.reasons[0] if c.reasons else "")
    return "\n".join([text, *([". ".join(x for x in (verdict, told) if x)] if verdict or told else [])])
