"""The plan as a YAML file that people edit: ``layer_quant_params.yaml``.

::

    qlib_plan: {version: 1, dynamic: false}
    layers:
      conv1:
        kind: conv
        inputs:
          - {bits: 8, mode: asym_u, clip: none, min: -1.0, max: 1.0}  # scale 0.00784314, zero point 128
        weight: {bits: 8, mode: sym, per_channel: true}
        output: {bits: 8, mode: asym_u, clip: none, min: 0.0, max: 7.94}  # scale 0.0311373, zero point 0
      relu:
        kind: relu
        inputs: [null]

null stands for a tensor that stays float or, as an input, arrives quantized. The comments follow from the numbers
before them and are not read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml

from qlib.errors import ConfigError, StatsError, did_you_mean
from qlib.files import write_text
from qlib.graph.kinds import KINDS
from qlib.quant.plan import LayerPlan, Plan, TensorPlan, WeightPlan
from qlib.quant.plan_schema import HEADER, SCALARS, VERSION, plan_from_node
from qlib.stats.tensor_stats import LayerStats, ModelStats, TensorStats
from qlib.yaml_tree import load_yaml, parse_yaml

__all__ = ["check_plan", "is_plan_file", "plan_from_text", "plan_text", "read_plan", "stats_from_plan", "write_plan"]

_UNKNOWN = TensorStats(count=0, samples=0, min=float("nan"), max=float("nan"))
"""Stands for a tensor without a range; no grid can be made from it, so using it is an error that names the layer."""


def write_plan(path: str | Path, plan: Plan) -> None:
    """Writes the file, whole or not at all.

    Raises:
        StatsError: a range is NaN or infinite; the sentence names the layer.
        OutputError: the file cannot be written.
    """
    write_text(Path(path), plan_text(plan), "plan")


def plan_text(plan: Plan) -> str:
    """The file's text; the same plan gives the same text, and every number reads back as the same number.

    >>> from qlib.quant.spec import QuantSpec
    >>> tensor = TensorPlan(QuantSpec.of_mode("asym_u", 8), min=0.0, max=25.5)
    >>> print(plan_text(Plan({"add": LayerPlan("add", (None, tensor), output=tensor)})), end="")
    qlib_plan: {version: 1, dynamic: false}
    layers:
      add:
        kind: add
        inputs:
          - null
          - {bits: 8, mode: asym_u, clip: none, min: 0.0, max: 25.5}  # scale 0.1, zero point 0
        output: {bits: 8, mode: asym_u, clip: none, min: 0.0, max: 25.5}  # scale 0.1, zero point 0

    Raises:
        StatsError: a range is NaN or infinite; the sentence names the layer.
    """
    header: dict[str, object] = {"version": VERSION, "dynamic": plan.dynamic}
    header |= {} if plan.weights is None else {"weights": plan.weights}
    lines = [f"{HEADER}: {_flow(header)}", "layers:" + " {}" * (not plan.layers)]
    for name, layer in plan.layers.items():
        lines.append(f"  {_flow(name)}:")
        lines += [f"    {line}" for line in _layer_lines(name, layer)]
    return "\n".join(lines) + "\n"


def _layer_lines(name: str, layer: LayerPlan) -> Iterator[str]:
    yield f"kind: {_flow(layer.kind)}"
    if any(layer.inputs):
        yield "inputs:"
        yield from (f"  - {_tensor(f'input {i} of {name!r}', tensor)}" for i, tensor in enumerate(layer.inputs))
    else:
        yield f"inputs: {_flow(list(layer.inputs))}"
    kind = KINDS[layer.kind]
    if kind.weighted or layer.weight is not None:
        if layer.weight is not None and layer.weight.raised:
            yield "# raised: so many scales are larger than their weights ask for, so that int32 holds the sums"
        yield f"weight: {'null' if layer.weight is None else _flow(_weight(layer.weight))}"
    if kind.has_output_grid or layer.output is not None:
        yield f"output: {_tensor(f'the output of {name!r}', layer.output)}"
    for key in SCALARS:
        if getattr(layer, key) != getattr(LayerPlan, key):
            yield f"{key}: {_flow(getattr(layer, key))}"


def _tensor(what: str, tensor: TensorPlan | None) -> str:
    """One tensor on one line, with the scale and zero point that its range gives."""
    if tensor is None:
        return "null"
    numbers = {"min": tensor.min, "max": tensor.max}
    numbers |= {key.removeprefix("clip_"): value for key, value in tensor.clip_parameters}
    fields: dict[str, object] = {"bits": tensor.spec.bits, "mode": tensor.spec.mode, "clip": tensor.clip}
    fields |= {key: float(value) for key, value in numbers.items() if value is not None}
    fields |= {"pow2": True} if tensor.spec.pow2 else {}
    if tensor.min is None:
        return _flow(fields)
    try:
        grid = tensor.qparams()
    except ValueError as error:
        raise StatsError(
            f"the range {tensor.min} .. {tensor.max} of {what} cannot be quantized: {error}; collect the statistics"
            " again for this model, with --qe-calibration"
        ) from None
    return f"{_flow(fields)}  # scale {float(grid.scale):.6g}, zero point {int(grid.zero_point)}"


def _weight(weight: WeightPlan) -> dict[str, object]:
    """The fields of a weight; those that say nothing beyond its own range are left out."""
    spec, ends = weight.spec, {"min": weight.min, "max": weight.max}
    fields: dict[str, object] = {"bits": spec.bits, "mode": spec.mode, "per_channel": weight.per_channel}
    fields |= {"clip": weight.clip} if weight.clip != WeightPlan.clip else {}
    fields |= {"pow2": True} if spec.pow2 else {}
    fields |= {"raised": weight.raised} if weight.raised else {}
    return fields | {key: [float(end) for end in each] for key, each in ends.items() if each is not None}


def _flow(value: object) -> str:
    """A value as YAML, on one line.

    >>> print(_flow("layer1.0"), _flow("0"), _flow([1e-05, None]), _flow({"note": "a, b"}))
    layer1.0 '0' [1.0e-05, null] {note: 'a, b'}
    """
    style = '"' if isinstance(value, str) and not value.isprintable() else None
    text: str = yaml.safe_dump(
        value, default_flow_style=True, default_style=style, sort_keys=False, allow_unicode=True, width=float("inf")
    )
    return text.removesuffix("\n...\n").rstrip("\n")


def is_plan_file(path: str | Path) -> bool:
    """Whether the file has the header of a plan; False where it cannot be read: its reader will say why."""
    try:
        text = Path(path).read_bytes()
    except OSError:
        return False
    return re.search(rb"^(\xef\xbb\xbf)?[\"']?%s[\"']?\s*:" % HEADER.encode(), text, re.MULTILINE) is not None


def read_plan(path: str | Path) -> Plan:
    """Reads a plan file.

    Raises:
        ConfigError: every mistake in the file, each as `file:line: sentence`.
    """
    return plan_from_node(load_yaml(path))


def plan_from_text(text: str, source: str) -> Plan:
    """The plan of a file's text; `source` is what error messages call the file.

    Raises:
        ConfigError: every mistake in the text, each as `source:line: sentence`.
    """
    return plan_from_node(parse_yaml(text, source))


def stats_from_plan(plan: Plan) -> ModelStats:
    """The ranges of a plan as statistics: quantizing with clipping `none` or `avg` gives the same ranges again.

    A range is min and max, and their averages; mean, std and b are not known. A layer without ranges is left out; an
    input without one keeps its place, with a record of NaN that no grid can be made from.

    Raises:
        StatsError: the plan is dynamic, so that it holds no ranges.
    """
    if plan.dynamic:
        raise StatsError(
            "the plan is of dynamic quantization and holds no ranges; pass it with --qe-config-file,"
            " or collect statistics with --qe-calibration"
        )
    return ModelStats(
        {
            name: LayerStats(tuple(map(_stats, layer.inputs)), _stats(layer.output))
            for name, layer in plan.layers.items()
            if any((*layer.inputs, layer.output))
        }
    )


def _stats(tensor: TensorPlan | None) -> TensorStats:
    if tensor is None or tensor.min is None or tensor.max is None:
        return _UNKNOWN
    low, high = tensor.min, tensor.max
    return TensorStats(count=1, samples=1, min=low, max=high, avg_min=low, avg_max=high)


def check_plan(
    plan: Plan,
    layers: Mapping[str, tuple[str, int]],
    source: str = "the plan",
    channels: Mapping[str, int] | None = None,
) -> None:
    """Checks that a plan is of this graph: `layers` maps each layer's name to its kind and number of tensor inputs.

    `channels` has the output channels of those with weights: as many ranges has a weight with one for each channel.

    >>> check_plan(Plan({"conv": LayerPlan("conv", (None,))}), {"conv1": ("conv", 1)})
    Traceback (most recent call last):
    qlib.errors.ConfigError: 2 problems:
      the plan: layer 'conv' is not in the model; remove it; did you mean conv1?
      the plan: layer 'conv1' of the model is missing; write the plan again with --quantize-eval

    Raises:
        ConfigError: every layer that is missing, not in the model, or of another kind or number of inputs or channels.
    """
    problems = []
    for name, layer in plan.layers.items():
        if name not in layers:
            problems.append(f"layer {name!r} is not in the model; remove it{did_you_mean(name, layers)}")
            continue
        kind, inputs = layers[name]
        if layer.kind != kind:
            problems.append(f"layer {name!r} has kind {layer.kind!r}, but {kind!r} in the model; correct it")
        if len(layer.inputs) != inputs:
            problems.append(
                f"layer {name!r} lists {len(layer.inputs)} inputs, but has {inputs} in the model; correct it"
            )
        ranges, wanted = _ranges(layer), (channels or {}).get(name)
        if ranges is not None and wanted is not None and ranges != wanted:
            problems.append(
                f"the weight of layer {name!r} has {ranges} ranges, but {wanted} channels in the model; write the plan"
                " again with --quantize-eval"
            )
    for name in layers:
        if name not in plan.layers:
            problems.append(f"layer {name!r} of the model is missing; write the plan again with --quantize-eval")
    if problems:
        raise ConfigError([f"{source}: {problem}" for problem in problems])


def _ranges(layer: LayerPlan) -> int | None:
    """How many ranges stand for the channels of a layer's weight; None where it has none, or one for all."""
    weight = layer.weight
    return None if weight is None or weight.min is None or not weight.per_channel else len(weight.min)
