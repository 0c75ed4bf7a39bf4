"""Which of a model's parameters the names in a schedule mean."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from qlib.config.layers.aliases import in_own_names
from qlib.config.schedule.pruning_keys import NAMING
from qlib.errors import did_you_mean

__all__ = ["in_own_names_of", "unknown_names"]

_EVERY = "*"


def in_own_names_of(settings: Mapping[str, object], parameters: Mapping[str, Tensor]) -> dict[str, Any]:
    """The settings of a component with the model's own names of parameters; names that mean nothing are left out.

    `module.`, which a parallel model has at the front of its names or inside of them, does not count. The name `*`
    means each weight of 2 or more axes that has no entry of its own.

    >>> import torch
    >>> weights = {"conv.weight": torch.ones(1, 1, 1, 1), "fc.weight": torch.ones(1, 1), "fc.bias": torch.ones(1)}
    >>> in_own_names_of({"levels": {"*": 0.5, "module.fc.weight": 0.25, "f.weight": 0.9}}, weights)
    {'levels': {'fc.weight': 0.25, 'conv.weight': 0.5}}
    """
    own = {key: _own(value, parameters) for key, value in settings.items() if key in NAMING}
    return {**settings, **own}


def _own(named: object, parameters: Mapping[str, Tensor]) -> object:
    if isinstance(named, Mapping):
        found = {_own_name(name, parameters): value for name, value in named.items() if name != _EVERY}
        found = {name: value for name, value in found.items() if name in parameters}
        every = {name: named[_EVERY] for name in (_weights(parameters) if _EVERY in named else ()) if name not in found}
        return {**found, **every}
    assert isinstance(named, tuple)
    names = [_own_name(name, parameters) for name in named]
    return tuple(dict.fromkeys(each for each in names if each in parameters)) or (
        tuple(_weights(parameters)) if _EVERY in named else ()
    )


def _weights(parameters: Mapping[str, Tensor]) -> list[str]:
    return [name for name, value in parameters.items() if value.ndim > 1]


def _own_name(name: str, parameters: Mapping[str, Tensor]) -> str:
    """A parameter's own name, where it has one.

    >>> import torch
    >>> _own_name("features.module.0.weight", {"features.0.weight": torch.ones(1)})
    'features.0.weight'
    """
    if name in parameters:
        return name
    bare = re.sub(r"(^|\.)module\.", r"\1", name)
    layer, dot, last = bare.rpartition(".")
    (own,) = in_own_names({layer: None}, {each.rpartition(".")[0] for each in parameters})
    return own + dot + last


def unknown_names(settings: Mapping[str, object], parameters: Mapping[str, Tensor]) -> list[str]:
    """A sentence for each name that means no parameter of the model.

    >>> import torch
    >>> unknown_names({"weights": ("fc.wait",)}, {"fc.weight": torch.ones(1, 1)})
    ["weights names 'fc.wait', which no parameter of the model is called; did you mean fc.weight?"]
    """
    named = [(key, name) for key in NAMING if key in settings for name in _names(settings[key])]
    bare = [(key, name, _own_name(name, parameters)) for key, name in named if name != _EVERY]
    return [
        f"{key} names {name!r}, which no parameter of the model is called{did_you_mean(own, parameters)}"
        for key, name, own in bare
        if own not in parameters
    ]


def _names(named: object) -> Iterable[str]:
    assert isinstance(named, (Mapping, tuple))
    return named
