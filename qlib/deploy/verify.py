"""The proof that a file computes what was simulated: the exact model and ONNX Runtime side by side."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, fx

from qlib.deploy.export import OUTPUT
from qlib.deploy.inspection import LOGITS, Inspection, dequantizes
from qlib.deploy.kernels import Kernels
from qlib.deploy.session import run_session
from qlib.files import write_csv
from qlib.lower import exact_arithmetic
from qlib.lower.exact import activation_grid

__all__ = ["FLOAT_SHARE", "Checked", "Verification", "table", "verify", "write_verification"]

FLOAT_SHARE = 1e-3
"""Of the codes of a layer that ONNX Runtime computes in float, this share may differ, by one step."""

_ROUNDING = 1e-4
"""How far logits that are computed in float may be apart, relative to the largest one."""

_BATCH = 8
"""Images at a time: the codes of all their layers are held at once."""


@dataclass(frozen=True)
class Checked:
    """One tensor of codes: how many, how many differ and by how much at most, given the same codes before the layer.

    The logits are one more: all of them must be equal where they are dequantized codes, else nearly so.
    `integer` tells whether ONNX Runtime computes the layer in integers; `codes` is 0 where the file does not hold the
    tensor. `same_kernel` is false where ONNX Runtime computes the layer otherwise once its codes are to be seen: then
    nothing is known about it. `differing_alone` counts without giving both sides the same codes before the layer.
    """

    layer: str
    kernel: str
    integer: bool
    codes: int
    differing: int
    largest: int
    differing_alone: int
    same_kernel: bool = True

    @property
    def share(self) -> float:
        """The share of codes that differ."""
        return self.differing / self.codes if self.codes else 0.0

    @property
    def verdict(self) -> str:
        """``exact``, ``within a step`` (a layer in float, as far as allowed), ``differs`` or ``not verified``.

        >>> Checked("a", "QGemm", True, 1000, 1, 1, 1).verdict, Checked("a", "Gelu", False, 1000, 1, 1, 1).verdict
        ('differs', 'within a step')
        """
        if not self.codes or not self.same_kernel:
            return "not verified"
        if not self.differing:
            return "exact"
        within = not self.integer and self.largest <= 1 and self.share <= FLOAT_SHARE
        return "within a step" if within else "differs"


@dataclass(frozen=True)
class Verification:
    """What `verify` found: `layers` in execution order, and the two models run freely on `images` images.

    `agreeing` counts the images with the same prediction, `logit_difference` is the largest one. `faithful` tells
    whether the model whose codes were seen gave the very logits of the one that ships.
    """

    layers: tuple[Checked, ...]
    images: int
    agreeing: int
    logit_difference: float
    faithful: bool

    @property
    def exact(self) -> bool:
        """Whether every integer layer computes the same codes, and every float one nearly so."""
        good = [layer.verdict in ("exact", "within a step") for layer in self.layers]
        return self.faithful and self.images > 0 and all(good)

    @property
    def first(self) -> str | None:
        """The first layer, in execution order, whose codes differ when both models run freely."""
        return next((layer.layer for layer in self.layers if layer.differing_alone), None)


@torch.inference_mode()
def verify(exact: fx.GraphModule, path: Path, batches: Iterable[Tensor]) -> Verification:
    """Compares the model of `lower_exact` with the file that `export_quantized` made of it, on `batches` of images.

    Each layer is judged alone: it is given the codes that ONNX Runtime had before it. Where codes are made from float
    values that ONNX Runtime does not show, those of the exact model are taken.
    """
    inspection = Inspection.open(exact, path)
    tallies = {name: _Tally() for name in (*inspection.grids, LOGITS)}
    images = agreeing = 0
    largest, faithful = 0.0, True
    with exact_arithmetic():
        for batch in (part for whole in batches for part in torch.split(whole, _BATCH)):
            (shipped,) = run_session(inspection.shipped, batch, [OUTPUT])
            logits, deployed = inspection.run(batch)
            faithful &= torch.equal(logits, shipped)
            mine = _compare(exact, batch, deployed, tallies).cpu()
            images += len(batch)
            agreeing += int((mine.argmax(-1) == shipped.argmax(-1)).sum())
            largest = max(largest, float((mine - shipped).abs().max()))
    return Verification(tuple(_rows(inspection, tallies)), images, agreeing, largest, faithful)


@dataclass
class _Tally:
    codes: int = 0
    differing: int = 0
    largest: int = 0
    differing_alone: int = 0


def _rows(inspection: Inspection, tallies: Mapping[str, _Tally]) -> Iterator[Checked]:
    for name, tally in tallies.items():
        kernels = inspection.kernels.get(name, Kernels())
        yield Checked(
            name,
            str(kernels),
            kernels.integer and name not in inspection.from_float,
            tally.codes,
            tally.differing,
            tally.largest,
            tally.differing_alone,
            name not in inspection.altered,
        )


def _compare(
    exact: fx.GraphModule, batch: Tensor, deployed: Mapping[str, Tensor], tallies: dict[str, _Tally]
) -> Tensor:
    """Adds the differences of a batch to the tallies; the exact model's own logits."""
    device = next((value.device for value in exact.state_dict().values()), batch.device)
    alone = _SideBySide(exact, deployed, follow=False)
    logits: Tensor = alone.run(batch.to(device))
    judged = alone
    if any(differing for differing, _ in alone.found.values()):  # otherwise both had the same codes all along
        judged = _SideBySide(exact, deployed, follow=True)
        judged.run(batch.to(device))
    for name, (differing, largest) in judged.found.items():
        tally = tallies[name]
        tally.codes += deployed[name].numel()
        tally.differing += differing
        tally.largest = max(tally.largest, largest)
        tally.differing_alone += alone.found[name][0]
    return logits


class _SideBySide(fx.Interpreter):
    """Runs the exact model and compares each layer's codes with those `deployed`; `follow`: goes on with the latter."""

    def __init__(self, exact: fx.GraphModule, deployed: Mapping[str, Tensor], *, follow: bool) -> None:
        super().__init__(exact)
        self.deployed, self.follow = deployed, follow
        self.dequantized = dequantizes(exact)
        self.found: dict[str, tuple[int, int]] = {}

    def run_node(self, node: fx.Node) -> Any:
        mine = super().run_node(node)
        name = str(node.target)
        if node.op == "output":
            theirs = self.deployed[LOGITS].to(mine.device)
            tolerance = 0.0 if self.dequantized else _ROUNDING * float(theirs.abs().max())
            self.found[LOGITS] = _differences(mine, theirs, tolerance)
        elif node.op == "call_module" and name in self.deployed:
            # The exporter leaves out a reshape where another follows.
            grid = activation_grid(node)
            assert grid is not None
            theirs = self.deployed[name].to(mine.device).float().view_as(mine) - grid.zero_point
            self.found[name] = _differences(mine, theirs, 0.0)
            mine = theirs if self.follow else mine
        return mine


def _differences(mine: Tensor, theirs: Tensor, tolerance: float) -> tuple[int, int]:
    """How many values are further apart than the tolerance, and the largest difference of these, rounded up.

    >>> _differences(torch.tensor([1.0, 2.0, 5.0]), torch.tensor([1.0, 3.0, 3.0]), 0.0)
    (2, 2)
    """
    if torch.equal(mine, theirs):
        return 0, 0
    apart = (mine - theirs).abs_()
    return int((apart > tolerance).sum()), math.ceil(float(torch.where(apart > tolerance, apart, 0.0).max()))


_HEADERS = ("Layer", "Kernel", "Type", "Codes", "Differing", "Share", "Largest", "Verdict")


def _cells(layer: Checked) -> tuple[str | int, ...]:
    kind = "integer" if layer.integer else "float"
    share = f"{layer.share:.2e}" if layer.differing else "0"
    return (layer.layer, layer.kernel, kind, layer.codes, layer.differing, share, layer.largest, layer.verdict)


def table(verification: Verification) -> str:
    """One line a layer, then what the two models did when they ran freely."""
    rows = [[str(cell) for cell in _cells(layer)] for layer in verification.layers]
    align = ("left", "left", "left", "right", "right", "right", "right", "left") if rows else None
    lines = [tabulate(rows, _HEADERS, tablefmt="psql", disable_numparse=True, colalign=align)]
    for integer in (True, False):
        group = [layer for layer in verification.layers if layer.integer == integer]
        codes, differing = sum(layer.codes for layer in group), sum(layer.differing for layer in group)
        kind = "integer" if integer else "float"
        lines.append(f"{kind} layers: {differing:,} of {codes:,} codes differ in {len(group)} tensors")
    lines.append(f"first layer that differs: {verification.first or 'none'}")
    lines.append(
        f"predictions: {verification.agreeing} of {verification.images} agree,"
        f" largest logit difference {verification.logit_difference:.3g}"
    )
    if not verification.faithful:
        lines.append("not verified: with its codes to be seen, the model gives other logits than the one that ships")
    lines.append(f"verification: {'exact' if verification.exact else 'NOT exact'}")
    return "\n".join(lines)


def write_verification(path: Path, verification: Verification) -> None:
    """Writes the table's columns; raises OutputError where that is impossible."""
    write_csv(path, [header.lower() for header in _HEADERS], map(_cells, verification.layers))
