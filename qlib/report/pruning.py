"""What pruning kept: a row for each weight, or for channels that live and die together, and their tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tabulate import tabulate
from torch import Tensor

from qlib.graph.coordinates import ChannelClasses
from qlib.report.record_parts import Pruned

__all__ = ["channels_table", "pruned_channels", "pruned_weights", "pruning_table"]


def pruned_weights(masks: Mapping[str, Tensor], errors: Mapping[str, float]) -> tuple[Pruned, ...]:
    """One row a parameter.

    >>> import torch
    >>> pruned_weights({"fc.weight": torch.tensor([[True, False]])}, {"fc.weight": 0.125})
    (Pruned(name='fc.weight', kept=1, total=2, shape=(1, 2), layers=1, error=0.125),)
    """
    return tuple(
        Pruned(name, int(mask.sum()), mask.numel(), tuple(mask.shape), error=errors.get(name))
        for name, mask in masks.items()
    )


def pruned_channels(classes: ChannelClasses, ranges: Sequence[range], removed: Sequence[int]) -> tuple[Pruned, ...]:
    """One row for channels that live and die together, by the weight that makes them first.

    >>> from torch import nn
    >>> from qlib.graph import capture
    >>> from qlib.graph.coordinates import channel_classes
    >>> import torch
    >>> net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1))
    >>> pruned_channels(channel_classes(capture(net, torch.zeros(2, 3, 1, 1))), [range(1, 5)], [2])
    (Pruned(name='0.weight', kept=3, total=4, shape=(), layers=1, error=None),)
    """
    gone, rows = set(removed), list[Pruned]()
    for numbers in ranges:
        made = list(dict.fromkeys(name for name, axis, _ in classes.entries(numbers[0]) if axis == 0))
        weights = [name for name in made if name.endswith("weight")]
        kept = len(numbers) - len(gone.intersection(numbers))
        rows.append(Pruned(next(iter(weights), made[0]), kept, len(numbers), layers=len(weights)))
    return tuple(rows)


def pruning_table(rows: Sequence[Pruned]) -> str:
    """One line a parameter: its shape, how many weights are kept, the share that is not, the error of its outputs.

    >>> print(pruning_table([Pruned("fc.weight", 1, 2, (1, 2), error=0.125)]))
    +-----------+---------+--------+---------+------------+---------+
    | Name      | Shape   |   Kept |   Total |   Sparsity |   Error |
    |-----------+---------+--------+---------+------------+---------|
    | fc.weight | 1x2     |      1 |       2 |      50.00 |   12.50 |
    | all       |         |      1 |       2 |      50.00 |         |
    +-----------+---------+--------+---------+------------+---------+
    """
    whole = Pruned("all", sum(each.kept for each in rows), sum(each.total for each in rows))
    lines = [
        [each.name, "x".join(map(str, each.shape)), each.kept, each.total, _share_gone(each),
         None if each.error is None else f"{100 * each.error:.2f}"]
        for each in (*rows, whole)
    ]  # fmt: skip
    headers = ["Name", "Shape", "Kept", "Total", "Sparsity", "Error"]
    return tabulate(lines, headers, tablefmt="psql", floatfmt=".2f", intfmt=",")


def _share_gone(each: Pruned) -> str:
    return f"{100 * (1 - each.kept / each.total):.2f}"


def channels_table(rows: Sequence[Pruned]) -> str:
    """One line for channels that live and die together: where they are made, and how many stay.

    >>> print(channels_table([Pruned("0.weight", 3, 4)]))
    +---------------+----------+--------+---------+
    | Channels of   |   Layers |   Kept |   Total |
    |---------------+----------+--------+---------|
    | 0.weight      |        1 |      3 |       4 |
    +---------------+----------+--------+---------+
    """
    lines = [[each.name, each.layers, each.kept, each.total] for each in rows]
    return tabulate(lines, ["Channels of", "Layers", "Kept", "Total"], tablefmt="psql", intfmt=",")
