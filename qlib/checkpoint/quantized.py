"""Quantized checkpoints: integers, the plan and the model's name; enough to evaluate again without flags."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, fx, nn

from qlib.checkpoint.fit import is_state, load_state
from qlib.checkpoint.write import write_checkpoint
from qlib.errors import CheckpointError
from qlib.graph import Graph
from qlib.graph.ir import layers
from qlib.graph.weights import give_bias
from qlib.lower import bias_names, lower
from qlib.quant.plan import Plan
from qlib.quant.plan_file import plan_from_text, plan_text

__all__ = [
    "QuantizedHeader",
    "float_weights",
    "is_quantized",
    "quantized_checkpoint",
    "read_header",
    "restore_quantized",
    "save_quantized",
]

_FORMAT = "qlib_quantized"
_VERSION = 1
_FLOAT_WEIGHTS = "float_state_dict"


@dataclass(frozen=True)
class QuantizedHeader:
    """What a quantized checkpoint tells before its weights are loaded."""

    arch: str
    dataset: str
    num_classes: int
    plan: Plan


def is_quantized(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a checkpoint that was read is one of `save_quantized`.

    >>> is_quantized({"state_dict": {}})
    False
    """
    return checkpoint.get("format") == _FORMAT


def save_quantized(
    path: Path,
    header: QuantizedHeader,
    lowered: nn.Module,
    extras: Mapping[str, float | int | str],
    original: nn.Module | None = None,
) -> None:
    """Writes the integer model atomically, beside it the weights of its float `original` where that is given.

    Raises OutputError when the file cannot be written.
    """
    checkpoint = quantized_checkpoint(header, lowered, extras)
    write_checkpoint(path, checkpoint if original is None else {**checkpoint, _FLOAT_WEIGHTS: _on_cpu(original)})


def quantized_checkpoint(
    header: QuantizedHeader, lowered: nn.Module, extras: Mapping[str, float | int | str]
) -> dict[str, Any]:
    """What `save_quantized` writes, for a checkpoint that holds it."""
    return {
        "format": _FORMAT,
        "version": _VERSION,
        "arch": header.arch,
        "dataset": header.dataset,
        "num_classes": header.num_classes,
        "plan": plan_text(header.plan),
        "state_dict": _on_cpu(lowered),
        "extras": dict(extras),
    }


def _on_cpu(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.cpu() for name, value in model.state_dict().items()}


def float_weights(checkpoint: Mapping[str, Any]) -> Mapping[str, Tensor] | None:
    """The weights of the float original that `save_quantized` put beside the integers, if it did."""
    return checkpoint.get(_FLOAT_WEIGHTS)


def read_header(checkpoint: Mapping[str, Any], source: str) -> QuantizedHeader:
    """The header of a checkpoint for which `is_quantized` holds. Raises CheckpointError where it is damaged."""
    wanted = {"version": int, "arch": str, "dataset": str, "num_classes": int, "plan": str}
    wrong = [key for key, kind in wanted.items() if not isinstance(checkpoint.get(key), kind)]
    wrong += [] if is_state(checkpoint.get("state_dict")) else ["state_dict"]
    if checkpoint.get("version") != _VERSION or wrong:
        what = f"lacks {', '.join(wrong)}" if wrong else f"is of version {checkpoint.get('version')}, not {_VERSION}"
        raise CheckpointError(f"the quantized checkpoint {source} {what}; write it again with --quantize-eval")
    return QuantizedHeader(
        checkpoint["arch"],
        checkpoint["dataset"],
        checkpoint["num_classes"],
        plan_from_text(checkpoint["plan"], source),
    )


def restore_quantized(
    checkpoint: Mapping[str, Any], header: QuantizedHeader, graph: Graph, source: str
) -> fx.GraphModule:
    """The integer model of a checkpoint; `graph` is the folded graph of its architecture, with any weights.

    Raises CheckpointError when the checkpoint is not of this architecture.
    """
    for node, module in layers(graph):  # corrections may have given a layer a bias
        if hasattr(module, "bias") and bias_names(node, header.plan) & checkpoint["state_dict"].keys():
            give_bias(module)
    lowered = lower(graph, header.plan)
    load_state(lowered, checkpoint["state_dict"], source)
    return lowered
