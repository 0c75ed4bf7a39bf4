"""What is printed without running: `--summary` of a model, `--check` of settings, a plan or a schedule."""

from __future__ import annotations

import logging
from pathlib import Path

from qlib.app.distill import make_distillation
from qlib.app.job import Job
from qlib.app.plan import fitting, given_plan, plan_of, settings_of, stats_for
from qlib.app.policies import make_quantization, read_schedule
from qlib.app.sense import removal_table
from qlib.app.sparsity import sparsity_lines
from qlib.config.schedule.timeline import timeline
from qlib.graph import fold
from qlib.prune.removal import REMOVALS
from qlib.report.summary import summary
from qlib.report.tables import plan_table, settings_table

__all__ = ["check", "summarize"]

_log = logging.getLogger(__name__)


def summarize(job: Job) -> None:
    """Prints each summary of the model that `--summary` names."""
    for what in job.config.summary:
        _log.info("%s", summary(what, job.model, job.example, job.run.folder))


def check(job: Job) -> None:
    """Prints what the run would do with each layer: by the schedule, the plan or the settings that it is given."""
    if job.config.train.compress is not None:
        _check_schedule(job, job.config.train.compress)
        return
    if job.config.sense in REMOVALS:
        _log.info("%s", removal_table(job))
        return
    folded = fold(job.model, job.example)
    plan = given_plan(job, folded)
    if plan is not None:
        _log.info("%s", plan_table(folded.graph, fitting(folded, plan)))
        return
    ptq, settings = settings_of(job, folded)
    if ptq.stats_file is not None:
        fitting(folded, plan_of(folded, stats_for(job, folded, ptq, settings), settings))
    _log.info("%s", settings_table(folded.graph, settings, folded.absorbed))


def _check_schedule(job: Job, path: Path) -> None:
    """Prints when each policy of a schedule acts, on which parameters, and what its quantizers do with each layer."""
    schedule = read_schedule(path, job.config.train.epochs)
    _log.info("%s", timeline(schedule, job.config.train.epochs))
    for line in sparsity_lines(job, schedule):
        _log.info("%s", line)
    folded, quantization = fold(job.model, job.example), make_quantization(job, schedule)
    make_distillation(job, quantization.module if quantization else job.model, schedule)
    for spec, settings in quantization.settings if quantization else []:
        table = settings_table(folded.graph, settings, folded.absorbed)
        _log.info("%s (%s), from epoch %d on:\n%s", spec.component.name, spec.component.cls, spec.start, table)
