"""An exported program -> the normal form of a graph: every op that changes values is a module with a stable name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torchvision.ops import FrozenBatchNorm2d, StochasticDepth

from qlib.graph import ops
from qlib.graph.any_batch import number_of
from qlib.graph.aten import arguments_of, layer_of
from qlib.graph.formulas import formula_of, train_through
from qlib.graph.ir import Graph
from qlib.graph.moves import is_move, move_of
from qlib.graph.names import DROPOUTS, NORMED_BY, attribute_name, name_ops, op_of, owner_of, writes
from qlib.graph.trace import DROP_PATHS, Trace, depends_on, pads_values

__all__ = ["rewrite"]


def rewrite(trace: Trace, model: nn.Module, batch: int, *, share: bool) -> Graph:
    """The graph of modules that computes what the program computes.

    With `share` the modules hold the model's own tensors, else copies. `batch` is the number of images of the shapes
    that the nodes' meta tells.
    """
    return _Rewriter(trace, model, batch, share).run()


def constant_values(trace: Trace, depending: frozenset[fx.Node]) -> dict[fx.Node, Any]:
    """The values of all other nodes, computed in order, as ops may write into what others made."""
    values: dict[fx.Node, Any] = {node: value.detach() for node, value in trace.tensors.items()}
    if any(writes(node) for node in trace.graph.graph.nodes):
        values = {node: value.clone() for node, value in values.items()}
    with torch.no_grad():
        for node in trace.graph.graph.nodes:
            if node.op == "call_function" and node not in depending:
                args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda each: values[each])
                values[node] = node.target(*args, **kwargs)
    return values


class _Rewriter:
    def __init__(self, trace: Trace, model: nn.Module, batch: int, share: bool) -> None:
        self.trace, self.model, self.batch, self.share = trace, model, batch, share
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.depending = depends_on(trace.graph.graph, trace.images)
        self.values = constant_values(trace, self.depending)
        layers = [n for n in trace.graph.graph.nodes if n.op == "call_function" and n in self.depending and _tensor(n)]
        moves = frozenset(node for node in layers if is_move(node, self.depending))
        self.several = {node for node in layers if node not in moves and not isinstance(node.meta["val"], Tensor)}
        self.names = name_ops([n for n in layers if n not in self.several], model, trace.paths, moves)
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.new: dict[fx.Node, Any] = {}
        self.copies: dict[int, Tensor] = {}
        self.targets: dict[Any, str] = {}
        self.constants: dict[fx.Node, fx.Node] = {}

    def run(self) -> Graph:
        for node in self.trace.graph.graph.nodes:
            if node is self.trace.images:
                self.new[node] = self._noted(self.graph.placeholder("x"), node, "x")
            elif node.op == "output":
                (logits,) = node.args[0]
                self.graph.output(self.new[logits]).meta |= {"name": "output", "tensor": True}
            elif node in self.depending and node not in self.several:  # of those, each result is a layer
                self.new[node] = self._op(node)
        graph = fx.GraphModule(self.root, self.graph)
        graph.eval()
        return graph

    def _noted(self, new: fx.Node, old: fx.Node, name: str) -> fx.Node:
        new.meta["name"], new.meta["tensor"] = name, _tensor(old)
        value = old.meta.get("val")
        if isinstance(value, Tensor):
            new.meta["shape"] = self._sizes(old)
            new.meta["dtype"] = value.dtype
        new.stack_trace = old.meta.get("stack_trace") or old.stack_trace
        return new

    def _sizes(self, node: fx.Node) -> tuple[int, ...]:
        """The shape of a node's tensor for as many images as the example has."""
        shape = node.meta["val"].shape
        more = node.meta["more"].shape if isinstance(node.meta.get("more"), Tensor) else shape
        return tuple(number_of(size, other, self.batch) for size, other in zip(shape, more, strict=True))

    def _op(self, node: fx.Node) -> fx.Node:
        if not _tensor(node):
            return self._noted(self._call(node, node.target), node, node.name)  # how many images there are
        if node in self.names:
            return self._layer(node)
        return self._move(node)

    def _call(self, node: fx.Node, target: Any) -> fx.Node:
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), self._input)
        return self.graph.call_function(target, args, kwargs)

    def _input(self, node: fx.Node) -> Any:
        """What stands for a node of the program: a node, or the plain value of a constant that is none."""
        if node in self.new:
            return self.new[node]
        value = self.values[node]
        return self._constant(node, value) if isinstance(value, Tensor) else value

    def _constant(self, node: fx.Node, value: Tensor) -> fx.Node:
        if node not in self.constants:
            own = self.trace.tensors.get(node)
            path = attribute_name(self.trace.paths.get(node, ""))
            target = path if path and not self._is_of_a_layer(path) else f"constant_{node.name}"
            if self.share and (formula := formula_of(self.trace, node)) is not None:
                _add(self.root, target, formula)
                new = self.graph.call_module(target)
            else:
                _put(self.root, target, self._owned(own if own is not None else value))
                new = self.graph.get_attr(target)
            self.constants[node] = self._noted(new, node, path or target)
        return self.constants[node]

    def _is_of_a_layer(self, path: str) -> bool:
        """Whether a tensor has its place in a module that the graph has under the same path."""
        owners = {path[:end] for end, letter in enumerate(path) if letter == "."}
        return not owners.isdisjoint(self.names.values())

    def _owned(self, value: Tensor) -> Tensor:
        """The tensor itself, or its copy: one for each."""
        if self.share:
            return value
        if id(value) not in self.copies:
            copy = value.detach().clone()
            self.copies[id(value)] = (
                nn.Parameter(copy, requires_grad=value.requires_grad) if isinstance(value, nn.Parameter) else copy
            )
        return self.copies[id(value)]

    def _layer(self, node: fx.Node) -> fx.Node:
        given = arguments_of(node) if hasattr(node.target, "_schema") else {}
        name = self.names[node]
        built = layer_of(op_of(node), {key: self._weight(value) for key, value in given.items()}, self._shape(node))
        module, inputs = built if built is not None else self._function(node)
        module = self._own_module(node, module) or module
        if "num_batches_tracked" in module._buffers:  # the op does not read it, so the program does not know it
            mean = self.trace.paths.get(node.args[NORMED_BY["batch_norm"]], "")  # type: ignore[arg-type]
            counter = getattr(self.modules.get(mean.rpartition(".")[0]), "num_batches_tracked", None)
            module._buffers["num_batches_tracked"] = torch.tensor(0) if counter is None else self._owned(counter)
        key = _identity(op_of(node), module, given)
        self._train(module, given)
        if key not in self.targets:
            self.targets[key] = self._free_target(name)
            _add(self.root, self.targets[key], module.eval())
        new = self.graph.call_module(self.targets[key], tuple(self._operand(each, node) for each in inputs))
        return self._noted(new, node, name)

    def _train(self, module: nn.Module, given: Mapping[str, Any]) -> None:
        """Lets what the model computes from parameters, of the tensors of a module, train with those."""
        own = {**module._parameters, **module._buffers}
        for name, node in given.items() if self.share else ():
            computed = name in own and isinstance(node, fx.Node) and node not in self.depending
            if computed and (formula := formula_of(self.trace, node)) is not None:
                train_through(module, name, formula)

    def _own_module(self, node: fx.Node, built: nn.Module) -> nn.Module | None:
        """A module like the model's own, where the op that stands for it does not tell all that it does."""
        owner: Any = self.modules.get(owner_of(node))
        made: nn.Module
        if op_of(node) in DROPOUTS and type(owner).__name__ in DROP_PATHS:
            made = StochasticDepth(arguments_of(node)["p"], str(getattr(owner, "mode", "row")))
            return made
        if isinstance(owner, FrozenBatchNorm2d) and op_of(node) == "batch_norm":
            made = owner if self.share else copy.deepcopy(owner)
            return made
        if pads_values(owner) and isinstance(built, nn.modules.conv._ConvNd):
            made = copy.copy(owner)
            made._parameters = dict(built._parameters)
            return made
        return None

    def _weight(self, value: Any) -> Any:
        """A tensor of the model in the place of its node; other nodes stay what they are."""
        if isinstance(value, fx.Node) and value not in self.depending:
            own = self.trace.tensors.get(value)
            found = own if own is not None else self.values[value]
            return self._owned(found) if isinstance(found, Tensor) else found
        return value

    def _operand(self, value: Any, node: fx.Node) -> fx.Node:
        if isinstance(value, fx.Node):
            return self.new[value] if value in self.new else self._constant(value, self.values[value])
        for source in node.all_input_nodes:
            if source not in self.depending and self._weight(source) is value:
                return self._constant(source, self.values[source])
        raise AssertionError(f"{node} has an input that is no node")

    def _shape(self, node: fx.Node) -> tuple[int, ...]:
        source = node.all_input_nodes[0] if node.all_input_nodes else None
        return self._sizes(source) if source is not None and isinstance(source.meta.get("val"), Tensor) else ()

    def _function(self, node: fx.Node) -> tuple[nn.Module, list[Any]]:
        """An op without a module of its own, computed in float; what the model holds becomes its buffers."""
        inputs: list[fx.Node] = []
        constants: list[Tensor] = []
        held: dict[str, fx.Node] = {}

        def slot(each: fx.Node) -> Any:
            if each in self.depending:
                inputs.append(each)
                return ops.Function.Slot(len(inputs) - 1)
            value = self._weight(each)
            if not isinstance(value, Tensor):
                return value
            held[f"constant_{len(held)}"] = each
            constants.append(value if self.share else value.detach())
            return ops.Function.Slot(-len(constants))

        function: Callable[..., Any]
        if op_of(node) == "getitem":
            (source,) = node.all_input_nodes
            function, node = ops.Result(_functional(source), cast(int, node.args[1])), source
        else:
            function = _functional(node)
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), slot)
        module = ops.Function(function, args, kwargs, constants)
        self._train(module, held)
        return module, inputs

    def _free_target(self, name: str) -> str:
        target, suffix = name, 0
        prefixes = {each for each in self.names.values() if each.startswith(f"{name}.")}
        while _exists(self.root, target) or (prefixes and target == name):
            suffix += 1
            target = f"{name}_{suffix}"
        return target

    def _move(self, node: fx.Node) -> fx.Node:
        found = move_of(node)
        if found is None:
            return self._noted(self._call(node, node.target), node, node.name)
        function, args = found
        return self._noted(self.graph.call_function(function, fx.node.map_arg(args, self._input)), node, node.name)


def _identity(op: str, module: nn.Module, given: Mapping[str, Any]) -> Any:
    """What two calls of one layer have in common: the op, its tensors and its plain arguments."""
    own = tuple(id(tensor) for tensor in (*module.parameters(), *module.buffers()))
    plain = {key: value for key, value in given.items() if not isinstance(value, fx.Node)}
    return (op, own, repr(plain)) if own and not isinstance(module, ops.Function) else id(module)


def _tensor(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) or (isinstance(value, (tuple, list)) and all(isinstance(v, Tensor) for v in value))


def _functional(node: fx.Node) -> Callable[..., Any]:
    """The op itself, or for one that works in place the one that does not."""
    target: Any = node.target
    found: Callable[..., Any] = target
    if writes(node):
        found = getattr(getattr(torch.ops.aten, op_of(node)), target._overloadname)
    return found


def _exists(root: nn.Module, target: str) -> bool:
    try:
        root.get_submodule(target)
    except AttributeError:
        parent, _, last = target.rpartition(".")
        try:
            return hasattr(root.get_submodule(parent), last)
        except AttributeError:
            return False
    return True


def _put(root: nn.Module, target: str, tensor: Tensor) -> None:
    """Makes a tensor a parameter or a buffer of the module that its path names."""
    path, _, last = target.rpartition(".")
    if path and not _exists(root, path):
        _add(root, path, nn.Module())
    owner = root.get_submodule(path)
    if isinstance(tensor, nn.Parameter):
        owner.register_parameter(last, tensor)
    else:
        owner.register_buffer(last, tensor)


def _add(root: nn.Module, target: str, module: nn.Module) -> None:
    *path, last = target.split(".")
    for part in path:
        if not isinstance(getattr(root, part, None), nn.Module):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    root.add_module(last, module)
