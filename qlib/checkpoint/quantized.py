"""Quantized checkpoints: integers, the plan and the model's name; enough to evaluate again without flags.

Law: what is loaded is what was written. A hash of plan and integers stands beside them, and every tensor has the type,
shape and range that the plan gives it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, fx, nn

from qlib.checkpoint.fields import ANY, CLASSES, NAME, TEXT, WEIGHTS, Record, check_fields, shown
from qlib.checkpoint.fingerprint import content_hash
from qlib.checkpoint.fit import is_state, load_state
from qlib.checkpoint.write import write_checkpoint
from qlib.errors import CheckpointError
from qlib.graph import Graph
from qlib.graph.ir import layers
from qlib.graph.weights import give_bias
from qlib.lower import bias_names, lower
from qlib.quant.plan import Plan
from qlib.quant.plan_file import plan_from_text, plan_text
from qlib.tensor_file import flushed

__all__ = [
    "QuantizedHeader",
    "float_weights",
    "is_quantized",
    "quantized_checkpoint",
    "read_header",
    "restore_quantized",
    "save_quantized",
]

_log = logging.getLogger(__name__)

_FORMAT = "qlib_quantized"
_VERSION = 1
_FLOAT_WEIGHTS = "float_state_dict"
_HASH, _THINNING = "hash", "thinning"
_HEADER = {"arch": NAME, "dataset": NAME, "num_classes": CLASSES, "plan": TEXT}
_FIELDS = Record({"version": ANY, **_HEADER, "state_dict": WEIGHTS})
_REMEDY = "write it again with --quantize-eval"


@dataclass(frozen=True)
class QuantizedHeader:
    """What a quantized checkpoint tells before its weights are loaded."""

    arch: str
    dataset: str
    num_classes: int
    plan: Plan
    thinning: Mapping[str, Any] = field(default_factory=dict)
    """What the checkpoint holds of the recipe by which the model was thinned, if it was."""


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
    if original is not None:
        checkpoint[_FLOAT_WEIGHTS] = flushed(_on_cpu(original))
    write_checkpoint(path, checkpoint)


def quantized_checkpoint(
    header: QuantizedHeader, lowered: nn.Module, extras: Mapping[str, float | int | str]
) -> dict[str, Any]:
    """What `save_quantized` writes, for a checkpoint that holds it."""
    content = {
        "arch": header.arch,
        "dataset": header.dataset,
        "num_classes": header.num_classes,
        "plan": plan_text(header.plan),
        "state_dict": _on_cpu(lowered),
        **header.thinning,
    }
    version = {"format": _FORMAT, "version": _VERSION}
    return {**version, **content, _HASH: _content_hash(content), "extras": dict(extras)}


def _content_hash(checkpoint: Mapping[str, Any]) -> str:
    """That of plan, integers and the model's name."""
    thinning = [_THINNING] if _THINNING in checkpoint else []
    return content_hash({key: checkpoint[key] for key in (*_HEADER, "state_dict", *thinning)})


def _on_cpu(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.cpu() for name, value in model.state_dict().items()}


def float_weights(checkpoint: Mapping[str, Any]) -> Mapping[str, Tensor] | None:
    """The weights of the float original that `save_quantized` put beside the integers, if it did."""
    kept = checkpoint.get(_FLOAT_WEIGHTS)
    return kept if is_state(kept) else None


def read_header(checkpoint: Mapping[str, Any], source: str) -> QuantizedHeader:
    """The header of a checkpoint for which `is_quantized` holds.

    Raises CheckpointError where it is damaged, or where plan or integers are not those that were written.
    """
    check_fields(checkpoint, _FIELDS, f"the quantized checkpoint {source}", _REMEDY)
    if checkpoint["version"] != _VERSION:
        version = f"is of version {shown(checkpoint['version'])}, not {_VERSION}"
        raise CheckpointError(f"the quantized checkpoint {source} {version}; {_REMEDY}")
    if _HASH not in checkpoint:  # written before there was one
        _log.warning(
            "Warning: %s has no hash, so that a change of its plan would not be noticed; %s, which adds one",
            source,
            _REMEDY,
        )
    elif checkpoint[_HASH] != _content_hash(checkpoint):
        raise CheckpointError(
            f"the plan or the integers in {source} were changed after it was written; copy it again, or change the plan"
            " in layer_quant_params.yaml and give that with --quantize-eval --qe-config-file"
        )
    plan = plan_from_text(checkpoint["plan"], source)
    thinning = {_THINNING: checkpoint[_THINNING]} if _THINNING in checkpoint else {}
    return QuantizedHeader(checkpoint["arch"], checkpoint["dataset"], checkpoint["num_classes"], plan, thinning)


def restore_quantized(
    checkpoint: Mapping[str, Any], header: QuantizedHeader, graph: Graph, source: str
) -> fx.GraphModule:
    """The integer model of a checkpoint; `graph` is the folded graph of its architecture, with any weights.

    Raises CheckpointError when the checkpoint is not of this architecture, or holds a tensor that its plan rules out.
    """
    for node, module in layers(graph):  # corrections may have given a layer a bias
        if hasattr(module, "bias") and bias_names(node, header.plan) & checkpoint["state_dict"].keys():
            give_bias(module)
    lowered, state = lower(graph, header.plan), checkpoint["state_dict"]
    problem = next(_ruled_out(lowered, state), None)
    if problem is not None:
        raise CheckpointError(f"{source} holds {problem}; it is damaged: {_REMEDY}")
    load_state(lowered, state, source)
    return lowered


def _is_finite(given: Tensor, own: Tensor) -> bool:
    """Whether it holds neither NaN nor, unless the model has them itself, as masks do, infinities."""
    return not bool(given.isnan().any()) and (bool(own.isinf().any()) or not bool(given.isinf().any()))


def _ruled_out(lowered: nn.Module, state: Mapping[str, Tensor]) -> Iterator[str]:
    """What no integer model of this plan has: another type or shape, NaN, a value out of its bounds."""
    for name, own in lowered.state_dict().items():
        given = state.get(name)
        if given is not None and (given.dtype, given.shape) != (own.dtype, own.shape):
            yield f"{name} as {shown(given)}, where the plan gives {shown(own)}"
        elif given is not None and not _is_finite(given, own):
            yield f"NaN or infinity in {name}"
    for prefix, module in lowered.named_modules(remove_duplicate=False):
        for name, (low, high) in getattr(module, "bounds", {}).items():
            given = state.get(f"{prefix}.{name}")
            if given is not None and not bool(((low <= given) & (given <= high)).all()):
                found = f"{given.min().item():g} to {given.max().item():g}"
                yield f"{prefix}.{name} from {found}, which the plan bounds to {low:g} to {high:g}"
