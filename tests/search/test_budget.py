"""Bits under a budget: the integer program against brute force, budgets as text, and the command line."""

from __future__ import annotations

import csv
import itertools
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import Run, finish, good, run, start

from qlib.config.layers.budget import parse_budget
from qlib.quant.plan_file import read_plan
from qlib.search.allocate import Costs, allocate, best_uniform, cost_of, error_of, smallest_cost


@st.composite
def programs(draw: st.DrawFn) -> tuple[Costs, list[list[float]], int]:
    """Small instances: costs rise with the option, errors are whatever they are."""
    options = draw(st.integers(1, 3))
    groups = draw(st.integers(1, 4))
    sizes = [draw(st.sampled_from([1, options])) for _ in range(groups)]
    single = [sorted(draw(st.lists(st.integers(0, 50), min_size=n, max_size=n))) for n in sizes]
    pairs = {}
    for g, h in itertools.combinations(range(groups), 2):
        if draw(st.booleans()):
            macs = draw(st.integers(1, 9))
            pairs[g, h] = [[macs * (i + 1) * (j + 1) for j in range(sizes[h])] for i in range(sizes[g])]
    numbers = st.floats(0, 10, allow_nan=False).map(lambda x: round(x, 3))
    errors = [draw(st.lists(numbers, min_size=n, max_size=n)) for n in sizes]
    costs = Costs(single, pairs)
    return costs, errors, draw(st.integers(0, cost_of(costs, [n - 1 for n in sizes]) + 5))


@given(programs())
@settings(max_examples=150, deadline=None)
def test_the_best_choice_within_the_budget_is_found(program: tuple[Costs, list[list[float]], int]) -> None:
    costs, errors, budget = program
    found = allocate(costs, errors, budget)
    every = itertools.product(*(range(len(options)) for options in costs.single))
    within = [choice for choice in every if cost_of(costs, choice) <= budget]
    assert (found is None) == (not within) == (budget < smallest_cost(costs))
    if found is not None:
        assert cost_of(costs, found) <= budget
        best = min(error_of(errors, choice) for choice in within)
        assert error_of(errors, found) == pytest.approx(best, abs=1e-6)
        uniform = best_uniform(costs, errors, budget)
        assert uniform is None or error_of(errors, found) <= error_of(errors, uniform)


def test_large_costs_are_kept_to_the_last_unit() -> None:
    """A solver's tolerance of a millionth is 3 units here."""
    costs = Costs([[1_000_000, 1_500_000 + i] for i in range(2)])
    errors = [[1.0, 0.0], [1.1, 0.0]]
    assert allocate(costs, errors, 2_500_000) == (1, 0)
    assert allocate(costs, errors, 3_000_000) == (0, 1)
    assert allocate(costs, errors, 3_000_001) == (1, 1)
    assert allocate(costs, errors, 1_999_999) is None


UNITS = [
    ("3.2MB", 1000, 25_600_000),
    ("100 b", 1000, 800),
    (".5kB", 1000, 4000),
    ("4.5BITS", 1001, 4504),
    ("4bit", 1000, 4000),
    ("12GBOPs", 1000, 12_000_000_000),
    ("7bops", 1000, 7),
    ("1.5Tbops", 1000, 1_500_000_000_000),
]


@pytest.mark.parametrize(("text", "weights", "limit"), UNITS)
def test_budgets(text: str, weights: int, limit: int) -> None:
    budget = parse_budget(text)
    assert budget.limit(weights) == limit
    assert parse_budget(str(budget)) == budget


@pytest.mark.parametrize("text", ["", "4", "MB", "4XB", "4 m b", "0MB", "-1MB", "4kbits", "1e3MB", "4MBit", "nanMB"])
def test_no_budgets(text: str) -> None:
    with pytest.raises(ValueError, match=f"^{text}$"):
        parse_budget(text)


@given(st.integers(1, 10**9), st.sampled_from(["1B", "1KB", "1MB", "1bits", "1BOPs", "1GBOPs"]))
@settings(deadline=None)
def test_the_smallest_feasible_budget_is_feasible_and_tight(cost: int, unit: str) -> None:
    weights = 12_345
    text = parse_budget(unit).text(cost, weights)
    limit = parse_budget(text).limit(weights)
    assert cost <= limit <= cost * 1.0011 + weights * (unit == "1bits") * 1e-3 + 8


DIGITS = "-a digits_cnn --pretrained"
STATS = "--qe-stats-file stats/digits_cnn_digits.yaml --qem asym_u"
FAST = "--sense-images 96"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("budget")
    good(f"{DIGITS} --qe-calibration 0.2", folder)
    return folder


def bits_of(run: Run) -> tuple[dict[str, int], dict[str, int]]:
    """Weight and activation bits of the plan of a run."""
    plan = read_plan(run.folder / "layer_quant_params.yaml")
    weights = {name: layer.weight.spec.bits for name, layer in plan.layers.items() if layer.weight is not None}
    return weights, {name: layer.output.spec.bits for name, layer in plan.layers.items() if layer.output is not None}


def test_mixed_precision_beats_uniform_at_its_size(folder: Path) -> None:
    uniform = good(f"{DIGITS} --qe {STATS} --qebw 4", folder)
    words = f"{DIGITS} --qe {STATS} --qe-budget 4bits {FAST} -j 0"
    mixed = finish(start(words, folder), folder)
    assert (mixed.code, mixed.err) == (0, "")
    assert float(mixed.score()[0]) > float(uniform.score()[0]) + 0.5
    assert float(mixed.score()[2]) < float(uniform.score()[2])
    weights, activations = bits_of(mixed)
    assert len(set(weights.values())) > 1
    assert set(activations.values()) == {8}
    assert {"mixed_precision.yaml", "sensitivity.csv", "tradeoff.csv"} <= mixed.files
    with (mixed.folder / "tradeoff.csv").open(newline="") as file:
        curve = list(csv.DictReader(file))
    assert len(curve) == 8
    predicted = [float(row["predicted_loss_increase"]) for row in curve]
    assert predicted == sorted(predicted, reverse=True)
    assert any(line.startswith("Bits chosen for a budget of 4bits: 3.") for line in mixed.lines) or any(
        line.startswith("Bits chosen for a budget of 4bits: 4bits") for line in mixed.lines
    )


@pytest.mark.parametrize(
    "words",
    [
        f"{STATS} --qe-budget 4.2bits --qepc",
        f"{STATS} --qe-budget 2MBOPs --qenql fc --qe-clip-acts avg",
        "--qe-calibration 0.1 --qe-budget 3KB --qeba 4 --qem sym_restr",
    ],
)
def test_the_settings_passed_back_repeat_the_run(words: str, folder: Path) -> None:
    first = good(f"{DIGITS} --qe {words} {FAST}", folder)
    again = good(f"{DIGITS} --qe --qe-config-file '{first.folder}/mixed_precision.yaml'", folder)
    assert again.score() == first.score()
    origin = re.compile(r"\((--qe-no-quant-layers|mixed_precision.yaml:\d+)\)")
    plans = [origin.sub("", (each.folder / "layer_quant_params.yaml").read_text()) for each in (first, again)]
    assert plans[0] == plans[1]


def test_a_budget_of_operations_chooses_bits_of_activations_too(folder: Path) -> None:
    run = good(f"{DIGITS} --qe {STATS} --qe-budget 2MBOPs {FAST}", folder)
    weights, activations = bits_of(run)
    assert len(set(weights.values())) > 1
    assert len(set(activations.values())) > 1


def test_what_the_user_says_of_a_layer_stands(folder: Path) -> None:
    (folder / "rules.yaml").write_text(
        "quantizers:\n  q:\n    class: PostTrainLinearQuantizer\n    mode: ASYMMETRIC_UNSIGNED\n"
        "    model_activation_stats: stats/digits_cnn_digits.yaml\n"
        "    overrides:\n      stem.conv: {bits_weights: 5}\n      fc: {bits_weights: null, bits_activations: null}\n"
    )
    run = good(f"{DIGITS} --qe --qe-config-file rules.yaml --qe-budget 12bits {FAST}", folder)
    weights, _ = bits_of(run)
    assert weights["stem.conv"] == 5
    assert "fc" not in weights


def test_weights_alone(folder: Path) -> None:
    run = good(f"{DIGITS} --qe --qeba 0 --qe-budget 4bits {FAST} --qe-bits-choices 3,4,5", folder)
    weights, activations = bits_of(run)
    assert set(weights.values()) <= {3, 4, 5}
    assert not activations
    again = good(f"{DIGITS} --qe --qe-config-file '{run.folder}/mixed_precision.yaml'", folder)
    assert again.score() == run.score()


def test_an_infeasible_budget_names_the_smallest_one(folder: Path) -> None:
    failed = run(f"{DIGITS} --qe {STATS} --qe-budget 1bits", folder)
    assert failed.code == 2
    assert failed.err == (
        "compress.py: error: --qe-budget 1bits cannot be met: the smallest feasible one is 2bits, with"
        " --qe-bits-choices 2,3,4,6,8 and what the other settings leave in float or give bits\n"
    )
    failed = run(f"{DIGITS} --qe {STATS} --qe-budget 1KBOPs --qenql fc", folder)
    smallest = failed.err.split("feasible one is ")[1].split(",")[0]
    good(f"{DIGITS} --qe {STATS} --qe-budget {smallest} --qenql fc {FAST}", folder)


REFUSED = [
    ("nothing to choose", f"{STATS} --qebw 0 --qe-budget 4bits", "--qe-budget finds no bits to choose: each layer is"),
    ("a plan", "--qe-config-file plan.yaml --qe-budget 4bits", "--qe-budget needs settings, but --qe-config-file is a"),
]


@pytest.mark.parametrize(("words", "sentence"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_what_is_refused(words: str, sentence: str, folder: Path) -> None:
    made = good(f"{DIGITS} --qe {STATS}", folder)
    (folder / "plan.yaml").write_bytes((made.folder / "layer_quant_params.yaml").read_bytes())
    done = run(f"{DIGITS} --qe {words}", folder)
    assert done.code == 2
    assert done.err.startswith(f"compress.py: error: {sentence}")
    assert len(done.err.splitlines()) == 1
