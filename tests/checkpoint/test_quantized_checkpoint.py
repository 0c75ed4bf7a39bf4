"""Quantized checkpoints: the integer model that comes back, whatever corrections did to its biases."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from qlib.checkpoint.quantized import QuantizedHeader, read_header, restore_quantized, save_quantized
from qlib.checkpoint.read import read_checkpoint
from qlib.config.layers.resolve import resolve
from qlib.config.layers.settings import LayerSettings, PtqConfig
from qlib.graph import Graph, capture
from qlib.graph.ir import layers
from qlib.graph.weights import give_bias
from qlib.lower import lower
from qlib.ptq.planner import layer_infos, plan_post_train_linear
from qlib.stats.collect import Collector
from qlib.stats.tensor_stats import ModelStats

IMAGES = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def without_biases() -> Graph:
    torch.manual_seed(0)
    convolutions = nn.Conv2d(3, 5, 3, bias=False), nn.ReLU(), nn.Conv2d(5, 4, 3, bias=False)
    return capture(nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(16, 3, bias=False)), IMAGES[:2])


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("bits_weights", [8, 0], ids=["integer weights", "float weights"])
@pytest.mark.parametrize("bits_activations", [8, 0], ids=["integer activations", "float activations"])
def test_a_bias_that_a_correction_gave_comes_back(
    tmp_path: Path, dynamic: bool, bits_weights: int, bits_activations: int
) -> None:
    graph, path = without_biases(), tmp_path / "quantized.pth.tar"
    _, module = [each for each in layers(graph) if isinstance(each[1], nn.Conv2d)][1]
    give_bias(module).data.copy_(torch.tensor([1.0, -2.0, 3.0, 0.5]))
    collector = Collector(graph)
    collector.update(IMAGES)
    settings = LayerSettings(bits_activations=bits_activations, bits_weights=bits_weights)
    stats = None if dynamic else ModelStats(collector.result())
    plan = plan_post_train_linear(graph, resolve(PtqConfig(settings), layer_infos(graph)), stats)
    lowered = lower(graph, plan)
    save_quantized(path, QuantizedHeader("net", "images", 3, plan), lowered, {})
    checkpoint = read_checkpoint(path)
    restored = restore_quantized(checkpoint, read_header(checkpoint, "it"), without_biases(), "it")
    assert torch.equal(restored(IMAGES), lowered(IMAGES))
