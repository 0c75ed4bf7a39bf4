"""The table of a pruned model."""

from __future__ import annotations

from collections.abc import Mapping

from tabulate import tabulate
from torch import Tensor

__all__ = ["pruning_table"]


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
