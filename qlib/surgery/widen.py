"""Wider layers: the same model with more channels, to win back what few bits lose."""

from __future__ import annotations

import copy
import re
from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from qlib.errors import ModelError
from qlib.graph import Graph, capture
from qlib.graph.ir import is_layer, layer_inputs
from qlib.graph.norms import BATCH_NORMS
from qlib.models import ModelSpec, find_model

__all__ = ["find_wide_model", "is_wide", "wide_name", "widened"]

_WEIGHTED = (nn.Linear, nn.modules.conv._ConvNd)


def wide_name(arch: str, factor: int) -> str:
    """The name of a widened model, by which its checkpoints are read again.

    >>> wide_name("resnet20_cifar", 2)
    'resnet20_cifar.wide2'
    """
    return f"{arch}.wide{factor}"


def is_wide(name: str, arch: str) -> bool:
    """Whether `name` is that of the model `arch`, widened.

    >>> is_wide("vgg11.wide2", "vgg11"), is_wide("vgg11", "vgg11"), is_wide("vgg11.wide2/x.py:f.wide2", "vgg11")
    (True, False, False)
    """
    return re.fullmatch(re.escape(arch) + r"\.wide[2-8]", name) is not None


def find_wide_model(arch: str) -> ModelSpec:
    """`find_model`, which also knows the names that `wide_name` gives.

    >>> find_wide_model("resnet20_cifar.wide2").build(10).fc.in_features
    128
    """
    wide = re.fullmatch(r"(.+)\.wide([2-8])", arch)
    if wide is None:
        return find_model(arch)
    spec, factor = find_model(wide[1]), int(wide[2])

    def build(classes: int) -> nn.Module:
        return widened(spec.build(classes), factor, torch.zeros(1, *spec.input_shape))

    return replace(spec, arch=arch, build=build, weights=None)


def widened(model: nn.Module, factor: int, example: Tensor) -> nn.Module:
    """A new model whose convolutions, linear layers and batch-norms have `factor` times the channels.

    The channels of the input and of the output stay. All of these layers begin with fresh random weights. `example` is
    a batch of images.

    References: Mishra et al., "WRPN: wide reduced-precision networks", 2018, section 3.

    Raises:
        ModelError: the model's own code relies on its widths.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 10))
    >>> wide = widened(model, 2, torch.zeros(1, 3, 4, 4))
    >>> wide[0], wide[4]
    (Conv2d(3, 16, kernel_size=(3, 3), stride=(1, 1)), Linear(in_features=64, out_features=10, bias=True))
    """
    assert factor >= 1
    graph = capture(copy.deepcopy(model).eval(), example)
    wide_in = _fed_by_layers(graph)
    last = _last_layers(graph)
    wide = copy.deepcopy(model)
    for name, module in wide.named_modules():
        if isinstance(module, (*_WEIGHTED, *BATCH_NORMS)):
            if name not in wide_in:
                raise _refusal(factor, f"layer {name!r} takes no part in evaluation")
            _widen(module, factor, wide_in[name], name not in last)
    _try(wide, example, graph, factor)
    return wide


def _fed_by_layers(graph: Graph) -> dict[str, bool]:
    """Module -> whether a layer with weights comes before it: if not, it has the channels of the input."""
    found: dict[str, bool] = {}
    wide: dict[fx.Node, bool] = {}
    for node in graph.graph.nodes:
        wide[node] = any(wide[each] for each in node.all_input_nodes)
        if node.op == "call_module":
            found[str(node.target)] = wide[node]
            wide[node] |= isinstance(graph.get_submodule(str(node.target)), _WEIGHTED)
    return found


def _last_layers(graph: Graph) -> set[str]:
    """The layers with weights whose output reaches that of the model through no other one."""
    (waiting,), found = ([node] for node in graph.graph.nodes if node.op == "output"), set[str]()
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if is_layer(graph, node) and isinstance(graph.get_submodule(str(node.target)), _WEIGHTED):
            found.add(str(node.target))
            continue
        sources = [each for each in layer_inputs(node) if each not in seen]
        seen.update(sources)
        waiting += sources
    return found


def _widen(module: nn.Module, factor: int, inputs: bool, outputs: bool) -> None:
    """Multiplies the channels that come in, or go out, or both, and draws new weights."""
    if isinstance(module, nn.Linear):
        module.in_features *= factor if inputs else 1
        module.out_features *= factor if outputs else 1
        _resize(module, module.out_features, module.in_features)
    elif isinstance(module, nn.modules.conv._ConvNd):
        depthwise = module.groups == module.in_channels
        module.in_channels *= factor if inputs else 1
        module.out_channels *= factor if outputs else 1
        module.groups *= factor if inputs and depthwise else 1
        ends = (module.out_channels, module.in_channels // module.groups)
        if module.transposed:
            ends = (module.in_channels, module.out_channels // module.groups)
        _resize(module, *ends, *module.kernel_size)
    elif inputs:
        assert isinstance(module, nn.modules.batchnorm._BatchNorm)
        module.num_features *= factor
        for name in ("weight", "bias", "running_mean", "running_var"):
            value = getattr(module, name)
            if value is not None:
                value.data = torch.empty(module.num_features, dtype=value.dtype, device=value.device)
    module.reset_parameters()  # type: ignore[operator]


def _resize(module: nn.Linear | nn.modules.conv._ConvNd, *shape: int) -> None:
    """Gives a layer parameters of another shape, without values."""
    outputs = module.out_features if isinstance(module, nn.Linear) else module.out_channels
    module.weight = nn.Parameter(module.weight.new_empty(shape))
    if module.bias is not None:
        module.bias = nn.Parameter(module.bias.new_empty(outputs))


def _try(model: nn.Module, example: Tensor, graph: Graph, factor: int) -> None:
    """Raises ModelError unless the model runs, and gives what it gave, in shape."""
    training = {name: module.training for name, module in model.named_modules()}
    try:
        with torch.no_grad():
            shape, before = model.eval()(example).shape, graph(example).shape
    except (RuntimeError, ValueError) as error:
        raise _refusal(factor, "its own code relies on its widths") from error
    finally:
        for name, module in model.named_modules():
            module.training = training[name]
    if shape != before:
        raise _refusal(factor, f"its output would have shape {tuple(shape)} instead of {tuple(before)}")


def _refusal(factor: int, reason: str) -> ModelError:
    return ModelError(f"the model cannot be widened by {factor}: {reason}; use widen: 1, or a model made wider")
