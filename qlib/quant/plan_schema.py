"""What a plan file may hold: strict reading of its tree, with every mistake at once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlib.errors import ConfigError, did_you_mean
from qlib.graph.kinds import KINDS, LAYER_KINDS
from qlib.quant.clip_names import CLIP_NAMES, CLIP_PARAMETERS, HISTOGRAM_CLIPS, ClipParameters
from qlib.quant.plan import LayerPlan, Plan, TensorPlan, WeightPlan
from qlib.quant.spec import MODES, QuantSpec
from qlib.values import FLAG, Interval, Value, among, choice, real, text, whole
from qlib.yaml_tree import Node

__all__ = ["HEADER", "SCALARS", "VERSION", "plan_from_node"]

HEADER = "qlib_plan"
VERSION = 1


_LARGEST = 3.4e38  # of float32: beyond it a scale is infinite
_NUMBER = real(Interval(-_LARGEST, _LARGEST), f"a number such as 0.5 or 1.0e-5, within +-{_LARGEST:g}")
_BITS, _MODE = whole(2, 16), choice(MODES, any_case=False)
_NODE = Value(lambda raw: raw, "")

_CLIP_NUMBERS = {
    key.removeprefix("clip_"): key
    for key, each in CLIP_PARAMETERS.items()
    if each.method in CLIP_NAMES and each.method not in HISTOGRAM_CLIPS
}
"""The parameters of clip methods that a dynamic plan can have, by their names in its tensors -> their keys."""
_CLIP = choice((*CLIP_NAMES, "lapq", "learned"), any_case=False)
_TENSOR = {
    "bits": whole(1, 16),
    "mode": _MODE,
    "clip": _CLIP,
    "min": _NUMBER,
    "max": _NUMBER,
    **{name: real(CLIP_PARAMETERS[key].interval) for name, key in _CLIP_NUMBERS.items()},
    "pow2": FLAG,
}
_WEIGHT = {
    "bits": _BITS,
    "mode": _MODE,
    "per_channel": FLAG,
    "clip": _CLIP,
    "min": _NODE,
    "max": _NODE,
    "pow2": FLAG,
    "raised": whole(0),
}
SCALARS: Mapping[str, Value] = {
    "bits_bias": whole(2, 32),
    "bits_accum": whole(2, 32),
    "scale_approx_bits": whole(1, 31).or_null("or null"),
    "float_bits": among(16, 32, 64).or_null("or null"),
    "note": text("text", empty=True),
}
"""The fields of `LayerPlan` that are no tensors."""
_LAYER = {"kind": choice(LAYER_KINDS, any_case=False), "inputs": _NODE, "weight": _NODE, "output": _NODE, **SCALARS}


def plan_from_node(root: Node) -> Plan:
    """The plan of a file's tree.

    Raises:
        ConfigError: every mistake, each as `file:line: sentence`.
    """
    reader = _Reader([])
    plan = reader.plan(root)
    if reader.problems:
        raise ConfigError(reader.problems)
    return plan


@dataclass
class _Reader:
    """Reads nodes and collects problems; what it returns is only of use where there were none."""

    problems: list[str]
    dynamic: bool = False

    def plan(self, root: Node) -> Plan:
        """The whole file."""
        weights: str | None = None
        top = self._children(root, "the file", {HEADER: _NODE, "layers": _NODE}, (HEADER, "layers"))
        if HEADER in top:
            weights_file = text("the name of a file beside this one")
            known = {"version": whole(VERSION, VERSION), "dynamic": FLAG, "weights": weights_file}
            header = self._values(top[HEADER], HEADER, known, ("version", "dynamic"))
            self.dynamic = header.get("dynamic") is True
            weights = header.get("weights")
        layers = self._mapping(top["layers"], "layers") if "layers" in top else {}
        return Plan({name: self._layer(name, node) for name, node in layers.items()}, self.dynamic, weights)

    def _layer(self, name: str, node: Node) -> LayerPlan:
        what = f"layer {name!r}"
        entries = node.mapping or {}
        kind = str(entries["kind"].value) if "kind" in entries else ""
        required = ["kind", "inputs"]
        if kind in LAYER_KINDS:
            known = KINDS[kind]
            required += ["weight"] * known.weighted + ["output"] * known.has_output_grid
        found = self._children(node, what, _LAYER, required)
        values: dict[str, Any] = {key: child.value for key, child in found.items() if key in ("kind", *SCALARS)}
        if "inputs" in found:
            values["inputs"] = self._inputs(found["inputs"], what)
        if "weight" in found:
            values["weight"] = self._weight(found["weight"], what)
        if "output" in found:
            values["output"] = self._tensor(found["output"], f"the output of {what}")
        self._conflicts(node, name, values)
        return LayerPlan(**{"kind": "", **values})

    def _conflicts(self, node: Node, name: str, values: Mapping[str, Any]) -> None:
        """Settings that are allowed one by one, but of which one would have no effect."""
        kind = values.get("kind", "")
        weighted, gridded = (KINDS[kind].weighted, KINDS[kind].has_output_grid) if kind else (True, True)
        weight, output = values.get("weight") is not None, values.get("output") is not None
        conflicts = (
            (weight and not weighted, "weight", f"a layer of kind {kind} has no weight; remove it"),
            (output and not gridded, "output", f"kind {kind} keeps its input's grid; remove output"),
            (output and self.dynamic, "output", "a dynamic plan leaves outputs in float; write null"),
            (weight and values.get("float_bits"), "float_bits", "its weight is in integers; remove one of the two"),
        )
        for conflict, key, sentence in conflicts:
            if conflict:
                self._problem(node.where_key(key), f"{key} of layer {name!r} has no effect: {sentence}")

    def _inputs(self, node: Node, what: str) -> tuple[TensorPlan | None, ...]:
        if not isinstance(node.value, tuple):
            self._problem(
                node.where, f"inputs of {what} is {node}; allowed: a list of one tensor or null for each input"
            )
            return ()
        return tuple(self._tensor(item, f"input {index} of {what}") for index, item in enumerate(node.value))

    def _tensor(self, node: Node, what: str) -> TensorPlan | None:
        if node.value is None:
            return None
        required = ("bits", "mode") if self.dynamic else ("bits", "mode", "min", "max")
        values = self._values(node, what, _TENSOR, required)
        spec = self._spec(node, values, what)
        for key in ("min", "max"):
            if self.dynamic and key in values:
                self._problem(node.where_key(key), f"{what}: a dynamic plan has no ranges; remove {key}")
        for key in ("min", "max"):
            if key in values:
                values[key] = float(values[key])
        parameters = {key: float(values.pop(name)) for name, key in _CLIP_NUMBERS.items() if name in values}
        if values.get("min", -math.inf) > values.get("max", math.inf):
            self._problem(
                node.where_key("min"), f"min {values['min']} of {what} is above max {values['max']}; swap them"
            )
        if self.dynamic and values.get("clip") in HISTOGRAM_CLIPS:
            others = ", ".join(name for name in CLIP_NAMES if name not in HISTOGRAM_CLIPS)
            sentence = f"clip {values['clip']} of {what} needs histograms, and a dynamic plan has none; use {others}"
            self._problem(node.where_key("clip"), sentence)
        clip = str(values.get("clip"))
        for key in ClipParameters(parameters).lacks(clip) if self.dynamic else ():
            needed = f"{key.removeprefix('clip_')}, a number {CLIP_PARAMETERS[key].interval}"
            self._problem(node.where, f"{what}: clip {clip} needs {needed}")
        return TensorPlan(spec, **values, clip_parameters=tuple(parameters.items()))

    def _spec(self, node: Node, values: dict[str, Any], what: str) -> QuantSpec:
        """Takes out of `values` the keys that spell the format."""
        mode, bits, pow2 = values.pop("mode", "sym"), values.pop("bits", 8), values.pop("pow2", False)
        axis = 0 if values.pop("per_channel", False) else None
        if bits == 1 and mode != "asym_u":
            allowed = f"{_BITS.allowed}, or 1 with mode asym_u"
            self._problem(node.where_key("bits"), f"bits of {what} is 1; allowed: {allowed}")
            bits = 2
        return QuantSpec.of_mode(mode, bits, axis, pow2)

    def _weight(self, node: Node, what: str) -> WeightPlan | None:
        if node.value is None:
            return None
        what = f"the weight of {what}"
        found = self._children(node, what, _WEIGHT, ("bits", "mode"))
        values: dict[str, Any] = {key: child.value for key, child in found.items() if key not in ("min", "max")}
        ends: dict[str, tuple[float, ...]] = {
            key: self._ends(found[key], f"{key} of {what}") for key in ("min", "max") if key in found
        }
        values |= ends
        if len(ends) == 1 or len({len(end) for end in ends.values()}) > 1:
            self._problem(node.where, f"{what} needs a min for each max; give both, or none for the weight's own range")
            return None
        if ends and not all(low <= high for low, high in zip(*ends.values(), strict=True)):
            self._problem(node.where, f"{what} has a min above its max; swap them")
        if ends and not values.get("per_channel") and len(ends["min"]) > 1:
            self._problem(node.where, f"{what} has {len(ends['min'])} ranges; give one, or per_channel: true")
        return WeightPlan(self._spec(node, values, what), **values)

    def _ends(self, node: Node, what: str) -> tuple[float, ...]:
        """The lower or upper ends of a weight's ranges: a list of numbers."""
        items = node.value if isinstance(node.value, tuple) else ()
        if not items or not all(_NUMBER.accepts(item.value) for item in items):
            self._problem(node.where, f"{what} is {node}; allowed: a list of numbers, one for each range")
            return ()
        return tuple(float(item.value) for item in items)  # type: ignore[arg-type]

    def _values(self, node: Node, what: str, known: Mapping[str, Value], required: Sequence[str]) -> dict[str, Any]:
        """The values of a mapping that are allowed."""
        return {key: child.value for key, child in self._children(node, what, known, required).items()}

    def _children(self, node: Node, what: str, known: Mapping[str, Value], required: Sequence[str]) -> dict[str, Node]:
        """The entries of a mapping whose key is known and whose value is allowed."""
        entries = self._mapping(node, what)
        found: dict[str, Node] = {}
        for key, child in entries.items():
            if key not in known:
                hint = did_you_mean(key, known)
                allowed = ", ".join(known)
                self._problem(node.where_key(key), f"unknown key {key!r} in {what}; allowed: {allowed}{hint}")
            elif not known[key].accepts(child.value):
                hint = known[key].hint(child.value)
                self._problem(child.where, f"{key} of {what} is {child}; allowed: {known[key].allowed}{hint}")
            else:
                found[key] = child
        if node.mapping is not None:
            for key in required:
                if key not in entries:
                    remedy = "add it, with null for float" if key in ("weight", "output") else "add it"
                    self._problem(node.where, f"{what} lacks {key!r}; {remedy}")
        return found

    def _mapping(self, node: Node, what: str) -> Mapping[str, Node]:
        if node.mapping is None:
            self._problem(node.where, f"{what} is {node}; allowed: a mapping of names to values")
        return node.mapping or {}

    def _problem(self, where: str, sentence: str) -> None:
        self.problems.append(f"{where}: {sentence}")
