"""The float weights that corrections have changed, in a file beside the plan."""

from __future__ import annotations

from pathlib import Path

import safetensors
from safetensors.torch import load_file, save_file

from qlib.correct._bias import give_bias
from qlib.errors import ConfigError, OutputError
from qlib.graph import Graph
from qlib.graph.ir import layers, name_of

__all__ = ["load_weights", "save_weights"]


def save_weights(path: Path, graph: Graph, fingerprint: str) -> None:
    """Writes the parameters of all layers of a folded graph, whole or not at all.

    `fingerprint` is that of the model before any correction. Raises OutputError when the file cannot be written.
    """
    state = {
        f"{name_of(node)}.{key}": value.detach().cpu().clone().contiguous()
        for node, module in layers(graph)
        for key, value in module.named_parameters()
    }
    temporary = path.with_name(path.name + ".tmp")
    try:
        save_file(state, temporary, {"qlib": fingerprint})
        temporary.replace(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise OutputError(f"cannot write {path}: {error}; choose a folder that can be written") from error


def load_weights(path: Path, graph: Graph, fingerprint: str) -> None:
    """Puts the parameters of such a file into the folded graph of the same model.

    Raises ConfigError where the file cannot be read, or is of another model.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            found = (file.metadata() or {}).get("qlib")
        state = load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise ConfigError(f"the plan needs {path}, which cannot be read: {error}; keep it beside the plan") from error
    if found != fingerprint:
        raise ConfigError(f"the weights in {path} are of another model; quantize this one again with --quantize-eval")
    for node, module in layers(graph):
        if f"{name_of(node)}.bias" in state:
            give_bias(module)
        for key, value in module.named_parameters():
            value.data.copy_(state[f"{name_of(node)}.{key}"])
