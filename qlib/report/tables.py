"""Tables that a run prints: what is quantized how, where each setting came from, what stays in float."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from tabulate import tabulate

from qlib.config.layers.read import LayerSettings
from qlib.graph import Graph, kind_of
from qlib.graph.ir import layers, name_of
from qlib.quant.plan import LayerPlan, Plan, TensorPlan

__all__ = ["float_layers", "plan_table", "settings_table"]

_PASSING = ("relu", "max_pool")
_WEIGHTED = ("conv", "conv_transpose", "linear", "embedding")
_OF_WEIGHTS = ("bits_weights", "mode_weights", "per_channel_wts", "clip_wts")
_SHOWN = (
    *("bits_activations", "bits_weights", "mode_activations", "mode_weights", "clip_acts", "clip_wts"),
    *("per_channel_wts", "scale", "fpq", "input_overrides"),
)


def settings_table(graph: Graph, settings: Mapping[str, LayerSettings], absorbed: Mapping[str, str]) -> str:
    """One line a layer: name, kind, output shape, bits, mode, clip, and where what is not a default was set."""
    rows = []
    for node, module in layers(graph):
        name, kind = name_of(node), kind_of(module)
        shape = _shape(node.meta.get("shape", ()))
        if name in absorbed:
            rows.append([name, kind, shape, "", "", "", "", f"computed by {absorbed[name]}"])
            continue
        if kind in _PASSING:
            rows.append([name, kind, shape, "", "", "", "", "codes pass through"])
            continue
        s = settings[name]
        weighted = kind in _WEIGHTED
        channel = " per channel" if weighted and s.per_channel_wts and s.bits_weights else ""
        mode = s.mode_activations if not weighted else f"{s.mode_weights}{channel} / {s.mode_activations}"
        mode += " pow2" * s.pow2
        rows.append(
            [
                name,
                kind,
                shape,
                _bits(s.bits_weights) if weighted else "",
                _activation_bits(s) if s.fpq is None else f"float{s.fpq}",
                mode,
                _clip(s, weighted),
                _origins(s, weighted),
            ]
        )
    headers = ["Name", "Kind", "Output", "W bits", "A bits", "Mode (weights / acts)", "Clip", "Set by"]
    return tabulate(rows, headers, tablefmt="psql", disable_numparse=True)


def _activation_bits(settings: LayerSettings) -> str:
    """Those of the output, and of inputs that have others."""
    bits = {index: settings.of_input(index).bits_activations for index in settings.input_overrides}
    others = [f", input {index}: {_bits(each)}" for index, each in bits.items() if each != settings.bits_activations]
    return "".join([_bits(settings.bits_activations), *others])


def _clip(settings: LayerSettings, weighted: bool) -> str:
    """How ranges are clipped, that of the weights first where it is not all of theirs."""
    clip = settings.clip_acts
    if clip == "n_std" and "clip_n_stds" in settings.clip_parameters:
        clip += f" {settings.clip_parameters['clip_n_stds']:g}"
    return f"{settings.clip_wts} / {clip}" if weighted and settings.clip_wts != "none" else clip


def _origins(settings: LayerSettings, weighted: bool) -> str:
    shown = [setting for setting in _SHOWN if weighted or setting not in _OF_WEIGHTS]
    places = dict.fromkeys(settings.origin_of(setting) for setting in shown)
    return ", ".join(place for place in places if place != "default") or "defaults"


def _bits(bits: int) -> str:
    return str(bits) if bits else "float"


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape[1:]))


def plan_table(graph: Graph, plan: Plan) -> str:
    """One line a layer of a plan: name, kind, output shape, weight and output grids."""
    rows = []
    for node, module in layers(graph):
        layer = plan.layers[name_of(node)]
        weight = layer.weight
        grid = (
            ""
            if weight is None
            else f"{weight.spec.bits} {weight.spec.mode}{' per channel' if weight.per_channel else ''}"
        )
        rows.append(
            [name_of(node), kind_of(module), _shape(node.meta.get("shape", ())), grid, _grid(layer.output), layer.note]
        )
    headers = ["Name", "Kind", "Output", "Weight", "Activation", "Note"]
    return tabulate(rows, headers, tablefmt="psql", disable_numparse=True)


def _grid(tensor: TensorPlan | None) -> str:
    if tensor is None:
        return ""
    if tensor.min is None or tensor.max is None:
        return f"{tensor.spec.bits} {tensor.spec.mode} {tensor.clip}, each image's range"
    return f"{tensor.spec.bits} {tensor.spec.mode} {tensor.clip} {tensor.min:.4g} .. {tensor.max:.4g}"


def float_layers(plan: Plan) -> Iterator[str]:
    """How many layers compute in integers, and a line for each that does not, with the reason."""
    floats = {name: layer for name, layer in plan.layers.items() if layer.note}
    yield f"{len(plan.layers) - len(floats)} layers compute in integers, {len(floats)} in float"
    reasons: dict[str, list[str]] = {}
    for name, layer in floats.items():
        reasons.setdefault(_reason(layer), []).append(name)
    for reason, names in reasons.items():
        yield f"  in float: {', '.join(names)} ({reason})"


def _reason(layer: LayerPlan) -> str:
    return f"{layer.kind}: {layer.note}" if layer.kind != "float_op" else layer.note
