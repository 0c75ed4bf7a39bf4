"""Logits out of what a model answers: a tensor, a tuple, a dictionary or an object with `logits`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from qlib.errors import ModelError

__all__ = ["find_logits", "with_logits"]


def find_logits(output: Any) -> Tensor:
    """The logits in a model's output: the output itself, what it calls `logits`, or its only tensor of two axes.

    Raises:
        ModelError: there is no such tensor, or more than one; it names them.

    >>> import torch
    >>> find_logits({"features": torch.zeros(2, 8, 4, 4), "scores": torch.zeros(2, 10)}).shape
    torch.Size([2, 10])
    """
    if isinstance(output, Tensor):
        return output
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(named, Tensor):
        return named
    parts = _parts(output)
    found = {name: part for name, part in parts.items() if isinstance(part, Tensor) and part.ndim == 2}
    if len(found) == 1:
        return next(iter(found.values()))
    what = f"more than one tensor that could be its logits ({', '.join(found)})" if found else "no tensor of logits"
    raise ModelError(
        f"the model returns {type(output).__name__!r} with {what}; make it return its logits alone, or call them"
        " 'logits'"
    )


def _parts(output: Any) -> dict[str, Any]:
    if isinstance(output, Mapping):
        return {repr(key): value for key, value in output.items()}
    if isinstance(output, (tuple, list)):
        return {f"number {index}": value for index, value in enumerate(output)}
    return dict(vars(output)) if hasattr(output, "__dict__") else {}


def with_logits(model: nn.Module) -> nn.Module:
    """The model, which from now on returns its logits alone."""
    model.register_forward_hook(_only_logits)
    return model


def _only_logits(_: nn.Module, __: Any, output: Any) -> Tensor:
    return find_logits(output)
