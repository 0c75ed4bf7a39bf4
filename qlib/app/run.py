"""The application: one function a verb. `run` is what the command line calls."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from qlib.app.auto import choose_settings
from qlib.app.calibrate import calibrate
from qlib.app.capture import fold_model
from qlib.app.compare import compare_runs
from qlib.app.correct import correct_float
from qlib.app.evaluate import log_confusion, log_interval, log_result, measure
from qlib.app.export import SATURATING, export_float_model, export_model
from qlib.app.images import test_loader
from qlib.app.job import Job, choose_device, example_of, load_job
from qlib.app.observe import collect_histograms, log_masks, observe
from qlib.app.plan import given_plan, make_plan, plan_of, settings_of, stats_for, with_corrections
from qlib.app.predictions import compare_to_run, comparison_row, log_comparison, save_predictions
from qlib.app.prune import prune, report_size, save_pruned
from qlib.app.report import record_file, record_layers, write_report
from qlib.app.report_results import record_test, record_versus
from qlib.app.search import analyse
from qlib.app.seeds import Draw, next_draw, report_seeds
from qlib.app.sense import analyse_pruning
from qlib.app.show import check, summarize
from qlib.app.thin import thinnify
from qlib.app.train import train
from qlib.checkpoint.quantized import (
    QuantizedHeader,
    is_quantized,
    read_header,
    restore_quantized,
    save_quantized,
)
from qlib.checkpoint.read import read_checkpoint
from qlib.config.flags.checks import startup_warnings
from qlib.config.flags.rows.common import EVALUATES, HANDS_OVER
from qlib.config.flags.run_config import RunConfig
from qlib.config.flags.verb import Verb, asked, nothing_to_do, verb_of
from qlib.data.loader import Loader
from qlib.errors import ModelError, UsageError
from qlib.files import append_csv
from qlib.lower import lower
from qlib.metrics import Evaluation, Model, compare
from qlib.models import create_model, refuse_python_file
from qlib.models.names import family_of
from qlib.quant.plan_file import check_plan, write_plan
from qlib.report.tables import arithmetic_lines, plan_table
from qlib.runlog import RunLog, open_run
from qlib.surgery.recipe_file import saved_recipe, thinned_as
from qlib.surgery.widen import find_wide_model
from qlib.train.state import is_training
from qlib.users_code import users_models

__all__ = ["run"]

_log = logging.getLogger(__name__)


def run(config: RunConfig) -> int:
    """Does what the command line asks; 0 when it is done. Raises QlibError for a user's mistake."""
    inputs = (config.train.compress, config.qe.stats_file, config.qe.config_file)
    with (
        open_run(
            config.out_dir, config.name, config.to_yaml(), inputs, verbose=config.verbose, cpu=config.cpu
        ) as run_log,
        users_models(family_of(config.arch.lower()) is None),
    ):
        for warning in startup_warnings(config):
            _log.warning("Warning: %s", warning)
        if verb_of(config) is Verb.COMPARE:
            compare_runs(config.compare, run_log)
            return 0
        _log.info("Random seed: %d", config.seed)
        torch.manual_seed(config.seed)
        torch.use_deterministic_algorithms(config.deterministic, warn_only=True)
        device = choose_device(config)
        checkpoint = read_checkpoint(config.resume_from) if config.resume_from is not None else {}
        if is_quantized(checkpoint):
            _refuse_flags(config)
            return _use_checkpoint(config, run_log, device, checkpoint)
        if is_training(checkpoint) and config.quantize_eval and not _names_settings(config):
            return _use_checkpoint(config, run_log, device, _integers_of(config, checkpoint))
        verb = verb_of(config)
        if verb is Verb.NOTHING:
            raise nothing_to_do()
        job = load_job(with_corrections(config), run_log, device, checkpoint)
        given = thinnify(job) if config.thinnify else job
        job = _pruned(given, verb)
        if verb in HANDS_OVER.verbs and verb is not Verb.TRAIN:
            log_masks(job)
        exit_code = 0 if _is_done(given, job) else _DO[verb](job, checkpoint) or 0
        if verb in EVALUATES.verbs and verb is not Verb.TRAIN:  # which may have gone on with another model
            observe(job)
        write_report(job, exit_code)
        return exit_code


def _pruned(job: Job, verb: Verb) -> Job:
    """The job with its model pruned, evaluated and written, where `--prune` asks for it."""
    if job.config.prune.method is None or verb not in (Verb.QUANTIZE, Verb.EVALUATE):
        return job
    pruned = prune(job)
    results = _test(job, {"pruned": pruned.model, "fp32": job.model})
    save_pruned(pruned, results["pruned"].top1)
    report_size(job, pruned)
    return pruned


def _is_done(given: Job, pruned: Job) -> bool:
    """Whether a model was pruned, and nothing else is asked for than its evaluation."""
    return pruned is not given and not (given.config.quantize_eval or given.config.wants_onnx)


def _analyse(job: Job) -> None:
    """Measures what few bits in each layer alone do."""
    folded = fold_model(job)
    if given_plan(job, folded) is not None:
        raise UsageError("--sense needs settings, but --qe-config-file is a plan; give settings, or drop it")
    ptq, settings = settings_of(job, folded)
    correct_float(job, folded)
    stats = stats_for(job, folded, ptq, settings)
    record_layers(job, folded.graph, None, stats)
    analyse(job, folded.graph, settings, partial(plan_of, folded, stats))


def _calibrate(job: Job) -> None:
    """Collects statistics alone."""
    folded, fraction = fold_model(job), job.config.qe.calibration
    assert fraction is not None
    correct_float(job, folded)
    record_layers(job, folded.graph, None, calibrate(job, folded.graph, fraction))


def _quantize_and_evaluate(job: Job) -> int:
    """Once, or with `--seeds` once for each draw of calibration images; only the first one is handed over."""
    exit_code, score = _quantize_once(choose_settings(job) if job.config.automatic else job)
    if job.config.seeds > 1:
        others = [_quantize_once(next_draw(job, draw))[1] for draw in range(1, job.config.seeds)]
        report_seeds(job, [score, *others])
    return exit_code


def _quantize_once(job: Job) -> tuple[int, Draw]:
    """The exit code and the result."""
    folded = fold_model(job)
    planned = make_plan(job, folded)
    plan = planned.plan
    plan_path = job.file("layer_quant_params.yaml")
    write_plan(plan_path, plan)
    _log.info("Plan of each layer saved to %s; edit it and pass it back with --qe-config-file", plan_path)
    lowered = lower(folded.graph, plan).to(job.device)
    for line in arithmetic_lines(folded.graph, plan):
        _log.info("%s", line)
    record_layers(job, folded.graph, plan, planned.stats)
    deployed = export_model(job, folded.graph, lowered, plan, planned.stats)
    results = _test(job, {"quantized": deployed.engine, "fp32": job.model, **deployed.others})
    result, reference = results["quantized"], results["fp32"]
    path = job.file("quantized_checkpoint.pth.tar")
    header = QuantizedHeader(job.spec.arch, job.dataset_name, job.num_classes, plan, saved_recipe(job.model))
    original = job.model if planned.keep_float_weights else None
    save_quantized(path, header, lowered, {"quantized_top1": result.top1}, original)
    _log.info("Saving checkpoint to: %s", path)
    record_file(job, "quantized checkpoint", path)
    return deployed.exit_code, Draw.of(job, result, reference)


def _use_float(job: Job) -> None:
    """Exports and evaluates the float model, as the flags ask."""
    graph = fold_model(job).graph
    record_layers(job, graph, None, None)
    engine = export_float_model(job, graph)
    if job.config.evaluate:
        _test(job, {"fp32": engine})


def _use_checkpoint(config: RunConfig, run_log: RunLog, device: torch.device, checkpoint: Mapping[str, Any]) -> int:
    """Exports, verifies and evaluates a quantized checkpoint, which knows its architecture and plan."""
    file = str(config.resume_from)
    header = read_header(checkpoint, f"checkpoint {file!r}")
    if config.arch_given and config.arch != header.arch:
        raise UsageError(f"{file} is a quantized {header.arch}, not {config.arch}; drop --arch, as the file knows it")
    refuse_python_file(header.arch, f"checkpoint {file!r}", "-a", named=config.arch)
    spec = find_wide_model(header.arch)
    model = create_model(spec, num_classes=header.num_classes)
    model = thinned_as(model, header.thinning, example_of(spec), f"checkpoint {file!r}").to(device)
    job = Job(config, run_log, device, spec, config.dataset or header.dataset, header.num_classes, model)
    _log.info("=> loaded a quantized %s model with the %s dataset", spec.arch, job.dataset_name)
    folded = fold_model(job)
    check_plan(header.plan, folded.layers, f"the plan in {file!r}", folded.channels)
    lowered = restore_quantized(checkpoint, header, folded.graph, f"checkpoint {file!r}").to(device)
    if config.check:
        _log.info("%s", plan_table(folded.graph, header.plan))
        return 0
    record_layers(job, folded.graph, header.plan, None)
    deployed = export_model(job, folded.graph, lowered, header.plan, None)
    if config.evaluate or not config.exports:
        _test(job, {"quantized": deployed.engine, **deployed.others})
    write_report(job, deployed.exit_code)
    return deployed.exit_code


def _names_settings(config: RunConfig) -> bool:
    """Whether flags say how to quantize: what a checkpoint of training has learned then does not count."""
    return bool(config.automatic or config.given_of("qe") or config.given_of("ptq"))


def _integers_of(config: RunConfig, checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """The integer model in a checkpoint of training. Raises UsageError where it holds none."""
    found = checkpoint.get("quantized")
    if isinstance(found, dict) and is_quantized(found):
        return found
    raise UsageError(
        f"{config.resume_from} was not trained in integers, or saved within an epoch; quantize it with --qe-calibration"
        " or --qe-stats-file, or give best.pth.tar of a run whose schedule has quantizers"
    )


def _refuse_flags(config: RunConfig) -> None:
    """Raises UsageError for what cannot be done with a quantized checkpoint."""
    if config.prune.method is not None:
        raise UsageError(f"--prune needs a float model, but {config.resume_from} is quantized; give the original")
    for verb, sentence in _NEEDS_FLOAT.items():
        if verb in asked(config):
            raise UsageError(sentence.format(file=config.resume_from))
    for flag in ("--activation-stats", "--param-hist", "--masks-sparsity"):
        if flag in config.given:
            raise UsageError(_OBSERVED.format(flag=flag, file=config.resume_from))


def _test(job: Job, models: Mapping[str, Model]) -> dict[str, Evaluation]:
    """Evaluates the models on the same test images and records them; the lines people grep for are of the first one."""
    loader = test_loader(job)
    _log.info("--- test ---------------------")
    results = dict(zip(models, measure(job, loader, "Test", *models.values()), strict=True))
    if not all(math.isfinite(each.loss) for each in results.values()):
        raise ModelError(
            f"{job.spec.arch} gives NaN or infinity for some of these images, so it has no loss;"
            " --qe-calibration tells in which layer they arise"
        )
    first = next(iter(results.values()))
    log_result(first)
    log_interval(first)
    if job.config.confusion:
        log_confusion(first)
    save_predictions(job, loader, results)
    record_test(job, loader, results)
    _record_float(job, results, loader.dataset.classes)
    _record_saturating(job, results)
    _record_other_run(job, loader, first)
    return results


def _record_float(job: Job, results: Mapping[str, Evaluation], classes: Sequence[str]) -> None:
    """The integer or pruned model, the float model, and what changed from this to that."""
    made = "pruned" if "pruned" in results else "quantized"
    result, reference = results.get(made), results.get("fp32")
    more: dict[str, float | str] = {}
    if result and reference:
        _log.info("FP32:    Top1 %.3f    Top5 %.3f    Loss %.5f", reference.top1, reference.top5, reference.loss)
        _log.info("Predictions that differ from FP32: %.2f %%", result.changed(reference))
        comparison = compare(reference.predictions, result)
        log_comparison(comparison, "FP32", classes)
        more = {"changed": result.changed(reference), **comparison_row(comparison)}
    if reference:
        _record(job, "fp32", reference)
    if result:
        _record(job, made, result, **more)


def _record_saturating(job: Job, results: Mapping[str, Evaluation]) -> None:
    """What the integer model would be on a CPU that saturates, if that was evaluated."""
    if SATURATING in results:
        result, other = results["quantized"], results[SATURATING]
        _log.info(
            "On x86 without VNNI, where products saturate in 16 bits: Top1 %.3f    Top5 %.3f    Loss %.5f"
            " (%.2f %% of predictions differ); --qe-reduce-range auto avoids it",
            *(other.top1, other.top5, other.loss, other.changed(result)),
        )
        _record(job, SATURATING, other, changed=other.changed(result))


def _record_other_run(job: Job, loader: Loader, result: Evaluation) -> None:
    """What changed from the run that --compare-to names to this one."""
    run = job.config.compare_to
    if run is not None:
        comparison = compare_to_run(job, loader, result, run)
        log_comparison(comparison, run.name, loader.dataset.classes)
        record_versus(job, loader, comparison, "this run", run.name)
        _record(job, f"compared to {run.name}", result, **comparison_row(comparison))


def _record(job: Job, what: str, result: Evaluation, **more: float | str) -> None:
    low, high = result.top1_interval
    row = {"what": what, "arch": job.spec.arch, "samples": result.samples, "top1": result.top1, "top5": result.top5}
    interval = {"top1_low": low, "top1_high": high}
    append_csv(job.run.folder / "metrics.csv", {**row, "loss": result.loss, **interval, **more})


_QUANTIZED = "{file} is quantized already; drop --quantize-eval and --qe-calibration to evaluate it"

_SENSED = "--sense needs a float model, but {file} is quantized; give the original"

_OBSERVED = "{flag} looks at a float model, but {file} is quantized; give the original"

_NEEDS_FLOAT: Mapping[Verb, str] = {
    Verb.TRAIN: "{file} holds integers, which cannot be trained; give the checkpoint of the float model",
    Verb.QUANTIZE: _QUANTIZED,
    Verb.THINNIFY: "{file} holds integers; thin the checkpoint of the float model, and quantize that",
    Verb.CALIBRATE: _QUANTIZED,
    Verb.SENSE: _SENSED,
    Verb.SENSE_PRUNING: _SENSED,
    Verb.HISTOGRAMS: _OBSERVED.format(flag="--activation-histograms", file="{file}"),
    Verb.SUMMARY: "--summary needs a float model, but {file} is quantized; give the original",
}
"""Verb -> why it cannot be done with a quantized checkpoint."""

_DO: Mapping[Verb, Callable[[Job, Mapping[str, Any]], int | None]] = {
    Verb.SUMMARY: lambda job, _: summarize(job),
    Verb.CHECK: lambda job, _: check(job),
    Verb.SENSE: lambda job, _: _analyse(job),
    Verb.SENSE_PRUNING: lambda job, _: analyse_pruning(job),
    Verb.QUANTIZE: lambda job, _: _quantize_and_evaluate(job),
    Verb.CALIBRATE: lambda job, _: _calibrate(job),
    Verb.HISTOGRAMS: lambda job, _: collect_histograms(job),
    Verb.EVALUATE: lambda job, _: _use_float(job),
    Verb.EXPORT: lambda job, _: _use_float(job),
    Verb.THINNIFY: lambda job, _: None,
    Verb.TRAIN: train,
}
"""Verb -> what does it with a float model and its checkpoint: the exit code, None for 0."""
