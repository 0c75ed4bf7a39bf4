"""Pruners and regularizers of a schedule over a model: the parameters they name, and what they ask of its layers."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from qlib.app.images import TrainingImages
from qlib.app.job import Job
from qlib.config.schedule.types import Component, PolicySpec, Schedule
from qlib.errors import ConfigError
from qlib.graph import FoldedGraph, Graph, capture, fold_copy
from qlib.graph.coordinates import channel_classes
from qlib.graph.fuse import fused_activations
from qlib.graph.ir import name_of
from qlib.prune.masks import parameters_by_name
from qlib.prune.names import in_own_names_of, unknown_names
from qlib.prune.pruner import PRUNERS, Pruner
from qlib.regularize._base import REGULARIZERS, Regularizer
from qlib.train.masking import Masking
from qlib.train.policy import Policy
from qlib.train.pruning import Pruning
from qlib.train.regularizing import Regularizing

__all__ = ["make_pruning", "make_regularizing", "sparsity_lines"]

_log = logging.getLogger(__name__)

_IMAGES = 256
"""How many training images the activations of filters are measured on."""

_BATCH = 32

_Made = TypeVar("_Made", Pruner, Regularizer)


def make_pruning(job: Job, schedule: Schedule, images: TrainingImages, masking: Masking) -> list[Policy]:
    """The pruners of a schedule over the job's model. Raises ConfigError as `pruners_of` does."""
    layers = _Layers(job, images)
    return [
        Pruning(
            spec,
            pruner,
            pruner.names,
            masking,
            seed=job.config.seed,
            steps=images.steps,
            factors=layers.factors,
            activations=layers.activations,
        )
        for spec, pruner in pruners_of(job, schedule)
    ]


def make_regularizing(job: Job, schedule: Schedule, masking: Masking) -> list[Policy]:
    """The regularizers of a schedule over the job's model. Raises ConfigError as `regularizers_of` does."""
    pairs = regularizers_of(job, schedule)
    return [Regularizing(spec, regularizer, regularizer.names, masking) for spec, regularizer in pairs]


def pruners_of(job: Job, schedule: Schedule) -> list[tuple[PolicySpec, Pruner]]:
    """The policies of pruners, and their pruners in the model's own names.

    Raises:
        ConfigError: they name what the model does not have, or cannot prune what they name.
    """
    specs = [_with_levels(spec) for spec in schedule.of("pruners")]
    pruners = [PRUNERS[spec.component.cls](**_settings(job.model, spec.component, schedule)) for spec in specs]
    _check(job.model, specs, pruners)
    _Layers(job).check(specs, pruners)
    return list(zip(specs, pruners, strict=True))


def regularizers_of(job: Job, schedule: Schedule) -> list[tuple[PolicySpec, Regularizer]]:
    """The policies of regularizers, and their regularizers. Raises ConfigError as `pruners_of` does."""
    specs = schedule.of("regularizers")
    made: list[Regularizer] = [
        REGULARIZERS[spec.component.cls](**_settings(job.model, spec.component, schedule)) for spec in specs
    ]
    _check(job.model, specs, made)
    parameters = parameters_by_name(job.model)
    if any(each.needs_classes for each in made):
        classes = channel_classes(capture(job.model, job.example))
        made = [each.with_classes(classes, parameters) if each.needs_classes else each for each in made]
    for spec, regularizer in zip(specs, made, strict=True):
        frozen = [name for name in regularizer.names if not parameters[name].requires_grad]
        if frozen:
            place = f"{spec.component.where}: {spec.component.cls}"
            _log.warning("Warning: %s does not move %s, which does not train", place, ", ".join(frozen))
    return list(zip(specs, made, strict=True))


def sparsity_lines(job: Job, schedule: Schedule) -> list[str]:
    """What each pruner and regularizer acts on; raises ConfigError as a run would."""
    pairs: list[tuple[PolicySpec, Pruner | Regularizer]] = [
        *pruners_of(job, schedule),
        *regularizers_of(job, schedule),
    ]
    found = {spec.component.name: (spec.component.cls, each.names) for spec, each in pairs}
    return [
        f"{name} ({cls}) acts on {len(names)} parameter{'s' * (len(names) > 1)}: {', '.join(names)}"
        for name, (cls, names) in found.items()
    ]


def _settings(model: nn.Module, component: Component, schedule: Schedule) -> dict[str, Any]:
    """The settings of a component in the model's own names.

    In a file of Distiller's a name that means nothing is a warning, as long as another one means something.
    """
    parameters = parameters_by_name(model)
    problems = [f"{component.where}: {each}" for each in unknown_names(component.settings, parameters)]
    settings = in_own_names_of(component.settings, parameters)
    left = any(settings[key] for key in settings if isinstance(settings[key], (dict, tuple)))
    if problems and not (schedule.distillers and left):
        raise ConfigError(problems)
    for problem in problems:
        _log.warning("Warning: %s; it has no effect", problem)
    return settings


def _check(model: nn.Module, specs: Iterable[PolicySpec], made: Iterable[_Made]) -> None:
    parameters = parameters_by_name(model)
    pairs = zip(specs, made, strict=True)
    found = ((spec, each.problem({name: parameters[name] for name in each.names})) for spec, each in pairs)
    if problems := [f"{spec.component.where}: {spec.component.cls}: {problem}" for spec, problem in found if problem]:
        raise ConfigError(problems)


def _with_levels(spec: PolicySpec) -> PolicySpec:
    """The policy of a pruner whose component has the `levels` that the policy gives."""
    if "levels" not in spec.args:
        return spec
    component = spec.component
    if "levels" not in component.settings:
        raise ConfigError(
            f"{spec.where}: {component.cls} has no levels; they are those of SparsityLevelParameterPruner"
        )
    return spec.with_settings({**component.settings, "levels": spec.args["levels"]})


class _Layers:
    """What pruners ask of the layers around a weight, which the captured model knows."""

    def __init__(self, job: Job, images: TrainingImages | None = None) -> None:
        self._job, self._images = job, images
        self._graph: Graph | None = None

    def check(self, specs: Sequence[PolicySpec], pruners: Sequence[Pruner]) -> None:
        """Raises ConfigError for a weight behind which no ReLU stands, where its activations are asked for."""
        asking = [(spec, each) for spec, each in zip(specs, pruners, strict=True) if each.watches_activations]
        relus = _relus(self._folded()) if asking else {}
        problems = [
            f"{spec.component.where}: {spec.component.cls}: no ReLU follows {name!r}, whose zeros it could count"
            for spec, pruner in asking
            for name in pruner.names
            if name.removesuffix(".weight") not in relus
        ]
        if problems:
            raise ConfigError(problems)

    def _folded(self) -> FoldedGraph:
        """The model as it is now; it is captured once."""
        if self._graph is None:
            training = self._job.model.training
            self._graph = capture(self._job.model, self._job.example, share=True)
            self._job.model.train(training)
        return fold_copy(self._graph)

    def factors(self, name: str) -> Tensor | None:
        """What the batch-norm behind a weight multiplies each output channel by."""
        layer = name.removesuffix(".weight")
        norms = [norm for norm, into in self._folded().folded.items() if into == layer]
        if not norms:
            return None
        norm = self._job.model.get_submodule(norms[0])
        assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
        assert norm.running_var is not None
        scale = torch.ones_like(norm.running_var) if norm.weight is None else norm.weight.detach()
        return scale / (norm.running_var + norm.eps).sqrt()

    @torch.no_grad()
    def activations(self, names: Sequence[str]) -> Mapping[str, tuple[Tensor, Tensor]]:
        """For each channel of the ReLU behind a weight, the share of zeros and the mean over training images."""
        folded = self._folded()
        relus = _relus(folded)
        probe = _Probe(folded.graph.eval(), {relus[name.removesuffix(".weight")]: name for name in names})
        assert self._images is not None
        for images in self._images.sample(_IMAGES, _BATCH):
            probe.run(images)
        return {name: (zeros / probe.images, means / probe.images) for name, (zeros, means) in probe.sums.items()}


def _relus(folded: FoldedGraph) -> dict[str, fx.Node]:
    """Name of a layer -> the ReLU that follows it."""
    return {name_of(layer): relu for layer, relu in fused_activations(folded.graph).items()}


class _Probe(fx.Interpreter):
    """Sums, over images, the share of zeros and the mean of each channel behind some layers."""

    def __init__(self, graph: fx.GraphModule, nodes: Mapping[fx.Node, str]) -> None:
        super().__init__(graph)
        self._nodes = nodes
        self.images = 0
        self.sums: dict[str, tuple[Tensor, Tensor]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op == "placeholder":
            self.images += len(value)
        if n in self._nodes:
            by_channel = value.flatten(2) if value.ndim > 2 else value[..., None]
            now = ((by_channel == 0).double().mean(2).sum(0), by_channel.double().mean(2).sum(0))
            name = self._nodes[n]
            self.sums[name] = tuple(map(torch.add, self.sums[name], now)) if name in self.sums else now  # type: ignore[assignment]
        return value
