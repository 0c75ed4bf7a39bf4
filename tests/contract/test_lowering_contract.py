"""Every kind of layer has an exact form, which runs in a small model, is saved as integers and is loaded back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qlib.config.layers.settings import LayerSettings
from qlib.graph import Graph, capture, fold_batch_norm, kind_of
from qlib.graph.ir import layer_inputs, layers, name_of
from qlib.graph.kinds import LAYER_KINDS
from qlib.lower import lower
from qlib.lower.base import LOWERINGS
from qlib.lower.dynamic import DynamicMatMul
from qlib.lower.exact import activation_grid
from qlib.lower.ops.embedding import ExactEmbedding
from qlib.lower.ops.float_op import FloatOp
from qlib.lower.ops.weighted import ExactWeighted, FloatWeighted
from qlib.ptq.planner import layer_infos, plan_post_train_linear
from qlib.quant.arithmetic import float_reasons
from qlib.quant.plan import Plan
from qlib.stats.collect import Collector
from qlib.stats.tensor_stats import ModelStats

IMAGES = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(0, 20, (6, 5), generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self, function: Callable[[Any, Tensor], Tensor], seed: int, **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)
        generator = torch.Generator().manual_seed(seed)
        for value in [*self.parameters(), *(b for b in self.buffers() if b.is_floating_point())]:
            value.data = torch.rand(value.shape, generator=generator) - 0.4

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def conv() -> nn.Module:
    return nn.Conv2d(4, 4, 3, padding=1)


MODELS: dict[str, tuple[Callable[[Any, Tensor], Tensor], Callable[[], dict[str, nn.Module]], Tensor]] = {
    "conv": (lambda m, x: m.conv(x).relu(), lambda: {"conv": conv()}, IMAGES),
    "conv_transpose": (
        lambda m, x: m.up(x),
        lambda: {"up": nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2)},
        IMAGES,
    ),
    "linear": (lambda m, x: m.fc(x.flatten(2)), lambda: {"fc": nn.Linear(64, 5)}, IMAGES),
    "embedding": (
        lambda m, x: m.fc(m.table(x)),
        lambda: {"table": nn.Embedding(20, 6), "fc": nn.Linear(6, 3)},
        TOKENS,
    ),
    "matmul": (lambda m, x: m.conv(x) @ x.transpose(2, 3), lambda: {"conv": conv()}, IMAGES),
    "add": (lambda m, x: F.relu(m.conv(x) + x), lambda: {"conv": conv()}, IMAGES),
    "mul": (lambda m, x: m.conv(x) * torch.sigmoid(x.mean((2, 3), keepdim=True)), lambda: {"conv": conv()}, IMAGES),
    "concat": (lambda m, x: torch.cat([m.conv(x), F.relu(x), x], 1), lambda: {"conv": conv()}, IMAGES),
    "relu": (lambda m, x: m.conv(F.relu6(F.max_pool2d(m.conv(x), 2))), lambda: {"conv": conv()}, IMAGES),
    "max_pool": (lambda m, x: F.max_pool2d(m.conv(x), 3, 2, 1), lambda: {"conv": conv()}, IMAGES),
    "avg_pool": (lambda m, x: F.avg_pool2d(m.conv(x), 3, 2, 1), lambda: {"conv": conv()}, IMAGES),
    "global_avg_pool": (lambda m, x: m.conv(x).mean((2, 3)), lambda: {"conv": conv()}, IMAGES),
    "softmax": (lambda m, x: F.softmax(m.conv(x), -1), lambda: {"conv": conv()}, IMAGES),
    "float_op": (
        lambda m, x: m.norm(F.gelu(m.conv(x))),
        lambda: {"conv": conv(), "norm": nn.LayerNorm(8)},
        IMAGES,
    ),
}


def graph_of(kind: str, seed: int = 1) -> Graph:
    function, modules, example = MODELS[kind]
    graph = capture(Net(function, seed, **modules()), example[:2])
    fold_batch_norm(graph)
    return graph


def plan_of(kind: str, *, dynamic: bool = False, image_in_float: bool = False, **settings: Any) -> Plan:
    graph = graph_of(kind)
    chosen = {"mode_activations": "asym_u", **settings}
    each = {info.name: LayerSettings(**chosen) for info in layer_infos(graph)}
    for node, _ in layers(graph) if image_in_float else ():
        images = [i for i, source in enumerate(layer_inputs(node)) if source.op == "placeholder"]
        overrides = {index: {"bits_activations": 0} for index in images}
        each[name_of(node)] = dataclasses.replace(each[name_of(node)], input_overrides=overrides)
    if dynamic:
        return plan_post_train_linear(graph, each, None)
    collector = Collector(graph)
    collector.update(MODELS[kind][2])
    return plan_post_train_linear(graph, each, ModelStats(collector.result()))


@torch.inference_mode()
def run(model: fx.GraphModule, kind: str) -> Tensor:
    out: Tensor = model(MODELS[kind][2].clone())
    return out


def test_every_kind_has_a_lowering_and_a_model_here() -> None:
    assert set(LAYER_KINDS) == set(LOWERINGS) == set(MODELS)
    for kind in MODELS:
        assert kind in {kind_of(module) for _, module in layers(graph_of(kind))}


SETTINGS: dict[str, dict[str, Any]] = {
    **{f"{bits} bits": {"bits_activations": bits} for bits in (2, 8, 9, 12, 16)},
    **{mode: {"mode_activations": mode} for mode in ("sym", "sym_restr", "asym_s")},
    "float activations": {"bits_activations": 0},
    "float weights": {"bits_weights": 0},
    "half precision": {"fpq": 16},
    "image in float": {"image_in_float": True},
    "first input on more bits": {"input_overrides": {0: {"bits_activations": 12}}},
    "dynamic": {"dynamic": True},
    "dynamic, float weights": {"dynamic": True, "bits_weights": 0},
    "dynamic, 12 bits": {"dynamic": True, "bits_activations": 12},
}


def lowered_in_float(graph: Graph, plan: Plan) -> dict[str, bool]:
    """What each layer's module in the lowered model computes in; ReLUs that are a clamp of another are left out."""
    lowered = lower(graph, plan)
    found: dict[str, bool] = {}
    for node in lowered.graph.nodes:
        name = str(node.meta.get("name"))
        if node.op != "call_module" or name not in plan.layers or node.target.startswith(("quantize", "dequantize")):
            continue
        module = lowered.get_submodule(str(node.target))
        if isinstance(module, (ExactWeighted, DynamicMatMul, ExactEmbedding)):
            found[name] = False
        elif plan.dynamic or isinstance(module, (FloatOp, FloatWeighted)):
            found[name] = True
        else:  # the exact forms of others, and what keeps grids
            found[name] = activation_grid(node) is None
    return found


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("kind", MODELS)
def test_what_a_run_prints_is_what_it_lowers(kind: str, settings: dict[str, Any]) -> None:
    graph, plan = graph_of(kind), plan_of(kind, **settings)
    lowered = lowered_in_float(graph, plan)
    assert kind in {plan.layers[name].kind for name in lowered}
    assert {name: bool(plan.layers[name].note) for name in lowered} == lowered
    assert {name: bool(reason) for name, reason in float_reasons(graph, plan).items() if name in lowered} == lowered


@pytest.mark.parametrize("kind", MODELS)
def test_an_edit_of_a_plan_is_reported_as_it_is_lowered(kind: str) -> None:
    """The notes of a plan stay behind when its bits are edited."""
    graph, plan = graph_of(kind), plan_of(kind)
    wide = {
        name: dataclasses.replace(
            each,
            output=each.output
            and dataclasses.replace(each.output, spec=dataclasses.replace(each.output.spec, bits=12)),
        )
        for name, each in plan.layers.items()
    }
    edited = dataclasses.replace(plan, layers=wide)
    lowered, reasons = lowered_in_float(graph, edited), float_reasons(graph, edited)
    assert {name: bool(reasons[name]) for name in lowered} == lowered


@pytest.mark.parametrize("per_channel", [False, True], ids=["per tensor", "per channel"])
@pytest.mark.parametrize(("bits", "close"), [(8, 0.1), (16, 1e-3)])
@pytest.mark.parametrize("kind", MODELS)
def test_near_the_float_model(kind: str, bits: int, close: float, per_channel: bool) -> None:
    settings = {"bits_activations": bits, "bits_weights": bits, "per_channel_wts": per_channel}
    got, want = run(lower(graph_of(kind), plan_of(kind, **settings)), kind), run(graph_of(kind), kind)
    assert got.shape == want.shape
    assert got.dtype == torch.float32
    difference = float((got - want).abs().max()) / float(want.abs().max())
    assert 0 < difference < close


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("kind", MODELS)
def test_state_holds_integer_weights(kind: str, dynamic: bool) -> None:
    graph = graph_of(kind)
    lowered = lower(graph, plan_of(kind, dynamic=dynamic, per_channel_wts=True))
    weighted = [
        module for _, module in layers(graph) if isinstance(module.weight if hasattr(module, "weight") else 0, Tensor)
    ]
    codes = {key: value for key, value in lowered.state_dict().items() if key.endswith("weight_codes")}
    assert len(codes) >= len({id(m) for m in weighted if not isinstance(m, nn.LayerNorm)})
    assert all(not value.is_floating_point() and value.element_size() <= 2 for value in codes.values())
    if kind not in ("float_op",) and not dynamic:
        floats = [key for key, value in lowered.state_dict().items() if value.is_floating_point()]
        assert all(key.endswith("weight_scale") for key in floats), floats


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("kind", MODELS)
def test_reload_into_a_differently_initialized_model(kind: str, dynamic: bool) -> None:
    plan = plan_of(kind, dynamic=dynamic, mode_weights="asym_s", per_channel_wts=True)
    saved, other = lower(graph_of(kind), plan), lower(graph_of(kind, seed=2), plan)
    if saved.state_dict():
        assert not torch.equal(run(saved, kind), run(other, kind))
    other.load_state_dict(saved.state_dict())
    assert torch.equal(run(saved, kind), run(other, kind))


@pytest.mark.parametrize("kind", MODELS)
def test_results_do_not_depend_on_the_batch(kind: str) -> None:
    lowered = lower(graph_of(kind), plan_of(kind))
    batch = MODELS[kind][2]
    with torch.inference_mode():
        assert torch.equal(lowered(batch), torch.cat([lowered(part) for part in batch.split(1)]))


@pytest.mark.parametrize("kind", MODELS)
def test_the_graph_is_left_as_it_was(kind: str) -> None:
    graph = graph_of(kind)
    before = run(graph, kind)
    plan = plan_of(kind)
    lowered = lower(graph, plan)
    for value in lowered.state_dict().values():
        value.zero_()
    assert torch.equal(run(graph, kind), before)
