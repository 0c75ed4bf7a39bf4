"""The keys that the components of a training schedule may have: what each class allows, and what it cannot do without.

A class that is not here is an error. Settings are named as the keys, except that `mode` gives `mode_activations` and
`mode_weights`, `acts`, `wts` and `bias` give `bits_*`, and `total_iters` of PolynomialLR gives `T_max`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from qlib.config.layers.keys import Field, NotAllowed, Settings, choice, flag, modes, setting, whole
from qlib.yaml_tree import Node

__all__ = [
    "ABSENT_EXTENSIONS",
    "BITS_OVERRIDE_FIELDS",
    "ClassFields",
    "EXTENSION_CLASSES",
    "LR_CLASSES",
    "LR_POLICY_ARGS",
    "LR_REFUSED",
    "ONLY_WITH",
    "POLICY_FIELDS",
    "QUANTIZER_CLASSES",
    "override_fields",
]


def _number(words: str, holds: Callable[[float], bool], *, null: bool = False) -> Callable[[Node], float | None]:
    """A finite number for which `holds` is true. `1e-4`, which YAML takes for text, is one too."""

    def convert(node: Node) -> float | None:
        value = node.value
        if value is None and null:
            return None
        if isinstance(value, str) and re.fullmatch(r"[-+]?\d+[eE][-+]?\d+", value):
            value = float(value)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise NotAllowed(words)
        if not holds(value):
            raise NotAllowed(words)
        return float(value)

    return convert


def _count(low: int, *, null: bool = False) -> Callable[[Node], int | None]:
    """A whole number from `low`."""

    def convert(node: Node) -> int | None:
        value = node.value
        if value is None and null:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise NotAllowed(f"a whole number from {low}" + ", or null for none" * null)
        return value

    return convert


def _one_of(*names: str) -> Callable[[Node], str]:
    return choice({name: name for name in names})


def _text(words: str) -> Callable[[Node], str]:
    def convert(node: Node) -> str:
        if not isinstance(node.value, str) or not node.value:
            raise NotAllowed(words)
        return node.value

    return convert


def _items(node: Node, words: str) -> tuple[object, ...]:
    if not isinstance(node.value, tuple) or not node.value:
        raise NotAllowed(words)
    return tuple(item.value for item in node.value)


def _milestones(node: Node) -> tuple[int, ...]:
    words = "a list of epochs in increasing order, as in [60, 120]"
    numbers = [each for each in _items(node, words) if isinstance(each, int) and not isinstance(each, bool)]
    increasing = all(a < b for a, b in pairwise(numbers))
    if len(numbers) != len(_items(node, words)) or numbers[0] < 0 or not increasing:
        raise NotAllowed(words)
    return tuple(numbers)


def _gammas(node: Node) -> tuple[float, ...]:
    words = "a list of numbers above 0, as in [0.1, 0.2]"
    _items(node, words)
    each = _number(words, lambda x: x > 0)
    return tuple(float(each(item) or 0) for item in node.value if isinstance(item, Node))  # type: ignore[union-attr]


def _matches(key: str, node: Node, problems: list[str]) -> Settings:
    """`match`: layer of the student -> layer of the teacher."""
    pairs = {name: each.value for name, each in (node.mapping or {}).items() if isinstance(each.value, str)}
    if pairs and len(pairs) == len(node.mapping or {}):
        return {key: pairs}
    problems.append(f"{node.where}: {key} is {node}; allowed: a mapping of the student's layers to the teacher's")
    return {}


def _table(**converts: Callable[[Node], object]) -> dict[str, Field]:
    return {key: setting(convert, key) for key, convert in converts.items()}


_positive = _number("a number above 0", lambda x: x > 0)
_not_negative = _number("a number from 0", lambda x: x >= 0)
_share = _number("a number from 0 to 1", lambda x: 0 <= x <= 1)
_factor = _number("a number above 0 up to 1", lambda x: 0 < x <= 1)

_BITS = {
    "bits_activations": whole(1, 16, null=0, zero=True),
    "bits_weights": whole(1, 16, null=0, zero=True),
    "bits_bias": whole(2, 32, null=32),
}
_EVERY_QUANTIZER = _table(
    **_BITS,
    edges=_one_of("relu", "all", "inputs"),
    rounding=_one_of("nearest", "stochastic"),
    calibration_images=_count(1),
    lr_factor=_positive,
    dampening=_not_negative,
    bits_first_last=whole(1, 16, null=None),
    bits_other_edges=whole(2, 16, null=None),
    freeze_bn_epoch=_count(0, null=True),
)


def _quantizer(**own: Callable[[Node], object]) -> dict[str, Field]:
    return {**_EVERY_QUANTIZER, **_table(**own)}


QUANTIZER_CLASSES: Mapping[str, Mapping[str, Field]] = {
    "QuantAwareTrainRangeLinearQuantizer": {
        **_quantizer(
            ema_decay=_share,
            per_channel_wts=flag,
            quantize_inputs=flag,
            num_bits_inputs=whole(2, 16, null=None),
        ),
        "mode": Field(modes),
    },
    "LSQQuantizer": _quantizer(per_channel_wts=flag),
    "LSQPlusQuantizer": _quantizer(per_channel_wts=flag),
    "DorefaQuantizer": _quantizer(bits_gradients=whole(2, 16, null=None)),
    "PACTQuantizer": _quantizer(
        act_clip_init_val=_positive,
        act_clip_decay=_number("a number from 0, or null for none", lambda x: x >= 0, null=True),
    ),
    "WRPNQuantizer": _quantizer(widen=whole(1, 8, null=1)),
    "BinaryConnectQuantizer": _quantizer(stochastic=flag),
    "BinaryNetQuantizer": _quantizer(),
    "XNORQuantizer": _quantizer(),
    "TWNQuantizer": _quantizer(),
}
"""Class of quantizer -> its arguments, besides its overrides."""

BITS_OVERRIDE_FIELDS: Mapping[str, Field] = {
    "acts": setting(_BITS["bits_activations"], "bits_activations"),
    "wts": setting(_BITS["bits_weights"], "bits_weights"),
    "bias": setting(_BITS["bits_bias"], "bits_bias"),
}
"""The keys of one entry of `bits_overrides`, the older spelling of `overrides`."""


def override_fields(cls: str) -> Mapping[str, Field]:
    """The keys of one override of a class of quantizer: bits, and those of its arguments that layers may differ in.

    >>> list(override_fields("LSQQuantizer"))
    ['bits_activations', 'bits_weights', 'bits_bias', 'per_channel_wts']
    """
    keys = (*_BITS, "mode", "per_channel_wts")
    return {key: QUANTIZER_CLASSES[cls][key] for key in keys if key in QUANTIZER_CLASSES[cls]}


@dataclass(frozen=True)
class ClassFields:
    """The arguments of a class; of each tuple in `needs` exactly one key must be there."""

    fields: Mapping[str, Field]
    needs: tuple[tuple[str, ...], ...] = ()


_cycle = {"cycle_momentum": flag, "base_momentum": _share, "max_momentum": _share}

LR_CLASSES: Mapping[str, ClassFields] = {
    "StepLR": ClassFields(_table(step_size=_count(1), gamma=_positive), (("step_size",),)),
    "MultiStepLR": ClassFields(_table(milestones=_milestones, gamma=_positive), (("milestones",),)),
    "MultiStepMultiGammaLR": ClassFields(
        _table(milestones=_milestones, gammas=_gammas), (("milestones",), ("gammas",))
    ),
    "ConstantLR": ClassFields(_table(factor=_factor, total_iters=_count(0))),
    "LinearLR": ClassFields(_table(start_factor=_factor, end_factor=_share, total_iters=_count(1))),
    "ExponentialLR": ClassFields(_table(gamma=_positive), (("gamma",),)),
    "PolynomialLR": ClassFields(
        {
            "T_max": setting(_count(1), "T_max"),
            "total_iters": setting(_count(1), "T_max"),
            "power": setting(_positive, "power"),
        },
        (("T_max", "total_iters"),),
    ),
    "CosineAnnealingLR": ClassFields(_table(T_max=_count(1), eta_min=_not_negative), (("T_max",),)),
    "CosineAnnealingWarmRestarts": ClassFields(
        _table(T_0=_count(1), T_mult=_count(1), eta_min=_not_negative), (("T_0",),)
    ),
    "CyclicLR": ClassFields(
        _table(
            base_lr=_not_negative,
            max_lr=_positive,
            step_size_up=_count(1),
            step_size_down=_count(1, null=True),
            mode=_one_of("triangular", "triangular2", "exp_range"),
            gamma=_positive,
            **_cycle,
        ),
        (("base_lr",), ("max_lr",)),
    ),
    "OneCycleLR": ClassFields(
        _table(
            max_lr=_positive,
            total_steps=_count(2),
            epochs=_count(1),
            steps_per_epoch=_count(1),
            pct_start=_share,
            anneal_strategy=_one_of("cos", "linear"),
            div_factor=_positive,
            final_div_factor=_positive,
            three_phase=flag,
            **_cycle,
        ),
        (("max_lr",), ("total_steps", "epochs")),
    ),
    "ReduceLROnPlateau": ClassFields(
        _table(
            mode=_one_of("min", "max"),
            factor=_number("a number above 0 and below 1", lambda x: 0 < x < 1),
            patience=_count(0),
            threshold=_not_negative,
            threshold_mode=_one_of("rel", "abs"),
            cooldown=_count(0),
            min_lr=_not_negative,
            eps=_not_negative,
        )
    ),
}
"""Class of learning-rate scheduler -> its arguments: those of torch that plain values can say, and our own two."""

LR_REFUSED: Mapping[str, str] = {
    "LambdaLR": "needs a function; use MultiStepMultiGammaLR",
    "MultiplicativeLR": "needs a function; use ExponentialLR or MultiStepMultiGammaLR",
    "SequentialLR": "holds other schedulers; give each of them a policy of its own",
    "ChainedScheduler": "holds other schedulers; give each of them a policy of its own",
}
"""Classes of torch that a schedule cannot name, and what to do instead."""

LR_POLICY_ARGS = {"per": setting(_one_of("epoch", "step"), "per")}
"""The `args` of a policy of a learning-rate scheduler."""

EXTENSION_CLASSES: Mapping[str, ClassFields] = {
    "KnowledgeDistillation": ClassFields(
        {
            **_table(
                teacher=_text("the name of a model, or self"),
                resume=_text("the path of a checkpoint"),
                pretrained=flag,
                temperature=_positive,
                distill_wt=_not_negative,
                student_wt=_not_negative,
                cache=flag,
                match_wt=_not_negative,
                match_kind=_one_of("attention", "feature"),
            ),
            "match": Field(_matches),
        },
        (("teacher",),),
    ),
}
"""Class of extension -> its arguments."""

ABSENT_EXTENSIONS = ("FilterRemover", "ChannelRemover", "StructureRemover", "FreezeTraining")
"""Extensions that files for other versions name."""

POLICY_FIELDS: Mapping[str, Field] = _table(
    starting_epoch=_count(0), ending_epoch=_count(1), frequency=_count(1), epochs=_milestones
)
"""When a policy acts: from a start to an end, which is exclusive, or in listed epochs."""

ONLY_WITH = {"match_wt": "match", "match_kind": "match", "steps_per_epoch": "epochs"}
"""Arguments of learning-rate schedulers and extensions that mean something only beside another one."""
