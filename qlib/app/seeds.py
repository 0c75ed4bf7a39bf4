"""A quantized run repeated over draws of calibration images: how much the result owes to chance."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields, replace
from statistics import fmean

from tabulate import tabulate

from qlib.app.job import Job
from qlib.files import make_folder, write_csv
from qlib.metrics import Evaluation, compare
from qlib.runlog import RunLog

__all__ = ["Draw", "next_draw", "report_seeds"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Draw:
    """The result of one draw; `agreement` with FP32, in percent as Top1 and Top5 are."""

    seed: int
    top1: float
    top5: float
    loss: float
    agreement: float

    @classmethod
    def of(cls, job: Job, result: Evaluation, reference: Evaluation) -> Draw:
        agreement = compare(reference.predictions, result).agreement
        return cls(job.calibration_seed, result.top1, result.top5, result.loss, agreement)


def next_draw(job: Job, draw: int) -> Job:
    """The same run with other calibration images, in a folder of its own inside the run's; it hands nothing over."""
    config = replace(job.config, export_onnx=None, export_encodings=(), verify=None)
    again = replace(job, config=config, draw=draw)
    _log.info("=> draw %d of %d: calibration images of seed %d", draw + 1, job.config.seeds, again.calibration_seed)
    folder = make_folder(job.run.folder / f"seed_{again.calibration_seed}")
    return replace(again, run=RunLog(folder, job.run.file))


def report_seeds(job: Job, draws: Sequence[Draw]) -> None:
    """Prints mean, lowest and highest of each figure, and writes those of each draw to `seeds.csv`."""
    rows = [astuple(each) for each in draws]
    seeds, *figures = zip(*rows, strict=True)
    names = [each.name for each in fields(Draw)]
    write_csv(job.run.folder / "seeds.csv", names, rows)
    spread = [(name, fmean(each), min(each), max(each)) for name, each in zip(names[1:], figures, strict=True)]
    table = tabulate(spread, ("", "Mean", "Lowest", "Highest"), tablefmt="psql", floatfmt=".5f")
    _log.info("%d draws of calibration images, seeds %s:\n%s", len(rows), ", ".join(map(str, seeds)), table)
