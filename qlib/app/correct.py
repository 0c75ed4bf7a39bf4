"""The corrections that a run asks for, in their fixed order.

On the float model: equalize, absorb biases, smooth. Then come statistics, plan and searches. On the plan: rounding,
re-estimation of batch-norms, bias correction; what each changes, the next one sees.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator

from torch import Tensor

from qlib.app.images import calibration_batches, split_size
from qlib.app.job import Job
from qlib.correct._base import BATCH, CalibrationImages
from qlib.correct.absorb_bias import absorb_bias
from qlib.correct.adaround import adaround
from qlib.correct.bias_correction import analytic_bias_correction, bias_correction
from qlib.correct.bn_reestimation import bn_reestimation
from qlib.correct.brecq import brecq
from qlib.correct.equalize import equalize
from qlib.correct.gptq import gptq
from qlib.correct.qdrop import qdrop
from qlib.correct.smooth import smooth
from qlib.errors import UsageError
from qlib.files import STATS
from qlib.graph import FoldedGraph, Graph
from qlib.quant.plan import Plan

__all__ = ["correct_float", "correct_plan", "flag_of"]

_log = logging.getLogger(__name__)


def flag_of(field: str) -> str:
    """The flag of a field of `PtqArgs`.

    >>> flag_of("bias_correction")
    '--ptq-bias-correction'
    """
    return f"--ptq-{field.replace('_', '-')}"


def correct_float(job: Job, folded: FoldedGraph) -> None:
    """Changes the weights of the folded graph in ways that leave its output as it is."""
    args, lines = job.config.ptq, list[str]()
    if args.equalize or args.data_free:
        lines += equalize(folded.graph, folded.norms)
    if args.absorb_bias:
        lines += absorb_bias(folded.graph, folded.norms)
    if args.smooth is not None:
        lines += smooth(folded.graph, _images(job), args.smooth)
    for line in lines:
        _log.info("%s", line)


def correct_plan(job: Job, folded: FoldedGraph, plan: Plan) -> Plan:
    """Changes weights and biases of the folded graph so that the plan's integers lose less; returns the new plan."""
    args = job.config.ptq
    if not args.of_plan:
        return plan
    if plan.dynamic:
        raise UsageError("the --ptq corrections need fixed ranges, but the plan is dynamic; drop --qe-dynamic")
    graph, before = folded.graph, copy.deepcopy(folded.graph)
    if args.rounding == "gptq":
        plan = gptq(graph, plan, _images(job))
    elif args.rounding != "nearest":
        method = {"adaround": adaround, "brecq": brecq, "qdrop": qdrop}[args.rounding]
        plan = method(graph, plan, _images(job), args.iterations)
    if args.bn_reestimation:
        plan = bn_reestimation(graph, plan, _images(job), before)
    if args.data_free or args.bias_correction == "analytic":
        _report(analytic_bias_correction(graph, plan, folded.norms))
    elif args.bias_correction == "empirical":
        _report(bias_correction(graph, plan, _images(job), before))
    _log.info("Corrections changed %d weights and biases", len(_changed(before, graph)))
    return plan


def _changed(before: Graph, after: Graph) -> list[str]:
    was = before.state_dict()
    return [name for name, value in after.state_dict().items() if name not in was or not value.equal(was[name])]


def _report(lines: list[str]) -> None:
    for line in lines:
        _log.info("%s", line)


def _images(job: Job) -> CalibrationImages:
    count = min(job.config.ptq.images, split_size(job, job.config.qe.calibration_split))

    def batches() -> Iterator[Tensor]:
        return (images for images, _ in calibration_batches(job, count, BATCH))

    return CalibrationImages(batches, count, job.device, STATS, job.config.seed)
