"""The corrections that a run asks for, in their fixed order.

On the float model: equalize, absorb biases, smooth. Then come statistics, plan and searches. On the plan: rounding,
re-estimation of batch-norms, bias correction; what each changes, the next one sees.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

from PIL import Image
from torch import Tensor

from qlib.correct.adaround import adaround
from qlib.correct.base import BATCH, CalibrationImages
from qlib.correct.brecq import brecq
from qlib.correct.gptq import gptq
from qlib.correct.qdrop import qdrop
from qlib.errors import UsageError
from qlib.job import FoldedGraph, Job, calibration_images, split_size
from qlib.quant.plan import Plan

__all__ = ["correct_float", "correct_plan", "flag_of", "image_range"]

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
        from qlib.correct.equalize import equalize

        lines += equalize(folded.graph, folded.norms)
    if args.absorb_bias:
        from qlib.correct.absorb_bias import absorb_bias

        lines += absorb_bias(folded.graph, folded.norms)
    if args.smooth is not None:
        from qlib.correct.smooth import smooth

        lines += smooth(folded.graph, _images(job), args.smooth)
    for line in lines:
        _log.info("%s", line)


def correct_plan(job: Job, folded: FoldedGraph, plan: Plan) -> Plan:
    """Changes weights and biases of the folded graph so that the plan's integers lose less; answers the new plan."""
    args = job.config.ptq
    if not args.of_plan:
        return plan
    if plan.dynamic:
        raise UsageError("the --ptq corrections need fixed ranges, but the plan is dynamic; drop --qe-dynamic")
    graph = folded.graph
    before = {name: value.clone() for name, value in graph.state_dict().items()}
    if args.rounding == "gptq":
        plan = gptq(graph, plan, _images(job))
    elif args.rounding != "nearest":
        method = {"adaround": adaround, "brecq": brecq, "qdrop": qdrop}[args.rounding]
        plan = method(graph, plan, _images(job), args.iterations)
    if args.bn_reestimation:
        from qlib.correct.bn_reestimation import bn_reestimation

        plan = bn_reestimation(graph, plan, _images(job))
    if args.data_free or args.bias_correction == "analytic":
        from qlib.correct.bias_correction import analytic_bias_correction

        _report(analytic_bias_correction(graph, plan, folded.norms))
    elif args.bias_correction == "empirical":
        from qlib.correct.bias_correction import bias_correction

        _report(bias_correction(graph, plan, _images(job)))
    changed = sum(name not in before or not value.equal(before[name]) for name, value in graph.state_dict().items())
    _log.info("Corrections changed %d weights and biases", changed)
    return plan


def _report(lines: list[str]) -> None:
    for line in lines:
        _log.info("%s", line)


def _images(job: Job) -> CalibrationImages:
    count = min(job.config.ptq.images, split_size(job, job.config.qe.calibration_split))

    def batches() -> Iterator[Tensor]:
        return calibration_images(job, count, BATCH)

    return CalibrationImages(batches, count, job.device, job.run.folder, job.config.seed)


def image_range(job: Job) -> tuple[float, float]:
    """What the pixels of the model's input can be: those of a black and a white image, after its transform."""
    ends = [job.spec.transform(Image.new("RGB", (64, 64), color)) for color in ("black", "white")]
    return min(float(end.min()) for end in ends), max(float(end.max()) for end in ends)
