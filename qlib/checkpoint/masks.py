"""Masks in a checkpoint: which weights are pruned. Ours stand under `masks`, as uint8; Distiller's are read too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qlib.checkpoint.fit import in_model_names, own_name
from qlib.errors import CheckpointError
from qlib.prune.masks import Masks, check_masks, masked_count, parameters_by_name

__all__ = ["masked_text", "masks_for", "masks_of", "saved_masks", "unmasked_text"]


_WHOLE = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def masks_of(checkpoint: Mapping[str, Any], source: str) -> Masks:
    """The masks in a checkpoint, of Distiller's those that zero anything, by the model's own names of parameters.

    >>> import torch
    >>> masks = {"module.fc.weight": torch.tensor([0.0, 1.0]), "fc.bias": None, "conv.weight": torch.ones(2)}
    >>> masks_of({"compression_sched": {"masks_dict": masks}}, "it")
    {'fc.weight': tensor([False,  True])}

    Raises:
        CheckpointError: what stands in place of a mask is none.
    """
    schedule = checkpoint.get("compression_sched")
    distillers = schedule.get("masks_dict") if isinstance(schedule, dict) else None
    found = checkpoint.get("masks", distillers)
    masks = {} if found is None else found
    if not isinstance(masks, dict) or not all(isinstance(name, str) and _is_mask(m) for name, m in masks.items()):
        raise CheckpointError(f"{source} holds masks that are no tensors by name; save the state_dict of its model")
    kept = {own_name(name): mask != 0 for name, mask in masks.items() if mask is not None}
    ours = found is not distillers  # a run of ours goes on with what it had
    return {name: mask for name, mask in kept.items() if ours or not bool(mask.all())}


def masks_for(model: nn.Module, checkpoint: Mapping[str, Any], source: str) -> Masks:
    """The masks in a checkpoint, whose names and shapes are held to the model.

    Raises:
        CheckpointError: a mask is none, or of no parameter of the model, or not of its shape.
    """
    masks = in_model_names(masks_of(checkpoint, source), parameters_by_name(model))
    check_masks(model, masks, source)
    return masks


def saved_masks(masks: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """What a checkpoint holds for masks: nothing where there are none.

    >>> import torch
    >>> saved_masks({"fc.weight": torch.tensor([True, False])}), saved_masks({})
    ({'masks': {'fc.weight': tensor([1, 0], dtype=torch.uint8)}}, {})
    """
    return {"masks": {name: mask.to(torch.uint8) for name, mask in masks.items()}} if masks else {}


def _is_mask(value: object) -> bool:
    return value is None or (isinstance(value, Tensor) and (value.is_floating_point() or value.dtype in _WHOLE))


def masked_text(masks: Mapping[str, Tensor]) -> str:
    """How many weights masks zero.

    >>> import torch
    >>> masked_text({"fc.weight": torch.tensor([False, True, False])})
    '2 weights in 1 parameter'
    """
    return f"{masked_count(masks):,} weights in {len(masks)} parameter{'s' * (len(masks) > 1)}"


def unmasked_text(masks: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """Whether the weights under masks are zero.

    >>> import torch
    >>> unmasked_text({"fc.weight": torch.tensor([False, True, False])}, {"fc.weight": torch.tensor([0.0, 3.0, -1.0])})
    '1 of these weights is not zero (fc.weight 1)'
    """
    for name, mask in masks.items():
        if name not in state or state[name].shape != mask.shape:
            return f"that of {name!r} does not fit its weights"
    left = {name: int((~mask & (state[name] != 0)).sum()) for name, mask in masks.items()}
    total, found = sum(left.values()), [f"{name} {count:,}" for name, count in left.items() if count]
    if not found:
        return "all of these weights are zero in the file"
    more = ", ..." * (len(found) > 3)
    return f"{total:,} of these weights {'is' if total == 1 else 'are'} not zero ({', '.join(found[:3])}{more})"
