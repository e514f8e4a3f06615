"""Time and memory against the length, full support and band."""

from __future__ import annotations

from pathlib import Path

from .tables import Cell

ORDER = (
    "cpu", "tiled", "dense", "unrolled", "softmax", "Sinkformers", "POT", "OTT-JAX", "OTT unrolled", "GeomLoss",
)  # fmt: skip
MARKERS = "osDv^<>PX*"


def plot(path: Path, columns: dict[str, list[Cell]]) -> None:
    """One column of two log-log axes for each title in `columns`, a line for each function."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        2, len(columns), figsize=(6.5 * len(columns), 9), squeeze=False, sharex="col", layout="constrained"
    )
    shown = {}
    for k, (title, cells) in enumerate(columns.items()):
        axes[0, k].set_title(title)
        for name in [*ORDER, *sorted({x.function for x in cells} - set(ORDER))]:
            mine = [x for x in cells if x.function == name and x.seconds is not None]
            mine = [x for x in mine if x.backward] or mine
            if not mine:
                continue
            at = ORDER.index(name) if name in ORDER else len(ORDER)
            look = {
                "color": f"C{at % 10}", "marker": MARKERS[at % len(MARKERS)], "markersize": 6,
                "linewidth": 3 if name == "cpu" else 1.5, "linestyle": "-" if mine[0].backward else "--",
            }  # fmt: skip
            label = name if mine[0].backward else f"{name} (forward alone)"
            (shown[label],) = axes[0, k].plot([x.case.length for x in mine], [x.seconds for x in mine], **look)
            held = [(x.case.length, x.peak / 2**20) for x in mine if x.peak]
            axes[1, k].plot([n for n, _ in held], [peak for _, peak in held], **look)
        lengths = sorted({x.case.length for x in cells})
        for axis in axes[:, k]:
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xticks(lengths, map(str, lengths))
            axis.grid(True, which="major", alpha=0.4)
        axes[1, k].set_xlabel("tokens L")
    axes[0, 0].set_ylabel("seconds, forward + backward")
    axes[1, 0].set_ylabel("peak extra memory, MiB")
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=5, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
