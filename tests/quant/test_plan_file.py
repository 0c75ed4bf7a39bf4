"""The plan file: round trips, what a broken one says, and its ranges used as statistics."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from qlib.config.layers.settings import LayerSettings
from qlib.errors import ConfigError, OutputError, StatsError
from qlib.graph import capture, fold_batch_norm, kind_of
from qlib.graph.ir import layer_inputs, layers, name_of
from qlib.graph.kinds import LAYER_KINDS
from qlib.lower.base import LOWERINGS
from qlib.ptq.planner import plan_post_train_linear
from qlib.quant.clip_names import CLIP_NAMES
from qlib.quant.plan import LayerPlan, Plan, TensorPlan, WeightPlan
from qlib.quant.plan_file import (
    check_plan,
    is_plan_file,
    plan_from_text,
    plan_text,
    read_plan,
    stats_from_plan,
    write_plan,
)
from qlib.quant.spec import MODES, QuantSpec
from qlib.stats.tensor_stats import LayerStats, ModelStats, TensorStats

IN = TensorPlan(QuantSpec.of_mode("asym_u", 8), "avg", -1.0, 1e-05)
OUT = TensorPlan(QuantSpec.of_mode("sym_restr", 4), "n_std", -1 / 3, 2.5e20, (("clip_n_stds", 2.5),))
PLAN = Plan(
    {
        "conv1": LayerPlan("conv", (IN,), WeightPlan(QuantSpec.of_mode("sym", 8, 0)), OUT, 16, 24, 12),
        "layer1.0.relu": LayerPlan("relu", (None,)),
        "0": LayerPlan("add", (None, IN), output=OUT),
        "on": LayerPlan("linear", (None,), None, None, float_bits=16, note="runs in float16: 'a, b' # [x] é"),
        "table": LayerPlan("embedding", (), WeightPlan(QuantSpec.of_mode("asym_s", 4)), note="two\nlines"),
        "norm": LayerPlan("float_op", (None, None), output=IN, note="no integer form"),
    }
)
DYNAMIC = Plan(
    {
        "fc": LayerPlan(
            "linear",
            (TensorPlan(QuantSpec.of_mode("sym", 8), "n_std", clip_parameters=(("clip_n_stds", 2.0),)),),
            WeightPlan(QuantSpec.of_mode("sym", 8)),
        ),
        "matmul": LayerPlan(
            "matmul", (TensorPlan(QuantSpec.of_mode("asym_u", 8)), TensorPlan(QuantSpec.of_mode("asym_u", 8)))
        ),
        "relu": LayerPlan("relu", (None,), note="dynamic: only weighted layers and matmul are quantized"),
    },
    dynamic=True,
)


@pytest.mark.parametrize("plan", [PLAN, DYNAMIC, Plan({})], ids=["static", "dynamic", "empty"])
def test_round_trip_and_same_bytes(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "layer_quant_params.yaml"
    write_plan(path, plan)
    read = read_plan(path)
    assert read == plan
    assert list(read.layers) == list(plan.layers)
    assert plan_text(read).encode() == path.read_bytes()
    assert plan_from_text(path.read_text(encoding="utf-8"), "text") == plan
    assert [each.name for each in tmp_path.iterdir()] == ["layer_quant_params.yaml"], "no temporary file stays"


def test_text_is_for_people() -> None:
    lines = plan_text(PLAN).splitlines()
    assert lines[:8] == [
        "qlib_plan: {version: 1, dynamic: false}",
        "layers:",
        "  conv1:",
        "    kind: conv",
        "    inputs:",
        "      - {bits: 8, mode: asym_u, clip: avg, min: -1.0, max: 1.0e-05}  # scale 0.00392161, zero point 255",
        "    weight: {bits: 8, mode: sym, per_channel: true}",
        "    output: {bits: 4, mode: sym_restr, clip: n_std, min: -0.3333333333333333, max: 2.5e+20, n_stds: 2.5}"
        "  # scale 3.57143e+19, zero point 0",
    ]
    assert lines[8:14] == [
        "    bits_bias: 16",
        "    bits_accum: 24",
        "    scale_approx_bits: 12",
        "  layer1.0.relu:",
        "    kind: relu",
        "    inputs: [null]",
    ]
    assert yaml.safe_load(plan_text(PLAN))["layers"]["on"]["weight"] is None
    assert "scale" not in plan_text(DYNAMIC)


numbers = st.floats(-1e38, 1e38)
tensors = st.builds(
    lambda spec, clip, ends, parameters: TensorPlan(spec, clip, min(ends), max(ends), parameters),
    st.builds(QuantSpec.of_mode, st.sampled_from(MODES), st.integers(2, 16), pow2=st.booleans()),
    st.sampled_from(CLIP_NAMES),
    st.tuples(numbers, numbers),
    st.just(()) | st.tuples(st.tuples(st.just("clip_n_stds"), st.floats(1e-3, 1e3))),
)


@st.composite
def weights(draw: st.DrawFn) -> WeightPlan:
    axis = draw(st.none() | st.just(0))
    spec = QuantSpec.of_mode(draw(st.sampled_from(MODES)), draw(st.integers(2, 16)), axis, draw(st.booleans()))
    ends = draw(st.lists(st.tuples(numbers, numbers).map(sorted), max_size=1 if axis is None else 3))
    low, high = zip(*ends, strict=True) if ends else (None, None)
    return WeightPlan(spec, draw(st.sampled_from(CLIP_NAMES)), low, high)


@given(
    name=st.text(min_size=1, max_size=8),
    note=st.text(max_size=12),
    inputs=st.lists(st.none() | tensors, max_size=3),
    weight=st.none() | weights(),
)
def test_any_name_note_format_and_number_round_trips(
    name: str, note: str, inputs: list[TensorPlan | None], weight: WeightPlan | None
) -> None:
    plan = Plan({name: LayerPlan("conv", tuple(inputs), weight, note=note)})
    text = plan_text(plan)
    assert plan_from_text(text, "text") == plan
    assert plan_text(plan_from_text(text, "text")) == text


GOOD = """\
qlib_plan: {version: 1, dynamic: false}
layers:
  conv1:
    kind: conv
    inputs:
      - {bits: 8, mode: sym, clip: none, min: -1, max: 1.0}
    weight: {bits: 8, mode: sym}
    output: {bits: 8, mode: asym_u, min: 0.0, max: 2.0}
  relu:
    kind: relu
    inputs: [null]
"""


def test_what_people_write_by_hand_reads() -> None:
    plan = plan_from_text(GOOD, "my.yaml")
    assert plan.layers["conv1"].inputs == (TensorPlan(QuantSpec.of_mode("sym", 8), "none", -1.0, 1.0),)
    assert plan.layers["conv1"].output == TensorPlan(QuantSpec.of_mode("asym_u", 8), "none", 0.0, 2.0)


BROKEN = {
    "unknown layer key": ("relu:\n", "relu:\n    bitz: 3\n", "10: unknown key 'bitz' in layer 'relu'; allowed: kind, "),
    "misspelt layer key": ("    weight", "    wieght", "7: unknown key 'wieght' in .*did you mean weight"),
    "missing weight": ("    weight: {bits: 8, mode: sym}\n", "", "4: layer 'conv1' lacks 'weight'; add it, with null"),
    "missing output": ("    output: {bits: 8, mode: asym_u, min: 0.0, max: 2.0}\n", "", "4: .* lacks 'output'; add it"),
    "missing kind": ("    kind: relu\n", "", "10: layer 'relu' lacks 'kind'; add it"),
    "missing max": (", max: 2.0", "", "8: the output of layer 'conv1' lacks 'max'; add it"),
    "missing layers": ("layers:", "leyers:", "1: the file lacks 'layers'; add it"),
    "unknown kind": ("kind: conv", "kind: convv", "4: kind of .* is 'convv'; .*; did you mean conv"),
    "unknown mode": ("mode: asym_u", "mode: asym", "8: mode of the output .* is 'asym'; .*; did you mean .*asym_u"),
    "unknown clip": ("clip: none", "clip: nome", "6: clip of input 0 of layer 'conv1' is 'nome'; .* did you mean none"),
    "bits 1": ("{bits: 8, mode: sym,", "{bits: 1, mode: sym,", "6: bits of input 0 .* is 1; allowed: .* from 2 to 16"),
    "bits 33": ("weight: {bits: 8", "weight: {bits: 33", "7: bits of the weight of layer 'conv1' is 33; allowed: "),
    "bits 8.0": ("weight: {bits: 8", "weight: {bits: 8.0", "7: bits of the weight of layer 'conv1' is 8.0; allowed: "),
    "bits true": ("weight: {bits: 8", "weight: {bits: true", "7: bits of the weight .* is true; allowed: "),
    "bits_bias": ("kind: relu", "kind: relu\n    bits_bias: 64", "11: bits_bias of layer 'relu' is 64; allowed: "),
    "min above max": ("min: 0.0", "min: 3.0", "8: min 3.0 of the output of layer 'conv1' is above max 2.0; swap them"),
    "NaN": ("min: 0.0", "min: .nan", "8: min of the output of layer 'conv1' is nan; allowed: a number"),
    "infinity": ("max: 2.0", "max: .inf", "8: max of the output of layer 'conv1' is inf; allowed: a number"),
    "number without a point": ("max: 2.0", "max: 2e5", "8: max .* is '2e5'; allowed: a number such as 0.5 or 1.0e-5"),
    "number of text": ("max: 2.0", "max: two", "8: max of the output of layer 'conv1' is 'two'; allowed: a number"),
    "inputs no list": ("inputs: [null]", "inputs: 1", "11: inputs of layer 'relu' is 1; allowed: a list of one tensor"),
    "tensor no mapping": ("inputs: [null]", "inputs: [8]", "11: input 0 of layer 'relu' is 8; allowed: a mapping"),
    "layer no mapping": (
        "relu:\n    kind: relu\n    inputs: [null]", "relu: 8", "9: layer 'relu' is 8; allowed: a mapping",
    ),
    "duplicate layer": ("  relu:", "  conv1:", "9: duplicate key 'conv1', first on line 3; keep one"),
    "weight without use": (
        "kind: relu", "kind: relu\n    weight: {bits: 8, mode: sym}",
        "11: weight of layer 'relu' has no effect: a layer of kind relu has no weight; remove it",
    ),
    "output without use": (
        "kind: relu", "kind: relu\n    output: {bits: 8, mode: sym, min: 0, max: 1}",
        "11: output of layer 'relu' has no effect: kind relu keeps its input's grid; remove output",
    ),
    "float and weight": (
        "kind: conv", "kind: conv\n    float_bits: 16",
        "5: float_bits of layer 'conv1' has no effect: its weight is in integers",
    ),
    "float bits": ("kind: relu", "kind: relu\n    float_bits: 8", "11: float_bits .* is 8; allowed: 16, 32, 64, or"),
    "version": ("version: 1", "version: 2", "1: version of qlib_plan is 2; allowed: 1"),
    "dynamic with ranges": ("dynamic: false", "dynamic: true", "6: input 0 .*: a dynamic plan has no ranges; remove"),
    "tag": ("kind: conv", "kind: !!python/name:os.system ''", "4: the tag .* is not allowed"),
    "half a surrogate pair": ("kind: conv", "kind: \ud800", r"4: not valid YAML: '\\ud800' is no character"),
}  # fmt: skip


@pytest.mark.parametrize(("old", "new", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_a_mistake_is_told_with_its_line(old: str, new: str, message: str) -> None:
    assert old in GOOD
    with pytest.raises(ConfigError) as caught:
        plan_from_text(GOOD.replace(old, new, 1), "my.yaml")
    assert any(re.match(f"my.yaml:{message}", problem) for problem in caught.value.problems), caught.value


def test_all_mistakes_are_told_together() -> None:
    text = GOOD.replace("bits: 8", "bits: 1").replace("relu\n", "relo\n").replace("min: 0.0", "min: 9.0")
    with pytest.raises(ConfigError) as caught:
        plan_from_text(text, "my.yaml")
    places = [problem.partition(": ")[0] for problem in caught.value.problems]
    assert places == ["my.yaml:6", "my.yaml:7", "my.yaml:8", "my.yaml:10"]  # one bit with asym_u is allowed


def test_dynamic_n_std_needs_its_width() -> None:
    text = plan_text(DYNAMIC).replace(", n_stds: 2.0", "")
    with pytest.raises(ConfigError, match="text:6: input 0 of layer 'fc': clip n_std needs n_stds, a number above 0"):
        plan_from_text(text, "text")


def test_kinds_are_those_that_can_be_lowered() -> None:
    assert set(LAYER_KINDS) == set(LOWERINGS)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_range_that_is_not_finite_is_not_written(value: float, tmp_path: Path) -> None:
    plan = Plan(
        {"fc": LayerPlan("linear", (None,), output=TensorPlan(QuantSpec.of_mode("sym", 8), min=0.0, max=value))}
    )
    with pytest.raises(StatsError, match=r"the range 0.0 .. (nan|inf) of the output of 'fc' cannot be quantized"):
        write_plan(tmp_path / "plan.yaml", plan)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"cannot write plan '.*none.*' \(No such file or directory\); give"):
        write_plan(tmp_path / "none/plan.yaml", PLAN)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param(plan_text(PLAN), True, id="plan"),
        pytest.param("# edited\n\n'qlib_plan' : {version: 9\n", True, id="broken plan"),
        pytest.param("\ufeffqlib_plan: {}", True, id="byte order mark"),
        pytest.param("quantizers:\n  q: {class: PostTrainLinearQuantizer}\n", False, id="settings"),
        pytest.param("qlib_stats: {version: 1}\nconv1:\n  qlib_plan: 1\n", False, id="statistics"),
        pytest.param("", False, id="empty"),
    ],
)
def test_is_plan_file(text: str, expected: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text, encoding="utf-8")
    assert is_plan_file(path) is expected
    assert not is_plan_file(tmp_path / "none.yaml")


# --- as statistics ------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """A float input, batch-norm, ReLU6, a constant operand, a concat and a float op."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU6()
        self.shift, self.gelu, self.fc = (
            nn.Parameter(torch.linspace(-1, 2, 4).view(1, 4, 1, 1)),
            nn.GELU(),
            nn.Linear(8, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.conv(x)))
        x = torch.cat([x + self.shift, self.gelu(x)], 1)
        return self.fc(x.mean((2, 3)))


def _record(index: int) -> TensorStats:
    return TensorStats(8, 2, -2.0 - index, 7.0 + index, -1.0 - index / 3, 5.0 + index / 7, 0.5, 1.0, 0.8)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("clip", ["none", "avg"])
def test_ranges_of_a_plan_give_the_same_plan_again(clip: str, mode: str) -> None:
    graph = capture(Small(), torch.zeros(2, 2, 6, 6))
    folded = fold_batch_norm(graph)
    settings = {name_of(node): LayerSettings(mode_activations=mode, clip_acts=clip) for node, _ in layers(graph)}
    stats = ModelStats(
        {
            name_of(node): LayerStats(tuple(map(_record, range(len(layer_inputs(node))))), _record(index))
            for index, (node, _) in enumerate(layers(graph))
        }
    )
    plan = plan_post_train_linear(graph, settings, stats, folded)
    assert plan_post_train_linear(graph, settings, stats_from_plan(plan), folded) == plan
    check_plan(plan, {name_of(node): (kind_of(each), len(layer_inputs(node))) for node, each in layers(graph)})


def test_stats_keep_the_index_of_inputs() -> None:
    stats = stats_from_plan(PLAN)
    assert list(stats.layers) == ["conv1", "0", "norm"], "layers without a range are left out"
    unknown, known = stats.layers["0"].inputs
    assert (known.min, known.max, known.avg_min, known.avg_max, known.std) == (-1.0, 1e-05, -1.0, 1e-05, None)
    assert math.isnan(unknown.min)
    assert unknown.count == 0


def test_a_dynamic_plan_holds_no_ranges() -> None:
    with pytest.raises(StatsError, match="dynamic quantization and holds no ranges; pass it with --qe-config-file"):
        stats_from_plan(DYNAMIC)


MISMATCHES: dict[str, tuple[Callable[[dict[str, tuple[str, int]]], object], str]] = {
    "missing": (lambda model: model.update(fc=("linear", 1)), "my.yaml: layer 'fc' of the model is missing; write"),
    "not in the model": (
        lambda model: model.pop("matmul"), "my.yaml: layer 'matmul' is not in the model; remove it",
    ),
    "renamed": (
        lambda model: model.update(matmul_1=model.pop("matmul")), "layer 'matmul' is not .*; did you mean matmul_1?",
    ),
    "kind": (
        lambda model: model.update(matmul=("mul", 2)), "layer 'matmul' has kind 'matmul', but 'mul' in the model",
    ),
    "inputs": (lambda model: model.update(matmul=("matmul", 1)), "layer 'matmul' lists 2 inputs, but has 1 in"),
}  # fmt: skip


def test_ranges_of_other_channels() -> None:
    weight = WeightPlan(QuantSpec.of_mode("sym", 8, axis=0), min=(-1.0, -1.0), max=(1.0, 1.0))
    plan, model = Plan({"fc": LayerPlan("linear", (None,), weight)}), {"fc": ("linear", 1)}
    check_plan(plan, model, channels={"fc": 2})
    with pytest.raises(
        ConfigError, match=r"a.yaml: the weight of layer 'fc' has 2 ranges, but 3 channels in the model"
    ):
        check_plan(plan, model, "a.yaml", {"fc": 3})


@pytest.mark.parametrize(("change", "message"), MISMATCHES.values(), ids=MISMATCHES.keys())
def test_a_plan_of_another_model(change: Callable[[dict[str, tuple[str, int]]], object], message: str) -> None:
    plan = Plan({"matmul": DYNAMIC.layers["matmul"]}, dynamic=True)
    model = {"matmul": ("matmul", 2)}
    check_plan(plan, model)
    change(model)
    with pytest.raises(ConfigError, match=message):
        check_plan(plan, model, "my.yaml")
