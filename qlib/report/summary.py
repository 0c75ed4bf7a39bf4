"""What ``--summary`` prints about a model: sparsity of its weights, cost of its layers, its tree, its modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from tabulate import tabulate
from torch import Tensor, nn

from qlib.files import write_csv
from qlib.graph.capture import capture
from qlib.graph.cost import layer_costs
from qlib.registry import Registry

__all__ = ["SUMMARIES", "summary"]

_SPARSITY_FILE, _COMPUTE_FILE = "weights_sparsity.csv", "compute.csv"
_Row = Sequence["str | int | float"]

SUMMARIES: Registry[Callable[[nn.Module, Tensor, Path], str]] = Registry("summary", "qlib.report")
"""Name on the command line -> the function that makes the text."""


def summary(what: str, model: nn.Module, example: Tensor, folder: Path) -> str:
    """The text of one summary; `example` is a batch ``[N, ...]`` that the model takes, its values do not matter.

    ``sparsity`` writes ``weights_sparsity.csv`` into `folder` as well, ``compute`` writes ``compute.csv``.

    >>> import torch
    >>> print(summary("modules", nn.Sequential(nn.Linear(4, 2), nn.ReLU()), torch.zeros(1, 4), Path()))
    +--------+--------+
    | Name   | Type   |
    |--------+--------|
    | 0      | Linear |
    | 1      | ReLU   |
    +--------+--------+

    Raises:
        QlibError: there is no such summary.
        ModelError: the model cannot be captured (``compute``).
        OutputError: the file cannot be written.
    """
    return SUMMARIES[what](model, example, folder)


@SUMMARIES.register("model", order=2)
def _model(model: nn.Module, example: Tensor, folder: Path) -> str:
    return str(model)


@SUMMARIES.register("modules", order=3)
def _modules(model: nn.Module, example: Tensor, folder: Path) -> str:
    leaves = [(name, type(each).__name__) for name, each in model.named_modules() if _is_leaf(each)]
    return _table(("Name", "Type"), leaves)


def _is_leaf(module: nn.Module) -> bool:
    return next(module.children(), None) is None


# --- sparsity -----------------------------------------------------------------------------------------------------

_SPARSITY_COLUMNS = (
    *("Name", "Shape", "NNZ (dense)", "NNZ (sparse)", "Cols (%)", "Rows (%)", "Ch (%)", "2D (%)", "3D (%)", "Fine (%)"),
    *("Std", "Mean", "Abs-Mean"),
)


@SUMMARIES.register("sparsity", order=0)
def _sparsity(model: nn.Module, example: Tensor, folder: Path) -> str:
    """Zeros in the parameters with two or four axes, the weights of linear and of convolution layers."""
    weights = {name: value.detach() for name, value in model.named_parameters() if value.ndim in (2, 4)}
    dense = sum(value.numel() for value in weights.values())
    kept = sum(int(value.count_nonzero()) for value in weights.values())
    total = _percent(dense - kept, dense)
    rows: list[_Row] = [_sparsity_row(name, value) for name, value in weights.items()]
    rows.append(("Total sparsity:", "-", dense, kept, 0.0, 0.0, 0.0, 0.0, 0.0, total, 0.0, 0.0, 0.0))
    write_csv(
        folder / _SPARSITY_FILE,
        ("parameter", "shape", "volume", "sparse volume", "sparsity level"),
        [(row[0], row[1], row[2], row[3], row[9]) for row in rows[:-1]],
    )
    return f"{_table(_SPARSITY_COLUMNS, rows)}\nTotal sparsity: {total:.2f}"


def _sparsity_row(name: str, weight: Tensor) -> _Row:
    """Percentages of what is zero as a whole; blocks that the shape does not have count 0."""
    values, matrix = weight.double(), weight.ndim == 2
    zero = weight == 0
    kept = int(weight.count_nonzero())
    return (
        name,
        str(tuple(weight.shape)),
        weight.numel(),
        kept,
        _share(zero.all(0)) if matrix else 0.0,
        _share(zero.all(1)) if matrix else 0.0,
        0.0 if matrix else _share(zero.flatten(2).all(2).all(0)),
        0.0 if matrix else _share(zero.flatten(2).all(2)),
        0.0 if matrix else _share(zero.flatten(1).all(1)),
        _percent(weight.numel() - kept, weight.numel()),
        float(values.std(correction=0)),
        float(values.mean()),
        float(values.abs().mean()),
    )


def _share(zero: Tensor) -> float:
    return _percent(int(zero.sum()), zero.numel())


def _percent(part: int, whole: int) -> float:
    return 100 * part / whole if whole else 0.0


# --- compute ------------------------------------------------------------------------------------------------------

_COMPUTE_COLUMNS = ("Name", "Type", "Attrs", "IFM", "IFM volume", "OFM", "OFM volume", "Weights volume", "MACs")


@SUMMARIES.register("compute", order=1)
def _compute(model: nn.Module, example: Tensor, folder: Path) -> str:
    """The layers that have weights or multiply, for one image."""
    costs = [cost for cost in layer_costs(capture(model, example[:1])) if cost.macs or cost.weights]
    rows: list[_Row] = [
        (c.name, c.type, c.attrs, str(c.ifm), c.ifm_volume, str(c.ofm), c.ofm_volume, c.weights, c.macs) for c in costs
    ]
    write_csv(folder / _COMPUTE_FILE, _COMPUTE_COLUMNS, rows)
    return f"{_table(_COMPUTE_COLUMNS, rows)}\nTotal MACs: {sum(cost.macs for cost in costs):,}"


# --- tables -------------------------------------------------------------------------------------------------------


def _table(columns: Sequence[str], rows: Sequence[_Row]) -> str:
    """Text to the left and numbers to the right, fractions with five digits."""
    cells = [[f"{cell:.5f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    align = ["left" if isinstance(cell, str) else "right" for cell in rows[0]] if rows else None
    return tabulate(cells, columns, tablefmt="psql", disable_numparse=True, colalign=align)
