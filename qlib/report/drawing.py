"""``--summary png``: the captured graph, drawn by Graphviz; where that is not installed, the text that it draws."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor, fx, nn

from qlib.files import write_text, write_whole
from qlib.graph import Graph, capture
from qlib.graph.ir import is_layer, layer_inputs, name_of
from qlib.report.summary import SUMMARIES

__all__ = ["dot_text"]

_FONT = '  node [shape=box, fontname="Helvetica", fontsize=10];\n  edge [fontname="Helvetica", fontsize=9];\n'


@SUMMARIES.register("png", order=5)
def _png(model: nn.Module, example: Tensor, folder: Path) -> str:
    return _draw(model, example, folder, "png", parameters=False)


@SUMMARIES.register("png_w_params", order=6)
def _png_with_parameters(model: nn.Module, example: Tensor, folder: Path) -> str:
    return _draw(model, example, folder, "png", parameters=True)


@SUMMARIES.register("svg", order=7)
def _svg(model: nn.Module, example: Tensor, folder: Path) -> str:
    return _draw(model, example, folder, "svg", parameters=False)


def _draw(model: nn.Module, example: Tensor, folder: Path, kind: str, *, parameters: bool) -> str:
    """Writes ``model.dot``, and the picture of it where the program `dot` is installed."""
    text, picture = folder / "model.dot", folder / f"model.{kind}"
    write_text(text, dot_text(capture(model, example[:1]), parameters=parameters), "graph")
    dot = shutil.which("dot")
    if dot is None:
        return (
            f"Graph of the model saved to {text}; Graphviz, which draws it, is not installed: apt install graphviz, or"
            f" open the file in a viewer of DOT files"
        )
    drawn = subprocess.run([dot, f"-T{kind}", str(text)], capture_output=True, check=False)
    if drawn.returncode:
        reason = " ".join(drawn.stderr.decode(errors="replace").split())[:200]
        return f"Graph of the model saved to {text}; Graphviz could not draw it ({reason})"
    write_whole(picture, lambda file: file.write_bytes(drawn.stdout), "drawing")
    return f"Drawing of the model saved to {picture}"


def dot_text(graph: Graph, *, parameters: bool = False) -> str:
    """The layers of a captured graph in Graphviz's language, with the shape of what flows along each edge.

    >>> import torch
    >>> print(dot_text(capture(nn.Sequential(nn.Linear(4, 2), nn.ReLU()), torch.zeros(1, 4)), parameters=True))
    digraph model {
      node [shape=box, fontname="Helvetica", fontsize=10];
      edge [fontname="Helvetica", fontsize=9];
      "input" [label="input"];
      "0" [label="0\\nLinear\\nweight 2x4\\nbias 2"];
      "input" -> "0" [label="4"];
      "1" [label="1\\nReLU"];
      "0" -> "1" [label="2"];
    }
    <BLANKLINE>
    """
    return "digraph model {\n" + _FONT + "".join(f"  {line};\n" for line in _statements(graph, parameters)) + "}\n"


def _statements(graph: Graph, parameters: bool) -> Iterator[str]:
    for node in graph.graph.nodes:
        if node.op == "placeholder" and node.meta["tensor"]:
            yield f'{_text(_name(node))} [label="input"]'
        elif node.op != "output" and node.meta["tensor"]:
            yield f"{_text(_name(node))} [label={_text(_label(graph, node, parameters))}]"
            for source in layer_inputs(node):
                shape = "x".join(map(str, source.meta.get("shape", ())[1:]))
                yield f"{_text(_name(source))} -> {_text(_name(node))} [label={_text(shape)}]"


def _name(node: fx.Node) -> str:
    return "input" if node.op == "placeholder" else name_of(node)


def _label(graph: Graph, node: fx.Node, parameters: bool) -> str:
    if not is_layer(graph, node):
        return name_of(node)
    module = graph.get_submodule(str(node.target))
    lines = [name_of(node), type(module).__name__]
    if parameters:
        lines += [f"{name} {'x'.join(map(str, each.shape))}" for name, each in module.named_parameters()]
    return "\n".join(lines)


def _text(text: str) -> str:
    """In quotes, as Graphviz and JSON agree for what names are made of."""
    return json.dumps(text, ensure_ascii=False)
