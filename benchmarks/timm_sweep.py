"""A model of every timm family through the whole path: capture, fold, plan, lower, export, verify.

    python benchmarks/timm_sweep.py [MODEL ...] [--results timm.csv] [--capture-only] [--size 128] [--write PAGE]
    python benchmarks/timm_sweep.py --list   # finds the smallest model of each family anew, in a quarter of an hour

A family is a module of timm. Weights are random (the path is tested, not accuracy); batch-norms get the statistics of
the images, moved a little. Each model runs in a process of its own. One that is in the results file is not run again.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from rows import apart, append_row, read_rows, reason_of, start_processes_with
from tabulate import tabulate
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from whole_path import TOLERANCE, deploy, folding_error_in_float64, plan_eight_bits, randomize, relative_error

from qlib.graph import Graph, capture, fold_batch_norm
from qlib.graph.cost import layer_macs
from qlib.graph.ir import layer_inputs, layers, name_of
from qlib.graph.kinds import layer_kind
from qlib.graph.norms import BATCH_NORMS
from qlib.lower import lower
from qlib.quant.plan import Plan

LIST = Path(__file__).with_name("timm_models.csv")
"""Family, model, parameters: the smallest model of each family."""

LARGEST = 60_000_000
IMAGES = 2


@dataclass(frozen=True)
class Row:
    """What was measured of one model; `problems` is empty where all is well.

    `stage` is how far it got: built, captured, folded, exported. `left` names the batch-norms, convolutions, linear
    layers and matrix products that compute in float, with the reason of each. `macs_in_integers` is the share of the
    plan, `macs_in_int8` that of ONNX Runtime.
    """

    model: str
    family: str = ""
    millions: float = math.nan
    side: int = 0
    stage: str = ""
    layers: int = 0
    captured_error: float = math.nan
    folded_error: float = math.nan
    float64_error: float = math.nan
    left: str = ""
    in_float: str = ""
    macs_in_integers: float = math.nan
    macs_in_int8: float = math.nan
    codes: int = 0
    differing: int = 0
    float_codes: int = 0
    float_differing: int = 0
    seconds: float = math.nan
    problems: str = ""


def smallest_models() -> dict[str, tuple[str, int]]:
    """Family -> its smallest model and that one's parameters, where timm can build it without data."""
    smallest: dict[str, tuple[str, int]] = {}
    for family, name in ((each, name) for each in timm.list_modules() for name in timm.list_models(module=each)):
        try:
            with torch.device("meta"):
                size = sum(parameter.numel() for parameter in timm.create_model(name).parameters())
        except Exception as error:
            print(f"{name}: {reason_of(error)}", file=sys.stderr)
            continue
        if size < smallest.get(family, (name, LARGEST))[1]:
            smallest[family] = name, size
    return smallest


def write_list(path: Path, models: dict[str, tuple[str, int]]) -> None:
    """Writes the list of models."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("family", "model", "parameters"))
        writer.writerows((family, name, size) for family, (name, size) in sorted(models.items()))


def read_list(path: Path) -> dict[str, str]:
    """Model -> its family."""
    with open(path, newline="", encoding="utf-8") as file:
        return {row["model"]: row["family"] for row in csv.DictReader(file)}


def side_of(config: Mapping[str, Any], largest: int) -> int:
    """The side of a model's images: what timm says it can do with, no larger than `largest` where it is free."""
    side = int((config.get("min_input_size") or config["input_size"])[-1])
    return side if config.get("fixed_input_size") else min(side, largest)


def build(name: str, largest: int) -> tuple[nn.Module, Tensor]:
    """A model with random weights, and images for it."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    sides = dict.fromkeys((side_of(model.pretrained_cfg, largest), model.pretrained_cfg["input_size"][-1]))
    for side in sides:
        images = torch.randn(IMAGES, 3, side, side)
        try:
            randomize(model, images)
            break
        except Exception:  # it is fixed after all
            if side == list(sides)[-1]:
                raise
    return model, images


def left_in_float(graph: Graph, plan: Plan) -> list[tuple[str, str]]:
    """Name and reason of each batch-norm, convolution, linear layer and matrix product that computes in float."""
    found = []
    uncounted = {name for name, macs in layer_macs(graph).items() if macs is None}
    for node, module in layers(graph):
        name = name_of(node)
        note = plan.layers[name].note
        if isinstance(module, BATCH_NORMS):
            before = ", ".join(name_of(source) for source in layer_inputs(node))
            found.append((name, f"batch-norm after {before}"))
        elif name in uncounted or (layer_kind(module).accumulates and note):
            found.append((name, note or type(module).__name__))
    return found


def all_in_float(graph: Graph, plan: Plan) -> str:
    """The layers that compute in float, by kind."""
    kinds = [
        module.extra_repr() if type(module).__name__ == "Function" else type(module).__name__
        for node, module in layers(graph)
        if plan.layers[name_of(node)].note
    ]
    return ", ".join(f"{kind} {kinds.count(kind)}" for kind in dict.fromkeys(sorted(kinds)))


def total_macs(graph: Graph, image: Tensor) -> int:
    """The multiply-accumulates of a graph for one image, as torch counts them."""
    graph.requires_grad_(False)  # the counter looks for gradients of what needs them
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        graph(image)
    return counter.get_total_flops() // 2


def check(name: str, family: str, largest: int, capture_only: bool) -> Row:
    """Takes a model through the path, as far as it goes."""
    start = time.perf_counter()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = [Row(name, family)]
    try:
        for row in _steps(rows[0], largest, capture_only):
            rows.append(row)
    except Exception as error:  # what a model does is its own
        problems = f"{rows[-1].problems}; {reason_of(error)}".removeprefix("; ")
        rows.append(replace(rows[-1], problems=problems))
    return replace(rows[-1], seconds=time.perf_counter() - start)


@torch.no_grad()
def _steps(row: Row, largest: int, capture_only: bool) -> Iterator[Row]:
    """The row after each stage."""
    model, images = build(row.model, largest)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    row = replace(row, millions=millions, side=images.shape[-1], stage="built")
    yield row
    reference = model(images)
    graph = capture(model, images)
    macs = total_macs(graph, images[:1])
    row = replace(row, stage="captured", captured_error=relative_error(graph(images), reference))
    yield row
    folded = fold_batch_norm(graph)
    error = relative_error(graph(images), reference)
    row = replace(row, folded_error=error)
    if not error < TOLERANCE:
        in_float64 = folding_error_in_float64(model, images)
        row = replace(row, float64_error=in_float64, problems=f"folded graph differs by {error:.0e}")
    plan = plan_eight_bits(graph, folded, images)
    left = left_in_float(graph, plan)
    counted = {name: found or 0 for name, found in layer_macs(graph).items()}
    integers = sum(found for name, found in counted.items() if not plan.layers[name].note)
    row = replace(
        row,
        stage="folded",
        layers=len(plan.layers),
        left="; ".join(f"{name}: {reason}" for name, reason in left),
        in_float=all_in_float(graph, plan),
        macs_in_integers=integers / macs if macs else 1.0,
    )
    yield row
    if not capture_only:
        yield _exported(row, graph, plan, images, counted)


def _exported(row: Row, graph: Graph, plan: Plan, images: Tensor, macs: dict[str, int]) -> Row:
    lowered: fx.GraphModule = lower(graph, plan)
    with tempfile.TemporaryDirectory() as folder:
        found, verification = deploy(lowered, images, macs, Path(folder) / "model.onnx")
    fields = {key: found[key] for key in ("macs_in_int8", "codes", "differing", "float_codes", "float_differing")}
    places = [layer.layer for layer in verification.layers if layer.verdict not in ("exact", "within a step")]
    problems = [row.problems] if row.problems else []
    problems += [f"ONNX Runtime differs: {', '.join(places[:4])}"] if places else []
    problems += [] if verification.faithful else ["the inspected model differs from the shipped one"]
    return replace(row, stage="exported", problems="; ".join(problems), **fields)


def summary(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """The lines of the evidence: what, how much, what is to be reached."""
    folded = [row for row in rows if row.folded_error < TOLERANCE]
    tried = [row for row in folded if row.stage == "exported" or row.problems]  # not those of --capture-only
    exported = [row for row in tried if row.stage == "exported"]
    shares = [row.macs_in_integers for row in folded]
    kernels = [row.macs_in_int8 for row in exported]
    return [
        ("captured, folded output within 1e-4", _share(folded, rows), ">= 97 %"),
        (
            "of those: no batch-norm, convolution, linear layer or attention product in float",
            _share([row for row in folded if not row.left], folded),
            "100 %",
        ),
        ("of those that were to be exported: exported to ONNX at 8 bits", _share(exported, tried), ">= 95 %"),
        (
            "of those: no code differs in integer layers",
            _share([row for row in exported if not row.differing], exported),
            "100 %",
        ),
        ("share of MACs in integers, median", _median(shares), ">= 99 %"),
        ("share of MACs in integer kernels of ONNX Runtime, median", _median(kernels), ""),
    ]


def _share(part: Sequence[Row], whole: Sequence[Row]) -> str:
    return f"{len(part)} of {len(whole)} ({100 * len(part) / len(whole):.1f} %)" if whole else "none"


def _median(values: Sequence[float]) -> str:
    return f"{100 * statistics.median(values):.2f} %" if values else "none"


def write_page(path: Path, rows: Sequence[Row], families: int) -> None:
    """Writes the page: the summary, what fails, the table."""
    failing = [[row.model, _failure(row)] for row in rows if row.problems or row.left]
    cells = [
        [
            row.family,
            row.model,
            f"{row.millions:.1f}",
            row.side,
            row.layers,
            _error(row.captured_error),
            _error(row.folded_error),
            _percent(row.macs_in_integers),
            _percent(row.macs_in_int8),
            f"{row.differing} of {row.codes / 1e6:.1f} M" if row.stage == "exported" else "-",
            row.in_float,
        ]
        for row in rows
    ]
    headers = (
        *("family", "model", "M parameters", "side", "layers", "captured", "folded"),
        *("% MACs integer", "% in ONNX Runtime", "codes that differ", "in float"),
    )
    parts = [
        _INTRODUCTION.format(rows=len(rows), families=families, torch=torch.__version__, timm=timm.__version__),
        _markdown(summary(rows), ("of the families", "measured", "to reach")),
        "## What fails\n" if failing else "",
        _markdown([[name, _short(reason)] for name, reason in failing], ("model", "reason")) if failing else "",
        "## One by one\n",
        _markdown(cells, headers),
    ]
    path.write_text("\n".join(part for part in parts if part), encoding="utf-8")


def _failure(row: Row) -> str:
    rounding = f" ({row.float64_error:.0e} in float64: rounding)" if row.float64_error < TOLERANCE else ""
    return (row.problems + rounding) or f"left in float: {row.left}"


def _markdown(cells: Iterable[Sequence[Any]], headers: Sequence[str]) -> str:
    return tabulate(list(cells), headers, tablefmt="github", disable_numparse=True) + "\n"


def _error(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.0e}"


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.2f}"


def _short(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")[:200]


_INTRODUCTION = """\
# A model of every timm family

The smallest model of each family (a module of timm) up to 60 M parameters, random weights: {rows} of {families}
families so far. Written by `python benchmarks/timm_sweep.py --size 128 --write docs/timm.md`; torch {torch}, timm
{timm}, CPU. The table shows that the path works, and says nothing of accuracy. A row without *codes that differ* was
captured, folded and planned, and not exported. A family that is not in the table was not run.

- *captured*, *folded*: largest difference of the logits from those of the model itself, relative to the largest logit,
  before and after folding. Batch-norms have the statistics of the images, moved a little.
- *% MACs integer*: of the multiply-accumulates that torch counts in the captured graph, those that the 8-bit plan
  computes in integers (asym_u activations, sym weights per channel); torch counts none of an LSTM. *% in ONNX
  Runtime*: those that its integer kernels compute.
- *codes that differ*: between the exact model and ONNX Runtime, in all tensors of layers that both compute in integers,
  for two images. *in float*: layers computed in float between integer tensors, by kind.
"""


def run(models: dict[str, str], args: argparse.Namespace, report: Callable[[str], None]) -> list[Row]:
    """Runs what is not in the results file yet; the rows of the models."""
    rows = read_rows(args.results, Row(""))
    for name, family in models.items():
        if name not in rows:
            row = apart(check, name, family, args.size, args.capture_only, limit=args.limit)
            rows[name] = row if isinstance(row, Row) else Row(name, family, problems=row)
            append_row(args.results, rows[name])
            found = rows[name]
            report(f"{len(rows)} {name} ({found.stage}): {found.problems or 'ok'}; {found.left} {found.seconds:.0f} s")
    return [rows[name] for name in models]


def main() -> int:
    """Runs the sweep, or makes the list of models anew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="those of the list where none is given")
    parser.add_argument(
        "--results", type=Path, default=Path("timm.csv"), help="results so far; delete it to start anew"
    )
    parser.add_argument("--capture-only", action="store_true", help="neither lower nor export")
    parser.add_argument("--size", type=int, default=10_000, help="largest side of images for models that are free")
    parser.add_argument("--limit", type=float, default=900.0, help="seconds for a model")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="write the page")
    parser.add_argument("--list", action="store_true", help=f"make {LIST.name} anew")
    args = parser.parse_args()
    if args.list:
        write_list(LIST, smallest_models())
        return 0
    start_processes_with("torch", "timm", "whole_path")
    listed = read_list(LIST)
    wanted = {name: listed.get(name, "") for name in args.models} or listed
    rows = run(wanted, args, lambda line: print(line, file=sys.stderr, flush=True))
    for what, measured, goal in summary(rows):
        print(f"{what}: {measured}" + (f" (to reach: {goal})" if goal else ""))
    if args.write:
        write_page(args.write, rows, len(listed))
    return int(any(row.problems or row.left for row in rows))


if __name__ == "__main__":
    sys.exit(main())
