"""From the settings of a run to those of each layer."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from qlib.config.layers.aliases import spellings_of
from qlib.config.layers.patterns import pattern_problem
from qlib.config.layers.settings import LayerSettings, PtqConfig, Rule
from qlib.errors import ConfigError, did_you_mean
from qlib.quant.clip_names import CLIP_NAMES, CLIP_PARAMETERS, HISTOGRAM_CLIPS

__all__ = ["LayerInfo", "resolve", "wants_histograms"]

_OUTPUT_SETTINGS = (
    *("bits_activations", "mode_activations", "scale"),
    *("clip_acts", *CLIP_PARAMETERS, "clip_half_range"),
)
_WEIGHT_SETTINGS = ("bits_weights", "per_channel_wts", "clip_wts")

_Matches: TypeAlias = Sequence[tuple[Rule, frozenset[str]]]
"""Each rule with the names that it matches."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerInfo:
    """What the settings must know of a layer: name, kind (``conv``, ``add``, ...), weights, number of inputs."""

    name: str
    kind: str
    has_weight: bool
    inputs: int = 1


def resolve(
    config: PtqConfig, layers: Sequence[LayerInfo], absorbed: Mapping[str, str] | None = None
) -> dict[str, LayerSettings]:
    """The settings of each layer, in the order of `layers`.

    A rule whose pattern is the layer's very name wins; else the first whose pattern matches the whole name; else the
    defaults stand. `absorbed` maps a module that the graph fused away (batch-norm, ReLU) to the layer that computes
    it now (it may be listed in `layers` as well): where no rule matches that layer, the rule for its last absorbed
    module gives its output settings.

    >>> rules = (Rule("conv.*", {"bits_weights": 4}, {}, "a.yaml:9"), Rule("conv2", {}, {}, "a.yaml:11"))
    >>> layers = [LayerInfo("conv1", "conv", True), LayerInfo("conv2", "conv", True)]
    >>> {name: settings.bits_weights for name, settings in resolve(PtqConfig(rules=rules), layers).items()}
    {'conv1': 4, 'conv2': 8}

    Raises:
        ConfigError: all of: a rule that is no regular expression, matches no layer, or sets weights or inputs where
            there are none; a clip method without a parameter that it needs, or one that needs histograms where
            ranges are dynamic.
    """
    absorbed = absorbed or {}
    problems = [f"{rule.where}: {problem}" for rule in config.rules if (problem := pattern_problem(rule.pattern))]
    if problems:
        raise ConfigError(problems)
    names = [*(layer.name for layer in layers), *absorbed]
    matches = [(rule, rule.matched(names)) for rule in config.rules]
    winners = {name: _winner(matches, name, spellings) for name, spellings in spellings_of(names).items()}
    problems += _rule_problems(matches, layers, absorbed)
    problems += _input_problems(matches, layers)
    _warn_of_shadowed(matches, winners)
    resolved = {layer.name: _settings(config.defaults, layer.name, winners, absorbed) for layer in layers}
    problems += dict.fromkeys(problem for settings in resolved.values() for problem in _clip_problems(settings))
    if config.dynamic:
        problems += dict.fromkeys(problem for settings in resolved.values() for problem in _dynamic_problems(settings))
    if problems:
        raise ConfigError(problems)
    return resolved


def _winner(matches: _Matches, name: str, spellings: Sequence[str]) -> Rule | None:
    exact = next((rule for rule, _ in matches if rule.names(*spellings)), None)
    return exact or next((rule for rule, matched in matches if name in matched), None)


def _settings(
    defaults: LayerSettings, name: str, winners: Mapping[str, Rule | None], absorbed: Mapping[str, str]
) -> LayerSettings:
    rule = winners[name]
    if rule is not None:
        return defaults.with_settings(rule.settings, _origin(rule, rule.settings))
    stand_ins = [winners[module] for module, layer in absorbed.items() if layer == name]
    rule = next((rule for rule in reversed(stand_ins) if rule is not None), None)
    if rule is None:
        return defaults
    settings = {key: value for key, value in rule.settings.items() if key in _OUTPUT_SETTINGS}
    return defaults.with_settings(settings, _origin(rule, settings))


def _origin(rule: Rule, settings: Mapping[str, object]) -> dict[str, str]:
    return {setting: rule.lines.get(setting, rule.where) for setting in settings}


def _rule_problems(matches: _Matches, layers: Sequence[LayerInfo], absorbed: Mapping[str, str]) -> Iterator[str]:
    """A sentence for each rule that matches nothing, or sets weights on layers that all have none."""
    names = [layer.name for layer in layers]
    for rule, names_matched in matches:
        matched = [layer for layer in layers if layer.name in names_matched]
        if not names_matched:
            hint = did_you_mean(rule.spellings[1], names) or "; --check lists the layers"
            yield f"{rule.where}: {rule.pattern!r} matches no layer{hint}"
        if matched and not any(layer.has_weight or layer.name in absorbed for layer in matched):
            for setting in _WEIGHT_SETTINGS:
                if rule.settings.get(setting):
                    kinds = " and ".join(dict.fromkeys(layer.kind for layer in matched))
                    yield f"{rule.where}: {rule.pattern!r} sets {setting}, but {kinds} layers have none; remove it"


def _input_problems(matches: _Matches, layers: Sequence[LayerInfo]) -> Iterator[str]:
    """A sentence for each override of an input that none of the layers has that a rule matches."""
    for rule, names in matches:
        overrides = rule.settings.get("input_overrides")
        matched = [layer for layer in layers if layer.name in names]
        if not matched or not isinstance(overrides, Mapping):
            continue
        most = max(matched, key=lambda layer: layer.inputs)
        for index in overrides:
            if index >= most.inputs:
                where = rule.lines.get("input_overrides", rule.where)
                count = f"{most.inputs} input{'s' * (most.inputs != 1)}"
                yield f"{where}: input_overrides names input {index}, and {most.name} has {count}, from 0 on; remove it"


def _warn_of_shadowed(matches: _Matches, winners: Mapping[str, Rule | None]) -> None:
    """Logs each rule that matches layers but wins none of them."""
    winning = {id(rule) for rule in winners.values()}
    for rule, matched in matches:
        name = next((name for name in winners if name in matched), None)
        first = winners[name] if name else None
        if id(rule) not in winning and first is not None:
            _log.warning("%s: %r has no effect: %r (%s) wins wherever it matches", rule.where, rule.pattern,
                         first.pattern, first.where)  # fmt: skip


def _clip_problems(settings: LayerSettings) -> Iterator[str]:
    """A sentence for each parameter that a clip method of a layer, or the one of an input, lacks."""
    outputs, weights = settings.bits_activations and settings.clip_acts, settings.bits_weights and settings.clip_wts
    for setting, clip in (("clip_acts", outputs), ("clip_wts", weights)):
        for key in settings.clip_parameters.lacks(clip) if clip else ():
            needed, where = CLIP_PARAMETERS[key], settings.origin_of(setting)
            yield f"{where}: {setting} {clip} needs {key} {needed.interval} ({needed.flag} on the command line)"
    for index in (index for index, override in settings.input_overrides.items() if "clip_acts" in override):
        mine, where = settings.of_input(index), settings.origin_of("input_overrides")
        for key in mine.clip_parameters.lacks(mine.clip_acts):
            yield f"{where}: clip_acts {mine.clip_acts} of input {index} needs {key} {CLIP_PARAMETERS[key].interval}"


def _histogram_clips(settings: LayerSettings) -> Iterator[tuple[str, str]]:
    """Each setting that names a clip method that needs a histogram, and that method."""
    if settings.bits_activations and settings.clip_acts in HISTOGRAM_CLIPS:
        yield "clip_acts", settings.clip_acts
    for override in settings.input_overrides.values():
        if override.get("clip_acts") in HISTOGRAM_CLIPS:
            yield "input_overrides", str(override["clip_acts"])


def _dynamic_problems(settings: LayerSettings) -> Iterator[str]:
    others = ", ".join(name for name in CLIP_NAMES if name not in HISTOGRAM_CLIPS)
    for setting, clip in _histogram_clips(settings):
        yield (
            f"{settings.origin_of(setting)}: clip_acts {clip} needs histograms, and dynamic quantization has none; use"
            f" one of {others}, or statistics from --qe-calibration or --qe-stats-file"
        )


def wants_histograms(settings: Mapping[str, LayerSettings]) -> bool:
    """Whether a clip method of a layer needs a histogram.

    >>> wants_histograms({"conv1": LayerSettings(clip_acts="kl")}), wants_histograms({"conv1": LayerSettings()})
    (True, False)
    """
    return any(True for each in settings.values() for _ in _histogram_clips(each))
