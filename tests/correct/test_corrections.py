"""The registry of corrections: what each says of itself is true of its function, and the flags come from it."""

from __future__ import annotations

import inspect

import pytest

from qlib.config.flags.corrections import BIAS_CORRECTIONS, CORRECTION_FLAGS, ROUNDINGS, Switches
from qlib.config.flags.groups import PtqArgs
from qlib.config.flags.run_config import RunConfig, config_from_names, settings_by_name
from qlib.config.flags.table import FLAGS
from qlib.config.layers.keys import CORRECTION_FIELDS
from qlib.correct._base import CORRECTIONS

OFFERED = {"graph", "plan", "norms", "images", "reference", "iterations"}


@pytest.mark.parametrize("name", CORRECTION_FLAGS)
def test_the_facts_are_those_of_the_function(name: str) -> None:
    said, taken = CORRECTION_FLAGS[name], inspect.signature(CORRECTIONS[name]).parameters
    number = {said.number.name} if said.number else set()
    assert set(taken) <= OFFERED | number
    assert ("images" in taken, "iterations" in taken) == (said.images, said.iterates)
    assert number <= set(taken)
    assert ("plan" in taken) is not said.of_float
    assert not (said.data_free and said.images)
    assert bool(said.help) is not bool(said.choice)


def test_every_correction_can_be_asked_for_by_a_flag_and_in_yaml() -> None:
    flags = {flag.name: flag for flag in FLAGS}
    for each in CORRECTION_FLAGS.values():
        assert each.flag in flags
        assert each.name in (flags[each.flag].kind.choices if each.choice else CORRECTION_FIELDS)


def test_they_are_done_in_their_order() -> None:
    asked = PtqArgs(Switches({"bn_reestimation": True, "smooth": 0.5, "equalize": True}), rounding="brecq").asked
    assert list(asked) == ["equalize", "smooth", "brecq", "bn_reestimation"]


def test_data_free_corrects_biases_by_itself() -> None:
    assert list(PtqArgs(data_free=True, bias_correction="empirical").asked) == ["equalize", "analytic"]


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("bias_correction", BIAS_CORRECTIONS)
def test_settings_by_name_give_the_config_back(rounding: str, bias_correction: str) -> None:
    args = PtqArgs(Switches({"equalize": True, "smooth": 0.5}), False, rounding, bias_correction)
    assert config_from_names(settings_by_name(RunConfig(ptq=args))) == RunConfig(ptq=args)
    assert args.of_plan == (rounding != "nearest" or bias_correction != "none")
