"""Small nets with every kind of layer, planned, lowered and exported, for the tests of what is handed over."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qlib.config.layers.settings import LayerSettings
from qlib.graph import capture, fold_batch_norm
from qlib.graph.cost import layer_costs
from qlib.lower import lower
from qlib.ptq.planner import layer_infos, plan_post_train_linear
from qlib.stats.collect import Collector
from qlib.stats.tensor_stats import ModelStats

IMAGES = torch.randn(12, 8, 10, 10, generator=torch.Generator().manual_seed(0))

_Forward = Callable[[Any, Tensor], Tensor]


class Net(nn.Module):
    """`function` of modules whose weights are random, the same at each construction."""

    def __init__(self, function: _Forward, modules: dict[str, nn.Module]) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)
        generator = torch.Generator().manual_seed(1)
        for value in [*self.parameters(), *(b for b in self.buffers() if b.is_floating_point())]:
            value.data = torch.rand(value.shape, generator=generator) - 0.4
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_var += 0.6

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def conv(inputs: int = 8, outputs: int = 8, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2 * options.get("dilation", 1), **options)


def convolutions(m: Any, x: Tensor) -> Tensor:
    x = F.relu6(m.grouped(x))
    x = F.relu(m.dilated(F.relu(m.depthwise(x))) + m.pointwise(x))
    x = F.max_pool2d(x, 3, 2, 1)
    x = F.avg_pool2d(m.strided(F.pad(x, (1, 0, 1, 0))), 2, 1, 1)
    return m.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))  # type: ignore[no-any-return]


def branches(m: Any, x: Tensor) -> Tensor:
    a, b = m.a(x).chunk(2, 1)
    x = torch.cat([F.relu(a), m.b(torch.cat([b], 1)), F.max_pool2d(torch.roll(b, 2, 3), 3, 1, 1)], 1)
    x = m.c(x)
    x = F.relu(m.norm(F.relu(x)) + F.relu(x) + m.offset)
    gate = m.up(F.relu(m.down(x.mean((2, 3), keepdim=True))))
    x = x * torch.sigmoid(gate)
    return m.fc(x.view(-1, 2, 6, 10, 10).transpose(1, 2).flatten(1))  # type: ignore[no-any-return]


def attention(m: Any, x: Tensor) -> Tensor:
    x = m.ln(x.flatten(2))
    x = m.out(F.softmax(m.q(x) @ m.k(x).transpose(-2, -1), -1) @ m.v(x)) + x
    return m.fc(F.gelu(m.mlp(x))[:, 0])  # type: ignore[no-any-return]


def axes(m: Any, x: Tensor) -> Tensor:
    x = x * F.softmax(m.a(x), 1) + m.b(x).softmax(-2)
    key = m.k(F.adaptive_avg_pool2d(x, 1).flatten(2).transpose(1, 2))
    x = F.softmax(m.q(key) @ key.transpose(-2, -1), -1) @ m.v(key)  # one token
    return m.fc(x.flatten(1))  # type: ignore[no-any-return]


def factors(m: Any, x: Tensor) -> Tensor:
    x = F.relu(x + m.a(x) * 0.2)
    y = m.b(x) / 3
    x = (x * torch.sigmoid(y) * 2.0) * 0.7 + y.flip(3)
    x = m.c(x) * 0.1 + x
    return m.fc(F.adaptive_avg_pool2d(x + x * 0.3, 1).flatten(1))  # type: ignore[no-any-return]


def floats(m: Any, x: Tensor) -> Tensor:
    x = F.hardswish(m.deconv(F.leaky_relu(m.a(x))))
    return (F.silu(m.b(x)) * 0.5).flatten(1)  # type: ignore[no-any-return]


NETS: dict[str, tuple[_Forward, Callable[[], dict[str, nn.Module]]]] = {
    "convolutions": (
        convolutions,
        lambda: {
            "grouped": conv(groups=2),
            "depthwise": conv(groups=8),
            "dilated": conv(dilation=2),
            "pointwise": conv(kernel=1, bias=False),
            "strided": nn.Conv2d(8, 6, 3, stride=2),
            "fc": nn.Linear(6, 10),
        },
    ),
    "branches": (
        branches,
        lambda: {
            "a": conv(),
            "b": conv(4, 4),
            "c": conv(12, 12, 1),
            "norm": nn.BatchNorm2d(12),
            "offset": nn.Parameter(torch.empty(12, 1, 1)),  # type: ignore[dict-item]
            "down": conv(12, 4, 1),
            "up": conv(4, 12, 1),
            "fc": nn.Linear(1200, 10),
        },
    ),
    "attention": (
        attention,
        lambda: {
            "ln": nn.LayerNorm(100),
            **{name: nn.Linear(100, 16) for name in "qkv"},
            "out": nn.Linear(16, 100, bias=False),
            "mlp": nn.Linear(100, 24),
            "fc": nn.Linear(24, 10),
        },
    ),
    "axes": (
        axes,
        lambda: {"a": conv(), "b": conv(), **{name: nn.Linear(8, 8) for name in "qkv"}, "fc": nn.Linear(8, 10)},
    ),
    "factors": (factors, lambda: {**{name: conv() for name in "abc"}, "fc": nn.Linear(8, 10)}),
    "floats": (floats, lambda: {"a": conv(), "deconv": nn.ConvTranspose2d(8, 6, 2, stride=2), "b": conv(6, 4)}),
}


@torch.no_grad()
def lowered(net: str, *, without: tuple[str, ...] = (), **settings: Any) -> tuple[fx.GraphModule, dict[str, int]]:
    """The exact model of a net with these settings, the layers `without` in float; multiply-accumulates by layer."""
    function, modules = NETS[net]
    model = Net(function, modules()).eval()
    macs = {cost.name: cost.macs for cost in layer_costs(capture(model, IMAGES[:1]))}
    graph = capture(model, IMAGES[:2])
    folded = fold_batch_norm(graph)
    chosen = LayerSettings(**{"mode_activations": "asym_u", "per_channel_wts": True, **settings})
    in_float = LayerSettings(bits_activations=0, bits_weights=0)
    each = {info.name: in_float if info.name in without else chosen for info in layer_infos(graph)}
    collector = Collector(graph)
    collector.update(IMAGES)
    return lower(graph, plan_post_train_linear(graph, each, ModelStats(collector.result()), folded)), macs


def exported(
    net: str, folder: Path, *, opset: int = 20, **settings: Any
) -> tuple[fx.GraphModule, dict[str, int], Path]:
    """As `lowered`, with the file that was exported."""
    from qlib.deploy.export import export_quantized

    exact, macs = lowered(net, **settings)
    path = folder / f"{net}.onnx"
    export_quantized(exact, IMAGES[:2], path, opset=opset, metadata={"version": "test"})
    return exact, macs, path
