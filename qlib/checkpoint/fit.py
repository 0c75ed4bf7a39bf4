"""The weights in a checkpoint, and the model that they are loaded into."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn

from qlib.config.layers.aliases import in_own_names
from qlib.errors import CheckpointError

__all__ = ["in_model_names", "is_state", "load_state", "model_state", "own_name", "remedy_for"]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_COUNTER = "num_batches_tracked"


def model_state(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of the model in a checkpoint, by the model's own names: without the `module.` of DataParallel.

    Raises:
        CheckpointError: the checkpoint has no weights.

    >>> import torch
    >>> model_state({"state_dict": {"module.fc.bias": torch.zeros(1)}, "epoch": 3})["fc.bias"]
    tensor([0.])
    """
    state = checkpoint.get("state_dict", checkpoint.get("model"))
    if not is_state(state) or not state:
        keys = ", ".join(key for key in checkpoint if isinstance(key, str)) or "nothing"
        raise CheckpointError(f"the checkpoint has no weights under 'state_dict', only {keys}; save model.state_dict()")
    # The layers' versions, by which a model recognizes what an older one of its kind saved.
    versions = getattr(state, "_metadata", None)
    plain: OrderedDict[str, Tensor] = OrderedDict((own_name(name), value) for name, value in state.items())
    if versions is not None:
        cast(Any, plain)._metadata = {
            own_name(f"{name}.").rstrip("."): value
            for name, value in versions.items()
            if isinstance(name, str) and isinstance(value, dict) and isinstance(value.get("version"), int)
        }
    return plain


def is_state(value: object) -> TypeGuard[dict[str, Tensor]]:
    """Whether a value in a checkpoint is weights by name."""
    return isinstance(value, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())


def own_name(name: str) -> str:
    """A parameter's name without `module.`, also behind `features.` (the only part of an alexnet that is parallel)."""
    return re.sub(r"^(features\.)?module\.", r"\1", name)


_REMEDY = "give the -a that it was made with, and data with as many classes"

_CHANGED = {
    "quantizer_metadata": "it was quantized by Distiller, whose quantized models are not read: give the checkpoint in"
    " float that it was made from",
}
"""What a checkpoint of Distiller's holds whose weights are not those of the model -> why, and what to do."""


def remedy_for(checkpoint: Mapping[str, Any], remedy: str = _REMEDY) -> str:
    """What to do about a checkpoint that does not fit its model: `remedy`, unless it tells itself why.

    >>> remedy_for({"state_dict": {}, "quantizer_metadata": {}}, "give another")
    'give another'
    """
    return next((why for key, why in _CHANGED.items() if checkpoint.get(key)), remedy)


def load_state(
    model: nn.Module,
    state: Mapping[str, Tensor],
    source: str,
    remedy: str = _REMEDY,
) -> None:
    """Loads `state` into `model`: names, shapes and types must agree. The sentence goes from `source` to `remedy`.

    Law: loading changes no value but by rounding: floats may be of another width, and nothing else is cast. What only
    training needs may differ: auxiliary heads, and the counter that batch-norm has had since torch 0.4.1.

    Raises:
        CheckpointError: parameters are missing, too many, or of other shapes or types.
    """
    wanted = model.state_dict()
    given = _without_auxiliary_heads(in_model_names(state, wanted), wanted)
    misfits = [
        f"{name} is {_shape(value)} in it and {_shape(wanted[name])} in the model"
        for name, value in given.items()
        if name in wanted and value.shape != wanted[name].shape
    ]
    if misfits:
        raise _unfit(source, [_some("of another shape", misfits)], remedy)
    _check_types(given, wanted, source)
    versions = getattr(state, "_metadata", None) or {"": {"version": getattr(model, "_version", None)}}
    cast(Any, given)._metadata = versions
    result = model.load_state_dict(given, strict=False)
    missing = [name for name in result.missing_keys if not name.endswith(_COUNTER)]
    problems = [("missing", missing), ("unexpected", result.unexpected_keys)]
    if any(names for _, names in problems):
        raise _unfit(source, [_some(what, names) for what, names in problems if names], remedy)


def _check_types(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], source: str) -> None:
    """Raises CheckpointError for tensors whose type is not the model's; a model's floats may come in any width."""
    wrong = [name for name in given if name in wanted and given[name].dtype not in _allowed(name, wanted[name].dtype)]
    if wrong:
        name, more = wrong[0], f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        allowed = ", ".join(map(_type, _allowed(name, wanted[name].dtype)))
        raise CheckpointError(
            f"{source} holds {name}{more} as {_type(given[name].dtype)}; allowed: {allowed}; save model.state_dict()"
            " with the types of the model"
        )


def _allowed(name: str, dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """The types that may stand for a model's own; the counter was cast with the rest by those who cast everything."""
    if dtype.is_floating_point:
        return _FLOATS if dtype in _FLOATS else (dtype, *_FLOATS)
    return (dtype, *_FLOATS) if name.endswith(_COUNTER) else (dtype,)


def _type(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _unfit(source: str, problems: list[str], remedy: str) -> CheckpointError:
    return CheckpointError(f"{source} does not fit the model: {', '.join(problems)}; {remedy}")


def _some(what: str, names: list[str]) -> str:
    return f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a scalar"


def in_model_names(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of parameters with the model's own names of its layers, which may be called otherwise elsewhere."""
    layers = {name.rpartition(".")[0]: name.rpartition(".")[0] for name in state}
    own = {old: new for new, old in in_own_names(layers, {name.rpartition(".")[0] for name in wanted}).items()}
    split = ((name.rpartition("."), value) for name, value in state.items())
    return OrderedDict((own[layer] + dot + parameter, value) for (layer, dot, parameter), value in split)


def _without_auxiliary_heads(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state without the auxiliary heads of googlenet and inception_v3, if the model has none."""
    heads = ("aux1.", "aux2.", "AuxLogits.")
    absent = tuple(head for head in heads if not any(name.startswith(head) for name in wanted))
    return OrderedDict((name, value) for name, value in state.items() if not name.startswith(absent))
