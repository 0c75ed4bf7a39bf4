"""Thinning, model by model: without random channels a network computes what it computes with zeros in their place.

    python benchmarks/thinning.py [MODEL ...] [--size 64] [--share 0.3] [--export] [--results CSV] [--write PAGE]

All torchvision classifiers, and the smallest model of each timm family (`timm_models.csv`), random weights. A model in
the results file is not run again. Of each: 30 % of the classes that are neutral go, and the thinned graph is compared
with the graph whose entries of them are 0, in float and, to the bit, in the exact integer lowering; parameters and
multiply-accumulates with what was predicted. Then 30 % of all classes go, and the counts are compared again. The exit
code is 1 when a model failed.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rows import apart, append_row, read_rows, reason_of, start_processes_with
from tabulate import tabulate
from timm_sweep import LIST, read_list
from timm_sweep import build as build_timm
from torch import Tensor, nn
from whole_path import OPSET, plan_eight_bits, randomize, relative_error

from qlib.deploy.export import export_quantized
from qlib.deploy.verify import verify
from qlib.graph import Graph, capture, fold_batch_norm
from qlib.graph.coordinates import ChannelClasses, channel_classes
from qlib.graph.coordinates_cost import ClassCosts, class_costs
from qlib.graph.cost import layer_macs
from qlib.lower import exact_arithmetic, lower
from qlib.models import create_model, find_model, model_names
from qlib.models.names import family_of
from qlib.surgery.thin import masked, thin
from qlib.surgery.thin_moves import thinned
from qlib.surgery.thin_plan import thin_plan

TOLERANCE = 1e-5
IMAGES = 2


@dataclass(frozen=True)
class Row:
    """What was measured of one model; `problems` is empty where all is well.

    `classes`, of which `neutral` ones have no mean over them; `removed` went. `error` is that of the logits in float,
    `exact` whether the integer forms gave the same bits, `verified` whether ONNX Runtime gave the same codes.
    """

    model: str
    family: str = ""
    side: int = 0
    millions: float = math.nan
    classes: int = 0
    neutral: int = 0
    removed: int = 0
    millions_after: float = math.nan
    macs_left: float = math.nan
    error: float = math.nan
    exact: str = ""
    verified: str = ""
    analysis_s: float = math.nan
    seconds: float = math.nan
    problems: str = ""


def build(name: str, largest: int) -> tuple[nn.Module, Tensor]:
    """A model with random weights that behave like trained ones, and images for it."""
    torch.manual_seed(0)
    if family_of(name) != "torchvision_models":
        return build_timm(name, largest)
    spec = find_model(name)
    for side in (largest, 2 * largest, spec.input_shape[-1]):
        model, images = create_model(spec).eval(), torch.randn(IMAGES, 3, side, side)
        try:
            randomize(model, images)
            return model, images
        except Exception:  # these images are too small for it
            if side == spec.input_shape[-1]:
                raise
    raise AssertionError


def chosen(classes: ChannelClasses, share: float, candidates: Tensor) -> list[int]:
    """A share of the candidates at random, but for one of each axis that would be left without any."""
    keep = torch.rand(classes.count + 1, generator=torch.Generator().manual_seed(0)) >= share
    keep |= ~candidates
    keep[0] = True
    parts = [each for value in classes.values.values() for each in ([value] if isinstance(value, Tensor) else value)]
    for labels in (*(each.classes for each in classes.axes), *(part for part in parts if part.numel())):
        if 0 in thinned(labels, keep).shape:
            keep[labels.flatten()[0]] = True
    return (~keep).nonzero().flatten().tolist()


def check(name: str, family: str, largest: int, share: float, export: bool) -> Row:
    """Thins a model, and compares."""
    start = time.perf_counter()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = [Row(name, family)]
    try:
        rows += _steps(rows[0], largest, share, export)
    except Exception as error:  # what a model does is its own
        rows.append(replace(rows[-1], problems=f"{rows[-1].problems}; {reason_of(error)}".removeprefix("; ")))
    return replace(rows[-1], seconds=time.perf_counter() - start)


@torch.no_grad()
def _steps(row: Row, largest: int, share: float, export: bool) -> Iterator[Row]:
    model, images = build(row.model, largest)
    graph = capture(model, images)
    folded = fold_batch_norm(graph)
    start = time.perf_counter()
    classes = channel_classes(graph)
    seconds = time.perf_counter() - start
    neutral = int(classes.neutral[1:].sum())
    row = replace(row, side=images.shape[-1], classes=classes.count, neutral=neutral, analysis_s=seconds)
    removed = chosen(classes, share, classes.neutral)
    keep, costs = classes.keeps(removed), class_costs(graph, classes)
    zeroed, small = copy.deepcopy(graph), thin(graph, removed, classes)
    zeroed.load_state_dict(masked(graph.state_dict(), classes, removed))
    error = relative_error(small(images), zeroed(images))
    whole = torch.ones_like(keep)
    row = replace(
        row,
        removed=len(removed),
        millions=costs.total_parameters(whole) / 1e6,
        millions_after=costs.total_parameters(keep) / 1e6,
        macs_left=costs.total_macs(keep) / max(costs.total_macs(whole), 1),
        error=error,
    )
    problems = [] if error < TOLERANCE else [f"float differs by {error:.0e}"]
    problems += _miscounted(small, costs, keep, "")
    everything = chosen(classes, share, torch.ones_like(keep))
    problems += _miscounted(thin(graph, everything, classes), costs, classes.keeps(everything), "with all classes: ")
    plan = plan_eight_bits(zeroed, folded, images)
    lowered = lower(small, thin_plan(plan, graph, classes, keep))
    with exact_arithmetic():
        same = torch.equal(lowered(images), lower(zeroed, plan)(images))
    problems += [] if same else ["integers differ"]
    yield replace(row, exact="yes" if same else "no", problems="; ".join(problems))
    if export:
        del zeroed, graph
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.onnx"
            export_quantized(lowered, images, file, opset=OPSET, metadata={})
            found = verify(lowered, file, images.split(1))
        problems += [] if found.exact else [f"ONNX Runtime differs: {found.first}"]
        yield replace(
            row, exact="yes" if same else "no", verified="yes" if found.exact else "no", problems="; ".join(problems)
        )


def _miscounted(small: Graph, costs: ClassCosts, keep: Tensor, what: str) -> list[str]:
    """Whether a thinned graph has other counts than were predicted, or does not run."""
    parameters = sum(each.numel() for each in small.parameters())
    macs = sum(filter(None, layer_macs(small).values()))
    image = next(node for node in small.graph.nodes if node.op == "placeholder")
    finite = bool(small(torch.randn(image.meta["shape"])).isfinite().all())
    expected = (costs.total_parameters(keep), costs.total_macs(keep))
    found = [] if (parameters, macs) == expected else [f"{what}{parameters} parameters, {macs} MACs, not {expected}"]
    return found + ([] if finite else [f"{what}the logits are not finite"])


def run(models: dict[str, str], args: argparse.Namespace) -> list[Row]:
    """The rows of the models; runs what is not in the results file yet."""
    rows = read_rows(args.results, Row(""))
    for name, family in models.items():
        if name not in rows:
            found = apart(check, name, family, args.size, args.share, args.export, limit=args.limit)
            rows[name] = found if isinstance(found, Row) else Row(name, family, problems=found)
            append_row(args.results, rows[name])
            row = rows[name]
            print(f"{len(rows)} {name}: {row.problems or 'ok'}; {row.error:.0e} {row.seconds:.0f} s", file=sys.stderr)
    return [rows[name] for name in models]


def summary(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """What was reached, in lines."""
    good = [row for row in rows if row.error < TOLERANCE]
    exact, exported = [row for row in rows if row.exact == "yes"], [row for row in rows if row.verified]
    slow = sorted((row.analysis_s, row.model) for row in rows if not math.isnan(row.analysis_s))[-1:]
    return [
        ("models", str(len(rows))),
        ("thinned as zeroed, float, 1e-5 of the largest logit", f"{len(good)} of {len(rows)}"),
        ("thinned as zeroed, integers, to the bit", f"{len(exact)} of {len(rows)}"),
        ("counts as predicted and all else well", f"{sum(not row.problems for row in rows)} of {len(rows)}"),
        ("ONNX Runtime verified exact", f"{sum(row.verified == 'yes' for row in exported)} of {len(exported)}"),
        ("longest analysis of the classes", ", ".join(f"{name} {seconds:.1f} s" for seconds, name in slow)),
    ]


def write_page(path: Path, rows: Sequence[Row]) -> None:
    """Writes the page: the summary, then each model."""
    cells = [
        [
            *(row.family or "torchvision", row.model, row.side, row.classes, row.classes - row.neutral),
            *(f"{row.millions:.2f} -> {row.millions_after:.2f}", f"{100 * row.macs_left:.0f}", f"{row.error:.0e}"),
            *(row.exact, row.verified, f"{row.analysis_s:.1f}", row.problems.replace("|", "/")[:120]),
        ]
        for row in rows
    ]
    headers = ("family", "model", "side", "classes", "of a mean", "M parameters", "% MACs left", "float")
    headers += ("exact", "ORT", "analysis s", "problems")
    parts = [_INTRODUCTION, tabulate(summary(rows), ("", ""), tablefmt="github"), "", "## One by one", ""]
    table = tabulate(cells, headers, tablefmt="github", disable_numparse=True)
    path.write_text("\n".join([*parts, table, ""]), encoding="utf-8")


_INTRODUCTION = """\
# Thinning, model by model

Random weights, small images, 30 % of the classes at random. *float*: largest difference between the logits of the
thinned graph and of the graph with zeros, relative to the largest logit; *exact*: whether their integer forms, at 8
bits on the same grids, give the same bits; *ORT*: whether ONNX Runtime gives the codes of the thinned integer form,
where that was tried. *of a mean*: classes that a layer norm is over, without which others change; they are removed for
the counts alone. Written by `python benchmarks/thinning.py --write docs/thinning.md`. A model that is not in the table
was not run.
"""


def main() -> int:
    """Runs the sweep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="all where none is given")
    parser.add_argument("--results", type=Path, default=Path("thinning.csv"), help="results so far")
    parser.add_argument("--size", type=int, default=64, help="side of images for models that are free")
    parser.add_argument("--share", type=float, default=0.3, help="share of the classes that go")
    parser.add_argument("--export", action="store_true", help="export the integer form too, and verify it")
    parser.add_argument("--limit", type=float, default=900.0, help="seconds for a model")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="write the page")
    args = parser.parse_args()
    start_processes_with("torch", "timm", "whole_path")
    listed = {name: "" for name in model_names() if family_of(name) == "torchvision_models"} | read_list(LIST)
    rows = run({name: listed.get(name, "") for name in args.models} or listed, args)
    for what, measured in summary(rows):
        print(f"{what}: {measured}")
    if args.write:
        write_page(args.write, rows)
    return int(any(row.problems for row in rows))


if __name__ == "__main__":
    sys.exit(main())
