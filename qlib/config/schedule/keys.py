"""What the keys of a training schedule may be: readers of values, and the keys of a class from its dataclass.

Settings are named as the keys, except that `mode` gives `mode_activations` and `mode_weights`, and `acts`, `wts` and
`bias` give `bits_*`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any, TypeAlias

from qlib.config.layers.keys import Field, NotAllowed, Settings, choice, flag, modes, setting
from qlib.yaml_tree import Node

__all__ = [
    "ABSENT_EXTENSIONS",
    "BITS",
    "EXTENSION_CLASSES",
    "LR_POLICY_ARGS",
    "LR_REFUSED",
    "ONLY_WITH",
    "POLICY_FIELDS",
]
__all__ += ["FACTOR", "FROM_0", "POSITIVE", "SHARE", "Classes", "ClassFields", "key", "keys_of", "override_keys"]
__all__ += ["count", "gammas", "milestones", "number", "one_of", "table"]


def number(words: str, holds: Callable[[float], bool], *, null: bool = False) -> Callable[[Node], float | None]:
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


def count(low: int, *, null: bool = False) -> Callable[[Node], int | None]:
    """A whole number from `low`."""

    def convert(node: Node) -> int | None:
        value = node.value
        if value is None and null:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise NotAllowed(f"a whole number from {low}" + ", or null for none" * null)
        return value

    return convert


def one_of(*names: str) -> Callable[[Node], str]:
    return choice({name: name for name in names})


def text(words: str) -> Callable[[Node], str]:
    def convert(node: Node) -> str:
        if not isinstance(node.value, str) or not node.value:
            raise NotAllowed(words)
        return node.value

    return convert


def _items(node: Node, words: str) -> tuple[object, ...]:
    if not isinstance(node.value, tuple) or not node.value:
        raise NotAllowed(words)
    return tuple(item.value for item in node.value)


def milestones(node: Node) -> tuple[int, ...]:
    words = "a list of epochs in increasing order, as in [60, 120]"
    numbers = [each for each in _items(node, words) if isinstance(each, int) and not isinstance(each, bool)]
    increasing = all(a < b for a, b in pairwise(numbers))
    if len(numbers) != len(_items(node, words)) or numbers[0] < 0 or not increasing:
        raise NotAllowed(words)
    return tuple(numbers)


def gammas(node: Node) -> tuple[float, ...]:
    words = "a list of numbers above 0, as in [0.1, 0.2]"
    _items(node, words)
    each = number(words, lambda x: x > 0)
    return tuple(float(each(item) or 0) for item in node.value if isinstance(item, Node))  # type: ignore[union-attr]


def _matches(key: str, node: Node, problems: list[str]) -> Settings:
    """`match`: layer of the student -> layer of the teacher."""
    pairs = {name: each.value for name, each in (node.mapping or {}).items() if isinstance(each.value, str)}
    if pairs and len(pairs) == len(node.mapping or {}):
        return {key: pairs}
    problems.append(f"{node.where}: {key} is {node}; allowed: a mapping of the student's layers to the teacher's")
    return {}


def table(**converts: Callable[[Node], object] | Field) -> dict[str, Field]:
    """Keys with their readers; each sets what is named like it, unless it is a field already."""
    return {key: each if isinstance(each, Field) else setting(each, key) for key, each in converts.items()}


POSITIVE = number("a number above 0", lambda x: x > 0)
FROM_0 = number("a number from 0", lambda x: x >= 0)
SHARE = number("a number from 0 to 1", lambda x: 0 <= x <= 1)
FACTOR = number("a number above 0 up to 1", lambda x: 0 < x <= 1)

BITS = {"acts": "bits_activations", "wts": "bits_weights", "bias": "bits_bias"}
"""The keys of one entry of `bits_overrides`, the older spelling of `overrides` -> those of today."""


def key(default: Any, convert: Callable[[Node], object]) -> Any:
    """A field of a dataclass that is a key of YAML, with the reader of its value; a switch needs none."""
    return field(default=default, metadata={"convert": convert})


def keys_of(cls: type) -> dict[str, Field]:
    """The keys of YAML that set the fields of a dataclass; `mode_activations` and `mode_weights` are set by `mode`.

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
        found[name] = Field(modes) if name == "mode" else setting(each.metadata.get("convert", flag), name)
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

EXTENSION_CLASSES: Mapping[str, ClassFields] = {
    "KnowledgeDistillation": ClassFields(
        {
            **table(
                teacher=text("the name of a model, or self"),
                resume=text("the path of a checkpoint"),
                pretrained=flag,
                temperature=POSITIVE,
                distill_wt=FROM_0,
                student_wt=FROM_0,
                cache=flag,
                match_wt=FROM_0,
                match_kind=one_of("attention", "feature"),
            ),
            "match": Field(_matches),
        },
        (("teacher",),),
    ),
}
"""Class of extension -> its arguments."""

ABSENT_EXTENSIONS = ("FilterRemover", "ChannelRemover", "StructureRemover", "FreezeTraining")
"""Extensions that files for other versions name."""

POLICY_FIELDS: Mapping[str, Field] = table(
    starting_epoch=count(0), ending_epoch=count(1), frequency=count(1), epochs=milestones
)
"""When a policy acts: from a start to an end, which is exclusive, or in listed epochs."""

ONLY_WITH = {"match_wt": "match", "match_kind": "match", "steps_per_epoch": "epochs"}
"""Arguments of learning-rate schedulers and extensions that mean something only beside another one."""
