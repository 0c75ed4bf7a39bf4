"""The proof that a file computes what was simulated: the exact model and ONNX Runtime side by side."""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tabulate import tabulate
from torch import Tensor, fx, nn

from qlib.deploy.export_onnx import CODES, OUTPUT
from qlib.deploy.placement import Kernels, exact_layers, kernels_of, open_with_graph
from qlib.deploy.session import run_session
from qlib.errors import OutputError
from qlib.graph.ir import layer_inputs
from qlib.lower import exact_arithmetic
from qlib.lower.exact import EDGE
from qlib.lower.ops.base import Edge
from qlib.lower.ops.quantize import Quantize

if TYPE_CHECKING:
    import onnxruntime as ort

__all__ = ["FLOAT_SHARE", "Checked", "Verification", "table", "verify", "write_csv"]

FLOAT_SHARE = 1e-3
"""Of the codes of a layer that ONNX Runtime computes in float, this share may differ, by one step."""

_BATCH = 8
"""Images at a time: the codes of all their layers are held at once."""


@dataclass(frozen=True)
class Checked:
    """One tensor of codes: how many, how many differ and by how much at most, given the same codes before the layer.

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
        return self.faithful and all(layer.verdict in ("exact", "within a step") for layer in self.layers)

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
    inspection = _Inspection.open(exact, path)
    tallies = {name: _Tally() for name in inspection.edges}
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
    return Verification(tuple(inspection.rows(tallies)), images, agreeing, largest, faithful)


@dataclass
class _Tally:
    codes: int = 0
    differing: int = 0
    largest: int = 0
    differing_alone: int = 0


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
        self.found: dict[str, tuple[int, int]] = {}

    def run_node(self, node: fx.Node) -> Any:
        mine = super().run_node(node)
        name = str(node.target)
        if node.op != "call_module" or name not in self.deployed:
            return mine
        # The exporter leaves out a reshape where another follows.
        theirs = self.deployed[name].to(mine.device).float().view_as(mine) - node.meta[EDGE].zero_point
        self.found[name] = (0, 0)
        if not torch.equal(mine, theirs):
            difference = (mine - theirs).abs_()
            self.found[name] = int(difference.count_nonzero()), int(difference.max())
        return theirs if self.follow else mine


@dataclass(frozen=True)
class _Inspection:
    """The shipped model, and one that gives all codes as well; `edges` are the layers that hold codes."""

    shipped: ort.InferenceSession
    inspected: ort.InferenceSession
    edges: Mapping[str, bool]
    """Layer -> whether its codes come from float values that ONNX Runtime computes."""
    kernels: Mapping[str, Kernels]
    altered: frozenset[str]
    seen: Sequence[str]

    @classmethod
    def open(cls, exact: fx.GraphModule, path: Path) -> _Inspection:
        nodes = dict(exact_layers(exact))
        names = [str(node.target) for node in nodes]
        edges = {
            str(node.target): isinstance(module, Quantize) and _of_float_layer(node)
            for node, module in nodes.items()
            if isinstance(node.meta.get(EDGE), Edge) and not _is_constant(node, module)
        }
        shipped, graph = open_with_graph(path)
        kernels = kernels_of(graph, names)
        with tempfile.TemporaryDirectory() as folder:
            exposed = Path(folder) / "inspected.onnx"
            seen = _expose(path, exposed, edges)
            inspected, graph = open_with_graph(exposed)
        others = kernels_of(graph, names)
        altered = frozenset(
            name for name in names if _plain(kernels.get(name, Kernels())) != _plain(others.get(name, Kernels()))
        )
        return cls(shipped, inspected, edges, kernels, altered, seen)

    def run(self, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The logits, and the codes of each layer."""
        logits, *codes = run_session(self.inspected, batch, [OUTPUT, *(name + CODES for name in self.seen)])
        return logits, dict(zip(self.seen, codes, strict=True))

    def rows(self, tallies: Mapping[str, _Tally]) -> Iterator[Checked]:
        """One row a tensor."""
        for name, of_float in self.edges.items():
            kernels, tally = self.kernels.get(name, Kernels()), tallies[name]
            yield Checked(
                name,
                str(kernels),
                kernels.integer and not of_float,
                tally.codes,
                tally.differing,
                tally.largest,
                tally.differing_alone,
                name not in self.altered,
            )


def _is_constant(node: fx.Node, module: nn.Module) -> bool:
    """Whether a node quantizes an operand that the model holds: the file has its codes only; their user is compared."""
    return isinstance(module, Quantize) and layer_inputs(node)[0].op == "get_attr"


def _of_float_layer(node: fx.Node) -> bool:
    """Whether a quantize step takes what a layer computed, not an image or a constant."""
    while node.op not in ("placeholder", "get_attr"):
        sources = layer_inputs(node)
        if not sources:
            return True
        (node, *_) = sources
        if node.op == "call_module":
            return True
    return False


def _plain(kernels: Kernels) -> list[str]:
    """Operators that compute values, whatever the layout of their data."""
    return sorted(each.removeprefix("Nhwc") for each in kernels.operators)


def _expose(path: Path, exposed: Path, layers: Iterable[str]) -> list[str]:
    """Writes the model with the codes of `layers` as further outputs; which of them it holds."""
    import onnx
    from onnx import TensorProto

    model = onnx.load(path, load_external_data=False)
    external = any(tensor.data_location == TensorProto.EXTERNAL for tensor in model.graph.initializer)
    if external:
        onnx.load_external_data_for_model(model, str(path.parent))
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    made = {name for node in model.graph.node for name in node.output}
    wide = {
        node.output[0]
        for node in model.graph.node
        if node.op_type == "QuantizeLinear" and types.get(node.input[2]) == TensorProto.UINT16
    }
    seen = [name for name in layers if name + CODES in made]
    for name in seen:
        kind = TensorProto.UINT16 if name + CODES in wide else TensorProto.UINT8
        model.graph.output.append(onnx.helper.make_tensor_value_info(name + CODES, kind, None))
    onnx.save(model, exposed, save_as_external_data=external)
    return seen


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


def write_csv(path: Path, verification: Verification) -> None:
    """Writes the table's columns; raises OutputError where that is impossible."""
    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([header.lower() for header in _HEADERS])
            writer.writerows(map(_cells, verification.layers))
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error
