"""What a training checkpoint may hold: its fields, and an optimizer's state, checked before anything is taken over."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from qlib.checkpoint.fields import ANY, CLASSES, NAME, NUMBER, WEIGHTS, Each, Named, Record, Schema, check_fields, shown
from qlib.errors import CheckpointError
from qlib.train.best import EpochScore
from qlib.values import Interval, real, whole

__all__ = ["MAX_EPOCHS", "REMEDY", "check_optimizer", "check_training"]

MAX_EPOCHS, _MAX_IMAGES, _MAX_STEPS = 10**6, 10**12, 10**12
REMEDY = "give another one, or --reset-optimizer to begin a new run with its weights"

_PERCENT, _NOT_NEGATIVE = real(Interval(0, 100.0001)), real(Interval(0, 3.4e38))
_SCORE = {"epoch": whole(0, MAX_EPOCHS), "top1": _PERCENT, "top5": _PERCENT, "loss": NUMBER, "sparsity": _PERCENT}
_BEST = Record({**_SCORE, "nonzero": whole(0, _MAX_IMAGES)}, closed=True)
assert {field.name for field in dataclasses.fields(EpochScore)} == set(_BEST.fields)

_RATE, _SHARE = real(Interval(0, 1e6)), real(Interval(0, 1))
_GROUP: Mapping[str, Schema] = {
    **dict.fromkeys(("lr", "initial_lr", "weight_decay", "eps"), _RATE),
    **dict.fromkeys(("momentum", "dampening"), _SHARE),
    "betas": Each(_SHARE),
    "params": Each(whole(0, _MAX_STEPS)),
}
"""What the settings of a group of parameters may be; those that are not here never change in a run."""

_OF_ADAM = frozenset({"step", "exp_avg", "exp_avg_sq"})
_STATE = {"SGD": frozenset({"momentum_buffer"}), "Adam": _OF_ADAM, "AdamW": _OF_ADAM}
"""Optimizer -> what it keeps of each parameter."""


def check_training(checkpoint: Mapping[str, Any], steps_per_epoch: int, source: str) -> None:
    """Checks all fields that do not depend on optimizer and schedule. Raises CheckpointError."""
    fields = Record(
        {
            "arch": NAME,
            "dataset": NAME,
            "num_classes": CLASSES,
            "epoch": whole(-1, MAX_EPOCHS),
            "steps": whole(0, steps_per_epoch),
            "running": Record({"sums": Named(NUMBER), "images": whole(0, _MAX_IMAGES)}),
            "state_dict": WEIGHTS,
            "optimizer_type": NAME,
            "optimizer_state_dict": Record({"state": ANY, "param_groups": Each(Record({"params": Each(whole(0))}))}),
            "policies": Each(Record({})),
            "best": Each(_BEST),
        }
    )
    check_fields(checkpoint, fields, source, REMEDY)


def check_optimizer(saved: Mapping[str, Any], optimizer: Optimizer, source: str) -> None:
    """Checks the state of an optimizer of the same type, whose groups have their parameters already.

    Raises CheckpointError for settings out of their range and for state that is not that of the parameters.
    """
    own = optimizer.state_dict()["param_groups"]
    sizes = [len(group["params"]) for group in saved["param_groups"]]
    if sizes != [len(group["params"]) for group in own]:
        raise ValueError(f"it has groups of {sizes} parameters")
    for index, (group, mine) in enumerate(zip(saved["param_groups"], own, strict=True)):
        place = f"{source}, group {index} of its optimizer,"
        check_fields(group, Record({key: _GROUP.get(key, ANY) for key in mine}), place, REMEDY)
        changed = [key for key in mine if key not in _GROUP and group[key] != mine[key]]
        if changed or group["params"] != mine["params"]:
            key = (changed or ["params"])[0]
            what = f"has the {key} {shown(group[key])}; allowed: {shown(mine[key])}"
            raise CheckpointError(f"{place} {what}; {REMEDY}")
    problem = next(_state_problems(saved["state"], optimizer), None)
    if problem is not None:
        raise CheckpointError(f"{source} has an optimizer with {problem}; {REMEDY}")


def _state_problems(state: object, optimizer: Optimizer) -> Iterator[str]:
    """What is wrong with what an optimizer keeps of its parameters."""
    parameters = dict(enumerate(each for group in optimizer.param_groups for each in group["params"]))
    names = _STATE[type(optimizer).__name__]
    if not isinstance(state, dict):
        yield f"the state {shown(state)}"
        return
    for index, kept in state.items():
        if type(index) is not int or index not in parameters:
            yield f"a state of parameter {shown(index)}, which it does not have"
        elif not isinstance(kept, dict) or set(kept) != names:
            keys = ", ".join(map(str, kept)) if isinstance(kept, dict) else shown(kept)
            yield f"{keys or 'nothing'} for parameter {index}; allowed: {', '.join(sorted(names))}"
        else:
            fits = (name for name, value in kept.items() if not _fits(name, value, parameters[index]))
            yield from (f"{name} of parameter {index} as {shown(kept[name])} that does not fit it" for name in fits)


def _fits(name: str, value: object, parameter: nn.Parameter) -> bool:
    """Whether a value is what an optimizer may keep of a parameter under this name."""
    if value is None:
        return name == "momentum_buffer"
    if not isinstance(value, Tensor) or not value.is_floating_point() or not bool(torch.isfinite(value).all()):
        return False
    if name == "step":
        return value.shape == () and bool(0 <= value <= _MAX_STEPS)
    lowest = 0.0 if name == "exp_avg_sq" else -torch.inf
    return value.shape == parameter.shape and bool((value >= lowest).all())
