"""The settings of each layer as a YAML file that `--qe-config-file` takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import yaml

from qlib.config.layers.settings import LayerSettings, PtqConfig
from qlib.quant.clip_names import CLIP_PARAMETERS

__all__ = ["ptq_text"]

_KEYS = {"fpq": "fpq_module"}
_MODES = ("mode_activations", "mode_weights")
_OF_WEIGHTS = ("bits_weights", "per_channel_wts", "clip_wts")
_ONLY_ONCE = ("bits_accum",)


def ptq_text(
    config: PtqConfig, settings: Mapping[str, LayerSettings], weighted: set[str], stats_file: str | None, header: str
) -> str:
    """A PostTrainLinearQuantizer with the defaults of `config`, and an override for each layer that differs from them.

    `settings` are those of the layers that have any effect, `weighted` names those with weights.

    Law: loaded and resolved against the same layers, it gives the same settings.
    """
    defaults = config.defaults
    quantizer: dict[str, object] = {"class": "PostTrainLinearQuantizer"}
    quantizer |= _entries(defaults, LayerSettings(), ("bits_activations", "bits_weights"))
    quantizer["bits_parameters"] = quantizer.pop("bits_weights")
    if config.save_fp_weights:
        quantizer["save_fp_weights"] = True
    if stats_file is not None:
        quantizer["model_activation_stats"] = stats_file
    overrides = {
        name: _entries(each if name in weighted else _without_weights(each, defaults), defaults)
        for name, each in settings.items()
    }
    quantizer["overrides"] = {name: entries for name, entries in overrides.items() if entries}
    if not quantizer["overrides"]:
        del quantizer["overrides"]
    body = yaml.dump(
        {"quantizers": {"post_train_quantizer": quantizer}}, Dumper=_Dumper, sort_keys=False, allow_unicode=True
    )
    return "".join(f"# {line}\n" for line in header.splitlines()) + body


class _Dumper(yaml.SafeDumper):
    """Without anchors: equal values are written twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _without_weights(settings: LayerSettings, defaults: LayerSettings) -> LayerSettings:
    return replace(settings, **{name: getattr(defaults, name) for name in _OF_WEIGHTS})


def _entries(settings: LayerSettings, base: LayerSettings, always: tuple[str, ...] = ()) -> dict[str, object]:
    """What differs from `base`, by the keys of YAML."""
    found: dict[str, object] = {}
    once = () if always else _ONLY_ONCE
    for each in fields(LayerSettings):
        value = getattr(settings, each.name)
        if each.name in ("origin", *once) or (value == getattr(base, each.name) and each.name not in always):
            continue
        if each.name == "clip_parameters":
            now, was = value, base.clip_parameters
            found |= {key: now.get(key) for key in CLIP_PARAMETERS if now.get(key) != was.get(key)}
        elif each.name in _MODES:
            found["mode"] = {"activations": settings.mode_activations, "weights": settings.mode_weights}
        elif each.name == "input_overrides":
            found["input_overrides"] = {
                index: {"mode" if key == "mode_activations" else key: item for key, item in override.items()}
                for index, override in value.items()
            }
        else:
            found[_KEYS.get(each.name, each.name)] = value
    return found
