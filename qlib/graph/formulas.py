"""What the model computes from its own parameters, such as standardized weights: it trains through its formula."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from qlib.graph.ir import Graph, attribute
from qlib.graph.moves import move_of
from qlib.graph.names import writes
from qlib.graph.ops import Formula
from qlib.graph.trace import Trace, is_view

__all__ = ["formula_of", "settle", "settle_layer", "train_through"]


def formula_of(trace: Trace, node: fx.Node) -> Formula | None:
    """The part of the program that computes a node from the model's own tensors; None where there is none to train.

    None too for a parameter itself, and where the model writes into one.
    """
    needed = _needed(node)
    for each in trace.graph.graph.nodes:  # in order: one write may be into what another one has changed
        if writes(each) and not needed.isdisjoint(_written(each)):
            needed |= _needed(each)
    leaves = [each for each in needed if each in trace.tensors]
    trains = any(isinstance(trace.tensors[leaf], nn.Parameter) and trace.tensors[leaf].requires_grad for leaf in leaves)
    changes = any(each in leaves for write in filter(writes, needed) for each in _written(write))
    if node in leaves or not trains or changes or trace.images in needed:
        return None
    root, graph, new = nn.Module(), fx.Graph(), dict[fx.Node, fx.Node]()
    for each in trace.graph.graph.nodes:
        if each in leaves:
            _hold(root, each.name, trace.tensors[each])
            new[each] = graph.get_attr(each.name)
        elif each in needed:
            function, args = move_of(each) or (each.target, each.args)
            kwargs = {} if move_of(each) else each.kwargs
            new[each] = graph.call_function(function, *fx.node.map_arg((args, dict(kwargs)), new.__getitem__))
    graph.output(new[node])
    return Formula(fx.GraphModule(root, graph))


def _written(write: fx.Node) -> Iterator[fx.Node]:
    """What an op changes in place, and what that may be a view of."""
    each = write.args[0]
    while isinstance(each, fx.Node):
        yield each
        each = each.args[0] if is_view(each) or writes(each) else None


def _needed(node: fx.Node) -> set[fx.Node]:
    """A node and all that it is computed from."""
    found, waiting = set[fx.Node](), [node]
    while waiting:
        each = waiting.pop()
        if each not in found:
            found.add(each)
            waiting += each.all_input_nodes
    return found


def _hold(root: nn.Module, name: str, tensor: Tensor) -> None:
    if isinstance(tensor, nn.Parameter):
        root.register_parameter(name, tensor)
    else:
        root.register_buffer(name, tensor)


def train_through(module: nn.Module, name: str, formula: Formula) -> None:
    """Makes a tensor of a module the value of a formula, computed anew each time that it is read.

    It is a parametrization of `torch.nn.utils.parametrize`; its `original` is the value that the tensor had before.

    >>> scale = nn.Parameter(torch.tensor(3.0))
    >>> root, graph = nn.ParameterDict({"scale": scale}), fx.Graph()
    >>> _ = graph.output(graph.call_method("expand", (graph.get_attr("scale"), 1, 2)))
    >>> layer = nn.Linear(2, 1)
    >>> train_through(layer, "weight", Formula(fx.GraphModule(root, graph)))
    >>> layer.weight.sum().backward()
    >>> layer.weight.tolist(), scale.grad.item()
    ([[3.0, 3.0]], 2.0)
    """
    parametrize.register_parametrization(module, name, formula, unsafe=True)  # unsafe: it does not read the original


@torch.no_grad()
def settle(graph: Graph) -> None:
    """Makes constants, in place, of what formulas give now: such a graph computes the same, and does not train them."""
    for module in list(graph.modules()):
        settle_layer(module)
    for node in graph.graph.find_nodes(op="call_module"):
        target = str(node.target)
        if isinstance(graph.get_submodule(target), Formula):
            value = attribute(graph, node)
            graph.delete_submodule(target)
            graph.register_buffer(target, value)
            node.op = "get_attr"
    graph.recompile()


@torch.no_grad()
def settle_layer(module: nn.Module) -> None:
    """As `settle`, of the tensors of one layer."""
    if parametrize.is_parametrized(module):
        formulas: nn.ModuleDict = module.parametrizations  # type: ignore[assignment]
        values = {name: getattr(module, name) for name in formulas}
        del module.parametrizations
        # Not `remove_parametrizations`: it changes the class, which is that of all copies of the module.
        module.__class__ = type(module).__base__  # type: ignore[assignment]
        for name, value in values.items():
            own = isinstance(formulas[name].original, nn.Parameter)
            _hold(module, name, nn.Parameter(value, requires_grad=False) if own else value)
