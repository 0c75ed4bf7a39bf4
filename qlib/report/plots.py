"""The plots of sensitivities, where matplotlib is installed."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path

from qlib.files import write_whole
from qlib.prune.sensitivity import PruningSensitivity
from qlib.search.sensitivity import Sensitivity

__all__ = ["NO_MATPLOTLIB", "plot_pruning", "plot_sensitivity"]

NO_MATPLOTLIB = "No plot: matplotlib is not installed; pip install 'qlib-compress[plot]'"

_COLORS = [
    f"tab:{name}" for name in ["blue", "orange", "green", "red", "purple", "brown", "pink", "gray", "olive", "cyan"]
]
_DASHES = ["-", "--", ":", "-."]
_HIGHEST = 80.0  # dB: beyond it nothing is lost


def plot_sensitivity(path: Path, rows: Sequence[Sensitivity]) -> bool:
    """Writes the signal-to-noise ratio of the logits as PNG, a curve for each bit-width; False without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(row.what for row in rows))
    longest = max(sum(row.what == what for row in rows) for what in kinds)
    bits = sorted({row.bits for row in rows})
    figure = Figure(figsize=(max(8.0, 0.3 * longest / len(bits) + 3), 4.5 * len(kinds)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, what in zip(figure.subplots(len(kinds), squeeze=False)[:, 0], kinds, strict=True):
        for width in bits:
            found = [row for row in rows if (row.what, row.bits) == (what, width)]
            levels = [min(row.sqnr_logits, _HIGHEST) if not math.isnan(row.sqnr_logits) else 0.0 for row in found]
            axes.plot([row.layer for row in found], levels, marker=".", label=f"{width} bits")
        axes.set_title(f"{what} of one layer alone")
        axes.set_ylabel("SQNR of the logits, dB")
        axes.tick_params(axis="x", labelrotation=90)
        axes.grid(visible=True, alpha=0.3)
        axes.legend()
    write_whole(path, lambda file: figure.savefig(file, format="png"), "plot")
    return True


def plot_pruning(path: Path, rows: Sequence[PruningSensitivity], reference: PruningSensitivity) -> bool:
    """Writes Top1 and loss over sparsity as PNG, a curve for each weight; False without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row.parameter for row in rows))
    figure = Figure(figsize=(14.0, max(6.0, 0.17 * len(names))), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, what, label in zip(figure.subplots(1, 2), ("top1", "loss"), ("Top1, %", "loss"), strict=True):
        axes.set_prop_cycle(color=_COLORS * len(_DASHES), linestyle=[dash for dash in _DASHES for _ in _COLORS])
        for name in names:
            own = [row for row in rows if row.parameter == name]
            axes.plot([row.sparsity for row in own], [getattr(row, what) for row in own], marker=".", label=name)
        axes.axhline(getattr(reference, what), color="black", linewidth=0.8)
        axes.set_xlabel("sparsity of one weight alone")
        axes.set_ylabel(label)
        axes.grid(visible=True, alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize="x-small")
    write_whole(path, lambda file: figure.savefig(file, format="png"), "plot")
    return True
