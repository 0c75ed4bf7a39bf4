"""Tables of what a run looked at: sparsity of masks, activity of activation functions, histograms of parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from tabulate import tabulate
from torch import Tensor, nn

from qlib.prune.masks import sparsity
from qlib.stats.activity import Activity

__all__ = ["activity_table", "masks_table", "parameter_histograms"]

_BINS = 200


def masks_table(masks: Mapping[str, Tensor]) -> str:
    """One line a mask: shape, weights, how many are kept, the share that is not; and that of all of them together.

    >>> print(masks_table({"weight": torch.tensor([[True, False]])}))
    Masks sparsity:
    +-------------+---------+-----------+--------+----------------+
    | Parameter   | Shape   |   Weights |   Kept |   Sparsity (%) |
    |-------------+---------+-----------+--------+----------------|
    | weight      | (1, 2)  |         2 |      1 |       50.00000 |
    | Total       |         |         2 |      1 |       50.00000 |
    +-------------+---------+-----------+--------+----------------+
    >>> masks_table({})
    'Masks sparsity: there are no masks; --summary sparsity counts zeros'
    """
    if not masks:
        return "Masks sparsity: there are no masks; --summary sparsity counts zeros"
    rows = [_mask_row(name, str(tuple(mask.shape)), mask) for name, mask in masks.items()]
    rows.append(_mask_row("Total", "", torch.cat([mask.flatten().cpu() for mask in masks.values()])))
    headers = ("Parameter", "Shape", "Weights", "Kept", "Sparsity (%)")
    align = ("left", "left", "right", "right", "right")
    return "Masks sparsity:\n" + tabulate(rows, headers, tablefmt="psql", disable_numparse=True, colalign=align)


def _mask_row(name: str, shape: str, mask: Tensor) -> list[str]:
    return [name, shape, f"{mask.numel()}", f"{int(mask.sum())}", f"{100 * sparsity(mask):.5f}"]


def activity_table(found: Mapping[str, Activity]) -> str:
    """One line an activation function: its channels, how many never put out anything but 0, and its sparsity."""
    rows = [
        [
            name,
            len(each.zeros),
            int((each.zeros == 1).sum()),
            f"{100 * each.sparsity:.2f}",
            f"{float(each.l1.mean()):.4g}",
        ]
        for name, each in found.items()
    ]
    headers = ("Layer", "Channels", "Dead", "Sparsity (%)", "L1 of a channel")
    align = ("left", "right", "right", "right", "right")
    return tabulate(rows, headers, tablefmt="psql", disable_numparse=True, colalign=align)


def parameter_histograms(model: nn.Module) -> Iterator[tuple[str, float, float, int]]:
    """Parameter, both ends of a bin, and how many values lie in it: 200 bins from the least to the greatest value.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> layer.weight.data = torch.tensor([[0.0, 2.0]])
    >>> [row for row in parameter_histograms(layer) if row[3]]
    [('weight', 0.0, 0.01, 1), ('weight', 1.99, 2.0, 1)]
    """
    for name, parameter in model.named_parameters():
        values = parameter.detach().double().cpu().flatten()
        low, high = float(values.min()), float(values.max())
        width = (high - low) / _BINS
        for index, count in enumerate(torch.histc(values, _BINS, low, high).long().tolist()):
            yield name, low + index * width, low + (index + 1) * width, count
