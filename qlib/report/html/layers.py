"""The layers of a run on its page: the strip of bars, and the table that sorts and filters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qlib.report.html.charts import histogram, sparkline, strip
from qlib.report.html.markup import Markup, join, tag
from qlib.report.html.numbers import count, number, percent, size
from qlib.report.html.tables import Cell, figure_cell, heat, table
from qlib.report.record import RunReport
from qlib.report.record_parts import Layer, Placed
from qlib.search.sensitivity import Sensitivity

__all__ = ["layers_section", "sensitivity_section"]


def layers_section(report: RunReport) -> Markup | None:
    """All layers, in the order of the network; columns of which nothing is known are left out."""
    if not report.layers:
        return None
    placed = {each.layer: each for each in report.deployment.layers} if report.deployment is not None else {}
    columns = {title: cells for title, cells in _columns(report.layers, placed).items() if _is_known(cells)}
    rows = zip(*columns.values(), strict=True)
    caption = f"{len(report.layers)} layers, in the order of the network"
    return join([_strip(report.layers), table(tuple(columns), rows, caption, id_="layers"), _legend(columns)])


def _is_known(cells: Sequence[Cell]) -> bool:
    return any(cell.content not in ("", "-") for cell in cells)


def _columns(layers: Sequence[Layer], placed: Mapping[str, Placed]) -> dict[str, list[Cell]]:
    kernels = [placed.get(each.name) for each in layers]
    return {
        "Layer": [Cell(each.name) for each in layers],
        "Kind": [Cell(each.kind) for each in layers],
        "Output": [Cell("x".join(map(str, each.shape))) for each in layers],
        "MACs": [figure_cell(each.macs, count(each.macs) if each.macs else "") for each in layers],
        "Weights": [figure_cell(each.bytes, size(each.bytes) if each.bytes else "") for each in layers],
        "W bits": [_bits(each.weight_bits, each.channel_count > 0) for each in layers],
        "W grid": [Cell(_weight_grid(each)) for each in layers],
        "W SQNR, dB": [figure_cell(each.weight_sqnr, _known(each.weight_sqnr, 3)) for each in layers],
        "Channels": [Cell(_channels(each)) for each in layers],
        "A bits": [_bits(each.bits, False) for each in layers],
        "Range": [Cell(_range(each)) for each in layers],
        "Scale": [figure_cell(each.scale, _known(each.scale, 3)) for each in layers],
        "Zero point": [figure_cell(each.zero_point, _known(each.zero_point)) for each in layers],
        "Values": [Cell(_histogram(each)) for each in layers],
        "Clipped": [
            figure_cell(each.clipped, "" if each.clipped is None else percent(each.clipped, 2)) for each in layers
        ],
        "SQNR, dB": [figure_cell(each.sqnr, _known(each.sqnr, 3)) for each in layers],
        "Computes in": [Cell(_arithmetic(each)) for each in layers],
        "Kernel": [Cell(each.kernels if each is not None else "") for each in kernels],
        "Deployed": [Cell(_deployed(each)) for each in kernels],
        "Saturates without VNNI": [_saturates(each) for each in kernels],
    }


def _known(value: float | None, digits: int = 4) -> str:
    return "" if value is None else number(value, digits)


def _bits(bits: int | None, weighted: bool) -> Cell:
    return figure_cell(bits, "float" if bits is None and weighted else "" if bits is None else str(bits))


def _weight_grid(layer: Layer) -> str:
    if layer.weight_scale is None:
        return ""
    low, high = number(layer.weight_scale, 3), number(layer.weight_scale_max, 3)
    raised = f", {layer.weight_raised} raised for int32" if layer.weight_raised else ""
    return f"{layer.weight_mode}, scale {low}{'' if low == high else f' to {high}'}{raised}"


def _channels(layer: Layer) -> Markup | str:
    if not layer.channels:
        return ""
    label = f"largest weight of {layer.channel_count} channels, up to {number(max(layer.channels), 3)}"
    dead = tag("span", f"{layer.dead} dead", class_="bad") if layer.dead else None
    return join([sparkline(layer.channels, label), dead])


def _range(layer: Layer) -> str:
    if layer.bits is None:
        return ""
    ends = "each image's own" if layer.min is None else f"{number(layer.min, 3)} to {number(layer.max, 3)}"
    return f"{layer.mode}, {layer.clip}: {ends}"


def _histogram(layer: Layer) -> Markup | str:
    if layer.histogram is None:
        return ""
    return histogram(layer.histogram, layer.min, layer.max, layer.scale, layer.bits)


def _arithmetic(layer: Layer) -> str:
    if layer.integer:
        return "integers"
    return f"float: {layer.why_float}" if layer.why_float else ""


def _deployed(placed: Placed | None) -> str:
    if placed is None:
        return ""
    kind = "integers" if placed.integer else "float"
    return f"{kind}: {placed.why}" if placed.why else kind


def _saturates(placed: Placed | None) -> Cell:
    if placed is None or placed.saturated == 0 or not placed.pairs_at_risk:
        return Cell("" if placed is None else "never", 0.0)
    if placed.saturated is None:
        return Cell(f"can, {placed.pairs_at_risk} pairs", 0.0)
    return Cell(f"{percent(placed.saturated, 2)} of sums", placed.saturated)


def _strip(layers: Sequence[Layer]) -> Markup:
    """Bits, multiply-accumulates, bytes, and the error of the weights, as bars."""
    rows: dict[str, list[float | None]] = {
        "bits of weights": [each.weight_bits for each in layers],
        "bits of activations": [each.bits for each in layers],
        "multiply-accumulates": [each.macs for each in layers],
        "bytes of weights": [each.bytes for each in layers],
        "relative error of weights": [_error(each.weight_sqnr) for each in layers],
        "relative error of outputs, all before quantized": [_error(each.sqnr) for each in layers],
    }
    known = {title: values for title, values in rows.items() if any(values)}
    names = [each.name for each in layers]
    chart = strip(known, names, names)
    return tag("figure", tag("div", chart, class_="scroll", tabindex=0, role="region", aria_label="Strip of layers"))


def _error(sqnr: float | None) -> float | None:
    """The root of noise over signal: 20 dB are 0.1."""
    return None if sqnr is None else 10 ** (-sqnr / 20)


def _legend(columns: Mapping[str, object]) -> Markup:
    told = {
        "Values": "counts of the output's values, as square roots; lines at both ends of the range, ticks at its codes"
        " where they are 16 or fewer",
        "Channels": "the largest magnitude of each output channel's weights",
        "W SQNR, dB": "energy of the weights over that of their rounding errors",
        "SQNR, dB": "energy of the output over that of its error, all layers up to it quantized, on 8 images",
        "Clipped": "the share of values outside the range",
        "Weights": "bytes of weights at their bits, and of biases",
    }
    return tag("p", " ".join(f"{title}: {text}." for title, text in told.items() if title in columns), class_="soft")


def sensitivity_section(report: RunReport) -> Markup | None:
    """What few bits in one layer alone lose: a heat map, the most sensitive layers first."""
    rows = report.sensitivity
    if not rows:
        return None
    bits = sorted({row.bits for row in rows})
    found: dict[tuple[str, str], dict[int, Sensitivity]] = {}
    for row in rows:
        found.setdefault((row.layer, row.what), {})[row.bits] = row
    ordered = sorted(found.items(), key=lambda item: -max(row.divergence for row in item[1].values()))
    highest = max(row.divergence for row in rows)
    heads = (
        "Layer",
        "What",
        *(f"{each} bits" for each in bits),
        *(f"SQNR, dB, {each} bits" for each in bits),
    )
    cells = (
        (
            layer,
            what,
            *(heat(at[each].divergence, highest) if each in at else "" for each in bits),
            *(
                figure_cell(at[each].sqnr_logits, number(at[each].sqnr_logits, 3)) if each in at else ""
                for each in bits
            ),
        )
        for (layer, what), at in ordered
    )
    told = (
        "Divergence of the predictions from the float model, in nats, where one layer alone has few bits; and the"
        " signal-to-noise ratio of the logits."
    )
    return join([tag("p", told), table(heads, cells, "Sensitivity of each layer", id_="sensitivity")])
