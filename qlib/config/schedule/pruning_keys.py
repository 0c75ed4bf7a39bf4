"""What the keys of pruners and regularizers may be: names of parameters, levels, groups of weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, field, fields, replace
from typing import Any

from qlib import values
from qlib.config.layers.keys import Field
from qlib.config.schedule.keys import ClassFields, count, keys_of, number, table
from qlib.values import FLAG, Interval, Value
from qlib.yaml_tree import Node

__all__ = ["BLOCK", "LEVEL", "NAMES", "NAMING", "PRUNER_POLICY_ARGS", "RANGE", "REGULARIZER_POLICY_ARGS"]
__all__ += ["by_name", "class_fields", "exactly", "needed", "regimes"]

NAMING = ("weights", "levels", "thresholds", "sensitivities", "reg_regims")
"""Keys whose values are, or are keyed by, names of parameters: a component has one of them."""

LEVEL = number(Interval(0, 1, open_high=True), "a number from 0 to below 1: at 1 nothing would be left")

_NAME = values.text("the name of a parameter, as conv1.weight")


def needed(value: Value) -> Any:
    """A field of a dataclass that is a key of YAML and must be given."""
    return field(metadata={"value": value})


def class_fields(cls: type) -> ClassFields:
    """The keys of YAML of a dataclass; those without a default must be given."""
    return ClassFields(keys_of(cls), tuple((each.name,) for each in fields(cls) if each.default is MISSING))


def exactly(names: Iterable[str]) -> Value:
    """One of some names, in their own case."""
    return values.choice(names, any_case=False)


def _sequence(raw: object, item: Value) -> tuple[Any, ...]:
    if not isinstance(raw, tuple) or not raw:
        raise ValueError
    return tuple(item.read(each.value) for each in raw)


NAMES = Value(
    lambda raw: _sequence(raw, _NAME) if isinstance(raw, tuple) else (_NAME.read(raw),),
    "a list of names of parameters, as [conv1.weight, fc.weight], or one name",
)


def by_name(value: Value) -> Value:
    """A mapping of names of parameters to values.

    >>> from qlib.yaml_tree import parse_yaml
    >>> by_name(LEVEL).read(parse_yaml("{fc.weight: 0.5}", "a.yaml").value)
    {'fc.weight': 0.5}
    """

    def read(raw: object) -> dict[str, Any]:
        if not isinstance(raw, dict) or not raw:
            raise ValueError
        return {name: value.read(each.value) for name, each in raw.items()}

    return Value(read, f"a mapping of names of parameters, as conv1.weight, to {value.allowed}")


def regimes(kinds: Iterable[str], first: Value) -> Value:
    """A mapping of names of parameters to pairs: a number, and the type of groups."""
    kind = exactly(kinds)

    def read(raw: object) -> tuple[Any, str]:
        if not isinstance(raw, tuple) or len(raw) != 2:
            raise ValueError
        return first.read(raw[0].value), kind.read(raw[1].value)

    return by_name(Value(read, f"[a number {Interval(0)}, a type of groups: {kind.allowed}]"))


def _range(raw: object) -> tuple[float, float]:
    low, high = _sequence(raw, LEVEL) if isinstance(raw, tuple) and len(raw) == 2 else (1, 0)
    if low > high:
        raise ValueError
    return low, high


RANGE = Value(_range, "two numbers from 0 to below 1, the lower one first, as [0.1, 0.3]")


def _block(raw: object) -> tuple[int, int]:
    """`block_shape` of `kwargs`: how many filters, how many channels, 1, 1."""
    shape: Node | None = raw.get("block_shape") if isinstance(raw, dict) and len(raw) == 1 else None
    sizes = _sequence(shape.value, values.whole(1)) if shape is not None else ()
    if len(sizes) != 4 or sizes[2:] != (1, 1):
        raise ValueError
    return sizes[0], sizes[1]


BLOCK = replace(Value(_block, "{block_shape: [filters, channels, 1, 1]}, as [1, 8, 1, 1]").or_null("or null", (1, 1)))

PRUNER_POLICY_ARGS: Mapping[str, Field] = table(
    levels=by_name(LEVEL),
    keep_mask=FLAG,
    mini_batch_pruning_frequency=count(0),
    mask_on_forward_only=FLAG,
    mask_gradients=FLAG,
    use_double_copies=FLAG,
    discard_masks_at_minibatch_end=FLAG,
    skip_first_minibatch=FLAG,
    fold_batchnorm=FLAG,
)
"""The `args` of a policy of a pruner."""

REGULARIZER_POLICY_ARGS: Mapping[str, Field] = table(keep_mask=FLAG)
"""The `args` of a policy of a regularizer."""
