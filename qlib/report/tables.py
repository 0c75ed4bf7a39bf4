"""Tables that a run prints: what is quantized how, where each setting came from, what stays in float."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from tabulate import tabulate

from qlib.config.layers.settings import LayerSettings
from qlib.graph import Graph, kind_of
from qlib.graph.cost import layer_macs
from qlib.graph.ir import layers, name_of
from qlib.graph.kinds import IN_FLOAT, layer_kind
from qlib.quant.arithmetic import float_reasons
from qlib.quant.plan import Plan, TensorPlan, WeightPlan

__all__ = ["arithmetic_lines", "plan_table", "settings_table"]

_MAX_NAMES = 3
_OF_WEIGHTS = ("bits_weights", "mode_weights", "per_channel_wts", "clip_wts")
_SHOWN = (
    *("bits_activations", "bits_weights", "mode_activations", "mode_weights", "clip_acts", "clip_wts"),
    *("per_channel_wts", "scale", "fpq", "input_overrides"),
)


def settings_table(graph: Graph, settings: Mapping[str, LayerSettings], absorbed: Mapping[str, str]) -> str:
    """One line a layer: name, kind, output shape, bits, mode, clip, and where what is not a default was set."""
    rows = []
    for node, module in layers(graph):
        name, kind = name_of(node), layer_kind(module)
        shape = _shape(node.meta.get("shape", ()))
        if name in absorbed:
            rows.append([name, kind.name, shape, "", "", "", "", f"computed by {absorbed[name]}"])
            continue
        if kind.keeps_grid:
            rows.append([name, kind.name, shape, "", "", "", "", "codes pass through"])
            continue
        s = settings[name]
        weighted = kind.weighted
        channel = " per channel" if weighted and s.per_channel_wts and s.bits_weights else ""
        mode = s.mode_activations if not weighted else f"{s.mode_weights}{channel} / {s.mode_activations}"
        mode += " pow2" * s.pow2
        rows.append(
            [
                name,
                kind.name,
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
    """One line a layer of a plan: name, kind, output shape, weight and output grids, and why it computes in float."""
    rows, reasons = [], float_reasons(graph, plan)
    for node, module in layers(graph):
        name = name_of(node)
        layer = plan.layers[name]
        rows.append(
            [
                name_of(node),
                kind_of(module),
                _shape(node.meta.get("shape", ())),
                _weight_grid(layer.weight),
                _grid(layer.output),
                reasons[name_of(node)],
            ]
        )
    headers = ["Name", "Kind", "Output", "Weight", "Activation", "Note"]
    return tabulate(rows, headers, tablefmt="psql", disable_numparse=True)


def _weight_grid(weight: WeightPlan | None) -> str:
    if weight is None:
        return ""
    raised = f", {weight.raised} raised for int32" if weight.raised else ""
    return f"{weight.spec.bits} {weight.spec.mode}{' per channel' * weight.per_channel}{raised}"


def _grid(tensor: TensorPlan | None) -> str:
    if tensor is None:
        return ""
    if tensor.min is None or tensor.max is None:
        return f"{tensor.spec.bits} {tensor.spec.mode} {tensor.clip}, each image's range"
    return f"{tensor.spec.bits} {tensor.spec.mode} {tensor.clip} {tensor.min:.4g} .. {tensor.max:.4g}"


def arithmetic_lines(graph: Graph, plan: Plan) -> Iterator[str]:
    """The share of multiply-accumulates in integers, how many layers they are of, and a line for each reason for float.

    `graph` is the folded one. Layers whose multiply-accumulates are not known are counted as layers alone.
    """
    reasons, macs = float_reasons(graph, plan), layer_macs(graph)
    known = {name: each or 0 for name, each in macs.items()}
    floats: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        if reason:
            floats.setdefault(reason, []).append(name)
    in_float = [name for names in floats.values() for name in names]
    layers_in_integers = f"{len(reasons) - len(in_float)} of {len(reasons)} layers"
    share = _percent(sum(known.values()) - sum(known[name] for name in in_float), sum(known.values()))
    yield f"{share} of the multiply-accumulates are computed in integers: {layers_in_integers}"
    if unknown := [name for name, each in macs.items() if each is None]:
        yield f"  not counted, as their multiply-accumulates are unknown: {_listed(unknown)}"
    for reason, names in floats.items():
        part = sum(known[name] for name in names)
        share_of_it = f" with {_percent(part, sum(known.values()))}" if part else ""
        yield f"  in float: {reason.removeprefix(f'{IN_FLOAT}: ')}: {_listed(names)}{share_of_it}"


def _percent(part: int, whole: int) -> str:
    """100.0 % is all, and 0.0 % nothing.

    >>> _percent(99_999, 100_000), _percent(1, 100_000), _percent(0, 0)
    ('99.9 %', '0.1 %', '0.0 %')
    """
    share = 100 * part / max(whole, 1)
    return f"{share if part in (0, whole) else min(max(share, 0.1), 99.9):.1f} %"


def _listed(names: Sequence[str]) -> str:
    """How many, and the first of them.

    >>> _listed(["a", "b"]), _listed(["conv"] * 9)
    ('2 layers (a, b)', '9 layers (conv, conv, conv, ...)')
    """
    shown = ", ".join(names[:_MAX_NAMES])
    more = ", ..." * (len(names) > _MAX_NAMES)
    return f"{len(names)} layer{'s' * (len(names) > 1)} ({shown}{more})"
