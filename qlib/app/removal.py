"""Removers of a schedule: in the course of training, channels that are zero leave the model and the optimizer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from qlib.app.job import Job
from qlib.app.policies import Setup, set_up
from qlib.app.thin import dead_lines, log_sizes
from qlib.config.schedule.keys import REMOVERS
from qlib.config.schedule.types import PolicySpec, Schedule
from qlib.distill.loss import Distillation
from qlib.errors import ConfigError
from qlib.prune.masks import parameters_by_name
from qlib.surgery.dead import thin_dead
from qlib.surgery.recipe_file import trainable_graph
from qlib.surgery.thin import recipe_of
from qlib.train.loop import Trainee
from qlib.train.parts import moments_of, set_moments

__all__ = ["check_removers", "remove", "removers"]

_log = logging.getLogger(__name__)


def removers(schedule: Schedule) -> list[PolicySpec]:
    """The policies of removers."""
    return [spec for spec in schedule.of("extensions") if spec.component.cls in REMOVERS]


def check_removers(setup: Setup) -> None:
    """Raises ConfigError for what cannot be thinned in the course of training: quantizers, and a teacher `self`."""
    found = removers(setup.schedule)
    began = min((spec.start for spec in setup.schedule.of("quantizers")), default=None)
    problems = [
        f"{spec.where}: {spec.component.cls} acts in epoch {spec.last}, when a quantizer has begun (epoch {began});"
        " remove before that"
        for spec in found
        if began is not None and spec.last >= began
    ]
    if found and any(isinstance(policy, Distillation) and policy.own for policy in setup.policies):
        problems.append(
            f"{found[0].where}: {found[0].component.cls} makes another model of the one that is its own teacher; name"
            " the teacher, and give its checkpoint as resume"
        )
    if problems:
        raise ConfigError(problems)


def remove(setup: Setup, trainee: Trainee, specs: Sequence[PolicySpec], epoch: int) -> tuple[Setup, Trainee] | None:
    """The run without the channels that do nothing: model, masks, momentum and policies; None where all do something.

    Law: weights, momentum and masks of what stays are those that they were.
    """
    job, cls = setup.job, specs[0].component.cls
    small, dead = thin_dead(trainable_graph(job.model, job.example))
    for line in dead_lines(dead, f"{cls} in epoch {epoch}"):
        _log.info("%s", line)
    if not dead.all:
        return None
    both = recipe_of(small)
    assert both is not None
    recipe = both.since(recipe_of(job.model))
    log_sizes(job, job.model, small)
    thin: Job = replace(job, model=small, masks=recipe.of_tensors(setup.masks))
    now = set_up(thin, setup.schedule)
    made = Trainee.of(job.config.train, now.module, now.weights, now.policies)
    moments = moments_of(parameters_by_name(job.model), trainee.optimizer)
    kept = {
        key: recipe.of_tensors(values) if next(iter(values.values())).ndim else values
        for key, values in moments.items()
    }
    set_moments(parameters_by_name(small), made.optimizer, kept)
    for group, before in zip(made.optimizer.param_groups, trainee.optimizer.param_groups, strict=True):
        group.update({key: value for key, value in before.items() if key != "params"})
    for policy, before_it in zip(now.policies, trainee.policies, strict=True):
        policy.go_on(before_it.state_dict())
    return now, made
