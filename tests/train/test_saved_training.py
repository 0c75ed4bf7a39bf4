"""Training checkpoints: what was written is taken over, and a field that is not what it was is named."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qlib.checkpoint.read import read_checkpoint
from qlib.config.flags.groups import TrainArgs
from qlib.config.schedule.types import Component, PolicySpec
from qlib.errors import CheckpointError
from qlib.train.best import EpochScore
from qlib.train.loop import Progress, Running, Trainee
from qlib.train.lr.policy import LrPolicy
from qlib.train.state import TrainingState

STEPS = 10
HEADER = {"arch": "net", "dataset": "images", "num_classes": 3, "extras": {"best_epoch": 1}}
SCHEDULERS = {"StepLR": {"step_size": 1, "gamma": 0.5}, "ReduceLROnPlateau": {"patience": 0}}


def fresh(optimizer: str = "adam", scheduler: str = "StepLR") -> TrainingState:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    component = Component("lr_schedulers", "decay", scheduler, SCHEDULERS[scheduler], (), "s.yaml:1")
    policy = LrPolicy(PolicySpec(component, 0, 9, 1), STEPS)
    trainee = Trainee.of(TrainArgs(optimizer=optimizer, lr=0.1), model, list(model.parameters()), [policy])
    return TrainingState(model, trainee, Progress(), [])


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], dict[str, Any]]:
    """What is read of a checkpoint of a run in its third epoch, by optimizer and scheduler."""
    path = tmp_path_factory.mktemp("training") / "checkpoint.pth.tar"

    def make(optimizer: str = "adam", scheduler: str = "StepLR") -> dict[str, Any]:
        state = fresh(optimizer, scheduler)
        for epoch in range(2):
            state.weights(torch.ones(2, 4)).sum().backward()
            state.trainee.optimizer.step()
            state.trainee.policies[0].on_epoch_end(epoch, {"loss": 1.0, "top1": 50.0, "top5": 90.0})
        state.progress = Progress(2, 3, Running({"Overall Loss": 2.5}, 24))
        state.best[:] = [EpochScore(1, 50.0, 90.0, 1.0, 0.0, 12)]
        state.save(path, HEADER, None)
        return read_checkpoint(path)

    return make


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("old", [False, True], ids=["with a hash", "from before the hash"])
def test_what_was_written_is_taken_over(
    written: Callable[[str, str], dict[str, Any]], optimizer: str, scheduler: str, old: bool
) -> None:
    checkpoint, state = written(optimizer, scheduler), fresh(optimizer, scheduler)
    if old:
        del checkpoint["hash"]
    state.load(checkpoint, "it", STEPS)
    assert (state.progress.epoch, state.progress.steps, state.best[0].top1) == (2, 3, 50.0)
    assert state.progress.running == Running({"Overall Loss": 2.5}, 24)
    kept, given = state.trainee.optimizer.state_dict(), checkpoint["optimizer_state_dict"]
    assert kept["param_groups"] == given["param_groups"]
    assert str(kept["state"]) == str(given["state"])


def put(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    """Sets the field at a path."""

    def change(checkpoint: dict[str, Any]) -> None:
        target: Any = checkpoint
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = value

    return change


def drop(*path: Any) -> Callable[[dict[str, Any]], None]:
    """Removes the field at a path."""

    def change(checkpoint: dict[str, Any]) -> None:
        target: Any = checkpoint
        for key in path[:-1]:
            target = target[key]
        del target[path[-1]]

    return change


NAN, OPT = float("nan"), "optimizer_state_dict"
GROUP, FIRST = (OPT, "param_groups", 0), (OPT, "state", 0)
DAMAGED = [
    pytest.param(
        put("epoch", value="x"), "it has the epoch 'x'; allowed: a whole number from -1 to 1000000", id="epoch x"
    ),
    pytest.param(put("epoch", value=True), "it has the epoch True; allowed: a whole", id="epoch true"),
    pytest.param(put("epoch", value=-7), "it has the epoch -7; allowed: a whole", id="epoch below"),
    pytest.param(put("epoch", value=None), "it has the epoch None; allowed: a whole", id="epoch none"),
    pytest.param(drop("epoch"), "it lacks epoch; give another", id="no epoch"),
    pytest.param(
        put("steps", value=10**9), "it has the steps 1000000000; allowed: a whole number from 0 to 10", id="10^9"
    ),
    pytest.param(put("steps", value=-1), "it has the steps -1; allowed: a whole", id="steps below"),
    pytest.param(put("steps", value=2.5), "it has the steps 2.5; allowed: a whole", id="steps fraction"),
    pytest.param(put("running", value=[1]), "it has the running a list; allowed: values by name", id="running"),
    pytest.param(put("running", "sums", "Top1", value=NAN), "it has the running.sums.Top1 nan; allowed", id="sum nan"),
    pytest.param(put("running", "images", value=-5), "it has the running.images -5; allowed: a whole", id="images"),
    pytest.param(drop("running", "sums"), "it lacks running.sums; give", id="no sums"),
    pytest.param(put("num_classes", value=10**12), "it has the num_classes 1000000000000; allowed: a", id="classes"),
    pytest.param(put("arch", value="a\x1b[31m"), r"it has the arch 'a\\x1b\[31m'; allowed: text", id="arch"),
    pytest.param(put("state_dict", value=None), "it has the state_dict None; allowed: tensors", id="weights none"),
    pytest.param(put("best", value=None), "it has the best None; allowed: a list", id="best none"),
    pytest.param(put("best", 0, "top1", value=1e9), "it has the best.0.top1 1000000000.0; allowed: a", id="best top1"),
    pytest.param(put("best", 0, "more", value=1), "it has an unknown field 'best.0.more'; give", id="best more"),
    pytest.param(drop("best", 0, "loss"), "it lacks best.0.loss; give", id="best less"),
    pytest.param(put("policies", value={}), "it has the policies a dict; allowed: a list", id="policies"),
    pytest.param(put("policies", 0, value=3), "it has the policies.0 3; allowed: values by name", id="a policy"),
    pytest.param(
        drop("policies", 0, "last_epoch"), "it, policy 0 of its schedule, lacks last_epoch; give", id="no last"
    ),
    pytest.param(
        put("policies", 0, "last_epoch", value="3"), "it, policy 0 of its schedule, has the last_epoch '3'", id="3"
    ),
    pytest.param(put("optimizer_type", value=7), "it has the optimizer_type 7; allowed: text", id="type"),
    pytest.param(put(OPT, value=None), "it has the optimizer_state_dict None; allowed: values", id="optimizer none"),
    pytest.param(drop(OPT, "state"), "it lacks optimizer_state_dict.state; give", id="no state"),
    pytest.param(
        put(*GROUP, "lr", value=-1.0), "it, group 0 of its optimizer, has the lr -1.0; allowed: a", id="lr below"
    ),
    pytest.param(put(*GROUP, "lr", value=NAN), "it, group 0 of its optimizer, has the lr nan; allowed: a", id="lr nan"),
    pytest.param(
        put(*GROUP, "lr", value=1e30), r"it, group 0 of its optimizer, has the lr 1e\+30; allowed", id="lr huge"
    ),
    pytest.param(drop(*GROUP, "lr"), "it, group 0 of its optimizer, lacks lr; give", id="no lr"),
    pytest.param(
        put(*GROUP, "betas", value=(0.9, 7)), "optimizer, has the betas.1 7; allowed: a number from 0 to 1", id="b"
    ),
    pytest.param(put(*GROUP, "weight_decay", value=-3), "optimizer, has the weight_decay -3; allowed: a", id="decay"),
    pytest.param(put(*GROUP, "amsgrad", value=True), "optimizer, has the amsgrad True; allowed: False", id="amsgrad"),
    pytest.param(
        put(*GROUP, "maximize", value=True), "optimizer, has the maximize True; allowed: False", id="maximize"
    ),
    pytest.param(put(*GROUP, "params", value=[1, 0]), "optimizer, has the params a list; allowed: a list", id="order"),
    pytest.param(
        put(*GROUP, "params", value=[0]), r"another schedule \(it has groups of \[1\] parameters\)", id="fewer"
    ),
    pytest.param(put(OPT, "state", value=[]), "it has an optimizer with the state a list; give", id="state list"),
    pytest.param(
        put(OPT, "state", 9, value={}), "it has an optimizer with a state of parameter 9, which it", id="unknown"
    ),
    pytest.param(
        put(OPT, "state", "a", value={}), "it has an optimizer with a state of parameter 'a', which", id="name"
    ),
    pytest.param(put(*FIRST, value=None), "with None for parameter 0; allowed: exp_avg, exp_avg_sq, step", id="a none"),
    pytest.param(
        drop(*FIRST, "exp_avg"), "with step, exp_avg_sq for parameter 0; allowed: exp_avg, exp_avg_sq", id="less"
    ),
    pytest.param(
        put(*FIRST, "exp_avg", value=torch.zeros(2)), "exp_avg of parameter 0 as a tensor of float32, 2 that", id="s"
    ),
    pytest.param(put(*FIRST, "exp_avg", value=3), "exp_avg of parameter 0 as 3 that does not fit it", id="number"),
    pytest.param(
        put(*FIRST, "exp_avg", value=torch.zeros(3, 4).int()), "exp_avg of parameter 0 as a tensor of int32", id="i"
    ),
    pytest.param(
        put(*FIRST, "exp_avg", value=torch.full((3, 4), NAN)), "exp_avg of parameter 0 as a tensor of", id="nan"
    ),
    pytest.param(
        put(*FIRST, "exp_avg_sq", value=-torch.ones(3, 4)), "exp_avg_sq of parameter 0 as a tensor of", id="sq"
    ),
    pytest.param(
        put(*FIRST, "step", value=torch.tensor(-4.0)), "step of parameter 0 as a tensor of float32, a sca", id="st"
    ),
    pytest.param(put("version", value="1"), "it is of version '1', not 1; train it again", id="version"),
]


@pytest.mark.parametrize(("damage", "sentence"), DAMAGED)
def test_damaged_fields(
    written: Callable[[], dict[str, Any]], damage: Callable[[dict[str, Any]], None], sentence: str
) -> None:
    checkpoint = copy.deepcopy(written())
    damage(checkpoint)
    hashed = checkpoint.pop("hash")
    with pytest.raises(CheckpointError, match=sentence) as error:
        fresh().load(checkpoint, "it", STEPS)
    assert str(error.value).startswith("it")
    assert "\n" not in str(error.value)
    with pytest.raises(CheckpointError):
        fresh().load({**checkpoint, "hash": hashed}, "it", STEPS)


@pytest.mark.parametrize(
    "damage",
    [
        put("epoch", value=3),
        put(*GROUP, "lr", value=0.25),
        put("running", "images", value=23),
        drop(OPT, "state", 1),
        put("state_dict", "bias", value=torch.zeros(3)),
    ],
    ids=["epoch", "lr", "images", "a parameter's state", "weights"],
)
def test_changes_that_only_the_hash_tells(
    written: Callable[[], dict[str, Any]], damage: Callable[[dict[str, Any]], None]
) -> None:
    checkpoint = copy.deepcopy(written())
    damage(checkpoint)
    with pytest.raises(CheckpointError) as error:
        fresh().load(checkpoint, "it", STEPS)
    assert str(error.value) == (
        "it was changed after it was written; give another one, or --reset-optimizer to begin a new run with its"
        " weights"
    )


def test_settings_of_the_schedule_are_not_those_of_the_file(written: Callable[[str, str], dict[str, Any]]) -> None:
    checkpoint = copy.deepcopy(written("sgd", "ReduceLROnPlateau"))
    del checkpoint["hash"]
    checkpoint["policies"][0]["factor"] = 7.0
    state = fresh("sgd", "ReduceLROnPlateau")
    state.load(checkpoint, "it", STEPS)
    lr = state.trainee.lr
    state.trainee.policies[0].on_epoch_end(2, {"loss": 9.0, "top1": 0.0})
    assert state.trainee.lr == pytest.approx(lr * 0.1)


def test_weights_of_almost_nothing_are_written_as_zero(tmp_path: Path) -> None:
    state, path = fresh(), tmp_path / "checkpoint.pth.tar"
    state.weights.weight.data[0] = torch.tensor([1e-31, -3e-39, 1e-29, -1.0])
    state.trainee.optimizer.state[state.weights.weight]["exp_avg_sq"] = torch.full((3, 4), 1e-33)
    state.save(path, HEADER, None)
    written = read_checkpoint(path)
    assert written["state_dict"]["weight"][0].tolist() == pytest.approx([0.0, 0.0, 1e-29, -1.0], rel=1e-6, abs=0.0)
    assert float(written["optimizer_state_dict"]["state"][0]["exp_avg_sq"].max()) > 0, "a square may be that small"
    assert float(state.weights.weight[0, 0].detach()) > 0, "training goes on with what it has"
