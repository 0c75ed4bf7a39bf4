"""From a job's settings to the plan of every layer: settings, statistics, searches and corrections, in their order."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from qlib.app.budget import choose_bits
from qlib.app.calibrate import calibrate
from qlib.app.correct import correct_float, correct_plan
from qlib.app.images import image_range
from qlib.app.job import Job
from qlib.app.saturation import avoid_saturation
from qlib.app.search import lapq
from qlib.checkpoint.corrected import load_weights, save_weights
from qlib.checkpoint.fingerprint import weights_hash
from qlib.config.flags.checks import searches
from qlib.config.flags.groups import IMPLICIT_CALIBRATION
from qlib.config.flags.run_config import RunConfig
from qlib.config.layers.aliases import in_own_names
from qlib.config.layers.read import load_ptq_config, ptq_config_from_flags
from qlib.config.layers.resolve import resolve, wants_histograms
from qlib.config.layers.settings import LayerSettings, PtqConfig
from qlib.errors import UsageError
from qlib.graph import FoldedGraph
from qlib.lower.fit import fit
from qlib.ptq.planner import layer_infos, plan_post_train_linear
from qlib.quant.plan import Plan
from qlib.quant.plan_file import check_plan, is_plan_file, read_plan, stats_from_plan
from qlib.search.lapq import starting_clips
from qlib.stats.data_free import data_free_stats
from qlib.stats.stats_file import check_fingerprint, check_layers, read_stats
from qlib.stats.tensor_stats import ModelStats

__all__ = ["Planned", "fitting", "given_plan", "make_plan", "plan_of", "settings_of", "stats_for", "with_corrections"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Planned:
    """A plan, the statistics that it was made from if there were any, and whether to keep the float weights."""

    plan: Plan
    stats: ModelStats | None = None
    keep_float_weights: bool = False


def make_plan(job: Job, folded: FoldedGraph) -> Planned:
    """The plan that the run asks for; the weights of the folded graph are those that the plan belongs to.

    Raises UsageError where the flags contradict each other, and what reading and collecting raise.
    """
    given = given_plan(job, folded)
    if given is not None and job.config.qe.budget is not None:
        raise UsageError("--qe-budget needs settings, but --qe-config-file is a plan, with its bits; drop one of them")
    planned = Planned(given) if given is not None else _from_settings(job, folded)
    plan = planned.plan
    if job.config.qe.lapq:
        plan = lapq(job, folded.graph, plan, given=given is not None)
    plan = correct_plan(job, folded, fitting(folded, avoid_saturation(job, folded.graph, plan)))
    return replace(planned, plan=_keep_weights(job, folded, fitting(folded, plan)))


def fitting(folded: FoldedGraph, plan: Plan) -> Plan:
    """The plan with scales for which every kernel computes the same integers."""
    plan, raised = fit(folded.graph, plan)
    if raised:
        listed = ", ".join(f"{name} ({count})" for name, count in raised.items())
        _log.info("Scales of weights raised so that int32 holds their biases, channels by layer: %s", listed)
    return plan


def with_corrections(config: RunConfig) -> RunConfig:
    """The settings, with the corrections that a YAML file asks for; flags that the user gave have the last word."""
    file = config.qe.config_file
    if file is None or is_plan_file(file):
        return config
    given = config.given_of("ptq")
    asked = {key: value for key, value in load_ptq_config(file).corrections.items() if key not in given}
    return replace(config, ptq=config.ptq.with_settings(asked))


def settings_of(job: Job, folded: FoldedGraph) -> tuple[PtqConfig, dict[str, LayerSettings]]:
    """The settings of each layer, from the YAML file or the flags."""
    file = job.config.qe.config_file
    ptq = load_ptq_config(file) if file is not None else ptq_config_from_flags(job.config.qe, job.config.given)
    for note in ptq.notes:
        _log.info("Note: %s", note)
    return ptq, resolve(ptq, layer_infos(folded.graph), folded.absorbed)


def _read_stats(job: Job, folded: FoldedGraph, path: Path) -> ModelStats:
    """Statistics from a file of them, or the ranges of a plan; both of layers of this model, or of modules in them."""
    names = [*folded.layers, *folded.absorbed]
    if is_plan_file(path):
        stats = stats_from_plan(_read_plan(folded, path))
    else:
        stats = read_stats(path)
        check_fingerprint(stats, job.spec.arch, weights_hash(job.model.state_dict()), job.config.ptq.of_float)
        stats = replace(stats, layers=in_own_names(stats.layers, names))
    check_layers(stats, {*names, *dict(job.model.named_modules())}, str(path))
    return stats


def _read_plan(folded: FoldedGraph, path: Path) -> Plan:
    plan = read_plan(path)
    return replace(plan, layers=in_own_names(plan.layers, folded.layers))


def given_plan(job: Job, folded: FoldedGraph) -> Plan | None:
    """The plan that `--qe-config-file` names, if it is one and not settings."""
    path = job.config.qe.config_file
    if path is None or not is_plan_file(path):
        return None
    plan = _read_plan(folded, path)
    check_plan(plan, folded.layers, str(path), folded.channels)
    if corrections := job.config.ptq.of_float:
        raise UsageError(f"{corrections} changes the ranges that {path} holds; give settings, or drop the --ptq flag")
    if plan.weights is not None:
        load_weights(path.parent / plan.weights, folded.graph, weights_hash(job.model.state_dict()))
    return plan


def _from_settings(job: Job, folded: FoldedGraph) -> Planned:
    """The plan from settings and statistics, which are collected where none are given."""
    ptq, settings = settings_of(job, folded)
    correct_float(job, folded)
    stats = stats_for(job, folded, ptq, settings)
    planner = partial(plan_of, folded, stats)
    if job.config.qe.budget is not None:
        settings = choose_bits(job, folded.graph, ptq, settings, planner, _stats_file(job, ptq, stats))
    if job.config.qe.lapq:
        settings = starting_clips(ptq, settings, job.config.lapq.init_mode)
    return Planned(planner(settings), stats, ptq.save_fp_weights)


def plan_of(folded: FoldedGraph, stats: ModelStats | None, settings: Mapping[str, LayerSettings]) -> Plan:
    return plan_post_train_linear(folded.graph, settings, stats, folded.folded)


def _stats_file(job: Job, ptq: PtqConfig, stats: ModelStats | None) -> str | None:
    """The file of the statistics, as settings in the run's folder name it."""
    if ptq.stats_file is not None:
        return str(ptq.stats_file.absolute())
    return job.file("acts_quantization_stats.yaml").name if stats is not None else None


def stats_for(
    job: Job, folded: FoldedGraph, ptq: PtqConfig, settings: Mapping[str, LayerSettings]
) -> ModelStats | None:
    """The statistics that the settings need, read or collected; none where activations are dynamic or in float."""
    fraction, stats = job.config.qe.calibration, None
    quantizes_activations = any(each.bits_activations for each in settings.values())
    if ptq.stats_file is not None:
        stats = _read_stats(job, folded, ptq.stats_file)
    elif job.config.ptq.data_free:
        stats = data_free_stats(folded.graph, folded.norms, image_range(job))
    elif fraction is not None or (quantizes_activations and not ptq.dynamic):
        histograms = wants_histograms(settings)
        stats = calibrate(job, folded.graph, fraction or IMPLICIT_CALIBRATION, histograms=histograms)
    elif quantizes_activations:
        if searching := searches(job.config):
            raise UsageError(
                f"{searching[0]} needs fixed ranges, but {job.config.qe.config_file} names no model_activation_stats;"
                " add that line"
            )
        _log.warning(
            "Warning: dynamic quantization: each image's own range is used;"
            " only weighted layers and matrix products are quantized"
        )
    return stats


def _keep_weights(job: Job, folded: FoldedGraph, plan: Plan) -> Plan:
    """The plan, with the name of a file of the corrected weights beside it where there are such."""
    if plan.weights is None and not (job.config.ptq.of_float or job.config.ptq.of_plan):
        return plan
    path = job.file("corrected_weights.safetensors")
    save_weights(path, folded.graph, weights_hash(job.model.state_dict()))
    return replace(plan, weights=path.name)
