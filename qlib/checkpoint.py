"""Quantized checkpoints: integers, the plan and the model's name; enough to evaluate again without flags."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, fx, nn

from qlib.checkpoint_file import load_state, write_checkpoint
from qlib.errors import CheckpointError
from qlib.graph import Graph
from qlib.lower import lower
from qlib.quant.plan import Plan
from qlib.quant.plan_file import plan_from_text, plan_text

__all__ = ["QuantizedHeader", "is_quantized", "read_header", "restore_quantized", "save_quantized", "weights_hash"]

_FORMAT = "qlib_quantized"
_VERSION = 1


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
    path: Path, header: QuantizedHeader, lowered: nn.Module, extras: Mapping[str, float | int | str]
) -> None:
    """Writes the integer model atomically. Raises OutputError when the file cannot be written."""
    write_checkpoint(
        path,
        {
            "format": _FORMAT,
            "version": _VERSION,
            "arch": header.arch,
            "dataset": header.dataset,
            "num_classes": header.num_classes,
            "plan": plan_text(header.plan),
            "state_dict": {name: value.cpu() for name, value in lowered.state_dict().items()},
            "extras": dict(extras),
        },
    )


def read_header(checkpoint: Mapping[str, Any], source: str) -> QuantizedHeader:
    """The header of a checkpoint for which `is_quantized` holds. Raises CheckpointError where it is damaged."""
    wanted = {"arch": str, "dataset": str, "num_classes": int, "plan": str, "state_dict": dict}
    wrong = [key for key, kind in wanted.items() if not isinstance(checkpoint.get(key), kind)]
    if checkpoint.get("version") != _VERSION or wrong:
        what = f"lacks {', '.join(wrong)}" if wrong else f"is of version {checkpoint.get('version')}, not {_VERSION}"
        raise CheckpointError(f"the quantized checkpoint {source} {what}; write it again with --quantize-eval")
    return QuantizedHeader(
        checkpoint["arch"],
        checkpoint["dataset"],
        checkpoint["num_classes"],
        plan_from_text(checkpoint["plan"], source),
    )


def restore_quantized(checkpoint: Mapping[str, Any], header: QuantizedHeader, graph: Graph, source: str) -> fx.GraphModule:
    """The integer model of a checkpoint; `graph` is the folded graph of its architecture, with any weights.

    Raises CheckpointError when the checkpoint is not of this architecture.
    """
    lowered = lower(graph, header.plan)
    load_state(lowered, checkpoint["state_dict"], source)
    return lowered


def weights_hash(state: Mapping[str, Tensor]) -> str:
    """A short hash of names, shapes and values of all weights."""
    digest = hashlib.sha256()
    for name, value in state.items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(dtype=_bytes_of(value)).numpy().tobytes())
    return digest.hexdigest()[:16]


def _bytes_of(value: Tensor) -> Any:
    import torch

    return torch.uint8 if value.numel() else value.dtype
