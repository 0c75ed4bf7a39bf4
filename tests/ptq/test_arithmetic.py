"""What a run prints of the arithmetic of its layers, and what each costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlib.config.layers.settings import LayerSettings
from qlib.graph import FoldedGraph, capture, fold
from qlib.graph.cost import layer_costs, layer_macs
from qlib.graph.ir import layer_inputs, name_of
from qlib.graph.walk import producer_of, readers_of, sole_producer
from qlib.ptq.planner import layer_infos, plan_post_train_linear
from qlib.quant.plan import Plan
from qlib.report.tables import arithmetic_lines
from qlib.stats.collect import Collector
from qlib.stats.tensor_stats import ModelStats

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Branches(nn.Module):
    """Two convolutions, a batch-norm that none absorbs, an addition, and products that have no kind."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.pool, self.norm, self.fc = nn.MaxPool2d(2), nn.BatchNorm2d(4), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.first(x).relu())
        x = self.norm(self.second(x) + x)
        return self.fc(torch.einsum("nchw,ncij->nhwi", x, x).flatten(2).mean(1))


def branches() -> FoldedGraph:
    torch.manual_seed(0)
    return fold(Branches().eval(), IMAGES[:2])


def plan_of(folded: FoldedGraph, settings: Mapping[str, Any], layers: Mapping[str, Mapping[str, Any]]) -> Plan:
    collector = Collector(folded.graph)
    collector.update(IMAGES)
    defaults = LayerSettings().with_settings({"mode_activations": "asym_u", **settings}, {})
    each = {
        info.name: defaults.with_settings(layers.get(info.name, {}), dict.fromkeys(layers.get(info.name, {}), "--flag"))
        for info in layer_infos(folded.graph)
    }
    return plan_post_train_linear(folded.graph, each, ModelStats(collector.result()), folded.folded)


@pytest.mark.parametrize(
    ("settings", "layers", "lines"),
    [
        pytest.param(
            {},
            {},
            [
                "100.0 % of the multiply-accumulates are computed in integers: 7 of 9 layers",
                "  not counted, as their multiply-accumulates are unknown: 1 layer (einsum)",
                "  in float: no integer form: 2 layers (einsum, mean)",
            ],
            id="8 bits",
        ),
        pytest.param(
            {"bits_activations": 12},
            {"fc": {"bits_activations": 0}},
            [
                "99.6 % of the multiply-accumulates are computed in integers: 5 of 9 layers",
                "  not counted, as their multiply-accumulates are unknown: 1 layer (einsum)",
                "  in float: the integer form is that of at most 8 bits: 1 layer (add)",
                "  in float: no integer form: 2 layers (einsum, mean)",
                "  in float: activations: bits 0 (--flag): 1 layer (fc) with 0.4 %",
            ],
            id="12 bits, the last layer in float",
        ),
        pytest.param(
            {"bits_activations": 0, "bits_weights": 0},
            {},
            [
                "0.0 % of the multiply-accumulates are computed in integers: 0 of 9 layers",
                "  not counted, as their multiply-accumulates are unknown: 1 layer (einsum)",
                "  in float: activations: bits 0 (default): 7 layers (first, second, add, ...) with 100.0 %",
                "  in float: its input is float: 2 layers (relu, pool)",
            ],
            id="all in float",
        ),
    ],
)
def test_what_is_printed(settings: dict[str, Any], layers: dict[str, Any], lines: list[str]) -> None:
    folded = branches()
    assert list(arithmetic_lines(folded.graph, plan_of(folded, settings, layers))) == lines


def test_costs_of_a_folded_graph_are_those_of_one_image_before_folding() -> None:
    torch.manual_seed(0)
    alone = {cost.name: cost.macs for cost in layer_costs(capture(Branches().eval(), IMAGES[:1]))}
    macs = layer_macs(branches().graph)
    assert macs.pop("einsum") is None
    assert alone.pop("einsum") == 0
    assert macs == alone
    assert macs["first"] == 8 * 8 * 4 * 27


@pytest.mark.parametrize(
    ("module", "known"),
    [
        pytest.param(nn.GELU(), True, id="elementwise"),
        pytest.param(nn.LayerNorm((3, 8, 8)), True, id="norm"),
        pytest.param(nn.Bilinear(8, 8, 8), False, id="products of a module"),
    ],
)
def test_products_that_nobody_has_counted_are_unknown(module: nn.Module, known: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.op, self.fc = module, nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.op(x, x) if isinstance(self.op, nn.Bilinear) else self.op(x)
            return self.fc(y.mean((1, 2)))

    assert layer_macs(fold(Net(), IMAGES[:2]).graph)["op"] == (0 if known else None)


def test_walks_go_through_what_keeps_grids() -> None:
    graph = branches().graph
    nodes = {name_of(node): node for node in graph.graph.nodes if "name" in node.meta}
    assert name_of(producer_of(graph, layer_inputs(nodes["add"])[1])) == "first"
    assert [name_of(node) for node in readers_of(graph, nodes["first"])] == ["second", "add"]
    assert sole_producer(graph, layer_inputs(nodes["add"])[1], nodes["add"]) is None  # the second convolution reads it
    assert sole_producer(graph, nodes["second"], nodes["add"]) == nodes["second"]
