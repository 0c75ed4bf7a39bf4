"""Searches on calibration images: the sensitivity of each layer (`--sense quant`), and ranges by loss (`--qe-lapq`)."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, fields, replace
from pathlib import Path
from typing import TypeAlias

from tabulate import tabulate

from qlib.app.images import SEARCH_BATCH, images_in_memory
from qlib.app.job import Job
from qlib.app.report import record
from qlib.config.flags.groups import NORMS
from qlib.config.layers.settings import LayerSettings
from qlib.errors import UsageError
from qlib.files import write_csv
from qlib.graph import Graph
from qlib.progress import track
from qlib.quant.plan import Plan
from qlib.report.plots import NO_MATPLOTLIB, plot_sensitivity
from qlib.search.lapq import search_ranges
from qlib.search.sensitivity import ACTIVATIONS, WEIGHTS, Sensitivity, Study

__all__ = ["Planner", "analyse", "lapq", "measure_sensitivity", "with_bits", "write_sensitivities"]

_log = logging.getLogger(__name__)

Planner: TypeAlias = Callable[[Mapping[str, LayerSettings]], Plan]
"""From the settings of each layer to the plan, with ranges chosen for these bits."""


def with_bits(
    settings: Mapping[str, LayerSettings], weights: int | None = None, activations: int | None = None
) -> dict[str, LayerSettings]:
    """The settings with other bits for weights, activations or both, wherever they are quantized at all.

    >>> given = {"conv": LayerSettings(), "fc": LayerSettings(bits_weights=0)}
    >>> [each.bits_weights for each in with_bits(given, weights=4).values()]
    [4, 0]
    """
    return {
        name: replace(
            each,
            bits_weights=weights if weights and each.bits_weights else each.bits_weights,
            bits_activations=activations if activations and each.bits_activations else each.bits_activations,
        )
        for name, each in settings.items()
    }


def analyse(job: Job, graph: Graph, settings: Mapping[str, LayerSettings], planner: Planner) -> None:
    """Measures all layers at all bits of `--sense-bits`; logs a table, writes ``sensitivity.csv`` and a plot."""
    rows, floating = measure_sensitivity(job, graph, settings, planner, job.config.sense_bits, (WEIGHTS, ACTIVATIONS))
    if not rows:
        raise UsageError("--sense finds nothing to measure: all layers are left in float; let some have bits")
    _log.info("%s", _table(rows))
    _log.info("In float: Top1 %.3f    Loss %.5f", floating[1], floating[0])
    path = job.file("sensitivity.csv")
    write_sensitivities(path, rows)
    _log.info("Sensitivity of each layer saved to %s", path)
    plot = job.file("sensitivity.png")
    if plot_sensitivity(plot, rows):
        _log.info("Plot saved to %s", plot)
    else:
        _log.info(NO_MATPLOTLIB)


def measure_sensitivity(
    job: Job,
    graph: Graph,
    settings: Mapping[str, LayerSettings],
    planner: Planner,
    bits: Sequence[int],
    kinds: Sequence[str],
) -> tuple[list[Sensitivity], tuple[float, float]]:
    """The sensitivities at all `bits` of weights, activations or both; and loss and Top1 of the float model."""
    batches = images_in_memory(job, job.config.sense_images)
    study = Study(graph, {each: planner(with_bits(settings, each, each)) for each in bits}, kinds)
    images, began = sum(len(labels) for _, labels in batches), time.monotonic()
    _log.info(
        "Sensitivity: %d layers, %d variants, each on %d calibration images",
        *(len(study.names), len(study), images),
    )
    if not len(study):
        return [], (0.0, 0.0)
    for _ in track(
        study.steps(batches),
        total_images=len(study) * images,
        batch_size=min(SEARCH_BATCH, images),
        description="Sensitivity",
        print_freq=10 * job.config.print_freq,
        count=lambda done: done,
    ):
        pass
    _log.info("Sensitivity took %.1f s", time.monotonic() - began)
    loss, top1, _ = study.reference.running
    rows = study.results()
    record(job, sensitivity=tuple(rows))
    return rows, (loss, top1)


def _table(rows: Sequence[Sensitivity]) -> str:
    """Layers by weights and activations, the most sensitive at few bits first."""
    bits = sorted({row.bits for row in rows})
    found: dict[tuple[str, str], dict[int, Sensitivity]] = {}
    for row in rows:
        found.setdefault((row.layer, row.what), {})[row.bits] = row
    ordered = sorted(found.items(), key=lambda item: -item[1][bits[0]].divergence)
    lines = [
        [layer, what, *(f"{at[b].sqnr_logits:.1f}" for b in bits), *(f"{at[b].divergence:.4f}" for b in bits),
         f"{at[bits[0]].top1:.1f}"]
        for (layer, what), at in ordered
    ]  # fmt: skip
    headers = ["Layer", "What", *(f"SQNR {b} bits" for b in bits), *(f"dLoss {b}" for b in bits), f"Top1 {bits[0]}"]
    return tabulate(lines, headers, tablefmt="psql", disable_numparse=True)


def write_sensitivities(path: Path, rows: Sequence[Sensitivity]) -> None:
    """One line for each layer, what and bits. Raises OutputError where it cannot be written."""
    write_csv(path, [each.name for each in fields(Sensitivity)], map(astuple, rows))


def lapq(job: Job, graph: Graph, plan: Plan, given: bool) -> Plan:
    """The plan with the ranges that `--qe-lapq` finds on calibration images; `given`: the user gave the plan.

    Raises UsageError for a plan without fixed ranges, and for a start by statistics of a plan, which holds none.
    """
    args = job.config.lapq
    if any(grid is not None and grid.min is None for layer in plan.layers.values() for grid in layer.inputs):
        raise UsageError("--qe-lapq needs fixed ranges, but the plan of --qe-config-file is dynamic; give another")
    if given and args.init_mode is not None and args.init_mode not in NORMS:
        raise UsageError(
            f"--lapq-init-mode {args.init_mode} needs statistics, but --qe-config-file is a plan, with its ranges;"
            " drop --lapq-init-mode to start from these, or take l1, l2 or l3"
        )
    batches = images_in_memory(job, args.images, args.eval_size)
    return search_ranges(graph, plan, batches, args, job.calibration_seed)
