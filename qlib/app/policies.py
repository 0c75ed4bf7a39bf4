"""The sections of a schedule: what may stand in each, and the policies that it adds to a run of training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn

from qlib.app.distill import make_distillation
from qlib.app.images import TrainingImages
from qlib.app.job import Job
from qlib.app.sparsity import make_pruning, make_regularizing
from qlib.config.schedule.keys import EXTENSION_CLASSES, ClassFields
from qlib.config.schedule.read import load_schedule
from qlib.config.schedule.types import Schedule
from qlib.errors import ConfigError, ModelError
from qlib.graph import Graph, capture, fold, lay_out
from qlib.models import create_model
from qlib.prune.pruner import pruner_classes
from qlib.qat.assignment import quantizer_classes
from qlib.qat.quantization import Quantization
from qlib.quant.plan import Plan
from qlib.registry import Registry
from qlib.regularize._base import regularizer_classes
from qlib.stats.tensor_stats import ModelStats
from qlib.surgery.widen import find_wide_model, wide_name
from qlib.train.lr.policy import LrPolicy
from qlib.train.lr.schedulers import LR_CLASSES
from qlib.train.masking import Masking
from qlib.train.policy import Policy

__all__ = ["SECTIONS", "Section", "Setup", "make_quantization", "read_schedule", "set_up"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Setup:
    """A run of training before it begins: `module` is what is called, `weights` are what the optimizer's rate is for.

    `job` has the model whose weights these are; `original` is the job as it was loaded, before it was widened.
    `convert` gives the folded graph and the plan of what has been learned, None while all is in float. `masking`
    applies the masks, where there are any or may come to be.
    """

    job: Job
    original: Job
    schedule: Schedule
    images: TrainingImages
    module: nn.Module
    weights: Sequence[nn.Parameter]
    policies: tuple[Policy, ...] = ()
    convert: Callable[[], tuple[Graph, Plan] | None] = lambda: None
    masking: Masking | None = None

    @property
    def masks(self) -> Mapping[str, Tensor]:
        """The masks, as they are at any time."""
        return {} if self.masking is None else self.masking.masks

    def plus(self, *policies: Policy | None) -> Setup:
        """With more policies, which act after those that are there; None stands for none."""
        return replace(self, policies=(*self.policies, *(policy for policy in policies if policy is not None)))


_Add: TypeAlias = Callable[[Setup], Setup]


@dataclass(frozen=True)
class Section:
    """A section of a schedule: the classes that may stand in it, and what `add`s its policies to a run."""

    classes: Mapping[str, ClassFields]
    add: _Add


SECTIONS: Registry[Section] = Registry("section of a schedule")
"""Name -> section. In this order their policies act, and stand in checkpoints."""


def _section(name: str, classes: Mapping[str, ClassFields]) -> Callable[[_Add], _Add]:
    """Registers the function that adds the policies of a section."""

    def register(add: _Add) -> _Add:
        SECTIONS.add(name, Section(classes, add))
        return add

    return register


def read_schedule(path: str | Path, epochs: int) -> Schedule:
    """The schedule in a file, as `load_schedule` reads it, with the classes of all sections."""
    return load_schedule(path, epochs, {name: SECTIONS[name].classes for name in SECTIONS})


def set_up(job: Job, schedule: Schedule) -> Setup:
    """The run that the flags and the schedule ask for.

    Raises UsageError, ConfigError and ModelError for what does not fit the model or contradicts itself.
    """
    wide = _widened(job, schedule)
    module = lay_out(wide.model)
    weights = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not weights:
        raise ModelError(f"{job.spec.arch} has no parameter that can be trained; give one whose requires_grad is set")
    sparse = wide.masks or schedule.of("pruners") or schedule.of("regularizers")
    masking = Masking(wide.model, wide.masks) if sparse else None
    setup = Setup(wide, job, schedule, TrainingImages.of(wide), module, weights, masking=masking)
    for section in SECTIONS:
        setup = SECTIONS[section].add(setup)
    return setup


@_section("pruners", pruner_classes())
def _pruners(setup: Setup) -> Setup:
    if setup.masking is None:
        return setup
    return setup.plus(*make_pruning(setup.job, setup.schedule, setup.images, setup.masking))


@_section("regularizers", regularizer_classes())
def _regularizers(setup: Setup) -> Setup:
    """And the masks, which act after all that sets them."""
    if setup.masking is None:
        return setup
    return setup.plus(*make_regularizing(setup.job, setup.schedule, setup.masking), setup.masking)


@_section("quantizers", quantizer_classes())
def _quantizers(setup: Setup) -> Setup:
    quantization = make_quantization(setup.job, setup.schedule, setup.images)
    if quantization is None:
        return setup
    return replace(
        setup.plus(quantization),
        module=quantization.module,
        weights=quantization.weights,
        convert=quantization.convert,
    )


@_section("extensions", EXTENSION_CLASSES)
def _extensions(setup: Setup) -> Setup:
    return setup.plus(make_distillation(setup.original, setup.module, setup.schedule))


@_section("lr_schedulers", LR_CLASSES)
def _lr_schedulers(setup: Setup) -> Setup:
    return setup.plus(*(LrPolicy(spec, setup.images.steps) for spec in setup.schedule.of("lr_schedulers")))


def make_quantization(job: Job, schedule: Schedule, images: TrainingImages | None = None) -> Quantization | None:
    """The quantizers of a schedule over the job's model, whose weights they share; None where it has none.

    Raises ConfigError where their rules do not fit the model.
    """
    specs = schedule.of("quantizers")
    if not specs:
        return None
    graph = lay_out(capture(job.model, job.example, share=True))

    def calibrate(folded: Graph, count: int) -> ModelStats:
        assert images is not None
        return images.statistics(folded, count)

    quantization = Quantization(graph, fold(job.model, job.example), specs, calibrate)
    left = _left_out(job.model, quantization.weights)
    if left:
        shown = ", ".join(left[:3]) + ", ..." * (len(left) > 3)
        _log.warning(
            "Warning: %d parameters stay as they are: the graph that is quantized does not compute with them, or holds"
            " what follows from them as constants (%s)",
            len(left),
            shown,
        )
    return quantization


def _left_out(model: nn.Module, weights: Iterable[nn.Parameter]) -> list[str]:
    """The parameters that would train, but whose memory none of the `weights` shares."""
    trained = {weight.untyped_storage().data_ptr() for weight in weights}
    parameters = ((name, each) for name, each in model.named_parameters() if each.requires_grad)
    return [name for name, each in parameters if each.untyped_storage().data_ptr() not in trained]


def _widened(job: Job, schedule: Schedule) -> Job:
    """The job with the model that a quantizer's `widen` asks for, which begins with fresh weights."""
    factors = {spec.component.settings.get("widen") for spec in schedule.of("quantizers")} - {None, 1}
    if len(factors) > 1:
        where = schedule.of("quantizers")[0].component.where
        raise ConfigError(f"{where}: quantizers want models widened by {factors}; give them the same `widen`")
    if not factors or ".wide" in job.spec.arch:
        return job
    (factor,) = factors
    assert isinstance(factor, int)
    spec = find_wide_model(wide_name(job.spec.arch, factor))
    torch.manual_seed(job.config.seed)
    model = create_model(spec, num_classes=job.num_classes).to(job.device)
    _log.info("=> widened the model by %d: a %s model with random weights", factor, spec.arch)
    return replace(job, spec=spec, model=model, masks={})
