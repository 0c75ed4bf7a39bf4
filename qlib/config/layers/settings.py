"""The settings of post-training quantization: of one layer, of a rule for some layers, of a whole run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qlib.config.layers.aliases import spellings_of
from qlib.config.layers.patterns import SlowPattern, matching, pattern_problem
from qlib.errors import ConfigError
from qlib.quant.clip_names import CLIP_DEFAULTS, CLIP_PARAMETERS, ClipParameters
from qlib.quant.spec import QuantSpec

__all__ = ["LayerSettings", "PtqConfig", "Rule"]


@dataclass(frozen=True)
class LayerSettings:
    """All settings of one layer, each with a value; `origin` tells where a value that is no default was set.

    Bits of 0 leave activations or weights in float; `fpq` = 16, 32 or 64 runs the layer in floats of that size.
    A setting is a field of this class, or the key of a clip parameter. `input_overrides[i]` is either
    ``{"from_output": True}`` or the settings that differ for input i.
    """

    bits_activations: int = 8
    bits_weights: int = 8
    bits_bias: int = 32
    bits_accum: int = 32
    mode_activations: str = "sym"
    mode_weights: str = "sym"
    clip_acts: str = "none"
    clip_parameters: ClipParameters = CLIP_DEFAULTS
    clip_wts: str = "none"
    scale: str = "float"
    clip_half_range: bool = False
    per_channel_wts: bool = False
    scale_approx_mult_bits: int | None = None
    fpq: int | None = None
    fake: bool = False
    make_identity: bool = False
    quantize_inputs: bool = True
    inputs_quant_auto_fallback: bool = True
    input_overrides: Mapping[int, Mapping[str, object]] = field(default_factory=dict)
    origin: Mapping[str, str] = field(default_factory=dict)

    def origin_of(self, setting: str) -> str:
        """Where a setting came from: a flag, `file:line`, or `default`.

        >>> settings = LayerSettings(origin={"clip_acts": "--qe-clip-acts"})
        >>> settings.origin_of("clip_acts"), settings.origin_of("fpq")
        ('--qe-clip-acts', 'default')
        """
        return self.origin.get(setting, "default")

    @property
    def spec_activations(self) -> QuantSpec:
        """The grid of the layer's activations, whose bits are not 0."""
        return QuantSpec.of_mode(self.mode_activations, self.bits_activations, pow2=self.pow2)

    @property
    def spec_weights(self) -> QuantSpec:
        """The grid of the layer's weight, whose bits are not 0; its output channels are axis 0.

        >>> LayerSettings(mode_weights="asym_u", per_channel_wts=True, scale="pow2").spec_weights
        QuantSpec(bits=8, signed=False, symmetric=False, restricted=False, axis=0, pow2=True)
        """
        axis = 0 if self.per_channel_wts else None
        return QuantSpec.of_mode(self.mode_weights, self.bits_weights, axis, self.pow2)

    @property
    def pow2(self) -> bool:
        """Whether scales are powers of two."""
        return self.scale == "pow2"

    def of_input(self, index: int) -> LayerSettings:
        """The settings that input `index` is quantized with: those of the output, but for what its override says.

        >>> settings = LayerSettings(bits_activations=8, input_overrides={0: {"bits_activations": 4}})
        >>> settings.of_input(0).bits_activations, settings.of_input(1).bits_activations
        (4, 8)
        """
        override = self.input_overrides.get(index, {})
        return self.with_settings({key: value for key, value in override.items() if key != "from_output"}, {})

    def with_settings(self, settings: Mapping[str, object], origin: Mapping[str, str]) -> LayerSettings:
        """These settings with some replaced.

        >>> changed = LayerSettings().with_settings({"bits_weights": 4}, {"bits_weights": "a.yaml:7"})
        >>> changed.bits_weights, changed.origin_of("bits_weights")
        (4, 'a.yaml:7')
        >>> LayerSettings().with_settings({"clip_p": 3.0}, {}).clip_parameters["clip_p"]
        3.0
        """
        parameters: Any = {key: value for key, value in settings.items() if key in CLIP_PARAMETERS}
        fields: Any = {key: value for key, value in settings.items() if key not in CLIP_PARAMETERS}
        clip_parameters = self.clip_parameters | parameters
        return replace(self, **fields, clip_parameters=clip_parameters, origin={**self.origin, **origin})


@dataclass(frozen=True)
class Rule:
    """An override: settings for the layers whose whole name matches a regular expression.

    `lines` gives the place of each setting, `where` that of the rule: `file:line` or a flag. An `exact` rule whose
    pattern is a layer's very name beats rules that stand before it. A leading ``module.`` is tolerated, and a layer may
    be named as it is called elsewhere.
    """

    pattern: str
    settings: Mapping[str, object]
    lines: Mapping[str, str]
    where: str
    exact: bool = True

    @property
    def spellings(self) -> tuple[str, str]:
        """The pattern as written, and without a leading ``module.``."""
        return self.pattern, re.sub(r"^\^?module\\?\.", "", self.pattern)

    def matches(self, name: str) -> bool:
        """Whether the pattern matches the whole name.

        >>> rule = Rule("module.layer1[.].*", {}, {}, "a.yaml:3")
        >>> rule.matches("layer1.0.conv1"), rule.matches("layer10.conv1"), rule.matches("block.layer1.x")
        (True, False, False)
        """
        return bool(self.matched([name]))

    def matched(self, names: Iterable[str]) -> frozenset[str]:
        """Those of a model's names of layers that the pattern matches as a whole, in any of their spellings.

        >>> sorted(Rule(".*relu2", {}, {}, "a.yaml:3").matched(["layer1.0.relu", "layer1.0.relu_1", "layer1.1.relu2"]))
        ['layer1.0.relu_1', 'layer1.1.relu2']

        Raises:
            ConfigError: that takes more than a second.
        """
        own = {spelling: name for name, spellings in spellings_of(names).items() for spelling in spellings}
        try:
            found = [matching(each, own) for each in set(self.spellings) if not pattern_problem(each)]
        except SlowPattern as error:
            raise ConfigError(f"{self.where}: {error}") from None
        return frozenset(own[spelling] for each in found for spelling in each)

    def names(self, *spellings: str) -> bool:
        """Whether this is the rule for exactly the layer with these spellings."""
        return self.exact and not set(spellings).isdisjoint(self.spellings)


@dataclass(frozen=True)
class PtqConfig:
    """The settings of a whole run: defaults, and rules in order of precedence.

    `stats_file` is what the YAML file names; `notes` are sentences about what was read and has no effect;
    `corrections` are fields of `PtqArgs`.
    """

    defaults: LayerSettings = LayerSettings()
    rules: tuple[Rule, ...] = ()
    stats_file: Path | None = None
    dynamic: bool = False
    save_fp_weights: bool = False
    notes: tuple[str, ...] = ()
    corrections: Mapping[str, object] = field(default_factory=dict)
