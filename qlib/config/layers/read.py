"""The settings of post-training quantization from the flags, or from a YAML file as Distiller writes and reads it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from qlib.config.flags.groups import QuantArgs
from qlib.config.layers.keys import CORRECTION_FIELDS, LAYER_FIELDS, QUANTIZER_FIELDS, read_elsewhere, read_fields
from qlib.config.layers.patterns import pattern_problem
from qlib.config.layers.settings import LayerSettings, PtqConfig, Rule
from qlib.errors import ConfigError, did_you_mean
from qlib.files import expanded
from qlib.quant.clip_names import CLIP_PARAMETERS
from qlib.yaml_tree import MOST_SETTINGS, Node, load_yaml

__all__ = ["load_ptq_config", "ptq_config_from_flags"]

_CLASS = "PostTrainLinearQuantizer"
_SECTIONS = (
    "version",
    "pruners",
    "regularizers",
    "quantizers",
    "lr_schedulers",
    "extensions",
    "policies",
    "corrections",
)
_ARGUMENTS = {**QUANTIZER_FIELDS, "class": read_elsewhere, "overrides": read_elsewhere}


def ptq_config_from_flags(qe: QuantArgs, given: frozenset[str] = frozenset()) -> PtqConfig:
    """The settings that the --qe flags stand for; their values were checked by the command line.

    `given` holds the flags the user wrote, such as ``--qe-mode``: the others are defaults. The names after
    --qe-no-quant-layers and --qe-no-clip-layers are regular expressions; the former win.

    >>> flags = QuantArgs(bits_acts=6, no_quant_layers=("fc",))
    >>> config = ptq_config_from_flags(flags, frozenset({"--qe-bits-acts"}))
    >>> config.defaults.bits_activations, dict(config.defaults.origin), config.rules[0].pattern
    (6, {'bits_activations': '--qe-bits-acts'}, 'fc')

    Raises:
        ConfigError: a layer name is not a regular expression.
    """
    table: dict[str, tuple[object, str]] = {
        "bits_activations": (qe.bits_acts, "--qe-bits-acts"),
        "bits_weights": (qe.bits_wts, "--qe-bits-wts"),
        "bits_accum": (qe.bits_accum, "--qe-bits-accum"),
        "mode_activations": (qe.mode_acts or qe.mode, "--qe-mode-acts" if qe.mode_acts else "--qe-mode"),
        "mode_weights": (qe.mode_wts or qe.mode, "--qe-mode-wts" if qe.mode_wts else "--qe-mode"),
        "clip_acts": (qe.clip_acts, "--qe-clip-acts"),
        **{key: (value, CLIP_PARAMETERS[key].flag) for key, value in qe.clip_parameters.items()},
        "clip_wts": (qe.clip_wts, "--qe-clip-wts"),
        "scale": (qe.scale, "--qe-scale"),
        "per_channel_wts": (qe.per_channel, "--qe-per-channel"),
        "scale_approx_mult_bits": (qe.scale_approx_bits, "--qe-scale-approx-bits"),
    }
    origin = {setting: flag for setting, (_, flag) in table.items() if flag in given}
    rules = [
        Rule(pattern, settings, dict.fromkeys(settings, flag), flag, exact=False)
        for flag, patterns, settings in (
            ("--qe-no-quant-layers", qe.no_quant_layers, {"bits_activations": 0, "bits_weights": 0}),
            ("--qe-no-clip-layers", qe.no_clip_layers, {"clip_acts": "none"}),
        )
        for pattern in patterns
    ]
    problems = [f"{rule.where}: {problem}" for rule in rules if (problem := pattern_problem(rule.pattern))]
    if problems:
        raise ConfigError(problems)
    defaults = LayerSettings().with_settings({setting: value for setting, (value, _) in table.items()}, origin)
    return PtqConfig(defaults, tuple(rules), qe.stats_file, qe.dynamic, qe.save_fp_weights)


def load_ptq_config(path: str | Path) -> PtqConfig:
    """The settings in a file: those of its first component of class PostTrainLinearQuantizer, in whatever section.

    Without `model_activation_stats` quantization is dynamic; its path is relative to the YAML file, else to the
    current folder.

    Raises:
        ConfigError: every mistake in the file, each as `file:line: sentence`.
    """
    root = load_yaml(path, MOST_SETTINGS)
    problems: list[str] = []
    component = _find_quantizer(root, problems)
    if component is None:
        raise ConfigError(problems)
    settings, places = read_fields(component, _ARGUMENTS, problems)
    asked = (root.mapping or {}).get("corrections")
    corrections = {} if asked is None else read_fields(asked, CORRECTION_FIELDS, problems, "corrections")[0]
    _check_float_size(component, problems)
    rules = tuple(_read_rules(component, problems))
    stats_file = _find_stats(component, settings.pop("model_activation_stats", None), problems)
    save = bool(settings.pop("save_fp_weights", False))
    notes = [f"{where}: {what} has no effect on this quantization" for where, what in _others(root, component)]
    if settings.pop("also_clip_weights", False):
        notes.append(f"{places['also_clip_weights']}: also_clip_weights acts only in a search for the best clipping")
    if problems:
        raise ConfigError(problems)
    defaults = LayerSettings().with_settings(settings, {name: _short(places[name]) for name in settings})
    return PtqConfig(defaults, rules, stats_file, stats_file is None, save, tuple(notes), corrections)


def _others(root: Node, quantizer: Node) -> Iterator[tuple[str, str]]:
    """Place and name of the sections and quantizers that are not `quantizer`."""
    for section, components in (root.mapping or {}).items():
        if section not in ("version", "quantizers", "corrections"):
            yield root.where_key(section), f"section {section!r}"
        elif section == "quantizers":
            for name, component in (components.mapping or {}).items():
                if component is not quantizer:
                    yield components.where_key(name), f"quantizer {name!r}"


def _find_quantizer(root: Node, problems: list[str]) -> Node | None:
    """The component of our class; problems for unknown sections, and for there being no such component.

    A component whose class is misspelt is a problem, and is returned so that the rest of it is checked.
    """
    allowed = ", ".join(_SECTIONS)
    if root.mapping is None:
        problems.append(f"{root.where}: the file holds {root}; allowed: a mapping of the sections {allowed}")
        return None
    for name in root.mapping:
        if name not in _SECTIONS:
            hint = did_you_mean(name, _SECTIONS)
            problems.append(f"{root.where_key(name)}: unknown section {name!r}; allowed: {allowed}{hint}")
    candidates = [
        (component, component.mapping["class"])
        for section in root.mapping.values()
        for component in (section.mapping or {}).values()
        if component.mapping is not None and "class" in component.mapping
    ]
    for component, name_node in candidates:
        if name_node.value == _CLASS:
            return component
    if not candidates:
        problems.append(f"{root.where}: the file holds no quantizer; add one of class {_CLASS} under 'quantizers'")
    for component, name_node in candidates:
        if hint := did_you_mean(str(name_node.value), [_CLASS]):
            problems.append(f"{name_node.where}: unknown class {name_node}; allowed: {_CLASS}{hint}")
            return component
    problems += [f"{node.where}: class {node} does not quantize after training; use {_CLASS}" for _, node in candidates]
    return None


def _read_rules(component: Node, problems: list[str]) -> Iterator[Rule]:
    overrides = (component.mapping or {}).get("overrides")
    if overrides is None or overrides.value is None:
        return
    if overrides.mapping is None:
        problems.append(f"{overrides.where}: overrides is {overrides}; allowed: a mapping of layer names to settings")
    for pattern, node in (overrides.mapping or {}).items():
        where = overrides.where_key(pattern)
        if problem := pattern_problem(pattern):
            problems.append(f"{where}: {problem}")
        settings, places = read_fields(node, LAYER_FIELDS, problems)
        _check_float_size(node, problems)
        yield Rule(pattern, settings, {name: _short(place) for name, place in places.items()}, where)


def _check_float_size(node: Node, problems: list[str]) -> None:
    """fp16 and fpq_module say the same thing and must agree."""
    entries = node.mapping or {}
    if "fp16" in entries and "fpq_module" in entries:
        half, size = entries["fp16"], entries["fpq_module"]
        if (size.value == 16) != (half.value is True):
            problems.append(
                f"{node.where_key('fpq_module')}: fpq_module is {size} but fp16 is {half}; keep one of them"
            )


def _find_stats(component: Node, name: object, problems: list[str]) -> Path | None:
    if name is None:
        return None
    given = expanded(str(name))
    for candidate in (Path(component.file).parent / given, given):
        if candidate.is_file():
            return candidate
    where = component.where_key("model_activation_stats")
    beside = Path(component.file).parent
    problems.append(
        f"{where}: model_activation_stats {str(given)!r} is no file, in {str(beside)!r} or here; collect it"
    )
    return None


def _short(place: str) -> str:
    """`a/b.yaml:3` as `b.yaml:3`."""
    return Path(place).name
