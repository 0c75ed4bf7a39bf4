"""The settings that a quantizer's YAML may hold: what each allows, and which `LayerSettings` fields it sets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from qlib.config.flags.corrections import BIAS_CORRECTIONS, CORRECTION_FLAGS, ROUNDINGS, CorrectionFlag, Number
from qlib.config.layers.clips import CLIP_NAMES, CLIP_PARAMETERS, WEIGHT_CLIPS, ClipParameter
from qlib.errors import did_you_mean
from qlib.quant.spec import MODES
from qlib.yaml_tree import Node

__all__ = [
    "CORRECTION_FIELDS",
    "LAYER_FIELDS",
    "QUANTIZER_FIELDS",
    "SCALES",
]
__all__ += ["Field", "NotAllowed", "choice", "flag", "modes", "read_fields", "setting", "unknown_key", "whole"]

SCALES = ("float", "pow2")
"""What `scale` may be: any number, or powers of two."""

_MODE_NAMES = {
    **{mode: mode for mode in MODES},
    "symmetric": "sym",
    "symmetric_restricted": "sym_restr",
    "asymmetric_signed": "asym_s",
    "asymmetric_unsigned": "asym_u",
}
_RENAMED = {"acts": "bits_activations", "wts": "bits_weights", "bias": "bits_bias"}

Settings: TypeAlias = dict[str, object]
"""`LayerSettings` field -> value."""


class NotAllowed(ValueError):
    """A value that a field does not allow; the message says what it allows."""


@dataclass(frozen=True)
class Field:
    """One key: `read` gives the settings it stands for, and appends a sentence to the problems for each mistake.

    Law: `read(node, problems)` appends to `problems` exactly when the value is not allowed.
    """

    read: Callable[[str, Node, list[str]], Settings]


def setting(convert: Callable[[Node], object], *targets: str) -> Field:
    """A field whose one value, checked by `convert`, becomes that of every target."""

    def read(key: str, node: Node, problems: list[str]) -> Settings:
        try:
            value = convert(node)
        except NotAllowed as error:
            problems.append(f"{node.where}: {key} is {node}; allowed: {error}")
            return {}
        return dict.fromkeys(targets, value)

    return Field(read)


def whole(low: int, high: int, null: int | None, zero: bool = False) -> Callable[[Node], int | None]:
    """A whole number from `low` to `high`; YAML's null means `null`, and so does 0 where `zero` is set."""
    meaning = "null or 0 for float" if zero else f"null for {null}" if null else "null for none"

    def convert(node: Node) -> int | None:
        value = node.value
        if value is None or (zero and value == 0 and not isinstance(value, (bool, float))):
            return null
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise NotAllowed(f"a whole number from {low} to {high}, or {meaning}")
        return value

    return convert


def choice(names: Mapping[str, str]) -> Callable[[Node], str]:
    """One of `names`, in any case."""

    def convert(node: Node) -> str:
        word = node.value.lower() if isinstance(node.value, str) else ""
        if word not in names:
            raise NotAllowed(", ".join(names) + did_you_mean(word, names))
        return names[word]

    return convert


def flag(node: Node) -> bool:
    """True or false."""
    if not isinstance(node.value, bool):
        raise NotAllowed("true or false")
    return node.value


def _clip_parameter(parameter: ClipParameter) -> Callable[[Node], float | None]:
    """A number that a clip method takes; null means its default."""
    default = "" if parameter.default is None else f" for {parameter.default:g}"
    words = f"a number {parameter.allowed.replace(' and at most', ' to')}, or null{default}"

    def convert(node: Node) -> float | None:
        value = parameter.default if node.value is None else node.value
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not parameter.allows(value):
            raise NotAllowed(words)
        return float(value)

    return convert


def _float_bits(node: Node) -> int | None:
    if node.value not in (None, 16, 32, 64) or isinstance(node.value, (bool, float)):
        raise NotAllowed("16, 32, 64 or null")
    return node.value  # type: ignore[return-value]


def _path(node: Node) -> str | None:
    if node.value is not None and (not isinstance(node.value, str) or not node.value):
        raise NotAllowed("the path of a statistics file, or null")
    return node.value


def modes(key: str, node: Node, problems: list[str]) -> Settings:
    """`mode`: one name, or a mapping of one for activations and one for weights."""
    if node.mapping is None:
        return _BOTH_MODES.read(key, node, problems)
    return read_fields(node, _MODE_PARTS, problems)[0]


def _inputs(key: str, node: Node, problems: list[str]) -> Settings:
    """`input_overrides`: index of an input -> its settings, or `from_output: true`."""
    inputs: dict[int, Settings] = {}
    if node.mapping is None:
        problems.append(f"{node.where}: {key} is {node}; allowed: a mapping of input number to settings")
    for index, entry in (node.mapping or {}).items():
        if not index.isdecimal():
            problems.append(f"{node.where_key(index)}: input {index!r} of {key} is not allowed; inputs count from 0")
            continue
        settings, _ = read_fields(entry, _INPUT_FIELDS, problems)
        if "from_output" in settings and len(settings) > 1:
            problems.append(f"{entry.where}: from_output stands alone; remove it or the other settings of the input")
        inputs[int(index)] = settings
    return {"input_overrides": inputs}


def _only_true(node: Node) -> bool:
    if node.value is not True:
        raise NotAllowed("true")
    return True


def read_fields(node: Node, fields: Mapping[str, Field], problems: list[str]) -> tuple[Settings, dict[str, str]]:
    """The settings of a mapping node, and `file:line` of each; mistakes go to `problems`.

    A later field of `fields` wins over an earlier one that sets the same, whatever their order in the file.
    """
    settings: Settings = {}
    places: dict[str, str] = {}
    if node.mapping is None:
        problems.append(f"{node.where}: settings must be a mapping of names to values, not {node}")
        return settings, places
    problems += [f"{node.where_key(key)}: {unknown_key(key, fields)}" for key in node.mapping if key not in fields]
    for key, field in fields.items():
        if key not in node.mapping:
            continue
        found = field.read(key, node.mapping[key], problems)
        settings.update(found)
        places.update(dict.fromkeys(found, node.where_key(key)))
    return settings, places


def unknown_key(key: str, allowed: Iterable[str]) -> str:
    if key in _RENAMED:
        return f"the key {key!r} is no longer used; write {_RENAMED[key]!r}"
    return f"unknown key {key!r}; allowed: {', '.join(allowed)}{did_you_mean(key, allowed)}"


_mode = choice(_MODE_NAMES)
_clip = choice({name: name for name in CLIP_NAMES})
_clip_wts = choice({name: name for name in WEIGHT_CLIPS})
_CLIP_PARAMETERS = {key: setting(_clip_parameter(each), key) for key, each in CLIP_PARAMETERS.items()}
_scale = choice({name: name for name in SCALES})
_bits = whole(2, 16, null=0, zero=True)
_BOTH_MODES = setting(_mode, "mode_activations", "mode_weights")
_MODE_PARTS = {"activations": setting(_mode, "mode_activations"), "weights": setting(_mode, "mode_weights")}
_INPUT_FIELDS = {
    "from_output": setting(_only_true, "from_output"),
    "bits_activations": setting(_bits, "bits_activations"),
    "mode": setting(_mode, "mode_activations"),
    "clip_acts": setting(_clip, "clip_acts"),
    **_CLIP_PARAMETERS,
}
_COMMON = {
    "bits_activations": setting(_bits, "bits_activations"),
    "bits_weights": setting(_bits, "bits_weights"),
    "bits_bias": setting(whole(2, 32, null=32), "bits_bias"),
    "mode": Field(modes),
    "clip_acts": setting(_clip, "clip_acts"),
    **_CLIP_PARAMETERS,
    "clip_wts": setting(_clip_wts, "clip_wts"),
    "scale": setting(_scale, "scale"),
    "clip_half_range": setting(flag, "clip_half_range"),
    "per_channel_wts": setting(flag, "per_channel_wts"),
    "scale_approx_mult_bits": setting(whole(1, 31, null=None), "scale_approx_mult_bits"),
    "fp16": setting(lambda node: 16 if flag(node) else None, "fpq"),
    "fpq_module": setting(_float_bits, "fpq"),
    "inputs_quant_auto_fallback": setting(flag, "inputs_quant_auto_fallback"),
}

LAYER_FIELDS: Mapping[str, Field] = {
    **_COMMON,
    "fake": setting(flag, "fake"),
    "make_identity": setting(flag, "make_identity"),
    "quantize_inputs": setting(flag, "quantize_inputs"),
    "input_overrides": Field(_inputs),
}
"""The keys of one override."""

QUANTIZER_FIELDS: Mapping[str, Field] = {
    "bits_parameters": setting(_bits, "bits_weights"),
    **_COMMON,
    "bits_accum": setting(whole(2, 32, null=32), "bits_accum"),
    "model_activation_stats": setting(_path, "model_activation_stats"),
    "save_fp_weights": setting(flag, "save_fp_weights"),
    "also_clip_weights": setting(flag, "also_clip_weights"),
}
"""The arguments of the quantizer itself, besides its overrides."""


def _number(number: Number) -> Callable[[Node], float | None]:
    """The number that a correction takes; null means that it is not done."""

    def convert(node: Node) -> float | None:
        value = node.value
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not number.allows(value):
            raise NotAllowed(f"{number.allowed}, or null for none")
        return float(value)

    return convert


def _switch(name: str, correction: CorrectionFlag) -> Field:
    return setting(_number(correction.number) if correction.number else flag, name)


_COUNT = whole(1, 10**9, null=None)

CORRECTION_FIELDS: Mapping[str, Field] = {
    **{name: _switch(name, each) for name, each in CORRECTION_FLAGS.items() if each.of_float},
    "data_free": setting(flag, "data_free"),
    "rounding": setting(choice({name: name for name in ROUNDINGS}), "rounding"),
    **{name: _switch(name, each) for name, each in CORRECTION_FLAGS.items() if not each.of_float and not each.choice},
    "bias_correction": setting(choice({name: name for name in BIAS_CORRECTIONS}), "bias_correction"),
    "images": setting(_COUNT, "images"),
    "iterations": setting(_COUNT, "iterations"),
}
"""The keys of the section `corrections`: those that `PtqArgs.with_settings` takes, each with the values of its flag."""
