"""The corrections that a run asks for, in the order of their registration; what each changes, the next one sees.

Some are of the float model; then come statistics, plan and searches; the others are of the plan.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping

from torch import Tensor

from qlib.app.images import calibration_batches, split_size
from qlib.app.job import Job
from qlib.config.flags.corrections import CORRECTION_FLAGS
from qlib.correct._base import BATCH, CORRECTIONS, CalibrationImages, call
from qlib.errors import UsageError
from qlib.files import STATS
from qlib.graph import FoldedGraph, Graph
from qlib.quant.plan import Plan

__all__ = ["correct_float", "correct_plan"]

_log = logging.getLogger(__name__)


def correct_float(job: Job, folded: FoldedGraph) -> None:
    """Changes the weights of the folded graph in ways that leave its output as it is."""
    for name in job.config.ptq.asked:
        if CORRECTION_FLAGS[name].of_float:
            _correct(job, name, {"graph": folded.graph, "norms": folded.norms})


def correct_plan(job: Job, folded: FoldedGraph, plan: Plan) -> Plan:
    """Changes weights and biases of the folded graph so that the plan's integers lose less; returns the new plan."""
    args = job.config.ptq
    if not args.of_plan:
        return plan
    if plan.dynamic:
        raise UsageError("the --ptq corrections need fixed ranges, but the plan is dynamic; drop --qe-dynamic")
    before = copy.deepcopy(folded.graph)
    offered = {"graph": folded.graph, "norms": folded.norms, "reference": before}
    for name in args.asked:
        if not CORRECTION_FLAGS[name].of_float:
            plan = _correct(job, name, {**offered, "plan": plan}) or plan
    _log.info("Corrections changed %d weights and biases", len(_changed(before, folded.graph)))
    return plan


def _correct(job: Job, name: str, offered: Mapping[str, object]) -> Plan | None:
    """Does one correction; returns its plan, if it gives one, or logs what it tells."""
    args, flag = job.config.ptq, CORRECTION_FLAGS[name]
    images = {"images": _images(job)} if flag.images else {}
    number = {flag.number.name: args.asked[name]} if flag.number else {}
    found = call(CORRECTIONS[name], {**offered, **images, **number, "iterations": args.iterations})
    if isinstance(found, Plan):
        return found
    for line in found:
        _log.info("%s", line)
    return None


def _changed(before: Graph, after: Graph) -> list[str]:
    was = before.state_dict()
    return [name for name, value in after.state_dict().items() if name not in was or not value.equal(was[name])]


def _images(job: Job) -> CalibrationImages:
    count = min(job.config.ptq.images, split_size(job, job.config.qe.calibration_split))

    def batches() -> Iterator[Tensor]:
        return (images for images, _ in calibration_batches(job, count, BATCH))

    return CalibrationImages(batches, count, job.device, STATS, job.calibration_seed)
