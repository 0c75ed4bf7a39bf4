"""The application: one function a verb. `run` is what the command line calls."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qlib.calibrate import calibrate
from qlib.checkpoint import (
    QuantizedHeader,
    is_quantized,
    read_header,
    restore_quantized,
    save_quantized,
    weights_hash,
)
from qlib.checkpoint_file import read_checkpoint
from qlib.config.ptq_config import LayerSettings, PtqConfig, load_ptq_config, ptq_config_from_flags
from qlib.config.resolve import resolve, wants_histograms
from qlib.config.run_config import RunConfig, asks_for_something, exports, nothing_to_do, startup_warnings
from qlib.config.search_flags import searches
from qlib.correct.weights_file import load_weights, save_weights
from qlib.corrections import correct_float, correct_plan, flag_of, image_range
from qlib.errors import ModelError, UsageError
from qlib.evaluate import Evaluation, Meter, evaluate_together
from qlib.handover import Model, hand_over, hand_over_float, measure_saturation
from qlib.job import FoldedGraph, Job, choose_device, fold, load_job, report_skipped, test_loader
from qlib.lower import exact_arithmetic, lower
from qlib.models import create_model, find_model
from qlib.progress import track
from qlib.quant.plan import Plan
from qlib.quant.plan_file import check_plan, is_plan_file, read_plan, stats_from_plan, write_plan
from qlib.quantizers import layer_infos, plan_post_train_linear
from qlib.quantizers.reduce_range import reduce_range
from qlib.report import float_layers, plan_table, settings_table
from qlib.runlog import RunLog, append_metrics, open_run
from qlib.search.analysis import analyse
from qlib.search.lapq import lapq, starting_clips
from qlib.search.mixed import choose_bits
from qlib.stats.data_free import data_free_stats
from qlib.stats.stats_file import check_fingerprint, read_stats
from qlib.stats.tensor_stats import ModelStats
from qlib.summary import summary

__all__ = ["run"]

_log = logging.getLogger(__name__)

_IMPLICIT_CALIBRATION = 0.05


def run(config: RunConfig) -> int:
    """Does what the command line asks; 0 when it is done. Raises QlibError for a user's mistake."""
    with open_run(config) as run_log:
        for warning in startup_warnings(config):
            _log.warning("Warning: %s", warning)
        _log.info("Random seed: %d", config.seed)
        torch.manual_seed(config.seed)
        torch.use_deterministic_algorithms(config.deterministic, warn_only=True)
        device = choose_device(config)
        checkpoint = read_checkpoint(config.resume_from) if config.resume_from is not None else {}
        if is_quantized(checkpoint):
            return _use_checkpoint(config, run_log, device, checkpoint)
        if not asks_for_something(config):
            raise nothing_to_do()
        job = load_job(_with_corrections(config), run_log, device, checkpoint)
        if config.summary:
            _summarize(job)
        elif config.check:
            _check(job)
        elif config.sense is not None:
            _analyse(job)
        elif config.quantize_eval:
            return _quantize_and_evaluate(job)
        elif config.qe.calibration is not None:
            folded = fold(job)
            correct_float(job, folded)
            calibrate(job, folded.graph, config.qe.calibration)
        else:
            _use_float(job)
    return 0


def _with_corrections(config: RunConfig) -> RunConfig:
    """The settings, with the corrections that a YAML file asks for; flags that the user gave have the last word."""
    file = config.qe.config_file
    if file is None or is_plan_file(file):
        return config
    asked = {key: value for key, value in load_ptq_config(file).corrections.items() if flag_of(key) not in config.given}
    return replace(config, ptq=replace(config.ptq, **asked))  # type: ignore[arg-type]


def _summarize(job: Job) -> None:
    for what in job.config.summary:
        _log.info("%s", summary(what, job.model, job.example, job.run.folder))


def _settings(job: Job, folded: FoldedGraph) -> tuple[PtqConfig, dict[str, LayerSettings]]:
    """The settings of each layer, from the YAML file or the flags."""
    qe = job.config.qe
    if qe.config_file is not None:
        ptq = load_ptq_config(qe.config_file)
    else:
        ptq = ptq_config_from_flags(
            bits_acts=qe.bits_acts,
            bits_wts=qe.bits_wts,
            bits_accum=qe.bits_accum,
            mode=qe.mode,
            mode_acts=qe.mode_acts,
            mode_wts=qe.mode_wts,
            clip_acts=qe.clip_acts,
            clip_n_stds=qe.clip_n_stds,
            clip_percentile=qe.clip_percentile,
            clip_p=qe.clip_p,
            clip_wts=qe.clip_wts,
            scale=qe.scale,
            no_clip_layers=qe.no_clip_layers,
            no_quant_layers=qe.no_quant_layers,
            per_channel=qe.per_channel,
            scale_approx_bits=qe.scale_approx_bits,
            stats_file=qe.stats_file,
            dynamic=qe.dynamic,
            save_fp_weights=qe.save_fp_weights,
            given=job.config.given,
        )
    for note in ptq.notes:
        _log.info("Note: %s", note)
    return ptq, resolve(ptq, layer_infos(folded.graph), folded.absorbed)


def _read_stats(job: Job, path: Path) -> ModelStats:
    """Statistics from a file of them, or the ranges of a plan."""
    if is_plan_file(path):
        return stats_from_plan(read_plan(path))
    stats = read_stats(path)
    check_fingerprint(stats, job.spec.arch, weights_hash(job.model.state_dict()), job.config.ptq.of_float)
    return stats


def _given_plan(job: Job, folded: FoldedGraph) -> Plan | None:
    """The plan that `--qe-config-file` names, if it is one and not settings."""
    path = job.config.qe.config_file
    if path is None or not is_plan_file(path):
        return None
    plan = read_plan(path)
    check_plan(plan, folded.layers, str(path))
    if corrections := job.config.ptq.of_float:
        raise UsageError(f"{corrections} changes the ranges that {path} holds; give settings, or drop the --ptq flag")
    if plan.weights is not None:
        load_weights(path.parent / plan.weights, folded.graph, weights_hash(job.model.state_dict()))
    return plan


def _make_plan(job: Job, folded: FoldedGraph) -> tuple[Plan, ModelStats | None, bool]:
    """The plan from settings and statistics, which are collected where none are given.

    Also: the statistics, and whether to keep the float weights.
    """
    ptq, settings = _settings(job, folded)
    correct_float(job, folded)
    stats = _stats_for(job, folded, ptq, settings)
    planner = partial(_plan_of, folded, stats)
    if job.config.qe.budget is not None:
        settings = choose_bits(job, folded.graph, ptq, settings, planner, _stats_file(job, ptq, stats))
    if job.config.qe.lapq:
        settings = starting_clips(ptq, settings, job.config.lapq.init_mode)
    return planner(settings), stats, ptq.save_fp_weights


def _plan_of(folded: FoldedGraph, stats: ModelStats | None, settings: Mapping[str, LayerSettings]) -> Plan:
    return plan_post_train_linear(folded.graph, settings, stats, folded.folded)


def _stats_file(job: Job, ptq: PtqConfig, stats: ModelStats | None) -> str | None:
    """The file of the statistics, as settings in the run's folder name it."""
    if ptq.stats_file is not None:
        return str(ptq.stats_file.absolute())
    return job.file("acts_quantization_stats.yaml").name if stats is not None else None


def _stats_for(
    job: Job, folded: FoldedGraph, ptq: PtqConfig, settings: Mapping[str, LayerSettings]
) -> ModelStats | None:
    """The statistics that the settings need, read or collected; none where activations are dynamic or in float."""
    fraction, stats = job.config.qe.calibration, None
    quantizes_activations = any(each.bits_activations for each in settings.values())
    if ptq.stats_file is not None:
        stats = _read_stats(job, ptq.stats_file)
    elif job.config.ptq.data_free:
        stats = data_free_stats(folded.graph, folded.norms, image_range(job))
    elif fraction is not None or (quantizes_activations and not ptq.dynamic):
        histograms = wants_histograms(settings)
        stats = calibrate(job, folded.graph, fraction or _IMPLICIT_CALIBRATION, histograms=histograms)
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


def _analyse(job: Job) -> None:
    """Measures what few bits in each layer alone do."""
    folded = fold(job)
    if _given_plan(job, folded) is not None:
        raise UsageError("--sense needs settings, but --qe-config-file is a plan; give settings, or drop it")
    ptq, settings = _settings(job, folded)
    correct_float(job, folded)
    stats = _stats_for(job, folded, ptq, settings)
    analyse(job, folded.graph, settings, partial(_plan_of, folded, stats))


def _check(job: Job) -> None:
    folded = fold(job)
    plan = _given_plan(job, folded)
    if plan is not None:
        _log.info("%s", plan_table(folded.graph, plan))
        return
    ptq, settings = _settings(job, folded)
    if ptq.stats_file is not None:
        plan_post_train_linear(folded.graph, settings, _read_stats(job, ptq.stats_file), folded.folded)
    _log.info("%s", settings_table(folded.graph, settings, folded.absorbed))


def _quantize_and_evaluate(job: Job) -> int:
    folded = fold(job)
    given = _given_plan(job, folded)
    if given is not None and job.config.qe.budget is not None:
        raise UsageError("--qe-budget needs settings, but --qe-config-file is a plan, with its bits; drop one of them")
    plan, stats, keep_float_weights = (given, None, False) if given is not None else _make_plan(job, folded)
    if job.config.qe.lapq:
        plan = lapq(job, folded.graph, plan, given=given is not None)
    plan = _reduce_range(job, folded, plan)
    plan = _keep_weights(job, folded, correct_plan(job, folded, plan))
    plan_path = job.file("layer_quant_params.yaml")
    write_plan(plan_path, plan)
    _log.info("Plan of each layer saved to %s; edit it and pass it back with --qe-config-file", plan_path)
    lowered = lower(folded.graph, plan).to(job.device)
    for line in float_layers(plan):
        _log.info("%s", line)
    deployed = hand_over(job, folded.graph, lowered, plan, stats)
    result, reference, *others = _test(job, deployed.engine, job.model, *deployed.others)
    _log.info("FP32:    Top1 %.3f    Top5 %.3f    Loss %.5f", reference.top1, reference.top5, reference.loss)
    _log.info("Predictions that differ from FP32: %.2f %%", result.changed(reference))
    _record(job, "fp32", reference)
    _record(job, "quantized", result, changed=result.changed(reference))
    _record_saturating(job, result, others)
    path = job.file("quantized_checkpoint.pth.tar")
    header = QuantizedHeader(job.spec.arch, job.dataset_name, job.num_classes, plan)
    original = job.model if keep_float_weights else None
    save_quantized(path, header, lowered, {"quantized_top1": result.top1}, original)
    _log.info("Saving checkpoint to: %s", path)
    return deployed.exit_code


def _keep_weights(job: Job, folded: FoldedGraph, plan: Plan) -> Plan:
    """The plan, with the name of a file of the corrected weights beside it where there are such."""
    if plan.weights is None and not (job.config.ptq.of_float or job.config.ptq.of_plan):
        return plan
    path = job.file("corrected_weights.safetensors")
    save_weights(path, folded.graph, weights_hash(job.model.state_dict()))
    return replace(plan, weights=path.name)


def _reduce_range(job: Job, folded: FoldedGraph, plan: Plan) -> Plan:
    """The plan with 7-bit weights where `--qe-reduce-range` asks for them."""
    wanted = job.config.qe.reduce_range
    if wanted == "none":
        return plan
    reduced = reduce_range(plan, list(plan.layers)) if wanted == "all" else plan
    while wanted == "auto":  # a layer may begin to saturate when those before it no longer do
        rates = measure_saturation(job, lower(folded.graph, reduced).to(job.device))
        names = [name for name, rate in rates.items() if rate.saturated]
        if not names:
            break
        reduced = reduce_range(reduced, names)
    changed = [name for name, layer in reduced.layers.items() if layer != plan.layers[name]]
    _log.info("--qe-reduce-range %s: %d layers get 7-bit weights%s", wanted, len(changed), _listed(changed))
    return reduced


def _listed(names: list[str]) -> str:
    return f": {', '.join(names)}" if names else ""


def _use_float(job: Job) -> None:
    """Exports and evaluates the float model, as the flags ask."""
    engine = hand_over_float(job, fold(job).graph)
    if job.config.evaluate:
        result, *_ = _test(job, engine)
        _record(job, "fp32", result)


def _use_checkpoint(config: RunConfig, run_log: RunLog, device: torch.device, checkpoint: Mapping[str, Any]) -> int:
    """Exports, verifies and evaluates a quantized checkpoint, which knows its architecture and plan."""
    file = str(config.resume_from)
    header = read_header(checkpoint, f"checkpoint {file!r}")
    _refuse_flags(config, file, header.arch)
    spec = find_model(header.arch)
    model = create_model(spec, num_classes=header.num_classes).to(device)
    job = Job(config, run_log, device, spec, config.dataset or header.dataset, header.num_classes, model)
    _log.info("=> loaded a quantized %s model with the %s dataset", spec.arch, job.dataset_name)
    folded = fold(job)
    check_plan(header.plan, folded.layers, f"the plan in {file!r}")
    lowered = restore_quantized(checkpoint, header, folded.graph, f"checkpoint {file!r}").to(device)
    if config.check:
        _log.info("%s", plan_table(folded.graph, header.plan))
        return 0
    deployed = hand_over(job, folded.graph, lowered, header.plan, None)
    if config.evaluate or not exports(config):
        result, *others = _test(job, deployed.engine, *deployed.others)
        _record(job, "quantized", result)
        _record_saturating(job, result, others)
    return deployed.exit_code


def _refuse_flags(config: RunConfig, file: str, arch: str) -> None:
    """Raises UsageError for what cannot be done with a quantized checkpoint."""
    if config.quantize_eval or config.qe.calibration is not None:
        raise UsageError(f"{file} is quantized already; drop --quantize-eval and --qe-calibration to evaluate it")
    if config.sense is not None:
        raise UsageError(f"--sense needs a float model, but {file} is quantized; give the original")
    if config.summary:
        raise UsageError(f"--summary needs a float model, but {file} is quantized; give the original")
    if "--arch" in config.given and config.arch != arch:
        raise UsageError(f"{file} is a quantized {arch}, not {config.arch}; drop --arch, as the file knows it")


def _test(job: Job, *models: Model) -> list[Evaluation]:
    """Evaluates the models on the same test images; the log lines people grep for are of the first one."""
    config, loader = job.config, test_loader(job)
    _log.info("--- test ---------------------")
    _log.info("%d samples (%d per mini-batch)", loader.total_images, config.batch_size)
    meters = [Meter() for _ in models]

    def fields() -> dict[str, float]:
        loss, top1, top5 = meters[0].running
        return {"Loss": loss, "Top1": top1, "Top5": top5}

    batches = track(
        loader,
        total_images=loader.total_images,
        batch_size=config.batch_size,
        description="Test",
        print_freq=config.print_freq,
        fields=fields,
    )
    with exact_arithmetic():
        results = evaluate_together(models, meters, batches, job.device)
    report_skipped(loader)
    if not all(math.isfinite(each.loss) for each in results):
        raise ModelError(
            f"{job.spec.arch} gives NaN or infinity for some of these images, so it has no loss;"
            " --qe-calibration tells in which layer they arise"
        )
    result = results[0]
    _log.info("==> Top1: %.3f    Top5: %.3f    Loss: %.3f\n", result.top1, result.top5, result.loss)
    low, high = result.top1_interval
    _log.info("Top1 95 %% interval: %.2f to %.2f (%d images), Loss %.5f", low, high, result.samples, result.loss)
    if config.confusion:
        rows = (" ".join(f"{count:5d}" for count in row) for row in result.confusion.tolist())
        _log.info("==> Confusion:\n%s\n", "\n".join(rows))
    return results


def _record_saturating(job: Job, result: Evaluation, others: Sequence[Evaluation]) -> None:
    """What the integer model would be on a CPU that saturates, if that was evaluated."""
    for other in others:
        _log.info(
            "On x86 without VNNI, where products saturate in 16 bits: Top1 %.3f    Top5 %.3f    Loss %.5f"
            " (%.2f %% of predictions differ); --qe-reduce-range auto avoids it",
            *(other.top1, other.top5, other.loss, other.changed(result)),
        )
        _record(job, "saturating", other, changed=other.changed(result))


def _record(job: Job, what: str, result: Evaluation, **more: float) -> None:
    low, high = result.top1_interval
    row = {"what": what, "arch": job.spec.arch, "samples": result.samples, "top1": result.top1, "top5": result.top5}
    interval = {"top1_low": low, "top1_high": high}
    append_metrics(job.run.folder / "metrics.csv", {**row, "loss": result.loss, **interval, **more})
