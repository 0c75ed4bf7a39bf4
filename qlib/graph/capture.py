"""Model -> graph: trace, name every node, propagate shapes, turn functional ops into modules."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, fx, nn
from torchvision.models.feature_extraction import NodePathTracer
from torchvision.ops import FrozenBatchNorm2d, StochasticDepth

from qlib.errors import ModelError
from qlib.graph import ops
from qlib.graph.attention import expand_attention
from qlib.graph.canonical import canonical_module
from qlib.graph.identities import drop_identities, keep_dropouts
from qlib.graph.ir import MOVES, Graph, holds_tensor

__all__ = ["capture"]

_LEAVES = (ops.Op, StochasticDepth, FrozenBatchNorm2d)


def capture(model: nn.Module, example: Tensor, *, share: bool = False) -> Graph:
    """The graph of `model` in evaluation mode, on a copy of it: the model itself stays as it is.

    With `share` the graph is one to train: its weights and batch-norm statistics are those of the model, or lie in the
    same memory, and dropout stays in it.

    `example` is one batch ``[N, ...]`` of the size that the graph will see; its values do not matter. Every node has
    ``meta["name"]`` (the module path, or the name that torchvision's feature extraction gives), ``meta["tensor"]``
    and, for tensors, ``meta["shape"]``. Dropout and other identities are gone; what does not depend on the input is
    computed once and kept as a constant.

    Raises ModelError, naming the place, where the model cannot be traced or run.
    """
    own = [*model.parameters(), *model.buffers()] if share else []
    model = copy.deepcopy(model, {id(tensor): tensor for tensor in own}).eval()
    expand_attention(model)
    tracer = _Tracer()
    try:
        graph = fx.GraphModule(tracer.root_module(model), tracer.trace(model))
    except (TypeError, ValueError, AttributeError, RuntimeError, NotImplementedError) as error:
        raise ModelError(
            f"the model cannot be captured: {_one_line(error)}; rewrite the forward method without control flow on"
            " tensor values, or put that part into a module of torch.nn"
        ) from error
    graph.eval()
    _name_nodes(graph, tracer)
    if share:
        keep_dropouts(graph)
    drop_identities(graph, dropouts=not share)
    _propagate(graph, example)
    _fold_constants(graph)
    _drop_same_size_pools(graph)
    _drop_empty_masks(graph)
    _canonicalize(graph)
    _make_positional(graph)
    _views_to_reshapes(graph)
    graph.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    graph.delete_all_unused_submodules()
    graph.recompile()
    return graph


class _Tracer(NodePathTracer):  # type: ignore[misc]
    record_stack_traces = True  # an error can then name the line of the model

    def root_module(self, model: nn.Module) -> nn.Module:
        return model

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return isinstance(module, _LEAVES) or bool(super().is_leaf_module(module, qualified_name))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _name_nodes(graph: Graph, tracer: _Tracer) -> None:
    """Gives each node a unique name: its module's path, or torchvision's name for a functional op.

    A functional op that is all that a leaf-like module does (``class Add(nn.Module)``) gets the module's own name.
    """
    paths = {node: str(tracer.node_to_qualname.get(node, node.name)) for node in graph.graph.nodes}
    owners: dict[str, int] = {}
    for node, path in paths.items():
        if node.op in ("call_function", "call_method"):
            owners[path.rpartition(".")[0]] = owners.get(path.rpartition(".")[0], 0) + 1
    # The tracer writes `x.shape` at its first use, be it the call of a module: that does not make it the module's op.
    called = {str(node.target) for node in graph.graph.nodes if node.op == "call_module"}
    taken: set[str] = set()
    for node in graph.graph.nodes:
        path = str(node.target) if node.op in ("call_module", "get_attr") else paths[node]
        owner = path.rpartition(".")[0]
        functional = node.op in ("call_function", "call_method")
        if functional and owner and owners[owner] == 1 and owner not in called and _is_bare(graph, owner):
            path = owner
        name, suffix = path, 0
        while name in taken:
            suffix += 1
            name = f"{path}_{suffix}"
        if node.op not in ("get_attr", "output"):
            taken.add(name)
        node.meta["name"] = name


def _is_bare(graph: Graph, path: str) -> bool:
    """Whether the module at `path` has neither children nor weights."""
    try:
        module = graph.get_submodule(path)
    except AttributeError:  # a module without state is not copied into the GraphModule
        return True
    return not any(True for _ in module.children()) and not module.state_dict()


def _drop_same_size_pools(graph: Graph) -> None:
    """An adaptive pool whose output has the size of its input does nothing (VGG and AlexNet at 224 x 224)."""
    for node in list(graph.graph.nodes):
        if node.op == "call_module" and isinstance(graph.get_submodule(str(node.target)), nn.AdaptiveAvgPool2d):
            source = node.args[0]
            if source.meta["shape"] == node.meta["shape"] and node.meta["shape"][-1] > 1:
                node.replace_all_uses_with(source)
                graph.graph.erase_node(node)


def _drop_empty_masks(graph: Graph) -> None:
    """A masked softmax over windows that were not shifted is a softmax."""
    for node in graph.graph.nodes:
        if not node.meta.get("masked", True):
            graph.add_submodule(str(node.target), nn.Softmax(-1))
            node.args = node.args[:1]


class _Propagate(fx.Interpreter):
    """Runs the graph once; notes of each node whether it holds a tensor, and its shape, and keeps constant results."""

    def __init__(self, graph: Graph, example_shape: tuple[int, ...]) -> None:
        super().__init__(graph)
        self.extra_traceback = False  # else torch appends a page to the message
        self.example_shape = example_shape

    def run_node(self, n: fx.Node) -> Any:
        try:
            value = super().run_node(n)
        except (RuntimeError, TypeError, ValueError, IndexError, AssertionError) as error:
            raise ModelError(
                f"the model fails at {n.meta['name']!r} on an input of shape {self.example_shape}: {_one_line(error)}"
            ) from error
        n.meta["tensor"] = holds_tensor(value)
        module = self.submodules.get(str(n.target)) if n.op == "call_module" else None
        if isinstance(module, ops.MaskedSoftmax):
            (x, shape), _ = self.fetch_args_kwargs_from_env(n)
            n.meta["masked"] = module.mask(shape, x.device) is not None
        if isinstance(value, Tensor):
            n.meta["shape"], n.meta["dtype"] = tuple(value.shape), value.dtype
        inputs = n.all_input_nodes
        n.meta["constant"] = n.op == "get_attr" or (
            n.op != "placeholder" and bool(inputs) and all(i.meta["constant"] for i in inputs)
        )
        if n.meta["constant"] and isinstance(value, Tensor):
            n.meta["value"] = value
        return value


def _propagate(graph: Graph, example: Tensor) -> None:
    with torch.no_grad():
        _Propagate(graph, tuple(example.shape)).run(example)
    output = next(iter(reversed(graph.graph.nodes)))
    if not isinstance(output.args[0], fx.Node) or "shape" not in output.args[0].meta:
        raise ModelError("the model must return one tensor of logits in evaluation mode; wrap it so that it does")


def _fold_constants(graph: Graph) -> None:
    """Replaces each op whose inputs are all constants by its value, kept as a buffer of the graph."""
    for node in graph.graph.nodes:
        if node.op == "get_attr" or not node.meta["constant"] or "value" not in node.meta:
            continue
        target = "constant_" + node.name
        graph.register_buffer(target, node.meta["value"].detach().clone())
        with graph.graph.inserting_before(node):
            folded = graph.graph.create_node("get_attr", target)
        folded.meta = dict(node.meta)
        node.replace_all_uses_with(folded)
    for node in graph.graph.nodes:
        node.meta.pop("value", None)


def _canonicalize(graph: Graph) -> None:
    """Replaces every functional op that changes values by a module of the same name."""
    for node in list(graph.graph.nodes):
        if node.op not in ("call_function", "call_method") or not node.meta["tensor"]:
            continue
        if _only_moves(node):
            continue
        module, inputs = canonical_module(graph, node)
        target = _free_target(graph, node.meta["name"])
        graph.add_submodule(target, module.eval())
        with graph.graph.inserting_before(node):
            replacement = graph.graph.create_node("call_module", target, tuple(inputs))
        replacement.meta = dict(node.meta)
        node.replace_all_uses_with(replacement)
        graph.graph.erase_node(node)


def _only_moves(node: fx.Node) -> bool:
    """Whether a functional op leaves values as they are; padding does, unless with another constant than 0."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if name == "pad":
        given = {**dict(zip(("input", "pad", "mode", "value"), node.args, strict=False)), **node.kwargs}
        return not given.get("value")
    return name in MOVES


def _views_to_reshapes(graph: Graph) -> None:
    """A view fails where the memory layout does not allow it, which channels_last may not; a reshape never does."""
    for node in graph.graph.nodes:
        by_shape = not any(isinstance(arg, torch.dtype) for arg in (*node.args, *node.kwargs.values()))
        if node.op == "call_method" and node.target == "view" and by_shape:
            node.target = "reshape"


def _make_positional(graph: Graph) -> None:
    """Writes the keyword arguments of module calls as positional ones: inputs are numbered."""
    for node in graph.graph.nodes:
        if node.op == "call_module" and node.kwargs:
            call = inspect.signature(graph.get_submodule(str(node.target)).forward)
            bound = call.bind(*node.args, **node.kwargs)
            bound.apply_defaults()
            if bound.kwargs:
                raise ModelError(
                    f"{node.meta['name']!r} is called with {next(iter(bound.kwargs))!r}, which it takes by name only;"
                    " let its forward take it by position"
                )
            node.args, node.kwargs = bound.args, {}


def _free_target(graph: Graph, name: str) -> str:
    """`name`, or a variation of it that does not yet stand for something in the graph."""
    target, suffix = name, 0
    while True:
        parent, _, last = target.rpartition(".")
        try:
            if not hasattr(graph.get_submodule(parent), last):
                return target
        except AttributeError:
            return target
        suffix += 1
        target = f"{name}_{suffix}"
