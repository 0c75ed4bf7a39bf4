"""`--qe-budget`: mixed precision. The bits of each layer under a budget, by an integer program over sensitivities."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tabulate import tabulate

from qlib.app.images import images_in_memory
from qlib.app.job import Job
from qlib.app.report import record
from qlib.app.search import Planner, measure_sensitivity, write_sensitivities
from qlib.config.layers.budget import Budget, parse_budget
from qlib.config.layers.settings import LayerSettings, PtqConfig
from qlib.config.layers.write import ptq_text
from qlib.errors import UsageError
from qlib.files import write_csv, write_text
from qlib.graph import Graph
from qlib.graph.cost import layer_macs
from qlib.graph.ir import layers, name_of
from qlib.graph.kinds import layer_kind
from qlib.report.record_parts import TradeOff, TradeOffPoint
from qlib.search.allocate import Choice, Costs, allocate, best_uniform, cost_of, error_of, smallest_cost
from qlib.search.bit_groups import Group, bit_operations, errors_of, groups_of, weight_bits, weight_count
from qlib.search.replay import QuantState
from qlib.search.score import Score, Scorer
from qlib.search.sensitivity import ACTIVATIONS, WEIGHTS, Sensitivity

__all__ = ["choose_bits"]

_log = logging.getLogger(__name__)

_CURVE = 8
_FIELDS = {WEIGHTS: "bits_weights", ACTIVATIONS: "bits_activations"}


@dataclass(frozen=True)
class _Problem:
    """The groups, what they cost besides a fixed part, and the budget."""

    groups: Sequence[Group]
    costs: Costs
    fixed: int
    budget: Budget
    weights: int

    @property
    def left(self) -> int:
        """What the groups may cost."""
        return self.budget.limit(self.weights) - self.fixed

    def text(self, cost: int) -> str:
        """A cost of the groups, with the fixed part, in the unit of the budget."""
        return self.budget.text(cost + self.fixed, self.weights)

    def mean_bits(self, choice: Choice, what: str) -> float:
        """The mean over groups."""
        bits = [group.options[i] for group, i in zip(self.groups, choice, strict=True) if group.what == what]
        return sum(bits) / len(bits) if bits else 0.0


def choose_bits(
    job: Job,
    graph: Graph,
    config: PtqConfig,
    settings: Mapping[str, LayerSettings],
    planner: Planner,
    stats_file: str | None,
) -> dict[str, LayerSettings]:
    """The settings with the bits that lose least under `--qe-budget`.

    What the user left in float stays so, and what a rule of the user gives bits keeps them. Writes
    ``sensitivity.csv``, ``tradeoff.csv`` and ``mixed_precision.yaml``.

    Raises UsageError where no choice is within the budget, with the smallest feasible one.
    """
    problem = _problem(job, graph, config, settings, planner)
    kinds = list(dict.fromkeys(group.what for group in problem.groups))
    rows, _ = measure_sensitivity(job, graph, settings, planner, job.config.qe.bits_choices, kinds)
    write_sensitivities(job.file("sensitivity.csv"), rows)
    choice = _best(job, graph, problem, rows, settings, planner)
    chosen = _with_choice(settings, problem.groups, choice)
    _report(job, problem, rows, choice)
    known = {name_of(node): layer_kind(module) for node, module in layers(graph)}
    path = job.file("mixed_precision.yaml")
    text = ptq_text(
        config,
        {name: each for name, each in chosen.items() if not known[name].keeps_grid},
        {name for name, kind in known.items() if kind.weighted},
        stats_file,
        f"Bits of each layer for a budget of {problem.budget}; pass it back with --qe-config-file",
    )
    write_text(path, text, "settings")
    _log.info("Settings saved to %s; pass them back with --qe-config-file", path)
    return chosen


def _problem(
    job: Job, graph: Graph, config: PtqConfig, settings: Mapping[str, LayerSettings], planner: Planner
) -> _Problem:
    budget, plan = parse_budget(str(job.config.qe.budget)), planner(settings)
    pinned = {
        (name, what)
        for name, each in settings.items()
        for what, field in _FIELDS.items()
        if each.origin.get(field) != config.defaults.origin.get(field)
    }
    operations = budget.unit == "BOPs"
    groups = groups_of(graph, plan, job.config.qe.bits_choices, pinned, operations)
    if not any(len(group.options) > 1 for group in groups):
        raise UsageError("--qe-budget finds no bits to choose: each layer is in float, or a rule gives its bits")
    if operations:
        costs, fixed = bit_operations(graph, plan, groups, layer_macs(graph))
    else:
        costs, fixed = weight_bits(graph, groups)
    problem = _Problem(groups, costs, fixed, budget, weight_count(graph))
    if problem.left < (smallest := smallest_cost(costs)):
        allowed = ",".join(map(str, job.config.qe.bits_choices))
        raise UsageError(
            f"--qe-budget {budget} cannot be met: the smallest feasible one is {problem.text(smallest)}, with"
            f" --qe-bits-choices {allowed} and what the other settings leave in float or give bits"
        )
    return problem


def _best(
    job: Job,
    graph: Graph,
    problem: _Problem,
    rows: Sequence[Sensitivity],
    settings: Mapping[str, LayerSettings],
    planner: Planner,
) -> Choice:
    """Of the choices by divergence, by squared error of the logits, and uniform, the one that does best as a whole.

    Sensitivities of single layers add up only roughly: the whole is measured on the calibration images.
    """
    scorer = Scorer(graph, images_in_memory(job, job.config.sense_images))
    found: dict[str, Choice | None] = {}
    for what, relative in (("divergence", False), ("squared error", True)):
        found[what] = allocate(problem.costs, errors_of(problem.groups, rows, relative), problem.left)
    found["uniform"] = best_uniform(problem.costs, errors_of(problem.groups, rows), problem.left)
    scores: dict[str, tuple[Score, Choice]] = {}
    for what, choice in found.items():
        if choice is not None:
            plan = planner(_with_choice(settings, problem.groups, choice))
            scores[what] = scorer.score(QuantState.of(graph, plan)), choice
            score = scores[what][0]
            _log.info(
                "Bits by %s: %s    Divergence %.5f    Loss %.5f    Top1 %.3f (calibration images)",
                *(what, problem.text(cost_of(problem.costs, choice)), score.divergence, score.loss, score.top1),
            )
    return min(scores.values(), key=lambda item: item[0].divergence)[1]


def _with_choice(
    settings: Mapping[str, LayerSettings], groups: Sequence[Group], choice: Choice
) -> dict[str, LayerSettings]:
    changed = dict(settings)
    for group, i in zip(groups, choice, strict=True):
        for name in group.layers if len(group.options) > 1 else ():
            field = _FIELDS[group.what]
            changed[name] = changed[name].with_settings({field: group.options[i]}, {field: "--qe-budget"})
    return changed


def _report(job: Job, problem: _Problem, rows: Sequence[Sensitivity], choice: Choice) -> None:
    """Logs the bits of each layer and the trade-off curve, which goes to ``tradeoff.csv`` as well."""
    bits: dict[str, dict[str, int]] = {}
    for group, i in zip(problem.groups, choice, strict=True):
        for name in group.layers:
            bits.setdefault(name, {})[group.what] = group.options[i]
    lines = [[name, at.get(WEIGHTS, ""), at.get(ACTIVATIONS, "")] for name, at in bits.items()]
    _log.info("%s", tabulate(lines, ["Layer", "W bits", "A bits"], tablefmt="psql"))
    errors = errors_of(problem.groups, rows)
    points = _curve(problem, errors)
    chosen = _point(problem, errors, choice, problem.text(problem.left))
    record(job, tradeoff=TradeOff(str(problem.budget), problem.budget.unit, tuple(points), chosen, bits))
    curve = [(each.budget, each.cost, each.loss, each.bits_weights, each.bits_activations) for each in points]
    headers = ["budget", "cost", "predicted_loss_increase", "mean_bits_weights", "mean_bits_activations"]
    _log.info("%s", tabulate(curve, headers, tablefmt="psql", floatfmt=".4f"))
    path = job.file("tradeoff.csv")
    write_csv(path, headers, curve)
    used = problem.text(cost_of(problem.costs, choice))
    _log.info("Bits chosen for a budget of %s: %s are used; trade-off saved to %s", problem.budget, used, path)


def _curve(problem: _Problem, errors: Sequence[Sequence[float]]) -> list[TradeOffPoint]:
    """Budgets from the smallest feasible one to that of most bits, and the best that each allows."""
    smallest = smallest_cost(problem.costs)
    largest = cost_of(problem.costs, tuple(len(group.options) - 1 for group in problem.groups))
    table: list[TradeOffPoint] = []
    for step in range(_CURVE):
        limit = smallest + (largest - smallest) * step // (_CURVE - 1)
        choice = allocate(problem.costs, errors, limit)
        assert choice is not None
        table.append(_point(problem, errors, choice, problem.text(limit)))
    return table


def _point(problem: _Problem, errors: Sequence[Sequence[float]], choice: Choice, budget: str) -> TradeOffPoint:
    cost, means = cost_of(problem.costs, choice), [problem.mean_bits(choice, what) for what in (WEIGHTS, ACTIVATIONS)]
    return TradeOffPoint(budget, problem.text(cost), cost + problem.fixed, error_of(errors, choice), *means)
