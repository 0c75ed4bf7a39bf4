"""Optimizers by name, with one group of parameters for the weights and others for what policies learn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from qlib.config.flags.groups import TrainArgs

__all__ = ["ParameterGroup", "make_optimizer"]


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters besides the weights: their learning rate relative to that of the weights, and their weight decay."""

    lr_factor: float = 1.0
    weight_decay: float = 0.0


def make_optimizer(
    args: TrainArgs, weights: Sequence[nn.Parameter], groups: Sequence[ParameterGroup] = ()
) -> Optimizer:
    """The optimizer of the flags. Group 0 holds the `weights`; the others begin empty.

    >>> optimizer = make_optimizer(TrainArgs(lr=0.5), [nn.Parameter(torch.zeros(2))], [ParameterGroup(lr_factor=0.1)])
    >>> [(len(group["params"]), group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    [(1, 0.5, 0.0001), (0, 0.05, 0.0)]
    """
    first: dict[str, Any] = {"params": list(weights), "weight_decay": args.weight_decay}
    others = ({"params": [], "lr": args.lr * each.lr_factor, "weight_decay": each.weight_decay} for each in groups)
    parameters: list[dict[str, Any]] = [first, *others]
    if args.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=args.lr, momentum=args.momentum)
    kinds: Mapping[str, type[torch.optim.Adam]] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    return kinds[args.optimizer](parameters, lr=args.lr)
