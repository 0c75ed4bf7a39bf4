"""Training schedules: published files load, every mistake is reported, and the timeline says what acts when."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from qlib.app.policies import SECTIONS, read_schedule
from qlib.config.schedule.timeline import timeline
from qlib.config.schedule.types import Component, PolicySpec, Schedule
from qlib.errors import ConfigError

PUBLISHED = Path(__file__).resolve().parents[1] / "schedules"
QUANTIZERS, LR_SCHEDULERS = SECTIONS["quantizers"].classes, SECTIONS["lr_schedulers"].classes
OURS = Path(__file__).resolve().parents[2] / "schedules"


def load(folder: Path, text: str, epochs: int = 100) -> Schedule:
    path = folder / "a.yaml"
    path.write_text(text)
    return read_schedule(path, epochs)


def problems(folder: Path, text: str, epochs: int = 100) -> list[str]:
    """The problems of a file, without its folder."""
    with pytest.raises(ConfigError) as caught:
        load(folder, text, epochs)
    return [problem.replace(f"{folder}/", "") for problem in caught.value.problems]


def quantizer(*lines: str, cls: str = "LSQQuantizer") -> str:
    """A file whose arguments stand on line 4 and after."""
    body = "".join(f"    {line}\n" for line in lines)
    return f"quantizers:\n  q:\n    class: {cls}\n{body}" + policies("quantizer: {instance_name: q}, epochs: [0]")


def lr(*lines: str, cls: str = "StepLR") -> str:
    return quantizer(*lines, cls=cls).replace("quantizers:", "lr_schedulers:").replace("quantizer:", "lr_scheduler:")


def extension(*lines: str, cls: str = "KnowledgeDistillation") -> str:
    return quantizer(*lines, cls=cls).replace("quantizers:", "extensions:").replace("quantizer:", "extension:")


def policies(*entries: str) -> str:
    return "policies:\n" + "".join(f"  - {{{entry}}}\n" for entry in entries)


def settings(schedule: Schedule) -> dict[str, object]:
    return dict(schedule.policies[0].component.settings)


# ------------------------------------------------------------------------------------------------ what loads


FLOAT = {"bits_activations": 0, "bits_weights": 0}
PREACT = dict.fromkeys(("conv1", "layer1.0.pre_relu", "final_relu", "fc"), FLOAT)
ALEXNET = dict.fromkeys(("features.0", "features.1", "classifier.5", "classifier.6"), FLOAT)


@pytest.mark.parametrize(
    ("name", "components", "spans", "rules"),
    [
        pytest.param(
            "pact_w3a4",
            [
                ("PACTQuantizer", {"act_clip_init_val": 8.0, "bits_activations": 4, "bits_weights": 3}),
                ("MultiStepLR", {"milestones": (60, 120), "gamma": 0.1}),
            ],
            [(0, 200), (0, 121)],
            PREACT,
            id="PACT, the older overrides",
        ),
        pytest.param(
            "dorefa_w3a8",
            [
                ("DorefaQuantizer", {"bits_activations": 8, "bits_weights": 3}),
                ("MultiStepMultiGammaLR", {"milestones": (80, 120, 160), "gammas": (0.1, 0.1, 0.2)}),
            ],
            [(0, 200), (0, 161)],
            PREACT,
            id="DoReFa",
        ),
        pytest.param(
            "dorefa_alexnet_bn",
            [
                ("DorefaQuantizer", {"bits_activations": 8, "bits_weights": 3}),
                ("MultiStepLR", {"milestones": (60, 75), "gamma": 0.2}),
            ],
            [(0, 200), (0, 200)],
            ALEXNET,
            id="DoReFa, layers with numbers",
        ),
        pytest.param(
            "wrpn_w4a8",
            [
                ("WRPNQuantizer", {"bits_activations": 8, "bits_weights": 4}),
                ("MultiStepLR", {"milestones": (60, 75), "gamma": 0.2}),
            ],
            [(0, 200), (0, 200)],
            {
                "module.features.0": FLOAT,
                "features.1": FLOAT,
                "classifier.5": FLOAT,
                "classifier.6": {**FLOAT, "bits_bias": 16},
            },
            id="WRPN, empty bits, module.",
        ),
        pytest.param(
            "linear_w8a8",
            [
                (
                    "QuantAwareTrainRangeLinearQuantizer",
                    {
                        "bits_activations": 8,
                        "bits_weights": 8,
                        "mode_activations": "asym_u",
                        "mode_weights": "asym_u",
                        "ema_decay": 0.999,
                        "per_channel_wts": True,
                    },
                )
            ],
            [(0, 300)],
            {},
            id="linear",
        ),
        pytest.param("base_step", [("StepLR", {"step_size": 45, "gamma": 0.1})], [(35, 200)], {}, id="StepLR"),
        pytest.param("base_exponential", [("ExponentialLR", {"gamma": 0.98})], [(0, 200)], {}, id="ExponentialLR"),
        pytest.param(
            "base_multi_gamma",
            [("MultiStepMultiGammaLR", {"milestones": (80, 120, 160), "gammas": (0.1, 0.1, 0.2)})],
            [(0, 200)],
            {},
            id="MultiStepMultiGammaLR",
        ),
    ],
)
def test_published_files(
    name: str, components: list[tuple[str, dict[str, object]]], spans: list[tuple[int, int]], rules: dict[str, Any]
) -> None:
    schedule = read_schedule(PUBLISHED / f"{name}.yaml", 180)
    assert [(each.component.cls, each.component.settings) for each in schedule.policies] == components
    assert [(each.start, each.end) for each in schedule.policies] == spans
    assert {each.frequency for each in schedule.policies} == {1}
    assert {rule.pattern: rule.settings for rule in schedule.policies[0].component.rules} == rules


@pytest.mark.parametrize("path", sorted(OURS.glob("train_*.yaml")), ids=lambda path: path.stem)
def test_the_files_we_ship_load(path: Path) -> None:
    assert read_schedule(path, 200).policies


def test_a_rule_knows_its_lines_and_tolerates_the_prefix_of_a_parallel_model() -> None:
    rule = read_schedule(PUBLISHED / "wrpn_w4a8.yaml", 10).policies[0].component.rules[0]
    assert (rule.where, rule.lines["bits_weights"]) == (f"{PUBLISHED}/wrpn_w4a8.yaml:9", "wrpn_w4a8.yaml:10")
    assert rule.matches("features.0")


@pytest.mark.parametrize("cls", QUANTIZERS)
def test_every_quantizer_takes_the_common_arguments(tmp_path: Path, cls: str) -> None:
    lines = ["bits_activations: 1", "bits_weights: 0", "bits_bias: null", "edges: all", "rounding: stochastic"]
    lines += ["calibration_images: 64", "lr_factor: 1e-2", "dampening: 0", "bits_first_last: 8", "freeze_bn_epoch: 3"]
    lines += ["bits_other_edges: 6"]
    lines += ["overrides: {fc: {bits_weights: 2, bits_bias: 8}}"]
    schedule = load(tmp_path, quantizer(*lines, cls=cls))
    assert settings(schedule) == {
        "bits_activations": 1,
        "bits_weights": 0,
        "bits_bias": 32,
        "edges": "all",
        "rounding": "stochastic",
        "calibration_images": 64,
        "lr_factor": 0.01,
        "dampening": 0.0,
        "bits_first_last": 8,
        "bits_other_edges": 6,
        "freeze_bn_epoch": 3,
    }
    assert schedule.policies[0].component.rules[0].settings == {"bits_weights": 2, "bits_bias": 8}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param(quantizer(), {}, id="nothing given, nothing there"),
        pytest.param(quantizer("overrides:"), {}, id="overrides left empty"),
        pytest.param(quantizer("widen: 2", cls="WRPNQuantizer"), {"widen": 2}, id="WRPN"),
        pytest.param(quantizer("stochastic: yes", cls="BinaryConnectQuantizer"), {"stochastic": True}, id="binary"),
        pytest.param(quantizer("bits_gradients: 8", cls="DorefaQuantizer"), {"bits_gradients": 8}, id="gradients"),
        pytest.param(quantizer("act_clip_decay: null", cls="PACTQuantizer"), {"act_clip_decay": None}, id="no decay"),
        pytest.param(
            quantizer("mode: {weights: sym_restr}", cls="QuantAwareTrainRangeLinearQuantizer"),
            {"mode_weights": "sym_restr"},
            id="mode of weights",
        ),
        pytest.param(lr("T_max: 9", "power: 2", cls="PolynomialLR"), {"T_max": 9, "power": 2.0}, id="older spelling"),
        pytest.param(lr("total_iters: 9", cls="PolynomialLR"), {"T_max": 9}, id="spelling of torch"),
        pytest.param(
            lr("T_max: 9", "eta_min: 1e-5", cls="CosineAnnealingLR"), {"T_max": 9, "eta_min": 1e-5}, id="1e-5"
        ),
        pytest.param(
            extension("teacher: self", "temperature: 4", "match: {layer3: layer4}", "match_kind: feature"),
            {"teacher": "self", "temperature": 4.0, "match": {"layer3": "layer4"}, "match_kind": "feature"},
            id="distillation",
        ),
    ],
)
def test_settings(tmp_path: Path, text: str, expected: dict[str, object]) -> None:
    assert settings(load(tmp_path, text)) == expected


SEVERAL = """\
version: 2
quantizers:
  eight: {class: LSQQuantizer, bits_weights: 8}
  four: {class: LSQQuantizer, bits_weights: 4}
lr_schedulers:
  warm: {class: LinearLR, total_iters: 500}
pruners:
policies:
  - {quantizer: {instance_name: eight, args: {}}, starting_epoch: 2, ending_epoch: 6}
  - {lr_scheduler: {instance_name: warm, args: {per: step}}, starting_epoch: 0, ending_epoch: 3, frequency: 2}
  - {quantizer: {instance_name: four}, starting_epoch: 5, ending_epoch: 90}
  - {quantizer: {instance_name: eight}, epochs: [8, 95]}
"""


def test_several_quantizers_and_any_start(tmp_path: Path) -> None:
    schedule = load(tmp_path, SEVERAL, epochs=10)
    assert [[each.component.name for each in schedule.active(epoch)] for epoch in range(10)] == [
        ["warm"], [], ["eight", "warm"], ["eight"], ["eight"], ["eight", "four"], ["four"], ["four"], ["four", "eight"],
        ["four"],
    ]  # fmt: skip
    assert [each.component.name for each in schedule.of("quantizers")] == ["eight", "four", "eight"]
    assert (schedule.of("lr_schedulers")[0].args, schedule.policies[0].args) == ({"per": "step"}, {})
    last = schedule.policies[-1]
    assert (last.start, last.end, last.epochs) == (8, 96, (8, 95))


# ------------------------------------------------------------------------------------------------ laws


@given(st.integers(0, 30), st.integers(1, 30), st.data())
def test_a_span_acts_at_its_start_and_every_frequency_within(start: int, length: int, data: st.DataObject) -> None:
    frequency = data.draw(st.integers(1, length))
    policy = PolicySpec(Component("quantizers", "q", "LSQQuantizer", {}), start, start + length, frequency)
    assert [e for e in range(-5, 99) if policy.active(e)] == list(range(start, start + length, frequency))


# ------------------------------------------------------------------------------------------------ mistakes

BITS = "a whole number from 1 to 16, or null or 0 for float"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param(
            quantizer("bits_weights: 17"), f"a.yaml:4: bits_weights is 17; allowed: {BITS}", id="too many bits"
        ),
        pytest.param(
            quantizer("lr_factor: 0"), "a.yaml:4: lr_factor is 0; allowed: a number above 0", id="no learning"
        ),
        pytest.param(
            quantizer("dampening: .nan"), "a.yaml:4: dampening is nan; allowed: a number from 0", id="not a number"
        ),
        pytest.param(
            quantizer("edges: relus"),
            "a.yaml:4: edges is 'relus'; allowed: relu, all, inputs; did you mean relu?",
            id="edges",
        ),
        pytest.param(
            quantizer("calibration_images: 0"),
            "a.yaml:4: calibration_images is 0; allowed: a whole number from 1",
            id="no images",
        ),
        pytest.param(
            quantizer("widen: 9", cls="WRPNQuantizer"),
            "a.yaml:4: widen is 9; allowed: a whole number from 1 to 8, or null for 1",
            id="too wide",
        ),
        pytest.param(
            quantizer("overrides: {fc: {mode: sym}}"),
            "a.yaml:4: unknown key 'mode'; allowed: bits_activations, bits_weights, bits_bias, per_channel_wts",
            id="an override that the class does not know",
        ),
        pytest.param(
            quantizer("overrides:", "  fc: {wts: 4}"),
            "a.yaml:5: the key 'wts' is no longer used; write 'bits_weights'",
            id="the older key in overrides",
        ),
        pytest.param(
            quantizer("overrides: {'*.fc': {bits_weights: 4}}"),
            "a.yaml:4: '*.fc' is not a regular expression: nothing to repeat at position 0; write '.*' for any text",
            id="glob",
        ),
        pytest.param(
            quantizer("overrides: {fc: {bits_weights: 4}}", "bits_overrides: {fc: {wts: 4}}"),
            "a.yaml:5: overrides and bits_overrides mean the same; keep one",
            id="both overrides",
        ),
        pytest.param(
            quantizer("bits_overrides: [fc]"),
            "a.yaml:4: bits_overrides is a list; allowed: a mapping of layer names to settings",
            id="overrides in a list",
        ),
        pytest.param(
            quantizer(cls="PostTrainLinearQuantizer"),
            "a.yaml:3: PostTrainLinearQuantizer quantizes without training; use --quantize-eval --qe-config-file with "
            "this file",
            id="post-training",
        ),
        pytest.param(
            quantizer("step_size: 3", cls="StepLR"),
            "a.yaml:3: class 'StepLR' stands in section quantizers; move it to lr_schedulers",
            id="class of another section",
        ),
        pytest.param(
            "quantizers: {q: 4}\n" + policies("quantizer: {instance_name: q}, epochs: [0]"),
            f"a.yaml:1: the quantizer 'q' has no class; allowed: {', '.join(QUANTIZERS)}",
            id="no class",
        ),
        pytest.param(
            lr(cls="StepLr"),
            f"a.yaml:3: unknown class 'StepLr' in section lr_schedulers; allowed: {', '.join(LR_SCHEDULERS)}; "
            "did you mean StepLR?",
            id="unknown class",
        ),
        pytest.param(
            lr(cls="LambdaLR"), "a.yaml:3: LambdaLR needs a function; use MultiStepMultiGammaLR", id="LambdaLR"
        ),
        pytest.param(lr("gamma: 0.1"), "a.yaml:2: StepLR needs step_size; add it", id="missing argument"),
        pytest.param(
            lr("step_size: 3", "last_epoch: 4"),
            "a.yaml:5: unknown key 'last_epoch'; allowed: step_size, gamma, class",
            id="an argument that YAML cannot set",
        ),
        pytest.param(
            lr("step_size: 2.5"), "a.yaml:4: step_size is 2.5; allowed: a whole number from 1", id="half an epoch"
        ),
        pytest.param(
            lr("milestones: [60, 30]", cls="MultiStepLR"),
            "a.yaml:4: milestones is a list; allowed: a list of epochs in increasing order, as in [60, 120]",
            id="milestones in disorder",
        ),
        pytest.param(
            lr("milestones: [30, 60]", "gammas: [0.1]", cls="MultiStepMultiGammaLR"),
            "a.yaml:5: 2 milestones need as many gammas, not 1",
            id="a milestone without gamma",
        ),
        pytest.param(
            lr("milestones: [30]", "gammas: [0]", cls="MultiStepMultiGammaLR"),
            "a.yaml:5: gammas is a list; allowed: a list of numbers above 0, as in [0.1, 0.2]",
            id="gamma 0",
        ),
        pytest.param(
            lr("T_max: 3", "total_iters: 3", cls="PolynomialLR"),
            "a.yaml:5: total_iters and T_max exclude each other; keep one",
            id="both spellings",
        ),
        pytest.param(
            lr("power: 3", cls="PolynomialLR"),
            "a.yaml:2: PolynomialLR needs T_max or total_iters; add it",
            id="neither",
        ),
        pytest.param(
            lr("max_lr: 1", "total_steps: 5", "steps_per_epoch: 3", cls="OneCycleLR"),
            "a.yaml:6: steps_per_epoch has no effect without epochs; add that or remove it",
            id="no effect",
        ),
        pytest.param(
            extension(cls="FreezeTraining"),
            "a.yaml:3: FreezeTraining is not available in this version yet; remove it and its policies",
            id="absent extension",
        ),
        pytest.param(
            extension("temperature: 2"), "a.yaml:2: KnowledgeDistillation needs teacher; add it", id="no teacher"
        ),
        pytest.param(
            extension("teacher: self", "match: [fc]"),
            "a.yaml:5: match is a list; allowed: a mapping of the student's layers to the teacher's",
            id="match in a list",
        ),
        pytest.param(
            extension("teacher: self", "match_wt: 3"),
            "a.yaml:5: match_wt has no effect without match; add that or remove it",
            id="weight without match",
        ),
    ],
)
def test_one_mistake_in_a_component(tmp_path: Path, text: str, expected: str) -> None:
    assert problems(tmp_path, text) == [expected]


HEAD = "quantizers:\n  q: {class: LSQQuantizer}\nlr_schedulers:\n  lr: {class: StepLR, step_size: 3}\n"
USE_LR = "lr_scheduler: {instance_name: lr}, epochs: [0]"
USE_Q = "quantizer: {instance_name: q}, epochs: [0]"


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        pytest.param(
            "quantizer: {instance_name: qq}, epochs: [0]",
            "a.yaml:7: there is no quantizer 'qq'; allowed: q; did you mean q?",
            id="no such instance",
        ),
        pytest.param(
            "extension: {instance_name: kd}, epochs: [0]",
            "a.yaml:7: there is no extension 'kd'; allowed: none is declared",
            id="no such section",
        ),
        pytest.param(
            "quantizer: {instance_name: lr}, epochs: [0]",
            "a.yaml:7: 'lr' is no quantizer: it is a component of lr_schedulers (a.yaml:4); write lr_scheduler",
            id="of another section",
        ),
        pytest.param(
            "quantizer: q, epochs: [0]",
            "a.yaml:7: quantizer names no component; write quantizer: {instance_name: q}",
            id="bare name",
        ),
        pytest.param(
            "quantizer: , epochs: [0]",
            "a.yaml:7: quantizer names no component; write quantizer: {instance_name: NAME}",
            id="no name",
        ),
        pytest.param(
            "quantizer: {instance_name: q, arg: {}}, epochs: [0]",
            "a.yaml:7: unknown key 'arg'; allowed: instance_name, args; did you mean args?",
            id="unknown key beside the name",
        ),
        pytest.param(
            "quantizer: {instance_name: q, args: {bits_weights: 3}}, epochs: [0]",
            "a.yaml:7: a policy of a quantizer takes no args; set them where it is declared",
            id="args of a quantizer",
        ),
        pytest.param(
            "lr_scheduler: {instance_name: lr, args: {per: batch}}, epochs: [0]",
            "a.yaml:7: per is 'batch'; allowed: epoch, step",
            id="args of a scheduler",
        ),
        pytest.param(
            "epochs: [0]",
            "a.yaml:7: a policy needs exactly one of quantizer, lr_scheduler, extension, pruner, regularizer; "
            "this one has none",
            id="nothing to act",
        ),
        pytest.param(
            "quantizer: {instance_name: q}, lr_scheduler: {instance_name: lr}, epochs: [0]",
            "a.yaml:7: a policy needs exactly one of quantizer, lr_scheduler, extension, pruner, regularizer; "
            "this one has quantizer and lr_scheduler",
            id="two at once",
        ),
        pytest.param(
            "quantizer: {instance_name: q}, starting_epoch: 0",
            "a.yaml:7: a policy needs epochs, as in [0, 5], or starting_epoch, ending_epoch and frequency; "
            "this one has no ending_epoch",
            id="no end",
        ),
        pytest.param(
            "quantizer: {instance_name: q}",
            "a.yaml:7: a policy needs epochs, as in [0, 5], or starting_epoch, ending_epoch and frequency; "
            "this one has no starting_epoch and no ending_epoch",
            id="no epochs",
        ),
        pytest.param(
            "quantizer: {instance_name: q}, epochs: [0], frequency: 2",
            "a.yaml:7: epochs and frequency exclude each other; keep the list or the span",
            id="list and span",
        ),
        pytest.param(
            "quantizer: {instance_name: q}, epochs: 4",
            "a.yaml:7: epochs is 4; allowed: a list of epochs in increasing order, as in [60, 120]",
            id="epochs not a list",
        ),
        pytest.param(
            "quantizer: {instance_name: q}, starting_epoch: -1, ending_epoch: 9",
            "a.yaml:7: starting_epoch is -1; allowed: a whole number from 0",
            id="before the first",
        ),
        pytest.param(
            "quantizer: {instance_name: q}, starting_epoch: 9, ending_epoch: 9",
            "a.yaml:7: ending_epoch is 9; allowed: above starting_epoch, 9",
            id="ends as it starts",
        ),
        pytest.param(
            "quantizer: {instance_name: q}, starting_epoch: 2, ending_epoch: 9, frequency: 8",
            "a.yaml:7: frequency is 8; allowed: 1 to 7, the number of its epochs",
            id="rarer than its epochs",
        ),
        pytest.param(
            "quantizer: {instance_name: q}, starting_epoch: 30, ending_epoch: 40",
            "a.yaml:7: the policy begins in epoch 30, but the run ends after epoch 9 (--epochs 10); begin earlier or "
            "raise --epochs",
            id="after the run",
        ),
        pytest.param(
            "quantizer: {instance_name: q}, epochs: [10, 11]",
            "a.yaml:7: the policy begins in epoch 10, but the run ends after epoch 9 (--epochs 10); begin earlier or "
            "raise --epochs",
            id="listed after the run",
        ),
        pytest.param(
            "quantiser: {instance_name: q}, quantizer: {instance_name: q}, epochs: [0]",
            "a.yaml:7: unknown key 'quantiser'; allowed: quantizer, lr_scheduler, extension, pruner, regularizer, "
            "starting_epoch, ending_epoch, frequency, epochs; did you mean quantizer?",
            id="unknown key",
        ),
    ],
)
def test_one_mistake_in_a_policy(tmp_path: Path, policy: str, expected: str) -> None:
    """The mistaken policy stands on line 7, after two that use both components."""
    text = f"{HEAD}policies:\n  - {{{USE_LR}}}\n  - {{{policy}}}\n  - {{{USE_Q}}}\n"
    assert problems(tmp_path, text, epochs=10) == [expected]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param(
            "- 1",
            [
                "a.yaml:1: the file holds a list; allowed: a mapping of version, quantizers, lr_schedulers, "
                "extensions, pruners, regularizers, policies"
            ],
            id="a list",
        ),
        pytest.param(
            HEAD,
            ["a.yaml:1: the file has no policies, so that nothing in it acts; add a list 'policies'"],
            id="no policies",
        ),
        pytest.param(HEAD + "policies: {q: 1}\n", ["a.yaml:5: policies is a mapping; allowed: a list"], id="no list"),
        pytest.param(
            HEAD + "policies:\n  - q\n  - 3\n",
            [
                "a.yaml:6: a policy is 'q'; allowed: a mapping, as of quantizer and starting_epoch",
                "a.yaml:7: a policy is 3; allowed: a mapping, as of quantizer and starting_epoch",
                "a.yaml:2: no policy uses the quantizer 'q'; add one under 'policies' or remove it",
                "a.yaml:4: no policy uses the lr_scheduler 'lr'; add one under 'policies' or remove it",
            ],
            id="policies that are none",
        ),
        pytest.param(
            HEAD + policies(USE_Q),
            ["a.yaml:4: no policy uses the lr_scheduler 'lr'; add one under 'policies' or remove it"],
            id="not used",
        ),
        pytest.param(
            "quantizers: [q]\n" + policies(USE_Q),
            [
                "a.yaml:1: quantizers is a list; allowed: a mapping of names to components",
                "a.yaml:3: there is no quantizer 'q'; allowed: none is declared",
            ],
            id="a section that is a list",
        ),
        pytest.param(
            "pruners: {p: {class: AutomatedGradualPruner, final_sparsity: 0.9}}\n"
            "regularizers: {r: {class: L1Regularizer}}\n"
            + policies(
                "pruner: {instance_name: p, args: {levels: {fc: 1}}}, epochs: [0]",
                "regularizer: {instance_name: r}, epochs: [0]",
            ),
            [
                "a.yaml:1: AutomatedGradualPruner needs initial_sparsity; add it",
                "a.yaml:1: AutomatedGradualPruner needs weights; add it",
                "a.yaml:2: L1Regularizer needs reg_regims; add it",
            ],
            id="pruning",
        ),
        pytest.param(
            "lr_schedulers: {lr: {class: ReduceLROnPlateau}}\n"
            + policies("lr_scheduler: {instance_name: lr, args: {per: step}}, epochs: [0]"),
            ["a.yaml:3: ReduceLROnPlateau acts on the results of an epoch; remove per or write epoch"],
            id="plateau of steps",
        ),
    ],
)
def test_mistakes_in_the_file(tmp_path: Path, text: str, expected: list[str]) -> None:
    assert problems(tmp_path, text) == expected


def test_an_unknown_key_is_reported_once_for_each_place(tmp_path: Path) -> None:
    text = quantizer("act_sat_mode: sym", "bits_weigths: 4", cls="QuantAwareTrainRangeLinearQuantizer")
    found = [(each.split(";")[0], each.split("; ")[-1]) for each in problems(tmp_path, text)]
    assert found[0][0] == "a.yaml:4: unknown key 'act_sat_mode'"
    assert found[1] == (
        "a.yaml:5: unknown key 'bits_weigths'",
        "did you mean bits_weights or bits_bias or bits_overrides?",
    )


def test_mistakes_of_all_sorts_are_reported_together(tmp_path: Path) -> None:
    text = """\
quantisers: {}
quantizers:
  q: {class: DorefaQuantiser}
  p: {class: PACTQuantizer, bits_weights: many}
lr_schedulers:
  lr: {class: StepLR}
policies:
  - {quantizer: {instance_name: p}, starting_epoch: 3, ending_epoch: 2}
  - {lr_scheduler: {instance_name: lq}, epochs: []}
"""
    assert [problem.split(";")[0] for problem in problems(tmp_path, text)] == [
        "a.yaml:1: unknown section 'quantisers'",
        "a.yaml:3: unknown class 'DorefaQuantiser' in section quantizers",
        "a.yaml:4: bits_weights is 'many'",
        "a.yaml:6: StepLR needs step_size",
        "a.yaml:8: ending_epoch is 2",
        "a.yaml:9: epochs is a list",
        "a.yaml:9: there is no lr_scheduler 'lq'",
        "a.yaml:3: no policy uses the quantizer 'q'",
        "a.yaml:6: no policy uses the lr_scheduler 'lr'",
    ]


LENIENT = """\
quantizers:
  q:
    class: {quantizer}
    bits_weights: 4
    bits_weights: 3
lr_schedulers:
  lr: {{class: {lr}, gamma: 0.5, step_size: 3}}
  unused: {{class: StepLR, step_size: 3}}
policies:
  - {{quantizer: {{instance_name: q}}, starting_epoch: 0, ending_epoch: 300}}
  - {{lr_scheduler: {{instance_name: lr}}, starting_epoch: 30, ending_epoch: 300}}
  - {{lr_scheduler: {{instance_name: lr}}, epochs: [10, 12]}}
"""
RUN = "but the run ends after epoch 9 (--epochs 10); begin earlier or raise --epochs"
IDLE = [
    f"a.yaml:11: the policy begins in epoch 30, {RUN}",
    f"a.yaml:12: the policy begins in epoch 10, {RUN}",
    "a.yaml:8: no policy uses the lr_scheduler 'unused'; add one under 'policies' or remove it",
]


@pytest.mark.parametrize("cls", ["PACTQuantizer", "DorefaQuantizer", "QuantAwareTrainRangeLinearQuantizer"])
def test_what_published_files_of_distiller_have_is_a_warning(
    tmp_path: Path, cls: str, caplog: pytest.LogCaptureFixture
) -> None:
    schedule = load(tmp_path, LENIENT.format(quantizer=cls, lr="StepLR"), epochs=10)
    doubled = "a.yaml:5: duplicate key 'bits_weights', first on line 4; the last one counts"
    found = [message.replace(f"{tmp_path}/", "") for message in caplog.messages]
    assert found == [f"Warning: {each}" for each in (doubled, *IDLE)]
    assert {record.levelname for record in caplog.records} == {"WARNING"}
    assert settings(schedule) == {"bits_weights": 3}
    assert [[each.component.name for each in schedule.active(epoch)] for epoch in (0, 9)] == [["q"], ["q"]]
    assert [row[2] for row in cells(timeline(schedule, 10))[1:]] == [
        "0 to 9 (to 299 in the file)",
        "none (30 to 299 in the file)",
        "none (10, 12 in the file)",
    ]


@pytest.mark.parametrize(
    ("quantizer", "lr"),
    [
        pytest.param("LSQQuantizer", "StepLR", id="one of its classes is ours"),
        pytest.param("PACTQuantiser", "StepLR", id="one of its classes is nobody's"),
        pytest.param("DorefaQuantizer", "LinearLR", id="a scheduler of a later torch"),
    ],
)
def test_in_a_file_of_ours_it_is_a_mistake(tmp_path: Path, quantizer: str, lr: str) -> None:
    found = problems(tmp_path, LENIENT.format(quantizer=quantizer, lr=lr), epochs=10)
    assert found[0] == "a.yaml:5: duplicate key 'bits_weights', first on line 4; keep one"
    assert found[-3:] == IDLE


def test_other_mistakes_in_a_file_of_distiller_stay_mistakes(tmp_path: Path) -> None:
    text = LENIENT.format(quantizer="PACTQuantizer", lr="StepLR").replace("instance_name: q}", "instance_name: p}")
    assert problems(tmp_path, text, epochs=10) == ["a.yaml:10: there is no quantizer 'p'; allowed: q"]


# ------------------------------------------------------------------------------------------------ timeline


def cells(table: str) -> list[list[str]]:
    """The rows of tables, without their rules."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| ")]


def test_timeline_of_one_quantizer() -> None:
    schedule = read_schedule(PUBLISHED / "pact_w3a4.yaml", 100)
    what = "bits_activations 4, bits_weights 3, act_clip_init_val 8, 4 overrides"
    assert cells(timeline(schedule, 100)) == [
        ["Component", "Class", "Epochs", "Every", "What"],
        ["pact_quantizer", "PACTQuantizer", "0 to 99 (to 199 in the file)", "epoch", what],
        ["training_lr", "MultiStepLR", "0 to 99 (to 120 in the file)", "epoch", "milestones [60, 120], gamma 0.1"],
    ]


def test_timeline_of_several_quantizers(tmp_path: Path) -> None:
    assert cells(timeline(load(tmp_path, SEVERAL, epochs=10), 10))[1:] == [
        ["eight", "LSQQuantizer", "2 to 5", "epoch", "bits_weights 8"],
        ["warm", "LinearLR", "0 to 2", "step, every 2 epochs", "total_iters 500"],
        ["four", "LSQQuantizer", "5 to 9 (to 89 in the file)", "epoch", "bits_weights 4"],
        ["eight", "LSQQuantizer", "8 (then 95 in the file)", "listed", "bits_weights 8"],
        ["Epochs", "Quantizers"],
        ["0 to 1", "none: float"],
        ["2 to 4", "eight"],
        ["5", "eight, four"],
        ["6 to 7", "four"],
        ["8", "four, eight"],
        ["9", "four"],
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param(quantizer("bits_activations: null", "bits_first_last: null"),
                     "bits_activations float, bits_first_last none", id="float"),
        pytest.param(quantizer("per_channel_wts: false", "overrides: {fc: {bits_weights: 8}}"),
                     "per_channel_wts no, 1 override", id="one override"),
        pytest.param(extension("teacher: self", "match: {a: b, c: d}"), "teacher self, match of 2 layers", id="match"),
    ],
)  # fmt: skip
def test_what_the_timeline_says_of_a_component(tmp_path: Path, text: str, expected: str) -> None:
    assert cells(timeline(load(tmp_path, text), 10))[1][-1] == expected


# ------------------------------------------------------------------------------------------------ any file at all

WORDS = ["class", "epochs", "policies", "overrides", "instance_name", "args", "q", "LSQQuantizer", "StepLR", "mode"]
WORDS += ["quantizers", "lr_schedulers", "extensions", "quantizer", "lr_scheduler", "starting_epoch", "ending_epoch"]
WORDS += ["milestones", "match", "frequency", "bits_weights", "KnowledgeDistillation"]
SCALARS = st.sampled_from([None, True, 0, 1, -3, 2.5, float("nan"), *WORDS])
TREES = st.recursive(
    SCALARS,
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.sampled_from(WORDS), below, max_size=4),
    max_leaves=12,
)
ENTRIES = st.dictionaries(st.sampled_from(WORDS), TREES, max_size=4)


@given(
    st.dictionaries(st.sampled_from(["quantizers", "lr_schedulers", "extensions"]), TREES, max_size=3),
    st.lists(ENTRIES | TREES, max_size=3),
)
def test_any_file_loads_or_has_its_mistakes_told(tree: dict[str, object], entries: list[object]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.yaml"
        path.write_text(yaml.safe_dump({**tree, "policies": entries}))
        told: tuple[str, ...] = ()
        try:
            read_schedule(path, 10)
        except ConfigError as error:
            told = error.problems
        assert all(re.match(r".*a\.yaml:\d+: ", problem) for problem in told)
