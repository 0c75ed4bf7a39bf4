"""Pruners and regularizers of schedules: laws that hold for all that are registered, and their mistakes."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import good, run
from saved import same
from torch import Tensor, nn

import schedules
from qlib.app.policies import read_schedule
from qlib.config.schedule.types import Component, PolicySpec
from qlib.graph import capture
from qlib.graph.coordinates import ChannelClasses, channel_classes
from qlib.models import create_model, find_model
from qlib.prune.groups import GROUP_TYPES, Groups
from qlib.prune.masks import sparsity
from qlib.prune.names import in_own_names_of
from qlib.prune.pruner import CURVES, PRUNERS, Chosen, Moment, Pruner, Target
from qlib.regularize._base import REGULARIZERS, Regularizer
from qlib.train.loop import Running, StepSettings, Trainee, backward, forward
from qlib.train.masking import Masking
from qlib.train.policy import Batch, Losses, Policy
from qlib.train.pruning import Pruning
from qlib.train.regularizing import Regularizing

SETTINGS = StepSettings(batch_size=4, seed=0, print_freq=1)


def digits() -> nn.Module:
    torch.manual_seed(0)
    return create_model(find_model("digits_cnn"), pretrained=True)


def specs_of(folder: Path, text: str) -> tuple[PolicySpec, ...]:
    (folder / "a.yaml").write_text(text)
    return read_schedule(folder / "a.yaml", 3).policies


def pruner_of(spec: PolicySpec, model: nn.Module, **changed: object) -> Pruner:
    settings = in_own_names_of({**spec.component.settings, **changed}, dict(model.named_parameters()))
    return PRUNERS[spec.component.cls](**settings)


def targets_of(pruner: Pruner, model: nn.Module) -> list[Target]:
    weights = {name: model.get_parameter(name).detach() for name in pruner.names}
    shown = activations(pruner.names, model)
    return [
        Target(
            name,
            weight,
            torch.ones_like(weight, dtype=torch.bool),
            index,
            pruner.after_backward(weight, weight.square() + 0.1, pruner.at_first(weight)),
            shown[name],
        )
        for index, (name, weight) in enumerate(weights.items())
    ]


@functools.cache
def classes_of_digits() -> ChannelClasses:
    return channel_classes(capture(digits(), torch.zeros(2, 1, 8, 8)))


def activations(names: Sequence[str], model: nn.Module) -> Mapping[str, tuple[Tensor, Tensor]]:
    sums = {name: model.get_parameter(name).detach().flatten(1).double().sum(1) for name in names}
    return {name: (value.sigmoid(), value.exp()) for name, value in sums.items()}


# ------------------------------------------------------------------------------------------- laws of every class


def test_each_class_has_a_schedule_here() -> None:
    assert set(PRUNERS) == set(schedules.PRUNERS)
    assert set(REGULARIZERS) == set(schedules.REGULARIZERS)


@pytest.mark.parametrize("cls", schedules.PRUNERS)
def test_masks_have_the_shape_of_their_weight_and_leave_something(cls: str, tmp_path: Path) -> None:
    (spec,) = specs_of(tmp_path, schedules.schedule({cls: schedules.PRUNERS[cls]}))
    model = digits()
    pruner = pruner_of(spec, model)
    targets = targets_of(pruner, model)
    chosen = pruner.choose(targets, Moment(2, 0, 3))
    assert set(chosen) == set(pruner.names)
    for target in targets:
        mask = chosen[target.name].mask
        assert (mask.shape, mask.dtype) == (target.weight.shape, torch.bool)
        assert 0 < sparsity(mask) < 1
    again = pruner.choose(targets, Moment(2, 0, 3))
    assert all(torch.equal(chosen[name].mask, again[name].mask) for name in chosen)


LEVELS = {
    "MagnitudeParameterPruner": "thresholds",
    "SensitivityPruner": "sensitivities",
    "SparsityLevelParameterPruner": "levels",
    "BaiduRNNPruner": "q",
    "SplicingPruner": "sensitivities",
    "RigLPruner": "sparsity",
    "RandomLevelStructureParameterPruner": "sparsity_range",
    "StructureParameterPruner": "reg_regims",
}
"""Class -> what its level is, where it is no `desired_sparsity` or `final_sparsity`."""


def at_level(pruner: Pruner, cls: str, level: float) -> Pruner:
    key = LEVELS.get(cls, "final_sparsity" if hasattr(pruner, "final_sparsity") else "desired_sparsity")
    old = getattr(pruner, key)
    if key == "reg_regims":
        return replace(pruner, reg_regims={name: (level, kind) for name, (_, kind) in old.items()})  # type: ignore[type-var]
    if isinstance(old, dict):
        return replace(pruner, **{key: dict.fromkeys(old, level)})  # type: ignore[type-var]
    return replace(pruner, **{key: (level, level) if key == "sparsity_range" else level})  # type: ignore[type-var]


@pytest.mark.parametrize("cls", schedules.PRUNERS)
def test_a_higher_level_prunes_all_that_a_lower_one_does(cls: str, tmp_path: Path) -> None:
    (spec,) = specs_of(tmp_path, schedules.schedule({cls: schedules.PRUNERS[cls]}))
    model = digits()
    pruner = pruner_of(spec, model)
    targets = targets_of(pruner, model)
    before: dict[str, Chosen] | None = None
    counts = list[int]()
    for level in (0.0, 0.05, 0.3, 0.6, 0.9):
        now = at_level(pruner, cls, level).choose(targets, Moment(2, 0, 3))
        assert before is None or all(not bool((now[name].mask & ~before[name].mask).any()) for name in now)
        counts.append(sum(int((~each.mask).sum()) for each in now.values()))
        before = now
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]


class _Steps:
    """A run of training of two policies in memory, which can be broken off anywhere."""

    def __init__(self, spec: PolicySpec) -> None:
        self.model = digits()
        self.masking = Masking(self.model, {})
        self.policies: list[Policy] = [_policy(spec, self.model, self.masking), self.masking]
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
        for policy in self.policies:
            policy.use(self.optimizer, 1)

    def run(self, first: int, last: int) -> None:
        """The steps from `first` to `last`, two in each epoch."""
        for step in range(first, last):
            if step in (first, step // 2 * 2):
                for policy in self.policies:
                    policy.on_epoch_begin(step // 2)
            self._step(step)
            if step % 2:
                for policy in self.policies:
                    policy.on_epoch_end(step // 2, {})

    def _step(self, step: int) -> None:
        images = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(step))
        batch = Batch(step // 2, step % 2, [0] * 4, images, torch.arange(4))
        trainee = Trainee(self.model, self.optimizer, self.policies)
        losses = forward(trainee, batch, SETTINGS, Running())
        backward(trainee, batch, losses, SETTINGS, torch.amp.GradScaler("cpu", enabled=False))

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {
            "weights": self.model.state_dict(),
            "masks": self.masking.masks,
            "optimizer": self.optimizer.state_dict(),
            "policies": [policy.state_dict() for policy in self.policies],
        }

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["weights"])
        self.masking.__init__(self.model, state["masks"])  # type: ignore[misc]
        self.masking.use(self.optimizer, 1)
        for policy, saved in zip(self.policies, state["policies"], strict=True):
            policy.load_state_dict(saved)
        self.optimizer.load_state_dict(state["optimizer"])


def _policy(spec: PolicySpec, model: nn.Module, masking: Masking) -> Policy:
    if spec.component.section == "regularizers":
        settings = in_own_names_of(spec.component.settings, dict(model.named_parameters()))
        regularizer: Regularizer = REGULARIZERS[spec.component.cls](**settings)
        if regularizer.needs_classes:
            regularizer = regularizer.with_classes(classes_of_digits(), dict(model.named_parameters()))
        return Regularizing(spec, regularizer, regularizer.names, masking)
    pruner = pruner_of(spec, model)
    shown = lambda names: activations(names, model)  # noqa: E731
    return Pruning(spec, pruner, pruner.names, masking, seed=3, steps=2, activations=shown)


def copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: copied(each) for name, each in value.items()}
    if isinstance(value, list):
        return [copied(each) for each in value]
    return value.clone() if isinstance(value, Tensor) else value


@pytest.mark.parametrize("cls", [*schedules.PRUNERS, *schedules.REGULARIZERS])
def test_a_run_that_is_broken_off_at_any_step_ends_in_the_same_bytes(cls: str, tmp_path: Path) -> None:
    kind = schedules.PRUNERS if cls in schedules.PRUNERS else schedules.REGULARIZERS
    text = (
        schedules.schedule({cls: kind[cls]})
        if kind is schedules.PRUNERS
        else schedules.schedule(None, {cls: kind[cls]})
    )
    (spec,) = specs_of(tmp_path, text)
    whole, states = _Steps(spec), list[dict[str, Any]]()
    for step in range(6):
        whole.run(step, step + 1)
        states.append(copied(whole.state()))
    assert states[-1]["masks"] or cls in ("BernoulliFilterPruner", "GroupVarianceRegularizer")
    for step in (1, 2, 3):
        rest = _Steps(spec)
        rest.load(copied(states[step - 1]))
        rest.run(step, 6)
        assert same(copied(rest.state()), states[-1])


def test_all_of_them_train_from_a_file_of_distillers(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(schedules.schedule(schedules.PRUNERS, schedules.REGULARIZERS, "0 2 1"))
    done = good(
        "-a digits_cnn --pretrained --compress a.yaml --epochs 2 --lr 0.01 -b 64 --etrs 0.1 --evs 0.1 --etes 0.1 -p 1",
        tmp_path,
    )
    assert done.out.count("\nTotal sparsity: ") == 2
    line = next(line for line in done.lines if "Overall Loss" in line)
    assert all(f"{cls}_loss" in line for cls in schedules.REGULARIZERS)
    file = torch.load(done.folder / "checkpoint.pth.tar", weights_only=True)
    assert set(file["masks"]) >= {"fc.weight", "wide.conv.weight", "pointwise.conv.weight"}


def test_a_check_says_what_each_acts_on(tmp_path: Path) -> None:
    chosen = {name: schedules.PRUNERS[name] for name in ("SensitivityPruner", "L1RankedStructureParameterPruner")}
    (tmp_path / "a.yaml").write_text(
        schedules.schedule(chosen, {"L1Regularizer": schedules.REGULARIZERS["L1Regularizer"]})
    )
    done = good("-a digits_cnn --compress a.yaml --epochs 3 --check", tmp_path)
    assert "a_SensitivityPruner (SensitivityPruner) acts on 2 parameters: fc.weight, wide.conv.weight" in done.lines
    assert "a_L1Regularizer (L1Regularizer) acts on 2 parameters: fc.weight, wide.bn.weight" in done.lines
    (tmp_path / "a.yaml").write_text(
        (tmp_path / "a.yaml").read_text().replace("weights: module.fc.weight", "weights: fc.wait")
    )
    done = run("-a digits_cnn --compress a.yaml --epochs 3 --check", tmp_path)
    assert (done.code, "weights names 'fc.wait'" in done.err) == (2, True)


# ------------------------------------------------------------------------------------------- particular laws


def test_automated_gradual_pruning_ends_at_its_level_to_the_weight(tmp_path: Path) -> None:
    weights = "[wide.conv.weight, fc.weight, stem.conv.weight]"
    text = f"initial_sparsity: 0.05, final_sparsity: 0.8, weights: {weights}"
    (spec,) = specs_of(tmp_path, schedules.schedule({"AutomatedGradualPruner": text}))
    run = _Steps(spec)
    run.run(0, 6)
    for name in ("wide.conv.weight", "fc.weight", "stem.conv.weight"):
        weight = run.model.get_parameter(name)
        assert int((weight == 0).sum()) == int(0.8 * weight.numel())


@pytest.mark.parametrize("curve", CURVES)
def test_curves_go_from_the_first_level_to_the_last(curve: str) -> None:
    shares = [CURVES[curve](step / 10) for step in range(11)]
    assert (shares[0], shares[-1]) == (0, 1)
    assert shares == sorted(shares)


@pytest.mark.parametrize(
    ("start", "end", "frequency", "levels"),
    [
        pytest.param(0, 5, 2, [0.0, 0.7, 0.8], id="the end is met"),
        pytest.param(0, 6, 2, [0.0, 0.7, 0.8], id="the last epoch is not one of them"),
        pytest.param(3, 4, 1, [0.8], id="one epoch"),
    ],
)
def test_the_cubic_curve_is_distillers(start: int, end: int, frequency: int, levels: list[float]) -> None:
    moments = (Moment(epoch, start, end, frequency) for epoch in range(start, end, frequency))
    assert [0.8 * CURVES["cubic"](moment.share) for moment in moments] == pytest.approx(levels)


def test_rigl_keeps_its_sparsity_and_moves_its_mask(tmp_path: Path) -> None:
    (spec,) = specs_of(tmp_path, schedules.schedule({"RigLPruner": schedules.PRUNERS["RigLPruner"]}))
    run = _Steps(spec)
    run.run(0, 1)
    first = run.masking.masks["wide.conv.weight"]
    run.run(1, 3)
    now = run.masking.masks["wide.conv.weight"]
    assert int(now.sum()) == int(first.sum()) == first.numel() - int(0.6 * first.numel())
    assert not torch.equal(now, first)
    assert not bool((run.model.get_parameter("wide.conv.weight")[~now] != 0).any())


def test_the_lasso_of_channels_zeroes_all_that_belongs_to_one(tmp_path: Path) -> None:
    text = {"ChannelLassoRegularizer": "strength: 0.001, threshold: 0.2"}
    (spec,) = specs_of(tmp_path, schedules.schedule(None, text))
    run = _Steps(spec)
    run.run(0, 6)
    dead = (run.model.get_parameter("wide.conv.weight").flatten(1) == 0).all(1)
    assert 0 < int(dead.sum()) < len(dead)
    for name in ("wide.bn.weight", "wide.bn.bias"):
        assert bool((run.model.get_parameter(name)[dead] == 0).all())


def test_the_leader_decides_for_all() -> None:
    cls = PRUNERS["L1RankedStructureParameterPruner"]
    pruner = cls(desired_sparsity=0.5, weights=("a", "b"), group_type="Filters", group_dependency="Leader")  # type: ignore[call-arg]
    first, second = torch.tensor([[3.0], [1.0]]), torch.tensor([[1.0, 0.0], [3.0, 3.0]])
    targets = [Target(name, value, value > -1) for name, value in (("a", first), ("b", second))]
    chosen = pruner.choose(targets, Moment(0))
    assert chosen["b"].mask.tolist() == [[True, True], [False, False]]


@pytest.mark.parametrize("kind", GROUP_TYPES)
def test_groups_live_and_die_whole(kind: str) -> None:
    weight = torch.randn(4, 6) if kind in ("Rows", "Cols", "Columns") else torch.randn(4, 6, 3, 3)
    groups = Groups(kind, (2, 3))
    norms = groups.norms(weight, 1)
    assert norms.numel() * groups.size(weight) == weight.numel()
    kept = norms > norms.median()
    mask = groups.spread(kept, weight)
    left = groups.norms(mask.float(), 1)
    assert torch.equal(left > 0, kept)
    assert torch.equal(left[kept], torch.full_like(left[kept], groups.size(weight)))


def test_splicing_brings_weights_back(tmp_path: Path) -> None:
    """Behind masks of the forward pass weights move on, and return when they are large again."""
    (spec,) = specs_of(tmp_path, schedules.schedule({"SplicingPruner": schedules.PRUNERS["SplicingPruner"]}))
    run = _Steps(spec)
    run.run(0, 1)
    weight, mask = run.model.get_parameter("fc.weight"), run.masking.masks["fc.weight"]
    dead = (~mask).nonzero()[0].tolist()
    weight.data[tuple(dead)] = 9.0
    run.run(1, 2)
    assert bool(run.masking.masks["fc.weight"][tuple(dead)])


@pytest.mark.parametrize(
    ("name", "own"),
    [
        pytest.param("module.fc.weight", "fc.weight", id="front"),
        pytest.param("features.module.0.weight", "features.0.weight", id="inside"),
        pytest.param("fc.weight", "fc.weight", id="own"),
        pytest.param("module.weight", "module.weight", id="a layer of that name"),
        pytest.param("layer1.0.bn1_2.weight", "layer1.0.bn2.weight", id="elsewhere"),
    ],
)
def test_names(name: str, own: str) -> None:
    parameters = dict.fromkeys(
        ["fc.weight", "features.0.weight", "module.weight", "layer1.0.bn2.weight"], torch.ones(1, 1)
    )
    assert in_own_names_of({"weights": (name,)}, parameters) == {"weights": (own,)}


# ------------------------------------------------------------------------------------------- mistakes

FINE = "desired_sparsity: 0.5, weights: [fc.weight]"


@pytest.mark.parametrize(
    ("cls", "text", "message"),
    [
        pytest.param(
            "SparsityLevelParameterPruner",
            "levels: {fc.weight: 1.0}",
            "a.yaml:3: levels is a mapping; allowed: a mapping of names of parameters, as conv1.weight, to a number"
            " from 0 to below 1: at 1 nothing would be left",
            id="level 1",
        ),
        pytest.param(
            "AutomatedGradualPruner",
            "initial_sparsity: 0, final_sparsity: 1, weights: fc.weight",
            "a.yaml:3: final_sparsity is 1; allowed: a number from 0 to below 1: at 1 nothing would be left",
            id="final level 1",
        ),
        pytest.param(
            "SensitivityPruner",
            "sensitivities: {module.fc.wait: 1}",
            "a.yaml:3: sensitivities names 'module.fc.wait', which no parameter of the model is called; did you mean",
            id="no such name",
        ),
        pytest.param(
            "L1RankedStructureParameterPruner",
            f"{FINE}, group_type: Columms",
            "a.yaml:3: group_type is 'Columms'; allowed: Filters, 3D, Channels, Rows, Cols, Columns, 2D, 4D, Blocks;"
            " did you mean",
            id="no such groups",
        ),
        pytest.param(
            "L1RankedStructureParameterPruner",
            f"{FINE}, group_type: 2D",
            "a.yaml:3: L1RankedStructureParameterPruner: 'fc.weight' has the shape 10x128, and groups of type 2D need"
            " 3 axes",
            id="groups that a weight does not have",
        ),
        pytest.param(
            "L1RankedStructureParameterPruner",
            f"{FINE}, group_type: Blocks, kwargs: {{block_shape: [3, 8, 1, 1]}}",
            "'fc.weight' has the shape 10x128, which blocks of 3x8 do not divide",
            id="blocks",
        ),
        pytest.param(
            "L1RankedStructureParameterPruner",
            f"{FINE}, group_type: Blocks, kwargs: {{block_shape: [1, 8, 3, 3]}}",
            "kwargs is a mapping; allowed: {block_shape: [filters, channels, 1, 1]}, as [1, 8, 1, 1], or null",
            id="blocks of kernels",
        ),
        pytest.param(
            "L2RankedStructureParameterPruner",
            "desired_sparsity: 0.5, group_dependency: Leader, weights: [fc.weight, wide.conv.weight]",
            "group_dependency Leader needs tensors with as many groups: 'fc.weight' has 10 groups and"
            " 'wide.conv.weight' 24",
            id="leader",
        ),
        pytest.param(
            "GradientRankedFilterPruner",
            f"{FINE}, group_type: Channels",
            "GradientRankedFilterPruner: group_type is Channels; allowed: Filters, 3D, which this class ranks",
            id="filters only",
        ),
        pytest.param(
            "ActivationAPoZRankedFilterPruner",
            FINE,
            "ActivationAPoZRankedFilterPruner: no ReLU follows 'fc.weight', whose zeros it could count",
            id="no ReLU",
        ),
        pytest.param(
            "RandomLevelStructureParameterPruner",
            "sparsity_range: [0.5, 0.2], weights: [fc.weight]",
            "sparsity_range is a list; allowed: two numbers from 0 to below 1, the lower one first, as [0.1, 0.3]",
            id="range",
        ),
        pytest.param(
            "GroupLassoRegularizer",
            "reg_regims: {fc.weight: 0.1}",
            "reg_regims is a mapping; allowed: a mapping of names of parameters, as conv1.weight, to [a number from 0,"
            " a type of groups: Filters",
            id="regime",
        ),
    ],
)
def test_mistakes(cls: str, text: str, message: str, tmp_path: Path) -> None:
    classes = {cls: text}
    section = (None, classes) if cls in REGULARIZERS else (classes,)
    (tmp_path / "a.yaml").write_text(schedules.schedule(*section))
    done = run("-a digits_cnn --compress a.yaml --epochs 3 --lr 0.1", tmp_path)
    assert done.code == 2
    assert message in done.err.replace("\n", " "), done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        pytest.param("mask_gradients: True", "mask_gradients has no effect without mask_on_forward_only", id="mask"),
        pytest.param("levels: {fc.weight: 0.1}", "has no levels; they are those of Sparsity", id="levels"),
        pytest.param("keep: True", "unknown key 'keep'; allowed: levels, keep_mask, mini_batch_pruning", id="unknown"),
    ],
)
def test_mistakes_of_a_policy(args: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(schedules.ARGS, "AutomatedGradualPruner", args)
    (tmp_path / "a.yaml").write_text(
        schedules.schedule({"AutomatedGradualPruner": schedules.PRUNERS["AutomatedGradualPruner"]})
    )
    done = run("-a digits_cnn --compress a.yaml --epochs 3 --lr 0.1", tmp_path)
    assert (done.code, message in done.err) == (2, True), done.err


def test_a_name_beside_others_is_a_warning_in_a_file_of_distillers(tmp_path: Path) -> None:
    text = "sensitivities: {fc.weight: 0.5, fc.wait: 0.5}"
    (tmp_path / "a.yaml").write_text(schedules.schedule({"SensitivityPruner": text}, when="0 1 1"))
    done = good(
        "-a digits_cnn --pretrained --compress a.yaml --epochs 1 --lr 0.01 -b 64 --etrs 0.1 --evs 0.1 --etes 0.1",
        tmp_path,
    )
    assert any(
        line.endswith(
            "sensitivities names 'fc.wait', which no parameter of the model is called; did you mean fc.weight?"
            "; it has no effect"
        )
        for line in done.lines
    )


def test_a_frozen_parameter_is_pruned_and_no_loss_moves_it() -> None:
    model = digits()
    model.get_parameter("fc.weight").requires_grad_(False)
    masking = Masking(model, {})
    component = Component("regularizers", "r", "L1Regularizer", {})
    policy = Regularizing(
        PolicySpec(component, 0, 1),
        REGULARIZERS["L1Regularizer"](reg_regims={"fc.weight": 0.1}),  # type: ignore[call-arg]
        ["fc.weight"],
        masking,
    )
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)
    for each in (policy, masking):
        each.use(optimizer, 1)
    mask = torch.rand(10, 128) < 0.5
    masking.set("fc.weight", mask)
    before = model.get_parameter("fc.weight").clone()
    batch = Batch(0, 0, [0], torch.zeros(1, 1, 8, 8), torch.zeros(1))
    losses = policy.before_backward(batch, torch.zeros(1), Losses(torch.tensor(0.0), torch.tensor(0.0)))
    assert losses.others["L1Regularizer_loss"] > 0
    policy.before_optimizer_step()
    masking.before_optimizer_step()
    assert torch.equal(model.get_parameter("fc.weight"), before)
    assert torch.equal(before != 0, mask)
