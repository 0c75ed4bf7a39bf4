"""A captured model with a plan, for tests of what works on plans."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from qlib.config.layers.resolve import resolve
from qlib.config.layers.settings import LayerSettings, PtqConfig
from qlib.graph import Graph, capture, fold_batch_norm
from qlib.models import create_model, find_model
from qlib.ptq.planner import layer_infos, plan_post_train_linear
from qlib.quant.plan import Plan
from qlib.stats.collect import Collector
from qlib.stats.tensor_stats import ModelStats


def trained_like(model: nn.Module) -> nn.Module:
    """Batch-norms as training leaves them: no channel like another."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value, low, high in ((module.weight, 0.5, 1.5), (module.running_var, 0.5, 2.0)):
                assert isinstance(value, Tensor)
                value.data.uniform_(low, high, generator=generator)
            for value in (module.bias, module.running_mean):
                assert isinstance(value, Tensor)
                value.data.normal_(0, 0.3, generator=generator)
    return model


@functools.cache
def _captured(arch: str) -> tuple[Graph, dict[str, str], Tensor, ModelStats]:
    torch.manual_seed(0)
    spec = find_model(arch)
    size = (spec.input_shape[0], min(64, spec.input_shape[1]), min(64, spec.input_shape[2]))
    images = torch.randn(8, *size)
    graph = capture(trained_like(create_model(spec)), images[:2])
    folded = fold_batch_norm(graph)
    names = folded if isinstance(folded, dict) else folded.layer_of
    collector = Collector(graph)
    collector.update(images)
    return graph, names, images, ModelStats(collector.result())


def planned(
    arch: str, acts: int, wts: int, mode: str = "asym_u", per_channel: bool = True
) -> tuple[Graph, Plan, Tensor]:
    """The folded graph of a model (a fresh copy), its plan with ranges of 8 random images, and these images."""
    import copy

    graph, folded, images, stats = _captured(arch)
    graph = copy.deepcopy(graph)
    settings = LayerSettings(
        bits_activations=acts,
        bits_weights=wts,
        mode_activations=mode,
        mode_weights="sym",
        per_channel_wts=per_channel,
    )
    resolved = resolve(PtqConfig(settings), layer_infos(graph))
    return graph, plan_post_train_linear(graph, resolved, stats, folded), images
