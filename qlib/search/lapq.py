"""LAPQ: ranges that minimise the loss of the whole model on calibration images.

First each range alone, by statistics or by the least error of its own tensor; then all of them together, by a search
without gradients (Powell's, one coordinate after another). What is minimised is the divergence from the float model's
predictions, which is the expected increase of the loss if these are right; training images tell little otherwise, as a
trained model has hardly any loss on them.

References: Nahshan, Chmiel, Baskin, Zheltonozhskii, Banner, Bronstein, Mendelson, "Loss aware post-training
quantization", 2019.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from qlib.config.flags.groups import NORMS, LapqArgs
from qlib.config.layers.settings import LayerSettings, PtqConfig
from qlib.errors import UsageError
from qlib.graph import Graph
from qlib.quant.plan import Plan
from qlib.search.least_error import least_error
from qlib.search.minimize import Vector, minimize, options_for
from qlib.search.objective import Objective
from qlib.search.ranges import coordinates_of, scaled_plan, with_explicit_weights

__all__ = ["search_ranges", "starting_clips"]

_log = logging.getLogger(__name__)

_ITERATIONS = 2
_HOP = 1.0


def starting_clips(
    config: PtqConfig, settings: Mapping[str, LayerSettings], mode: str | None
) -> dict[str, LayerSettings]:
    """The settings with `mode` as clipping of activations, except where a rule of the user's names one."""
    if mode is None or mode in NORMS:
        return dict(settings)
    default, where = config.defaults.origin.get("clip_acts"), {"clip_acts": "--lapq-init-mode"}
    return {
        name: each if each.origin.get("clip_acts") != default else each.with_settings({"clip_acts": mode}, where)
        for name, each in settings.items()
    }


def search_ranges(
    graph: Graph, plan: Plan, batches: Sequence[tuple[Tensor, Tensor]], args: LapqArgs, seed: int
) -> Plan:
    """The plan with the best ranges that the search finds; never worse on these images than the plan given.

    Raises UsageError where the plan has no range to search.
    """
    explicit = with_explicit_weights(graph, plan)
    coordinates = coordinates_of(graph, explicit, args.search_clipping)
    if not coordinates:
        raise UsageError("--qe-lapq finds no range to search: all layers are left in float; let some have bits")
    objective, began = Objective(graph, explicit, coordinates, batches), time.monotonic()
    start = np.zeros(len(coordinates))
    first = objective(start)
    _log.info(
        "LAPQ: %d ranges, %d calibration images; divergence from float %.6f at the start",
        *(len(coordinates), objective.samples, first),
    )
    norm = args.init_mode or "l2"
    if norm in NORMS:
        start = least_error(graph, explicit, coordinates, batches, NORMS[norm], args.init_method)
        _log.info("Divergence %.6f with the ranges of least %s error", objective(start), norm.upper())
    _search(objective, objective.best, args, seed)
    _log.info(
        "LAPQ: divergence %.6f -> %.6f after %d evaluations, %d of them different, in %.1f s",
        *(first, objective.best_score, objective.calls, len(objective.scores), time.monotonic() - began),
    )
    return scaled_plan(explicit, coordinates, objective.best) if objective.best.any() else plan


def _search(objective: Objective, start: Vector, args: LapqArgs, seed: int) -> None:
    """Runs the method that the flags name; the objective remembers the best point."""
    options = _options(args, len(start))
    if not args.basinhopping:
        minimize(objective, start, args.method, options)
        return
    from scipy.optimize import basinhopping

    random = np.random.RandomState(seed)
    basinhopping(
        objective,
        start,
        niter=args.basinhopping_niter,
        T=0.0,
        take_step=lambda values: values + random.uniform(-_HOP, _HOP, len(values)),
        minimizer_kwargs={"method": args.method, "options": options_for(args.method, start, options)},
    )


def _options(args: LapqArgs, size: int) -> dict[str, Any]:
    """The limits, as the method calls them: for COBYLA an iteration is an evaluation."""
    iterations = args.maxiter or _ITERATIONS
    if args.method == "cobyla":
        return {"maxiter": args.maxfev or iterations * 10 * size}
    if args.method == "nelder-mead":
        iterations *= 10 * size  # one of its iterations moves one corner of a simplex
    return {"maxiter": iterations, **({"maxfev": args.maxfev} if args.maxfev else {})}
