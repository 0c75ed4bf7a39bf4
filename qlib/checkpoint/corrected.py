"""The float weights that corrections have changed, in a file beside the plan."""

from __future__ import annotations

from pathlib import Path

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
    state = {
        f"{name_of(node)}.{key}": value.clone()
        for node, module in layers(graph)
        for key, value in module.named_parameters()
    }
    write_tensors(path, state, "weights", {"qlib": fingerprint})


def load_weights(path: Path, graph: Graph, fingerprint: str) -> None:
    """Puts the parameters of such a file into the folded graph of the same model.

    Raises ConfigError where the file cannot be read, or is of another model.
    """
    try:
        state, texts = read_tensors(path)
    except OSError as error:
        raise ConfigError(f"the plan needs {path}, which cannot be read: {error}; keep it beside the plan") from error
    if texts.get("qlib") != fingerprint:
        raise ConfigError(f"the weights in {path} are of another model; quantize this one again with --quantize-eval")
    for node, module in layers(graph):
        if f"{name_of(node)}.bias" in state:
            give_bias(module)
        for key, value in module.named_parameters():
            value.data.copy_(state[f"{name_of(node)}.{key}"])
