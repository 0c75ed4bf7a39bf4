"""Model -> the ATen ops that it runs in evaluation, by torch.export, with the paths of its modules and tensors."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram, export

from qlib.errors import ModelError

__all__ = ["Trace", "trace"]

_DROP_PATHS = frozenset({"DropPath", "StochasticDepth"})


@dataclass(frozen=True, eq=False)
class Trace:
    """An exported program: `graph` of ATen ops whose placeholders are the model's tensors and one batch of images.

    `tensors`: placeholder -> the model's own tensor, `paths`: placeholder -> its path in the model, "" for a tensor that
    is no parameter or buffer. `images` is the placeholder of the batch.
    """

    graph: fx.GraphModule
    images: fx.Node
    tensors: dict[fx.Node, Tensor]
    paths: dict[fx.Node, str]


def trace(model: nn.Module, example: Tensor) -> Trace:
    """Exports the model in evaluation mode, with any number of images in a batch; the model itself stays as it is.

    Stochastic depth, which does nothing in evaluation, is there as a dropout of its probability.

    Raises:
        ModelError: the model cannot be exported, with the reason and the line of its source.
    """
    images = example[:1].expand(2, *example.shape[1:])  # a batch of one would be taken for a constant
    with _evaluating(model), _quiet():
        program = _exported(model, images)
    return _read(model, program)


def _exported(model: nn.Module, images: Tensor) -> ExportedProgram:
    first: Exception | None = None
    for size in (Dim("batch"), Dim.AUTO):
        try:
            return export(model, (images,), strict=False, dynamic_shapes=({0: size},))
        except Exception as error:  # the model's own code may raise anything
            first = first or error
    assert first is not None
    raise ModelError(
        f"the model cannot be captured: {_one_line(first)}; rewrite the forward method without control flow on tensor"
        " values, or put that part into a module of torch.nn"
    ) from first


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, its stochastic depth as dropout."""
    modes = {module: module.training for module in model.modules()}
    drops = [module for module in modes if type(module).__name__ in _DROP_PATHS]
    model.eval()
    try:
        for module in drops:
            module.__dict__["forward"] = _dropout_of(module)
        yield
    finally:
        for module in drops:
            del module.__dict__["forward"]
        for module, training in modes.items():
            module.training = training


def _dropout_of(module: nn.Module) -> Any:
    p = float(getattr(module, "p", None) or getattr(module, "drop_prob", None) or 0.0)
    return lambda x: torch.dropout(x, p, False)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch.export says on stderr about a model that it refuses."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _read(model: nn.Module, program: ExportedProgram) -> Trace:
    graph, signature = program.graph_module, program.graph_signature
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    first_path = {id(value): path for path, value in reversed(own.items())}
    path_of = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    constants = signature.inputs_to_lifted_tensor_constants
    tensors: dict[fx.Node, Tensor] = {}
    paths: dict[fx.Node, str] = {}
    images: list[fx.Node] = []
    for node in graph.graph.find_nodes(op="placeholder"):
        path = path_of.get(node.name)
        if path is not None:
            tensors[node] = own[path]
            paths[node] = first_path[id(own[path])]
        elif node.name in constants:
            value = program.constants[constants[node.name]]
            assert isinstance(value, Tensor)
            tensors[node], paths[node] = value, ""
        else:
            images.append(node)
    assert len(images) == 1
    return Trace(graph, images[0], tensors, paths)
