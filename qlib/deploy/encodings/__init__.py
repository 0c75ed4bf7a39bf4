"""Encodings: the ranges alone, for tools that quantize the float ONNX file by themselves; by the names of its tensors.

One format a file, which registers it in `ENCODINGS` by its name on the command line.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from qlib.deploy.encodings._base import ENCODINGS, Encodings
from qlib.deploy.encodings._collect import collect_encodings
from qlib.errors import StatsError
from qlib.files import write_text
from qlib.graph import Graph
from qlib.quant.plan import Plan

__all__ = ["ENCODINGS", "Encodings", "collect_encodings", "encodings_file", "write_encodings"]


def encodings_file(kind: str, arch: str) -> str:
    """The name of the file where none is given.

    >>> [encodings_file(kind, "resnet18") for kind in ENCODINGS]
    ['resnet18_calibration_ort.json', 'resnet18_calibration.cache', 'resnet18_encodings.json']
    """
    return f"{arch}_{ENCODINGS.facts(kind)['ending']}"


def write_encodings(kind: str, path: Path, graph: Graph, plan: Plan, lowered: nn.Module) -> int:
    """Writes the ranges of `plan` in the format `kind`; returns of how many tensors.

    `graph` is the folded float graph and `lowered` its exact form, from which the scales of the weights are taken: it
    may have been restored from a checkpoint, the weights of `graph` do not matter. The file is whole or absent.

    Raises QlibError for an unknown format, StatsError for a plan without ranges, ExportError where the format cannot
    express one, OutputError where the file cannot be written.
    """
    chosen = ENCODINGS[kind]
    if plan.dynamic:
        raise StatsError(
            f"a dynamic plan has no ranges to export for {kind}: each image has its own; drop --qe-dynamic"
            " and give statistics with --qe-stats-file or --qe-calibration"
        )
    text, count = chosen(collect_encodings(graph, plan, lowered))
    if not count:
        raise StatsError(f"no range to export for {kind}: the plan leaves everything in float; give --qe-bits-acts")
    write_text(path, text, "encodings")
    return count
