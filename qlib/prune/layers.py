"""The layers whose weights are pruned one by one, as matrices by the names of their parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, fx, nn

from qlib.config.layers.patterns import SlowPattern, matching, pattern_problem
from qlib.correct._pairs import single_layers
from qlib.errors import UsageError, did_you_mean
from qlib.graph import Graph
from qlib.graph.weights import grouped

__all__ = ["PrunedLayer", "chosen_layers", "prunable_layers"]

KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


@dataclass(frozen=True, eq=False)
class PrunedLayer:
    """A layer that is called once, with a weight of its own: a parameter of the model, under its name there."""

    parameter: str
    node: fx.Node
    module: nn.Module

    @property
    def weight(self) -> Tensor:
        """The parameter itself."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def rows(self) -> Tensor:
        """The weight, copied, as ``[groups, out / groups, in / groups * kernel]``."""
        return grouped(self.module, self.weight.detach()).flatten(2)

    @property
    def inputs(self) -> tuple[int, int]:
        """Input channels of a group, and places of the kernel."""
        shape = self.weight.shape
        return shape[1], shape[2:].numel()

    def as_weight(self, rows: Tensor) -> Tensor:
        """What ``[groups, out / groups, in / groups * kernel]`` is in the weight's own shape."""
        return rows.reshape(self.weight.shape)


def prunable_layers(graph: Graph, model: nn.Module) -> list[PrunedLayer]:
    """The convolutions and linear layers of a graph that shares its weights with `model`, in execution order."""
    names = {(value.data_ptr(), value.shape): name for name, value in model.named_parameters()}
    found = []
    for node in single_layers(graph):
        module = graph.get_submodule(str(node.target))
        weight = module.weight
        assert isinstance(weight, Tensor)
        name = names.get((weight.data_ptr(), weight.shape))
        if isinstance(module, KINDS) and name is not None:
            found.append(PrunedLayer(name, node, module))
    return found


def chosen_layers(layers: Sequence[PrunedLayer], patterns: Sequence[str], flag: str) -> list[PrunedLayer]:
    """Those whose layer or parameter one of the patterns matches as a whole; all without patterns.

    Raises UsageError, which names the `flag`, for a pattern that is none or matches nothing, and for no layers.
    """
    if not layers:
        raise UsageError(
            "the model has no convolution or linear layer that is called once, so there is nothing to prune"
        )
    names = {name: each for each in layers for name in (each.parameter, each.parameter.rpartition(".")[0])}
    wanted = {name for pattern in patterns for name in _matching(pattern, names, flag)}
    return [each for each in layers if not patterns or names_of(each) & wanted]


def names_of(layer: PrunedLayer) -> set[str]:
    """What a pattern may match."""
    return {layer.parameter, layer.parameter.rpartition(".")[0]}


def _matching(pattern: str, names: Mapping[str, object], flag: str) -> frozenset[str]:
    if problem := pattern_problem(pattern):
        raise UsageError(f"{flag} {problem}")
    try:
        found = matching(pattern, names)
    except SlowPattern as error:
        raise UsageError(f"{flag} {error}") from None
    if found:
        return found
    hint = did_you_mean(pattern, names)
    raise UsageError(f"{flag} {pattern!r} matches no layer whose weights can be pruned{hint}; --summary names all")
