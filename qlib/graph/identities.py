"""What does nothing in evaluation: identities, and dropout of all kinds."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx, nn

from qlib.graph.ir import Graph
from qlib.graph.kinds import DROPOUTS
from qlib.graph.norms import BATCH_NORMS

__all__ = ["drop_dropouts", "drop_identities", "keep_dropouts"]

_FUNCTIONS: dict[str, Callable[..., nn.Module]] = {
    "dropout": lambda input, p=0.5, *_, **__: nn.Dropout(p),
    "dropout1d": lambda input, p=0.5, *_, **__: nn.Dropout1d(p),
    "dropout2d": lambda input, p=0.5, *_, **__: nn.Dropout2d(p),
    "dropout3d": lambda input, p=0.5, *_, **__: nn.Dropout3d(p),
    "alpha_dropout": lambda input, p=0.5, *_, **__: nn.AlphaDropout(p),
    "feature_dropout": lambda input, p=0.5, *_, **__: nn.Dropout2d(p),
}


def keep_dropouts(graph: Graph) -> None:
    """Makes modules of functional dropouts, in place, so that `drop_identities` can tell what to keep.

    What was traced in evaluation mode is taken to have asked whether the model trains.
    """
    for node in graph.graph.nodes:
        make = _FUNCTIONS.get(_function(node))
        if make is not None:
            target = f"dropout_{node.name}"
            graph.add_submodule(target, make(*node.args, **node.kwargs))
            source = node.all_input_nodes[0]  # it may have been given by name
            node.op, node.target, node.args, node.kwargs = "call_module", target, (source,), {}


def drop_identities(graph: Graph, *, dropouts: bool = True) -> None:
    """Erases, in place, all that does nothing in evaluation; without `dropouts` those stay that a graph can train with.

    These can change values, and do not stand between a layer and the batch-norm or ReLU that is computed in it.
    """
    for node in list(graph.graph.nodes):
        module = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        identity = isinstance(module, (nn.Identity, *DROPOUTS)) or _function(node) in _FUNCTIONS
        if identity and (dropouts or not _trains(graph, node, module)):
            node.replace_all_uses_with(node.all_input_nodes[0])
            graph.graph.erase_node(node)


def _trains(graph: Graph, node: fx.Node, module: nn.Module | None) -> bool:
    return isinstance(module, DROPOUTS) and module.p > 0 and not any(_is_folded(graph, user) for user in node.users)


def drop_dropouts(graph: Graph) -> None:
    """Erases, in place, what `drop_identities` has kept."""
    drop_identities(graph)
    graph.delete_all_unused_submodules()
    graph.recompile()


def _function(node: fx.Node) -> str:
    """The name of the function or method that is called; empty for other nodes."""
    if node.op == "call_method":
        return str(node.target)
    return str(getattr(node.target, "__name__", "")) if node.op == "call_function" else ""


def _is_folded(graph: Graph, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(graph.get_submodule(str(node.target)), (*BATCH_NORMS, nn.ReLU, nn.ReLU6))
    return _function(node) in ("relu", "relu_", "relu6")
