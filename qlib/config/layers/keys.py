"""The settings that a quantizer's YAML may hold: what each allows, and which `LayerSettings` fields it sets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TypeAlias

from qlib import values
from qlib.config.flags.corrections import BIAS_CORRECTIONS, CORRECTION_FLAGS, ROUNDINGS, CorrectionFlag, Number
from qlib.errors import did_you_mean
from qlib.quant.clip_names import CLIP_NAMES, CLIP_PARAMETERS, WEIGHT_CLIPS, ClipParameter
from qlib.quant.spec import MODES
from qlib.values import FLAG, Value
from qlib.yaml_tree import Node

__all__ = [
    "CORRECTION_FIELDS",
    "LAYER_FIELDS",
    "QUANTIZER_FIELDS",
    "SCALES",
]
__all__ += ["Field", "modes", "read_elsewhere", "read_fields", "setting", "unknown_key", "whole"]

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


Field: TypeAlias = Callable[[str, Node, list[str]], Settings]
"""Reads one key: (key, node, problems) -> the settings that it stands for.

Law: it appends a sentence to the problems exactly when the value is not allowed.
"""


def read_elsewhere(key: str, node: Node, problems: list[str]) -> Settings:
    """A key that is allowed, but read by another function."""
    return {}


def setting(value: Value, *targets: str) -> Field:
    """A field whose one value becomes that of every target."""

    def read(key: str, node: Node, problems: list[str]) -> Settings:
        try:
            found = value.read(node.value)
        except ValueError:
            problems.append(f"{node.where}: {key} is {node}; allowed: {value.allowed}{value.hint(node.value)}")
            return {}
        return dict.fromkeys(targets, found)

    return read


def whole(low: int, high: int, null: int | None, zero: bool = False) -> Value:
    """A whole number from `low` to `high`; YAML's null means `null`, and so does 0 where `zero` is set.

    >>> whole(2, 16, null=0, zero=True).read(0), whole(2, 32, null=32).read(None)
    (0, 32)
    """
    meaning = "or null or 0 for float" if zero else f"or null for {null}" if null else "or null for none"
    value = values.whole(low, high).or_null(meaning, null)
    return replace(value, read=lambda raw: null if zero and type(raw) is int and raw == 0 else value.read(raw))


def _clip_parameter(parameter: ClipParameter) -> Value:
    """A number that a clip method takes; null means its default."""
    words = f"a number {parameter.interval}".replace(" and at most", " to")
    default = "" if parameter.default is None else f" for {parameter.default:g}"
    return values.real(parameter.interval, words).or_null(f"or null{default}", parameter.default)


def _true(raw: object) -> bool:
    """True. Raises ValueError for anything else."""
    if raw is not True:
        raise ValueError
    return True


_FLOAT_SIZE = replace(values.among(16, 32, 64).or_null("or null"), allowed="16, 32, 64 or null")
_PATH = values.text("the path of a statistics file").or_null("or null")


def modes(key: str, node: Node, problems: list[str]) -> Settings:
    """`mode`: one name, or a mapping of one for activations and one for weights."""
    if node.mapping is None:
        return _BOTH_MODES(key, node, problems)
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
        settings, _ = read_fields(entry, _INPUT_FIELDS, problems, f"{key} of {index}")
        if "from_output" in settings and len(settings) > 1:
            problems.append(f"{entry.where}: from_output stands alone; remove it or the other settings of the input")
        inputs[int(index)] = settings
    return {"input_overrides": inputs}


def read_fields(
    node: Node, fields: Mapping[str, Field], problems: list[str], what: str = "settings"
) -> tuple[Settings, dict[str, str]]:
    """The settings of a mapping node, and `file:line` of each; mistakes go to `problems`.

    A later field of `fields` wins over an earlier one that sets the same, whatever their order in the file.
    """
    settings: Settings = {}
    places: dict[str, str] = {}
    if node.mapping is None:
        problems.append(f"{node.where}: {what} must be a mapping of names to values, not {node}")
        return settings, places
    problems += [f"{node.where_key(key)}: {unknown_key(key, fields)}" for key in node.mapping if key not in fields]
    for key, field in fields.items():
        if key not in node.mapping:
            continue
        found = field(key, node.mapping[key], problems)
        settings.update(found)
        places.update(dict.fromkeys(found, node.where_key(key)))
    return settings, places


def unknown_key(key: str, allowed: Iterable[str]) -> str:
    if key in _RENAMED:
        return f"the key {key!r} is no longer used; write {_RENAMED[key]!r}"
    return f"unknown key {key!r}; allowed: {', '.join(allowed)}{did_you_mean(key, allowed)}"


_mode = values.choice(_MODE_NAMES)
_clip = values.choice(CLIP_NAMES)
_clip_wts = values.choice(WEIGHT_CLIPS)
_CLIP_PARAMETERS = {key: setting(_clip_parameter(each), key) for key, each in CLIP_PARAMETERS.items()}
_scale = values.choice(SCALES)
_bits = whole(2, 16, null=0, zero=True)
_BOTH_MODES = setting(_mode, "mode_activations", "mode_weights")
_MODE_PARTS = {"activations": setting(_mode, "mode_activations"), "weights": setting(_mode, "mode_weights")}
_INPUT_FIELDS = {
    "from_output": setting(Value(_true, "true"), "from_output"),
    "bits_activations": setting(_bits, "bits_activations"),
    "mode": setting(_mode, "mode_activations"),
    "clip_acts": setting(_clip, "clip_acts"),
    **_CLIP_PARAMETERS,
}
_COMMON = {
    "bits_activations": setting(_bits, "bits_activations"),
    "bits_weights": setting(_bits, "bits_weights"),
    "bits_bias": setting(whole(2, 32, null=32), "bits_bias"),
    "mode": modes,
    "clip_acts": setting(_clip, "clip_acts"),
    **_CLIP_PARAMETERS,
    "clip_wts": setting(_clip_wts, "clip_wts"),
    "scale": setting(_scale, "scale"),
    "clip_half_range": setting(FLAG, "clip_half_range"),
    "per_channel_wts": setting(FLAG, "per_channel_wts"),
    "scale_approx_mult_bits": setting(whole(1, 31, null=None), "scale_approx_mult_bits"),
    "fp16": setting(replace(FLAG, read=lambda raw: 16 if FLAG.read(raw) else None), "fpq"),
    "fpq_module": setting(_FLOAT_SIZE, "fpq"),
    "inputs_quant_auto_fallback": setting(FLAG, "inputs_quant_auto_fallback"),
}

LAYER_FIELDS: Mapping[str, Field] = {
    **_COMMON,
    "fake": setting(FLAG, "fake"),
    "make_identity": setting(FLAG, "make_identity"),
    "quantize_inputs": setting(FLAG, "quantize_inputs"),
    "input_overrides": _inputs,
}
"""The keys of one override."""

QUANTIZER_FIELDS: Mapping[str, Field] = {
    "bits_parameters": setting(_bits, "bits_weights"),
    **_COMMON,
    "bits_accum": setting(whole(2, 32, null=32), "bits_accum"),
    "model_activation_stats": setting(_PATH, "model_activation_stats"),
    "save_fp_weights": setting(FLAG, "save_fp_weights"),
    "also_clip_weights": setting(FLAG, "also_clip_weights"),
}
"""The arguments of the quantizer itself, besides its overrides."""


def _number(number: Number) -> Value:
    """The number that a correction takes; null means that it is not done."""
    return values.real(number.interval).or_null("or null for none")


def _switch(name: str, correction: CorrectionFlag) -> Field:
    return setting(_number(correction.number) if correction.number else FLAG, name)


_COUNT = whole(1, 10**9, null=None)

CORRECTION_FIELDS: Mapping[str, Field] = {
    **{name: _switch(name, each) for name, each in CORRECTION_FLAGS.items() if each.of_float},
    "data_free": setting(FLAG, "data_free"),
    "rounding": setting(values.choice(ROUNDINGS), "rounding"),
    **{name: _switch(name, each) for name, each in CORRECTION_FLAGS.items() if not each.of_float and not each.choice},
    "bias_correction": setting(values.choice(BIAS_CORRECTIONS), "bias_correction"),
    "images": setting(_COUNT, "images"),
    "iterations": setting(_COUNT, "iterations"),
}
"""The keys of the section `corrections`: those that `PtqArgs.with_settings` takes, each with the values of its flag."""
