"""The float weights that corrections have changed, in a file beside the plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from qlib.errors import ConfigError
from qlib.graph import Graph
from qlib.graph.ir import layers, name_of
from qlib.graph.weights import give_bias
from qlib.tensor_file import read_tensors, write_tensors

__all__ = ["load_weights", "save_weights"]


def save_weights(path: Path, graph: Graph, fingerprint: str) -> None:
    """Writes the parameters of all layers of a folded graph, whole or not at all.

    `fingerprint` is that of the model before any correction. Raises OutputError when the file cannot be written.
    """
    state = {name: value.clone() for name, value in _parameters(graph)}
    write_tensors(path, state, "weights", {"qlib": fingerprint})


def load_weights(path: Path, graph: Graph, fingerprint: str) -> None:
    """Puts the parameters of such a file into the folded graph of the same model.

    Raises ConfigError where the file cannot be read, is of another model, or lacks weights.
    """
    try:
        state, texts = read_tensors(path)
    except OSError as error:
        raise ConfigError(f"the plan needs {path}, which cannot be read: {error}; keep it beside the plan") from error
    if texts.get("qlib") != fingerprint:
        raise ConfigError(f"the weights in {path} are of another model; quantize this one again with --quantize-eval")
    for node, module in layers(graph):
        if f"{name_of(node)}.bias" in state and hasattr(module, "bias"):
            give_bias(module)
    wanted = dict(_parameters(graph))
    if _kinds(wanted) != _kinds(state) or not all(bool(value.isfinite().all()) for value in state.values()):
        raise ConfigError(f"the weights in {path} do not fit the model; quantize it again with --quantize-eval")
    for name, value in wanted.items():
        value.data.copy_(state[name])


def _kinds(state: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (value.shape, value.dtype) for name, value in state.items()}


def _parameters(graph: Graph) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of each layer under its own name, also where layers share a module."""
    for node, module in layers(graph):
        yield from ((f"{name_of(node)}.{key}", value) for key, value in module.named_parameters())
