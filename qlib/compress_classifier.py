"""The application: one function a verb. `run` is what the command line calls."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlib.checkpoint import (
    QuantizedHeader,
    is_quantized,
    read_header,
    restore_quantized,
    save_quantized,
    weights_hash,
)
from qlib.checkpoint_file import load_state, model_state, read_checkpoint
from qlib.config.ptq_config import LayerSettings, PtqConfig, load_ptq_config, ptq_config_from_flags
from qlib.config.resolve import resolve
from qlib.config.run_config import RunConfig, startup_warnings
from qlib.data import ImageDataset, Loader, choose_subset, make_loader, open_dataset
from qlib.errors import CheckpointError, UsageError
from qlib.evaluate import Evaluation, Meter, evaluate_together
from qlib.graph import Graph, capture, fold_batch_norm, fused_activations, kind_of
from qlib.graph.ir import layer_inputs, layers, name_of
from qlib.lower import exact_arithmetic, lower
from qlib.models import ModelSpec, create_model, find_model
from qlib.progress import track
from qlib.quant.plan import Plan
from qlib.quant.plan_file import check_plan, is_plan_file, read_plan, stats_from_plan, write_plan
from qlib.quantizers import layer_infos, plan_post_train_linear
from qlib.report import float_layers, plan_table, settings_table
from qlib.runlog import RunLog, append_metrics, open_run
from qlib.stats.collect import MICRO_BATCH, Collector
from qlib.stats.stats_file import check_fingerprint, read_stats, write_stats
from qlib.stats.tensor_stats import ModelStats
from qlib.summary import summary

__all__ = ["run"]

_log = logging.getLogger(__name__)

_IMPLICIT_CALIBRATION = 0.05
_SAVE_EVERY_SECONDS = 5.0


@dataclass(frozen=True)
class Job:
    """What every verb works on: the settings, the run's folder, the device and the model."""

    config: RunConfig
    run: RunLog
    device: torch.device
    spec: ModelSpec
    dataset_name: str
    num_classes: int
    model: nn.Module

    @property
    def example(self) -> Tensor:
        """A batch of two images of the model's size, on its device."""
        return torch.zeros(2, *self.spec.input_shape, device=self.device)

    def file(self, name: str) -> Path:
        """A file in the run's folder; the run's name is its prefix, as people's scripts expect."""
        return self.run.folder / (f"{self.config.name}_{name}" if self.config.name else name)


@dataclass(frozen=True)
class FoldedGraph:
    """The captured graph after folding, and which module went into which layer."""

    graph: Graph
    folded: Mapping[str, str]

    @property
    def absorbed(self) -> dict[str, str]:
        """Names of batch-norms and activations -> the layer that computes them."""
        fused = {name_of(relu): name_of(producer) for producer, relu in fused_activations(self.graph).items()}
        return {**self.folded, **fused}

    @property
    def layers(self) -> dict[str, tuple[str, int]]:
        """Layer name -> kind and number of tensor inputs."""
        return {name_of(node): (kind_of(module), len(layer_inputs(node))) for node, module in layers(self.graph)}


def run(config: RunConfig) -> int:
    """Does what the command line asks; 0 when it is done. Raises QlibError for a user's mistake."""
    with open_run(config) as run_log:
        for warning in startup_warnings(config):
            _log.warning("Warning: %s", warning)
        _log.info("Random seed: %d", config.seed)
        torch.manual_seed(config.seed)
        torch.use_deterministic_algorithms(config.deterministic, warn_only=True)
        device = _device(config)
        checkpoint = read_checkpoint(config.resume_from) if config.resume_from is not None else {}
        if is_quantized(checkpoint):
            _evaluate_checkpoint(config, run_log, device, checkpoint)
            return 0
        job = _load(config, run_log, device, checkpoint)
        if config.summary:
            _summarize(job)
        elif config.check:
            _check(job)
        elif config.quantize_eval:
            _quantize_and_evaluate(job)
        elif config.qe.calibration is not None:
            _calibrate(job, _folded(job), config.qe.calibration)
        else:
            _evaluate_float(job)
    return 0


def _device(config: RunConfig) -> torch.device:
    available = torch.cuda.device_count()
    if config.cpu or (not available and not config.gpus):
        return torch.device("cpu")
    wrong = [gpu for gpu in config.gpus or () if gpu >= available]
    if wrong:
        there = f"0 to {available - 1}" if available else "none"
        raise UsageError(f"--gpus names GPU {wrong[0]}, but this machine has {there}; use --cpu or another number")
    if config.gpus is None or len(config.gpus) > 1:
        _log.info("One GPU is used: %d", (config.gpus or (0,))[0])
    return torch.device("cuda", (config.gpus or (0,))[0])


def _load(config: RunConfig, run_log: RunLog, device: torch.device, checkpoint: Mapping[str, Any]) -> Job:
    """Builds the model and loads its weights."""
    weights_file = config.resume_from or config.exp_load_weights_from
    if config.exp_load_weights_from is not None:
        checkpoint = read_checkpoint(config.exp_load_weights_from)
        if is_quantized(checkpoint):
            raise CheckpointError(f"{config.exp_load_weights_from} holds integers, not float weights; use --resume-from")
    arch = config.arch
    if "-a" not in config.given and "--arch" not in config.given and isinstance(checkpoint.get("arch"), str):
        arch = str(checkpoint["arch"])
    spec = find_model(arch)
    dataset_name = config.dataset or spec.dataset
    num_classes = spec.num_classes
    if dataset_name == "imagefolder" and config.data is not None:
        num_classes = len(open_dataset(dataset_name, config.data, "val", spec.transform, num_classes=None).classes)
    model = create_model(spec, num_classes=num_classes, pretrained=config.pretrained and weights_file is None)
    if weights_file is not None:
        load_state(model, model_state(checkpoint), f"checkpoint {str(weights_file)!r}")
    pretrained = "pretrained " if config.pretrained else ""
    _log.info("=> created a %s%s model with the %s dataset", pretrained, spec.arch, dataset_name)
    if not config.pretrained and weights_file is None and not (config.summary or config.check):
        _log.warning(
            "Warning: the weights are random; give --pretrained, --resume-from or --exp-load-weights-from for trained ones"
        )
    model = model.to(device)
    return Job(config, run_log, device, spec, dataset_name, num_classes, model)


def _folded(job: Job) -> FoldedGraph:
    graph = capture(job.model, job.example)
    return FoldedGraph(graph, fold_batch_norm(graph))


# --- data ---------------------------------------------------------------------------------------------------------


def _open(job: Job, split: str) -> ImageDataset:
    if job.config.data is None and job.dataset_name != "digits":
        raise UsageError(f"no dataset folder was given; add the path of a {job.dataset_name} folder to the command line")
    root = job.config.data
    assert split in ("train", "val", "test")
    return open_dataset(job.dataset_name, root, split, job.spec.transform, num_classes=job.num_classes)  # type: ignore[arg-type]


def _test_loader(job: Job) -> Loader:
    dataset = _open(job, "test")
    config = job.config
    indices = choose_subset(len(dataset), config.effective_test_size, config.seed)
    train = len(_open(job, "train"))
    validation = round(train * config.validation_split)
    _log.info(
        "Dataset sizes:\n\ttraining=%d\n\tvalidation=%d\n\ttest=%d", train - validation, validation, len(indices)
    )
    return make_loader(
        dataset,
        batch_size=config.batch_size,
        workers=config.workers,
        indices=indices,
        skip_corrupt=config.skip_corrupt,
    )


# --- verbs --------------------------------------------------------------------------------------------------------


def _summarize(job: Job) -> None:
    for what in job.config.summary:
        _log.info("%s", summary(what, job.model, job.example, job.run.folder))


def _calibrate(job: Job, folded: FoldedGraph, fraction: float) -> ModelStats:
    """Collects activation statistics in one pass, saves them, and goes on from a broken collection of the same."""
    config = job.config
    split = config.qe.calibration_split
    dataset = _open(job, split)
    indices = choose_subset(len(dataset), fraction, config.seed)
    fingerprint: dict[str, str | int] = {
        "arch": job.spec.arch,
        "weights": weights_hash(job.model.state_dict()),
        "dataset": job.dataset_name,
        "split": split,
        "samples": len(indices),
    }
    stem = re.sub(r"[^\w.-]+", "_", f"{job.spec.arch}_{job.dataset_name}")
    partial = Path("stats") / f"{stem}.partial.safetensors"
    key = {**fingerprint, "seed": config.seed, "data": str(config.data)}
    _log.info("Collecting quantization calibration stats based on %.1f%% of %s dataset", 100 * fraction, split)
    collector = Collector(folded.graph)
    start = collector.load(partial, key)
    if start:
        _log.info("Going on from a broken collection: %d of %d images are done", start, len(indices))
    _collect(job, collector, dataset, indices, start, partial, key)
    stats = ModelStats(collector.result(), {**fingerprint, "samples": collector.samples})
    path = Path("stats") / f"{stem}.yaml"
    write_stats(path, stats)
    write_stats(job.file("acts_quantization_stats.yaml"), stats)
    partial.unlink(missing_ok=True)
    _log.info("Stats collection complete")
    _log.info("Stats saved to %s", path)
    return stats


def _collect(
    job: Job,
    collector: Collector,
    dataset: ImageDataset,
    indices: list[int],
    start: int,
    partial: Path,
    key: Mapping[str, Any],
) -> None:
    config = job.config
    # Whole micro-batches: the statistics then do not depend on -b, nor on where a broken collection stopped.
    batch_size = max(MICRO_BATCH, min(128, config.batch_size) // MICRO_BATCH * MICRO_BATCH)
    if start >= len(indices):
        return
    loader = make_loader(
        dataset,
        batch_size=batch_size,
        workers=config.workers,
        indices=indices[start:],
        skip_corrupt=config.skip_corrupt,
    )
    batches = track(
        loader,
        total_images=len(indices),
        batch_size=batch_size,
        description="Calibration",
        print_freq=config.print_freq,
        images_done=start,
    )
    saved = time.monotonic()
    try:
        for images, _ in batches:
            collector.update(images.to(job.device), consumed=batch_size)
            if time.monotonic() - saved > _SAVE_EVERY_SECONDS:
                collector.save(partial, key)
                saved = time.monotonic()
    except KeyboardInterrupt:
        if collector.samples:
            collector.save(partial, key)
        raise KeyboardInterrupt(
            f"Calibration stopped after {collector.samples} of {len(indices)} images; run the same command again to go on"
        ) from None
    _report_skipped(loader)


def _report_skipped(loader: Loader) -> None:
    if loader.skipped:
        _log.warning("Warning: %d corrupt images were left out, the first is %s", len(loader.skipped), loader.skipped[0])


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
    if is_plan_file(path):
        return stats_from_plan(read_plan(path))
    stats = read_stats(path)
    check_fingerprint(stats, job.spec.arch, weights_hash(job.model.state_dict()))
    return stats


def _plan(job: Job, folded: FoldedGraph) -> Plan:
    """The plan: from its own file, or from settings and statistics, which are collected where none are given."""
    qe = job.config.qe
    if qe.config_file is not None and is_plan_file(qe.config_file):
        plan = read_plan(qe.config_file)
        check_plan(plan, folded.layers, str(qe.config_file))
        return plan
    ptq, settings = _settings(job, folded)
    stats = None
    if ptq.stats_file is not None:
        stats = _read_stats(job, ptq.stats_file)
    elif not ptq.dynamic and any(each.bits_activations for each in settings.values()):
        stats = _calibrate(job, folded, qe.calibration or _IMPLICIT_CALIBRATION)
    if stats is None and any(each.bits_activations for each in settings.values()):
        _log.warning(
            "Warning: dynamic quantization: each image's own range is used;"
            " only weighted layers and matrix products are quantized"
        )
    return plan_post_train_linear(folded.graph, settings, stats, folded.folded)


def _check(job: Job) -> None:
    folded = _folded(job)
    config_file = job.config.qe.config_file
    if config_file is not None and is_plan_file(config_file):
        plan = read_plan(config_file)
        check_plan(plan, folded.layers, str(config_file))
        _log.info("%s", plan_table(folded.graph, plan))
        return
    ptq, settings = _settings(job, folded)
    if ptq.stats_file is not None:
        plan_post_train_linear(folded.graph, settings, _read_stats(job, ptq.stats_file), folded.folded)
    _log.info("%s", settings_table(folded.graph, settings, folded.absorbed))


def _quantize_and_evaluate(job: Job) -> None:
    folded = _folded(job)
    plan = _plan(job, folded)
    plan_path = job.file("layer_quant_params.yaml")
    write_plan(plan_path, plan)
    _log.info("Plan of each layer saved to %s; edit it and pass it back with --qe-config-file", plan_path)
    lowered = lower(folded.graph, plan).to(job.device)
    for line in float_layers(plan):
        _log.info("%s", line)
    result, reference = _test(job, lowered, job.model)
    assert reference is not None
    _log.info("FP32:    Top1 %.3f    Top5 %.3f    Loss %.5f", reference.top1, reference.top5, reference.loss)
    _log.info("Predictions that differ from FP32: %.2f %%", result.changed(reference))
    _record(job.run, "fp32", job.spec.arch, reference)
    _record(job.run, "quantized", job.spec.arch, result, changed=result.changed(reference))
    path = job.file("quantized_checkpoint.pth.tar")
    header = QuantizedHeader(job.spec.arch, job.dataset_name, job.num_classes, plan)
    save_quantized(path, header, lowered, {"quantized_top1": result.top1})
    _log.info("Saving checkpoint to: %s", path)


def _evaluate_float(job: Job) -> None:
    result, _ = _test(job, job.model, None)
    _record(job.run, "fp32", job.spec.arch, result)


def _evaluate_checkpoint(
    config: RunConfig, run_log: RunLog, device: torch.device, checkpoint: Mapping[str, Any]
) -> None:
    """Evaluates a quantized checkpoint, which knows its architecture and plan."""
    source = f"checkpoint {str(config.resume_from)!r}"
    if config.quantize_eval or config.qe.calibration is not None:
        raise UsageError(f"{config.resume_from} is quantized already; drop --quantize-eval and --qe-calibration")
    header = read_header(checkpoint, source)
    spec = find_model(header.arch)
    model = create_model(spec, num_classes=header.num_classes).to(device)
    job = Job(config, run_log, device, spec, config.dataset or header.dataset, header.num_classes, model)
    _log.info("=> loaded a quantized %s model with the %s dataset", spec.arch, job.dataset_name)
    folded = _folded(job)
    lowered = restore_quantized(checkpoint, header, folded.graph, source).to(device)
    if config.check:
        _log.info("%s", plan_table(folded.graph, header.plan))
        return
    if config.summary:
        raise UsageError(f"--summary needs a float model, but {config.resume_from} is quantized; give the original")
    result, _ = _test(job, lowered, None)
    _record(run_log, "quantized", spec.arch, result)


def _test(job: Job, model: Callable[[Tensor], Tensor], reference: nn.Module | None) -> tuple[Evaluation, Evaluation | None]:
    """Evaluates `model` on the test set, and `reference` on the same images, with the log lines people grep for."""
    config = job.config
    loader = _test_loader(job)
    _log.info("--- test ---------------------")
    _log.info("%d samples (%d per mini-batch)", loader.total_images, config.batch_size)
    meters = [Meter(), Meter()] if reference is not None else [Meter()]

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
    models = [model] if reference is None else [model, reference]
    with exact_arithmetic():
        results = evaluate_together(models, meters, batches, job.device)
    _report_skipped(loader)
    result = results[0]
    _log.info("==> Top1: %.3f    Top5: %.3f    Loss: %.3f\n", result.top1, result.top5, result.loss)
    _log.info("Top1 95 %% interval: %.2f to %.2f (%d images)", *result.top1_interval, result.samples)
    if config.confusion:
        _log.info("==> Confusion:\n%s\n", "\n".join(" ".join(f"{n:5d}" for n in row) for row in result.confusion.tolist()))
    return result, results[1] if reference is not None else None


def _record(run_log: RunLog, what: str, arch: str, result: Evaluation, **more: float) -> None:
    low, high = result.top1_interval
    row = {"what": what, "arch": arch, "samples": result.samples, "top1": result.top1, "top5": result.top5}
    append_metrics(
        run_log.folder / "metrics.csv", {**row, "loss": result.loss, "top1_low": low, "top1_high": high, **more}
    )
