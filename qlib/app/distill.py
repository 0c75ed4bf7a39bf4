"""The distillation that a command line or a schedule asks for."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import fx, nn

from qlib.app.job import Job
from qlib.app.teacher import SELF, cached_logits, load_teacher
from qlib.config.flags.groups import KdArgs
from qlib.config.flags.names import flag_of
from qlib.config.schedule.types import PolicySpec, Schedule
from qlib.distill.loss import Distillation, DistillSettings
from qlib.distill.matching import Matching
from qlib.errors import ConfigError, UsageError
from qlib.graph import fold
from qlib.models import refuse_python_file

__all__ = ["make_distillation"]

_log = logging.getLogger(__name__)

_CLASS = "KnowledgeDistillation"


def make_distillation(job: Job, student: nn.Module, schedule: Schedule | None = None) -> Distillation | None:
    """The distillation that the `--kd-*` flags or the schedule ask for; None where neither does.

    `student` is what the training calls; it is to be called before that is trained.

    Raises:
        UsageError: the flags cannot be obeyed, or the schedule asks for distillation as well.
        ConfigError: the settings in the schedule cannot be obeyed.
        ModelError, CheckpointError: the teacher cannot be had.
    """
    extensions = schedule.of("extensions") if schedule else ()
    policies = tuple(policy for policy in extensions if policy.component.cls == _CLASS)
    given = job.config.given_of("kd")
    named = job.config.kd.teacher
    if policies and named == policies[0].component.settings.get("teacher") and given == ("teacher",):
        given = ()  # the user trusts the Python file that the schedule names
    first = flag_of(f"kd.{given[0]}") if given else ""
    if policies and given:
        raise UsageError(
            f"{first} and the {_CLASS} at {policies[0].component.where} both say how to distill; drop one of them"
        )
    if policies:
        return _of_schedule(job, student, policies)
    if given and named is None:
        raise UsageError(f"{first} needs a teacher; give --kd-teacher, the name of a model or {SELF}")
    return None if job.config.kd.teacher is None else _of_flags(job)


def _of_flags(job: Job) -> Distillation:
    args, epochs = job.config.kd, job.config.train.epochs
    if args.teacher_wt != 0:
        raise UsageError(f"--kd-teacher-wt is {args.teacher_wt:g}, but the teacher does not learn; leave it at 0")
    if args.start_epoch >= epochs:
        raise UsageError(
            f"--kd-start-epoch {args.start_epoch} is not before the end, --epochs {epochs}, so the teacher would never"
            " help; give a lower one"
        )
    settings, start = _weights(args), args.start_epoch
    teacher = load_teacher(job, args)
    _log_distillation(job, args, settings, f"from epoch {start} on")
    return Distillation(teacher, settings, lambda epoch: epoch >= start, own=args.teacher == SELF)


def _weights(args: KdArgs, match_wt: float = 1.0) -> DistillSettings:
    return DistillSettings(args.temperature, args.distill_wt, args.student_wt, match_wt)


def _of_schedule(job: Job, student: nn.Module, policies: tuple[PolicySpec, ...]) -> Distillation:
    component = policies[0].component
    where, given = component.where, dict[str, Any](component.settings)
    others = [policy.component for policy in policies if policy.component.name != component.name]
    if others:
        raise ConfigError(f"{others[0].where}: a second {_CLASS} beside {component.name!r}; keep one of them")
    if "resume" in given:
        given["resume"] = Path(given["resume"])
    args = KdArgs(**{field.name: given[field.name] for field in fields(KdArgs) if field.name in given})
    match, cache = given.get("match", {}), given.get("cache", False)
    if cache and match:
        raise ConfigError(f"{where}: cache saves running the teacher, which match needs; remove one of them")
    if cache and job.config.skip_corrupt:
        raise ConfigError(f"{where}: cache needs every image, and --skip-corrupt leaves some out; remove one of them")
    try:
        refuse_python_file(str(args.teacher), "the schedule", "--kd-teacher", named=job.config.kd.teacher)
        teacher = load_teacher(job, args, prefix="")
    except UsageError as error:
        raise ConfigError(f"{where}: {error}") from error
    settings = _weights(args, given.get("match_wt", 1.0))
    when = " and ".join(f"in epochs {each.start} to {each.end - 1}" for each in policies)
    _log_distillation(job, args, settings, when)
    arch = job.spec.arch if args.teacher == SELF else str(args.teacher)
    return Distillation(
        teacher,
        settings,
        lambda epoch: any(policy.active(epoch) for policy in policies),
        matching=_matching(job, student, teacher, given, where) if match else None,
        cached=(lambda: cached_logits(job, teacher, arch)) if cache else None,
        own=args.teacher == SELF,
    )


def _matching(job: Job, student: nn.Module, teacher: nn.Module, given: Mapping[str, Any], where: str) -> Matching:
    kind, pairs = given.get("match_kind", "attention"), given["match"]
    absorbed = fold(job.model, job.example).absorbed if isinstance(student, fx.GraphModule) else None
    matching = Matching(student, teacher, pairs, kind, job.example, absorbed=absorbed, where=where)
    _log.info("Distillation: %s of %s", kind, ", ".join(f"{mine} as {theirs}" for mine, theirs in pairs.items()))
    return matching


def _log_distillation(job: Job, args: KdArgs, settings: DistillSettings, when: str) -> None:
    name = f"the float {job.spec.arch} itself" if args.teacher == SELF else f"{args.teacher}"
    source = f" ({args.resume})" if args.resume else " with its published weights" if args.pretrained else ""
    _log.info("Distillation: %s learns from %s%s %s", job.spec.arch, name, source, when)
    _log.info(
        "Distillation: temperature %g, weight %g of the teacher and %g of the labels",
        *(settings.temperature, settings.distill_wt, settings.student_wt),
    )
