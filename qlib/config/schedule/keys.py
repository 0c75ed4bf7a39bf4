"""What the keys of a training schedule may be: readers of values, and the keys of a class from its dataclass.

Settings are named as the keys, except that `mode` gives `mode_activations` and `mode_weights`, and `acts`, `wts` and
`bias` give `bits_*`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import Any, TypeAlias

from qlib import values
from qlib.config.layers.keys import Field, Settings, modes, setting
from qlib.values import FLAG, Interval, Value
from qlib.yaml_tree import Node

__all__ = [
    "ABSENT_EXTENSIONS",
    "BITS",
    "EXTENSION_CLASSES",
    "LR_POLICY_ARGS",
    "LR_REFUSED",
    "REMOVERS",
    "ONLY_WITH",
    "POLICY_FIELDS",
]
__all__ += ["FACTOR", "FROM_0", "GAMMAS", "MILESTONES", "POSITIVE", "SHARE", "Classes", "ClassFields", "count", "key"]
__all__ += ["keys_of", "number", "one_of", "override_keys", "table"]


def number(interval: Interval, words: str = "") -> Value:
    """A number of an interval. `1e-4`, which YAML takes for text, is one too."""
    value = values.real(interval, words)

    def read(raw: object) -> object:
        is_exponent = isinstance(raw, str) and re.fullmatch(r"[-+]?\d+[eE][-+]?\d+", raw)
        return value.read(float(str(raw)) if is_exponent else raw)

    return replace(value, read=read)


def count(low: int, *, null: bool = False) -> Value:
    """A whole number from `low`."""
    return values.whole(low).or_null("or null for none") if null else values.whole(low)


def one_of(*names: str) -> Value:
    """One of some names."""
    return values.choice(names)


def _list_of(item: Value, words: str) -> Value:
    """A list of values, not empty."""

    def read(raw: object) -> tuple[Any, ...]:
        if not isinstance(raw, tuple) or not raw:
            raise ValueError
        return tuple(item.read(each.value) for each in raw)

    return Value(read, words)


def _increasing(value: Value) -> Value:
    def read(raw: object) -> tuple[int, ...]:
        numbers: tuple[int, ...] = value.read(raw)
        if not all(a < b for a, b in pairwise(numbers)):
            raise ValueError
        return numbers

    return replace(value, read=read)


def _matches(key: str, node: Node, problems: list[str]) -> Settings:
    """`match`: layer of the student -> layer of the teacher."""
    pairs = {name: each.value for name, each in (node.mapping or {}).items() if isinstance(each.value, str)}
    if pairs and len(pairs) == len(node.mapping or {}):
        return {key: pairs}
    problems.append(f"{node.where}: {key} is {node}; allowed: a mapping of the student's layers to the teacher's")
    return {}


def table(**read: Value | Field) -> dict[str, Field]:
    """Keys with their readers; each sets what is named like it, unless it is a field already."""
    return {key: setting(each, key) if isinstance(each, Value) else each for key, each in read.items()}


POSITIVE = number(Interval(0, open_low=True))
FROM_0 = number(Interval(0))
SHARE = number(Interval(0, 1))
FACTOR = number(Interval(0, 1, open_low=True), "a number above 0 up to 1")
MILESTONES = _increasing(_list_of(count(0), "a list of epochs in increasing order, as in [60, 120]"))
GAMMAS = _list_of(POSITIVE, "a list of numbers above 0, as in [0.1, 0.2]")

BITS = {"acts": "bits_activations", "wts": "bits_weights", "bias": "bits_bias"}
"""The keys of one entry of `bits_overrides`, the older spelling of `overrides` -> those of today."""


def key(default: Any, value: Value) -> Any:
    """A field of a dataclass that is a key of YAML, with the reader of its value; a switch needs none."""
    return field(default=default, metadata={"value": value})


def keys_of(cls: type) -> dict[str, Field]:
    """The keys of YAML that set the fields of a dataclass; `mode_activations` and `mode_weights` are set by `mode`.

    A field whose `value` is None is none.

    >>> @dataclass
    ... class Example:
    ...     gamma: float = key(0.1, POSITIVE)
    ...     fast: bool = False
    >>> list(keys_of(Example))
    ['gamma', 'fast']
    """
    found: dict[str, Field] = {}
    for each in fields(cls):
        name = "mode" if each.name in ("mode_activations", "mode_weights") else each.name
        if each.metadata.get("value", FLAG) is None:
            continue
        found[name] = modes if name == "mode" else setting(each.metadata.get("value", FLAG), name)
    return found


def override_keys(keys: Mapping[str, Field]) -> dict[str, Field]:
    """Those keys of a quantizer in which layers may differ."""
    return {key: keys[key] for key in (*BITS.values(), "mode", "per_channel_wts") if key in keys}


@dataclass(frozen=True)
class ClassFields:
    """The arguments of a class; of each tuple in `needs` exactly one key must be there."""

    fields: Mapping[str, Field]
    needs: tuple[tuple[str, ...], ...] = ()


Classes: TypeAlias = Mapping[str, Mapping[str, ClassFields]]
"""Section of a schedule -> class -> its arguments."""

LR_REFUSED: Mapping[str, str] = {
    "LambdaLR": "needs a function; use MultiStepMultiGammaLR",
    "MultiplicativeLR": "needs a function; use ExponentialLR or MultiStepMultiGammaLR",
    "SequentialLR": "holds other schedulers; give each of them a policy of its own",
    "ChainedScheduler": "holds other schedulers; give each of them a policy of its own",
}
"""Classes of torch that a schedule cannot name, and what to do instead."""

LR_POLICY_ARGS = {"per": setting(one_of("epoch", "step"), "per")}
"""The `args` of a policy of a learning-rate scheduler."""

REMOVERS = ("FilterRemover", "ChannelRemover", "StructureRemover")
"""Extensions that remove the channels that do nothing: three names of one thing."""

EXTENSION_CLASSES: Mapping[str, ClassFields] = {
    "KnowledgeDistillation": ClassFields(
        {
            **table(
                teacher=values.text("the name of a model, or self"),
                resume=values.text("the path of a checkpoint"),
                pretrained=FLAG,
                temperature=POSITIVE,
                distill_wt=FROM_0,
                student_wt=FROM_0,
                cache=FLAG,
                match_wt=FROM_0,
                match_kind=one_of("attention", "feature"),
            ),
            "match": _matches,
        },
        (("teacher",),),
    ),
    **dict.fromkeys(
        REMOVERS,
        ClassFields(
            table(
                thinning_func_str=one_of("remove_filters", "remove_channels"),
                arch=values.text("the name of a model"),
                dataset=values.text("the name of a dataset"),
            )
        ),
    ),
}
"""Class of extension -> its arguments; `arch` and `dataset` of a remover mean nothing, as the run knows them."""

ABSENT_EXTENSIONS = ("FreezeTraining",)
"""Extensions that files for other versions name."""

POLICY_FIELDS: Mapping[str, Field] = table(
    starting_epoch=count(0), ending_epoch=count(1), frequency=count(1), epochs=MILESTONES
)
"""When a policy acts: from a start to an end, which is exclusive, or in listed epochs."""

ONLY_WITH = {"match_wt": "match", "match_kind": "match", "steps_per_epoch": "epochs"}
"""Arguments of learning-rate schedulers and extensions that mean something only beside another one."""
