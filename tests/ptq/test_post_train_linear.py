"""Post-training plans: who quantizes what, over which range."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlib.config.layers.settings import LayerSettings
from qlib.errors import ConfigError, StatsError
from qlib.graph import Graph, capture, fold_batch_norm
from qlib.lower import lower
from qlib.lower.ops.weighted import ExactWeighted
from qlib.ptq.planner import layer_infos, plan_post_train_linear
from qlib.quant.clip_names import CLIP_NAMES, HISTOGRAM_CLIPS
from qlib.quant.plan import LayerPlan, Plan, TensorPlan, WeightPlan
from qlib.quant.spec import QuantSpec
from qlib.stats.collect import Collector
from qlib.stats.tensor_stats import LayerStats, ModelStats, TensorStats

DEFAULTS = LayerSettings(mode_activations="asym_u", mode_weights="sym")
IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 1)
        self.relu, self.relu6, self.sigmoid, self.tanh = nn.ReLU(), nn.ReLU6(), nn.Sigmoid(), nn.Tanh()
        self.fc = nn.Linear(4, 5)
        self.gain = nn.Parameter(torch.linspace(-1.0, 2.0, 4).view(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def prepared(function: Callable[[Any, Tensor], Tensor]) -> tuple[Graph, dict[str, str]]:
    graph = capture(Net(function), IMAGES[:2])
    return graph, fold_batch_norm(graph)


def stats_of(graph: Graph) -> ModelStats:
    collector = Collector(graph)
    collector.update(IMAGES)
    return ModelStats(collector.result())


def plan_of(
    function: Callable[[Any, Tensor], Tensor],
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    dynamic: bool = False,
    stats: Callable[[ModelStats], ModelStats] = lambda stats: stats,
) -> Plan:
    """The plan, with `settings` of some layers over the defaults; those of ``*`` are for every layer."""
    graph, folded = prepared(function)
    given = settings or {}
    each = {
        info.name: DEFAULTS.with_settings({**given.get("*", {}), **given.get(info.name, {})}, {})
        for info in layer_infos(graph)
    }
    return plan_post_train_linear(graph, each, None if dynamic else stats(stats_of(graph)), folded)


def residual(m: Any, x: Tensor) -> Tensor:
    x = m.relu(m.bn1(m.conv1(x)))
    return m.fc(F.avg_pool2d(m.conv2(x) + x, 8).flatten(1))


def test_every_tensor_is_quantized_once_by_its_producer() -> None:
    plan = plan_of(residual)
    assert list(plan.layers) == ["conv1", "relu", "conv2", "add", "avg_pool2d", "fc"]
    inputs = {name: [grid is not None for grid in layer.inputs] for name, layer in plan.layers.items()}
    assert inputs == {
        "conv1": [True], "relu": [False], "conv2": [False], "add": [False, False], "avg_pool2d": [False], "fc": [False],
    }  # fmt: skip
    outputs = [name for name, layer in plan.layers.items() if layer.output is not None]
    assert outputs == ["conv1", "conv2", "add", "avg_pool2d", "fc"]
    assert not plan.dynamic


def test_ranges_come_from_the_statistics() -> None:
    graph, _ = prepared(residual)
    stats = stats_of(graph).layers
    plan = plan_of(residual)
    seen = stats["conv1"].inputs[0]
    assert plan.layers["conv1"].inputs == (TensorPlan(QuantSpec.of_mode("asym_u", 8), "none", seen.min, seen.max),)
    assert plan.layers["conv2"].output == TensorPlan(
        QuantSpec.of_mode("asym_u", 8), "none", stats["conv2"].output.min, stats["conv2"].output.max
    )
    assert plan.layers["conv2"].weight == WeightPlan(QuantSpec.of_mode("sym", 8))
    average = plan_of(residual, {"*": {"clip_acts": "avg"}}).layers["conv1"].inputs[0]
    assert average == TensorPlan(QuantSpec.of_mode("asym_u", 8), "avg", seen.avg_min, seen.avg_max)


def wide(stats: ModelStats) -> ModelStats:
    """As if every output had been seen between -20 and 30."""
    layers = {
        name: LayerStats(layer.inputs, replace(layer.output, min=-20.0, max=30.0, avg_min=-10.0, avg_max=15.0))
        for name, layer in stats.layers.items()
    }
    return ModelStats(layers)


@pytest.mark.parametrize(
    ("function", "low", "high", "average"),
    [
        pytest.param(lambda m, x: m.relu(m.conv1(x)), 0.0, 30.0, (0.0, 15.0), id="relu"),
        pytest.param(lambda m, x: F.relu(m.conv1(x)), 0.0, 30.0, (0.0, 15.0), id="functional relu"),
        pytest.param(lambda m, x: m.relu6(m.conv1(x)), 0.0, 6.0, (0.0, 6.0), id="relu6"),
        pytest.param(lambda m, x: m.sigmoid(m.conv1(x)), -6.0, 6.0, (-6.0, 6.0), id="sigmoid"),
        pytest.param(lambda m, x: m.tanh(m.conv1(x)), -4.0, 4.0, (-4.0, 4.0), id="tanh"),
        pytest.param(lambda m, x: torch.tanh(m.conv1(x)), -4.0, 4.0, (-4.0, 4.0), id="functional tanh"),
        pytest.param(lambda m, x: F.gelu(m.conv1(x)), -20.0, 30.0, (-10.0, 15.0), id="another activation"),
        pytest.param(
            lambda m, x: (lambda y: m.sigmoid(y) + y)(m.conv1(x)), -20.0, 30.0, (-10.0, 15.0), id="two successors"
        ),
    ],
)
def test_what_the_next_activation_flattens_gets_no_codes(
    function: Callable[[Any, Tensor], Tensor], low: float, high: float, average: tuple[float, float]
) -> None:
    output = plan_of(function, stats=wide).layers["conv1"].output
    assert output == TensorPlan(QuantSpec.of_mode("asym_u", 8), "none", low, high)
    output = plan_of(function, {"*": {"clip_acts": "avg"}}, stats=wide).layers["conv1"].output
    assert output == TensorPlan(QuantSpec.of_mode("asym_u", 8), "avg", *average)


def test_a_range_below_zero_before_relu_becomes_zero() -> None:
    def negative(stats: ModelStats) -> ModelStats:
        return ModelStats(
            {n: LayerStats(s.inputs, replace(s.output, min=-3.0, max=-1.0)) for n, s in stats.layers.items()}
        )

    output = plan_of(lambda m, x: m.relu(m.conv1(x)), stats=negative).layers["conv1"].output
    assert output == TensorPlan(QuantSpec.of_mode("asym_u", 8), "none", 0.0, 0.0)


def test_statistics_of_the_unfolded_model_are_understood() -> None:
    """A file of Distiller has entries for batch-norms: the folded layer's output is the batch-norm's."""

    def unfolded(stats: ModelStats) -> ModelStats:
        layers = dict(stats.layers)
        layers["bn1"] = layers["conv1"]
        layers["conv1"] = LayerStats(layers["conv1"].inputs, replace(layers["conv1"].output, min=-99.0, max=99.0))
        return ModelStats(layers)

    def function(m: Any, x: Tensor) -> Tensor:
        return m.bn1(m.conv1(x))

    assert plan_of(function, stats=unfolded) == plan_of(function)


def test_ranges_of_a_constant_operand_are_its_own() -> None:
    plan = plan_of(lambda m, x: m.conv1(x) * m.gain)
    assert plan.layers["mul"].inputs == (None, TensorPlan(QuantSpec.of_mode("asym_u", 8), "none", -1.0, 2.0))


def test_softmax_has_a_fixed_range() -> None:
    output = plan_of(lambda m, x: F.softmax(m.conv1(x), -1)).layers["softmax"].output
    assert output == TensorPlan(QuantSpec.of_mode("asym_u", 8), "none", 0.0, 255 / 256)
    assert output.qparams().scale.item() == 1 / 256


@pytest.mark.parametrize(
    ("function", "layer", "reader"),
    [
        pytest.param(lambda m, x: m.conv2(a := m.conv1(x)) / (a.relu() * a.relu() + 1e-6), "add", "div", id="divisor"),
        pytest.param(lambda m, x: torch.rsqrt(m.conv1(x).relu() + 1e-6), "add", "rsqrt", id="rsqrt"),
        pytest.param(
            lambda m, x: m.conv2(m.conv1(x).sigmoid() + 1e-3).sigmoid().reciprocal(),
            "sigmoid_1",
            "reciprocal",
            id="1/x",
        ),
        pytest.param(lambda m, x: torch.log(m.conv1(x).sigmoid()), "sigmoid", "log", id="log"),
    ],
)
def test_what_must_not_be_zero_stays_in_float(
    function: Callable[[Any, Tensor], Tensor], layer: str, reader: str
) -> None:
    graph, folded = prepared(function)
    each = {info.name: DEFAULTS for info in layer_infos(graph)}
    plan = plan_post_train_linear(graph, each, stats_of(graph), folded)
    assert plan.layers[layer].output is None
    assert plan.layers[layer].note == f"not to be rounded to 0, where {reader!r} has no value"
    assert lower(graph, plan)(IMAGES).isfinite().all()


def test_passing_layers_keep_their_input_grid() -> None:
    plan = plan_of(lambda m, x: F.max_pool2d(m.conv1(x), 2))
    assert plan.layers["max_pool2d"] == LayerPlan("max_pool", (None,))
    plan = plan_of(lambda m, x: m.conv1(F.max_pool2d(x, 2)))
    assert plan.layers["max_pool2d"].note == "its input is float"
    assert plan.layers["conv1"].inputs[0] is not None


@pytest.mark.parametrize(
    ("settings", "layer", "expected"),
    [
        pytest.param({"bits_activations": 0}, "conv2", ("weight", None), id="weights only"),
        pytest.param({"bits_activations": 0, "bits_weights": 0}, "conv2", (None, None), id="float"),
        pytest.param({"bits_weights": 0}, "conv2", (None, "output"), id="activations only"),
        pytest.param({"fake": True}, "conv2", (None, "output"), id="fake"),
        pytest.param({"fpq": 16}, "conv2", (None, None), id="float16"),
    ],
)
def test_parts_that_stay_in_float(settings: dict[str, Any], layer: str, expected: tuple[str | None, ...]) -> None:
    plan = plan_of(residual, {layer: settings})
    got = plan.layers[layer]
    assert ("weight" if got.weight else None, "output" if got.output else None) == expected
    assert bool(got.note) or expected == ("weight", "output")
    assert (got.float_bits == 16) == ("fpq" in settings)
    after = plan.layers["add"].inputs
    assert (after[0] is not None) == (got.output is None), "what arrives in float is quantized by the next layer"
    assert lower(prepared(residual)[0], plan)(IMAGES).shape == (8, 5)


def test_settings_of_weights_reach_the_plan() -> None:
    settings = {
        "conv2": {
            "bits_weights": 4, "mode_weights": "asym_s", "per_channel_wts": True, "bits_bias": 16, "bits_accum": 20,
            "scale_approx_mult_bits": 6,
        }
    }  # fmt: skip
    layer = plan_of(residual, settings).layers["conv2"]
    assert layer.weight == WeightPlan(QuantSpec.of_mode("asym_s", 4, 0))
    assert (layer.bits_bias, layer.bits_accum, layer.scale_approx_bits) == (16, 20, 6)


def test_input_overrides_of_an_input_that_arrives_in_float() -> None:
    override = {"conv1": {"input_overrides": {0: {"bits_activations": 4, "mode_activations": "sym"}}}}
    grid = plan_of(residual, override).layers["conv1"].inputs[0]
    assert grid is not None
    assert (grid.spec.bits, grid.spec.mode) == (4, "sym")
    from_output = {"conv1": {"bits_activations": 5, "input_overrides": {0: {"from_output": True}}}}
    grid = plan_of(residual, from_output).layers["conv1"].inputs[0]
    assert grid is not None
    assert grid.spec.bits == 5


def test_input_overrides_of_an_input_that_arrives_quantized() -> None:
    graph, _ = prepared(residual)
    plan = plan_of(residual, {"conv2": {"input_overrides": {0: {"bits_activations": 4}}}})
    own, whole = plan.layers["conv2"].inputs[0], plan.layers["conv1"].output
    assert own is not None
    assert whole is not None
    assert (own.spec.bits, own.min, own.max, whole.spec.bits) == (4, whole.min, whole.max, 8)
    assert plan.layers["add"].inputs == (None, None)
    same = plan_of(residual, {"conv2": {"input_overrides": {0: {"bits_activations": 8}}}})
    assert same == plan_of(residual), "what asks for its producer's grid is not rounded twice"
    seen: dict[str, Tensor] = {}
    exact = lower(graph, plan)
    for name in ("quantize_relu", "conv1"):
        exact.get_submodule(name).register_forward_hook(lambda *args, name=name: seen.update({name: args[2].clone()}))
    exact(IMAGES)
    fine, coarse = whole.qparams().scale, own.qparams().scale
    expected = (seen["conv1"] * fine / coarse).round().clamp(0, 15)
    assert torch.equal(seen["quantize_relu"], expected)
    assert len(seen["quantize_relu"].unique()) == 16


def lacking(name: str, *, inputs: bool = False) -> Callable[[ModelStats], ModelStats]:
    def cut(stats: ModelStats) -> ModelStats:
        layers = dict(stats.layers)
        gone = layers.pop(name)
        return ModelStats({**layers, name: LayerStats((), gone.output)} if inputs else layers)

    return cut


def without(field: str) -> Callable[[ModelStats], ModelStats]:
    def cut(stats: ModelStats) -> ModelStats:
        def clear(one: TensorStats) -> TensorStats:
            return replace(one, **{field: None})  # type: ignore[arg-type]

        return ModelStats(
            {n: LayerStats(tuple(map(clear, s.inputs)), clear(s.output)) for n, s in stats.layers.items()}
        )

    return cut


@pytest.mark.parametrize(
    ("stats", "settings", "message"),
    [
        pytest.param(lacking("conv2"), {}, "the statistics lack layer 'conv2'; collect them again", id="a layer"),
        pytest.param(lacking("conv1", inputs=True), {}, "the statistics lack input 0 of layer 'conv1'", id="an input"),
        pytest.param(
            without("b"), {"clip_acts": "laplace"}, "layer 'conv1': the statistics lack 'b'", id="b for laplace"
        ),
        pytest.param(
            without("std"), {"clip_acts": "gauss"}, "layer 'conv1': the statistics lack 'std'", id="std for gauss"
        ),
    ],
)
def test_what_statistics_may_lack(
    stats: Callable[[ModelStats], ModelStats], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(StatsError, match=message):
        plan_of(residual, {"*": settings}, stats=stats)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_range_that_is_not_finite_names_the_layer(bad: float) -> None:
    graph, folded = prepared(residual)
    plan = plan_post_train_linear(graph, {i.name: DEFAULTS for i in layer_infos(graph)}, stats_of(graph), folded)
    conv2 = plan.layers["conv2"]
    assert conv2.output is not None
    broken = {**plan.layers, "conv2": replace(conv2, output=replace(conv2.output, max=bad))}
    with pytest.raises(StatsError, match=r"the range .* of 'conv2' cannot be quantized: range is not finite"):
        lower(graph, Plan(broken))


def test_a_layer_left_in_float_needs_no_statistics() -> None:
    off = {"bits_activations": 0, "bits_weights": 0}
    plan = plan_of(residual, {"conv2": off}, stats=lacking("conv2"))
    assert plan.layers["conv2"].output is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        pytest.param(
            {"conv2": {"input_overrides": {0: {"bits_activations": 0}}}},
            "input_overrides of 'conv2' gives input 0 no bits, but 'conv1' quantizes it; override that layer",
            id="an override that leaves a quantized input in float",
        ),
        pytest.param(
            {"conv1": {"inputs_quant_auto_fallback": False}},
            "inputs_quant_auto_fallback of 'conv1' is false, but input 0 arrives in float; give input_overrides for it",
            id="no fallback",
        ),
        pytest.param(
            {"fc": {"make_identity": True}},
            "make_identity of 'fc' is only known for a ReLU that its producer computes; remove it",
            id="make_identity",
        ),
    ],
)
def test_settings_that_contradict_the_graph(settings: dict[str, dict[str, Any]], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_of(residual, settings)
    assert message in str(caught.value)


def test_all_contradictions_are_told_at_once_with_their_places() -> None:
    graph, folded = prepared(residual)
    each = {info.name: DEFAULTS for info in layer_infos(graph)}
    overrides = {"input_overrides": {0: {"bits_activations": 0}}}
    each["conv2"] = DEFAULTS.with_settings(overrides, {"input_overrides": "my.yaml:7"})
    each["fc"] = DEFAULTS.with_settings({"make_identity": True}, {"make_identity": "my.yaml:12"})
    with pytest.raises(ConfigError) as caught:
        plan_post_train_linear(graph, each, stats_of(graph), folded)
    assert [problem.split(": ")[0] for problem in caught.value.problems] == ["my.yaml:7", "my.yaml:12"]


def test_half_range_of_gauss_and_laplace_follows_the_relu() -> None:
    def ranges(function: Callable[[Any, Tensor], Tensor], clip: str) -> tuple[float | None, float | None]:
        output = plan_of(function, {"*": {"clip_acts": clip}}).layers["conv1"].output
        assert output is not None
        return output.min, output.max

    for clip in ("gauss", "laplace"):
        low, high = ranges(lambda m, x: m.relu(m.conv1(x)), clip)
        assert low == 0.0
        assert high != ranges(lambda m, x: m.conv1(x), clip)[1]


@pytest.mark.parametrize(
    ("function", "layer", "of_the_relu"),
    [
        pytest.param(lambda m, x: F.relu(m.conv1(x) + m.conv1(x)), "add", True, id="after-an-addition"),
        pytest.param(lambda m, x: m.relu(m.conv1(x)), "conv1", False, id="after-a-convolution"),
    ],
)
def test_n_std_takes_mean_and_std_where_the_ancestor_does(
    function: Callable[[Any, Tensor], Tensor], layer: str, of_the_relu: bool
) -> None:
    plan = plan_of(function, {"*": {"clip_acts": "n_std", "clip_n_stds": 1.0}})
    stats = stats_of(prepared(function)[0]).layers
    seen = stats["relu"].output if of_the_relu else stats[layer].output
    assert seen.mean is not None
    assert seen.std is not None
    output = plan.layers[layer].output
    assert output is not None
    assert (output.min, output.max) == (0.0, pytest.approx(seen.mean + seen.std))


def test_dynamic_plans_quantize_weighted_layers_and_matmul_only() -> None:
    plan = plan_of(lambda m, x: m.fc((m.conv1(x) @ m.conv1(x) + 1).flatten(2)[..., :4]), dynamic=True)
    assert plan.dynamic
    dynamic = TensorPlan(QuantSpec.of_mode("asym_u", 8))
    kinds = {layer.kind: layer.inputs for layer in plan.layers.values()}
    assert kinds == {"conv": (dynamic,), "matmul": (dynamic, dynamic), "float_op": (None,), "linear": (dynamic,)}
    assert all(layer.output is None for layer in plan.layers.values())
    notes = [layer.note for layer in plan.layers.values() if layer.kind == "float_op"]
    assert notes == ["dynamic: only weighted layers and matmul are quantized"]


@pytest.mark.parametrize("mode", ["sym", "sym_restr", "asym_s", "asym_u"])
def test_dynamic_result_is_near_float_and_does_not_depend_on_the_batch(mode: str) -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        y = m.conv2(m.relu(m.bn1(m.conv1(x))))
        return (y @ y.transpose(2, 3)) @ torch.ones(8, 2) + m.fc(y.mean((2, 3)))[:, :1, None, None]

    settings = {"*": {"mode_activations": mode, "mode_weights": mode}}
    lowered = lower(prepared(function)[0], plan_of(function, settings, dynamic=True))
    with torch.inference_mode():
        whole, want = lowered(IMAGES), prepared(function)[0](IMAGES)
        assert torch.equal(whole, torch.cat([lowered(part) for part in IMAGES.split(3)]))
        assert float((whole - want).abs().max()) < 0.05 * float(want.abs().max())


def test_dynamic_product_with_a_constant_matrix() -> None:
    """The rows of a matrix are summed over: one scale must hold for all of it."""
    matrix = torch.diag(torch.tensor([1.0, 100.0, 0.01, 10.0, 1.0, 1.0, 1.0, 1.0]))

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(matrix)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.matrix

    graph = capture(Product(), IMAGES[:2])
    settings = replace(DEFAULTS, bits_activations=12)
    plan = plan_post_train_linear(graph, {"matmul": settings}, None)
    with torch.inference_mode():
        got, want = lower(graph, plan)(IMAGES), IMAGES @ matrix
    assert float((got - want).abs().max()) < 1e-2 * float(want.abs().max())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_dynamic_values_that_are_not_finite_name_the_layer(bad: float) -> None:
    lowered = lower(prepared(residual)[0], plan_of(residual, dynamic=True))
    images = IMAGES.clone()
    images[5, 1, 2, 3] = bad
    with pytest.raises(StatsError, match="an input of 'conv1' cannot be quantized: range is not finite"):
        lowered(images)


def test_weights_only_keeps_activations_in_float() -> None:
    settings = {"*": {"bits_activations": 0, "bits_weights": 4, "per_channel_wts": True}}
    plans = [plan_of(residual, settings), plan_of(residual, settings, dynamic=True)]
    assert plans[0].layers == plans[1].layers
    assert all(layer.output is None and not any(layer.inputs) for layer in plans[0].layers.values())
    static, dynamic = (lower(prepared(residual)[0], plan)(IMAGES) for plan in plans)
    assert torch.equal(static, dynamic)


def test_input_that_stays_in_float_by_an_override() -> None:
    """The layer then computes in float with its integer weight, and its output is quantized all the same."""
    plan = plan_of(residual, {"conv1": {"input_overrides": {0: {"bits_activations": 0}}}})
    assert plan.layers["conv1"].inputs == (None,)
    assert plan.layers["conv2"].inputs == (None,)
    graph, _ = prepared(residual)
    with torch.inference_mode():
        got, want = lower(graph, plan)(IMAGES), graph(IMAGES)
    assert 0 < float((got - want).abs().max()) < 0.05 * float(want.abs().max())
    assert torch.equal(got, lower(graph, plan)(IMAGES))


# ------------------------------------------------------------------------------------------------ ranges of histograms


def histogram_stats(graph: Graph) -> ModelStats:
    collector = Collector(graph, histograms=True)
    collector.update(IMAGES)
    return ModelStats(collector.result())


def plan_with(function: Callable[[Any, Tensor], Tensor], settings: Mapping[str, Any]) -> tuple[Graph, Plan]:
    graph, folded = prepared(function)
    each = {info.name: DEFAULTS.with_settings(settings, {}) for info in layer_infos(graph)}
    return graph, plan_post_train_linear(graph, each, histogram_stats(graph), folded)


@pytest.mark.parametrize("clip", HISTOGRAM_CLIPS)
@pytest.mark.parametrize("mode", ["sym", "asym_u"])
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_methods_from_histograms_give_a_plan(clip: str, mode: str, bits: int) -> None:
    settings = {"clip_acts": clip, "mode_activations": mode, "bits_activations": bits}
    graph, plan = plan_with(residual, settings)
    seen = histogram_stats(graph).layers["conv2"].output
    for layer in plan.layers.values():
        for tensor in (*layer.inputs, layer.output):
            if tensor is not None:
                assert tensor.clip in (set(CLIP_NAMES) - {"auto"} if clip == "auto" else {clip})
    output = plan.layers["conv2"].output
    assert output is not None
    assert output.min is not None
    assert output.max is not None
    assert seen.min <= output.min <= output.max <= seen.max
    first = plan.layers["conv1"].output
    assert first is not None
    assert first.min == 0.0, "a ReLU follows"


@pytest.mark.parametrize("clip", HISTOGRAM_CLIPS)
def test_statistics_without_histograms_name_the_flag_and_the_layer(clip: str) -> None:
    with pytest.raises(StatsError, match=r"^input 0 of layer 'conv1': the statistics hold no histogram, .*histograms$"):
        plan_of(residual, {"*": {"clip_acts": clip}})


@pytest.mark.parametrize("clip", ["none", "kl", "mse", "auto"])
def test_a_concatenation_is_shared_where_the_request_is_the_same(clip: str) -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        return torch.cat([m.conv1(x), m.conv2(m.conv1(x) * 30)], 1)

    _, plan = plan_with(function, {"clip_acts": clip, "bits_activations": 4})
    assert plan.layers["conv2"].output == plan.layers["cat"].output


def test_weights_are_clipped_as_asked() -> None:
    settings = {"clip_wts": "mse", "bits_weights": 3, "per_channel_wts": True}
    for dynamic in (False, True):
        plan = plan_of(residual, {"*": settings, "conv2": {"clip_wts": "none"}}, dynamic=dynamic)
        weights = {name: layer.weight for name, layer in plan.layers.items() if layer.weight is not None}
        assert {name: weight.clip for name, weight in weights.items()} == {"conv1": "mse", "conv2": "none", "fc": "mse"}
        assert weights["conv1"].min is not None
        assert len(weights["conv1"].min) == 4
        assert weights["conv2"] == WeightPlan(QuantSpec.of_mode("sym", 3, 0))


@pytest.mark.parametrize("clip", ["none", "mse", "auto"])
@pytest.mark.parametrize("mode", ["sym", "sym_restr", "asym_u"])
def test_power_of_two_scales_make_every_requantization_a_shift(clip: str, mode: str) -> None:
    settings = {"scale": "pow2", "clip_acts": clip, "clip_wts": clip, "per_channel_wts": True}
    settings |= {"mode_activations": mode, "mode_weights": mode}
    graph, plan = plan_with(lambda m, x: m.fc(m.conv2(m.relu(m.conv1(x))).softmax(-1).mean((2, 3))), settings)
    lowered = lower(graph, plan)
    exact = [module for module in lowered.modules() if isinstance(module, ExactWeighted)]
    assert len(exact) == 3
    for module in exact:
        assert bool((torch.frexp(module.factor)[0] == 0.5).all())
    for layer in plan.layers.values():
        for grid in (*layer.inputs, layer.output):
            assert grid is None or float(torch.frexp(grid.qparams().scale)[0]) == 0.5
    with torch.inference_mode():
        assert lowered(IMAGES).shape == (8, 5)


def test_a_table_of_embeddings_is_clipped_as_a_whole() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table, self.fc = nn.Embedding(50, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.table(x))

    indices = torch.arange(8)
    graph = capture(Words(), indices)
    each = {
        info.name: DEFAULTS.with_settings({"clip_wts": "mse", "bits_weights": 3, "bits_activations": 0}, {})
        for info in layer_infos(graph)
    }
    plan = plan_post_train_linear(graph, each, None)
    weight = plan.layers["table"].weight
    assert weight is not None
    assert weight.max is not None
    assert (weight.clip, len(weight.max)) == ("mse", 1)
    assert lower(graph, plan)(indices).shape == (8, 2)
