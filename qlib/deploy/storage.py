"""What an ONNX file can hold of a plan: what is refused, what is stored in a wider type, which opset it needs."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from qlib.errors import ExportError
from qlib.lower.ops.weighted import ExactWeighted
from qlib.quant.plan import LayerPlan, Plan

__all__ = ["choose_opset", "refuse_unexportable", "storage_notes"]

_OPSET, _WIDE_OPSET = 20, 21


def choose_opset(plan: Plan | None, wanted: int | None) -> int:
    """The operator set of the file: the one wanted, else 20, or 21 for activations of more than 8 bits.

    Raises ExportError where the one wanted is too old for the plan.
    """
    wide = next((name for name, layer in (plan.layers if plan else {}).items() if _activation_bits(layer) > 8), None)
    if wide is None:
        return wanted or _OPSET
    if wanted is not None and wanted < _WIDE_OPSET:
        raise ExportError(
            f"--export-opset {wanted} has no 16-bit activations, which layer {wide!r} has;"
            f" use --export-opset {_WIDE_OPSET}, or --qe-bits-acts 8"
        )
    return wanted or _WIDE_OPSET


def _activation_bits(layer: LayerPlan) -> int:
    return max((tensor.spec.bits for tensor in (*layer.inputs, layer.output) if tensor is not None), default=0)


def refuse_unexportable(plan: Plan, exact: fx.GraphModule) -> None:
    """Raises ExportError, naming the first layer, for what ONNX's operators do not compute."""
    if plan.dynamic:
        raise ExportError(
            "a plan without fixed ranges cannot be exported: collect statistics with --qe-calibration,"
            " and quantize with --qe-stats-file"
        )
    modules = dict(exact.named_modules())
    for name, layer in plan.layers.items():
        reason = ""
        if layer.scale_approx_bits is not None:
            reason = "requantizes with an approximate factor (--qe-scale-approx-bits)"
        elif layer.bits_accum < 32 and _saturates(modules.get(name)):
            reason = f"has an accumulator of {layer.bits_accum} bits that can saturate (--qe-bits-accum)"
        elif layer.float_bits == 64:
            reason = "runs in float64 (fpq: 64)"
        if reason:
            raise ExportError(f"layer {name!r} cannot be exported: it {reason}, which no ONNX operator does; drop that")


def _saturates(module: object) -> bool:
    return not isinstance(module, ExactWeighted) or module.saturation is not None


def storage_notes(plan: Plan, opset: int) -> Iterator[str]:
    """A line for each bit-width that is stored in another type, or computed in float by ONNX Runtime."""
    weights, activations = dict[int, list[str]](), dict[int, list[str]]()
    for name, layer in plan.layers.items():
        if layer.weight is not None:
            weights.setdefault(layer.weight.spec.bits, []).append(name)
        if (bits := _activation_bits(layer)) > 0:
            activations.setdefault(bits, []).append(name)
    for bits, names in sorted(weights.items()):
        if bits == 4 and opset >= _WIDE_OPSET:
            yield f"weights of 4 bits are stored as int4, which ONNX Runtime computes in float: {_listed(names)}"
        elif bits < 8:
            yield f"weights of {bits} bits are stored as int8 with the same codes: {_listed(names)}"
        elif bits > 8:
            yield f"weights of {bits} bits are stored in float32, and computed so: {_listed(names)}"
    for bits, names in sorted(activations.items()):
        if bits < 8:
            yield f"activations of {bits} bits are stored as uint8 with the same codes: {_listed(names)}"
        elif bits > 8:
            kind = "uint16, which ONNX Runtime computes in float"
            yield f"activations of {bits} bits are stored as {kind}: {_listed(names)}"


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{len(names)} layers ({shown}{', ...' if len(names) > 3 else ''})"
