"""``--summary channels``: which layers' channels live and die together, and what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate
from torch import Tensor, nn

from qlib.files import write_csv
from qlib.graph import Graph
from qlib.graph.capture import capture
from qlib.graph.coordinates import Entry, channel_classes
from qlib.graph.coordinates_cost import class_costs
from qlib.report.summary import SUMMARIES

__all__ = ["axes_text"]

_FILE = "channels.csv"
_COLUMNS = ("Channels of", "Classes", "MACs of each", "Parameters of each", "Statistics")


@SUMMARIES.register("channels", order=4)
def _channels(model: nn.Module, example: Tensor, folder: Path) -> str:
    """A row for consecutive classes that are of the same layers; a class is what must be kept or removed together."""
    graph = capture(model, example[:2])
    classes = channel_classes(graph)
    costs = class_costs(graph, classes)
    macs, parameters = costs.macs_of_each(), costs.parameters_of_each()
    rows = [
        (
            axes_text(graph, entries),
            len(numbers),
            int(macs[numbers.start]),
            int(parameters[numbers.start]),
            "" if bool(classes.neutral[numbers.start]) else "yes",
        )
        for numbers, entries in classes.rows()
    ]
    write_csv(folder / _FILE, _COLUMNS, rows)
    return f"{_table(rows)}\nTotal classes: {classes.count:,}"


def axes_text(graph: Graph, entries: Sequence[Entry]) -> str:
    """The layers that a class is of, with what it is to each: its inputs, its outputs, or both.

    >>> import torch
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 10))
    >>> graph = capture(model, torch.zeros(2, 3, 2, 2))
    >>> axes_text(graph, channel_classes(graph).entries(1))
    '0 out, 1, 3 in x4'
    """
    parts: dict[str, None] = {}
    for name, axis, indices in entries:
        times = f" x{len(indices)}" if len(indices) > 1 else ""
        parts[f"{_part(graph, name, axis)}{times}"] = None
    return ", ".join(parts)


def _part(graph: Graph, name: str, axis: int) -> str:
    """The layer of a tensor, and whether an axis of it is that of inputs or of outputs."""
    layer, _, tensor = name.rpartition(".")
    module = graph.get_submodule(layer)
    plain = isinstance(module, nn.Linear) or (isinstance(module, nn.modules.conv._ConvNd) and module.groups == 1)
    if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) and tensor in ("weight", "bias"):
        outputs = tensor == "bias" or axis == int(getattr(module, "transposed", False))
        return layer if not plain else f"{layer} {'out' if outputs else 'in'}"
    return layer if layer and tensor in {**module._parameters, **module._buffers} and _is_norm(module) else name


def _is_norm(module: nn.Module) -> bool:
    return isinstance(getattr(module, "eps", None), float)


def _table(rows: Sequence[Sequence[str | int]]) -> str:
    cells = [[f"{cell:,}" if isinstance(cell, int) else cell for cell in row] for row in rows]
    return tabulate(
        cells,
        _COLUMNS,
        tablefmt="psql",
        disable_numparse=True,
        maxcolwidths=[100, None, None, None, None],
        colalign=("left", "right", "right", "right", "left") if rows else None,
    )
