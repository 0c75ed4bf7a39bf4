"""The table of a pruned model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tabulate import tabulate
from torch import Tensor

from qlib.graph.coordinates import ChannelClasses

__all__ = ["channels_table", "pruning_table"]


def pruning_table(masks: Mapping[str, Tensor], errors: Mapping[str, float]) -> str:
    """One line a parameter: its shape, how many weights are kept, the share that is not, the error of its outputs.

    >>> import torch
    >>> print(pruning_table({"fc.weight": torch.tensor([[True, False]])}, {"fc.weight": 0.125}))
    +-----------+---------+--------+---------+------------+---------+
    | Name      | Shape   |   Kept |   Total |   Sparsity |   Error |
    |-----------+---------+--------+---------+------------+---------|
    | fc.weight | 1x2     |      1 |       2 |      50.00 |   12.50 |
    | all       |         |      1 |       2 |      50.00 |         |
    +-----------+---------+--------+---------+------------+---------+
    """
    rows = [[name, "x".join(map(str, mask.shape)), *_counts([mask]), errors.get(name)] for name, mask in masks.items()]
    rows = [[*row[:-1], None if row[-1] is None else f"{100 * row[-1]:.2f}"] for row in rows]
    rows.append(["all", "", *_counts(list(masks.values())), None])
    headers = ["Name", "Shape", "Kept", "Total", "Sparsity", "Error"]
    return tabulate(rows, headers, tablefmt="psql", floatfmt=".2f", intfmt=",")


def _counts(masks: list[Tensor]) -> tuple[int, int, str]:
    kept, total = sum(int(mask.sum()) for mask in masks), sum(mask.numel() for mask in masks)
    return kept, total, f"{100 * (1 - kept / total):.2f}"


def channels_table(classes: ChannelClasses, ranges: Sequence[range], removed: Sequence[int]) -> str:
    """One line for channels that live and die together: where they are made and read, and how many stay.

    >>> from torch import nn
    >>> from qlib.graph import capture
    >>> from qlib.graph.coordinates import channel_classes
    >>> import torch
    >>> net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1))
    >>> print(channels_table(channel_classes(capture(net, torch.zeros(2, 3, 1, 1))), [range(1, 5)], [2]))
    +---------------+----------+--------+---------+
    | Channels of   |   Layers |   Kept |   Total |
    |---------------+----------+--------+---------|
    | 0.weight      |        1 |      3 |       4 |
    +---------------+----------+--------+---------+
    """
    gone, rows = set(removed), []
    for numbers in ranges:
        made = list(dict.fromkeys(name for name, axis, _ in classes.entries(numbers[0]) if axis == 0))
        weights = [name for name in made if name.endswith("weight")]
        kept = len(numbers) - len(gone.intersection(numbers))
        rows.append([next(iter(weights), made[0]), len(weights), kept, len(numbers)])
    return tabulate(rows, ["Channels of", "Layers", "Kept", "Total"], tablefmt="psql", intfmt=",")
