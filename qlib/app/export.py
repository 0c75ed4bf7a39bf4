"""Export of a model: the ONNX file, where each layer runs, its verification, and evaluation by ONNX Runtime."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, fx

import qlib
from qlib.app.images import loader_of, open_split, report_skipped
from qlib.app.job import Job
from qlib.app.report import record_deployment, record_file, record_verification
from qlib.app.saturation import measure_saturation
from qlib.config.flags.run_config import RunConfig
from qlib.data.subset import choose_subset
from qlib.deploy.encodings import encodings_file, write_encodings
from qlib.deploy.extra import require_onnx
from qlib.deploy.storage import choose_opset, refuse_unexportable, storage_notes
from qlib.errors import UsageError
from qlib.graph import Graph
from qlib.graph.cost import layer_macs
from qlib.lower.saturation import SaturationRate, emulated
from qlib.metrics import Model
from qlib.progress import track
from qlib.quant.plan import Plan
from qlib.quant.plan_file import plan_text
from qlib.stats.tensor_stats import ModelStats

__all__ = ["SATURATING", "Deployed", "export_model", "export_float_model"]

_log = logging.getLogger(__name__)

BATCH = 16

SATURATING = "saturating"
"""The name of the integer model as a CPU computes it whose products saturate."""


@dataclass(frozen=True)
class Deployed:
    """What is evaluated of a quantized model: the engine that computes it, and `others` beside it, by name.

    `exit_code` is 1 where the file does not compute the same integers.
    """

    engine: Model
    others: Mapping[str, Model] = field(default_factory=dict)
    exit_code: int = 0


def export_model(job: Job, graph: Graph, lowered: fx.GraphModule, plan: Plan, stats: ModelStats | None) -> Deployed:
    """Exports and verifies the integer model as far as the flags ask; `graph` is its folded float graph."""
    config = job.config
    for kind in config.export_encodings:
        file = job.file(encodings_file(kind, Path(job.spec.arch).name))
        count = write_encodings(kind, file, graph, plan, lowered)
        _log.info("Ranges of %d tensors written for %s to %s", count, kind, file)
    if not config.wants_onnx:
        return Deployed(lowered)
    require_onnx(_flag(config))
    if config.verify is not None:
        _require_images(job, config.verify)
    path = _export_quantized(job, lowered, plan, stats)
    rates = measure_saturation(job, lowered)
    _report_placement(job, path, graph, lowered, rates)
    exact = config.verify is None or _verify(job, path, lowered, config.verify)
    engine = _onnx_engine(path, lowered, job.device) if config.engine == "onnxruntime" else lowered
    saturates = any(rate.saturated for rate in rates.values())
    return Deployed(engine, {SATURATING: emulated(lowered)} if saturates else {}, 0 if exact else 1)


def export_float_model(job: Job, graph: Graph) -> Model:
    """Exports the float model if the flags ask for it; returns what to evaluate.

    Raises UsageError for what needs an integer model.
    """
    config = job.config
    for flag, given in (("--verify", config.verify is not None), ("--export-encodings", config.export_encodings)):
        if given:
            raise UsageError(f"{flag} needs a quantized model, but this one is float; add --quantize-eval")
    if not config.wants_onnx:
        return job.model
    require_onnx(_flag(config))
    path = _export_float(job, graph)
    return _onnx_engine(path, job.model, job.device) if config.engine == "onnxruntime" else job.model


def _flag(config: RunConfig) -> str:
    """The flag that asks for ONNX."""
    if config.export_onnx is not None:
        return "--export-onnx"
    return "--verify" if config.verify is not None else "--engine onnxruntime"


def _path(job: Job, ending: str) -> Path:
    """The file that the flag names, or one in the run's folder."""
    wanted = job.config.export_onnx
    if wanted is not None and wanted.suffix == ".onnx":
        return wanted
    stem = "".join(c if c.isalnum() or c in "._-" else "_" for c in Path(job.spec.arch).name)
    return job.file(f"{stem}{ending}.onnx")


def _metadata(job: Job, **more: str) -> dict[str, str]:
    """What the file says of its origin; nothing of the machine: no folders, no addresses of functions."""
    settings = {
        "version": qlib.__version__,
        "arch": Path(job.spec.arch).name,
        "dataset": job.dataset_name,
        "transform": re.sub(r" at 0x\w+", "", " ".join(str(job.spec.transform).split())),
        "config": hashlib.sha256(job.config.to_yaml().encode()).hexdigest()[:16],
    }
    return {**settings, **more}


def _export_float(job: Job, graph: Graph) -> Path:
    """Writes the float model; returns where."""
    from qlib.deploy.export import export_float

    path = _path(job, "")
    opset = choose_opset(None, job.config.export_opset)
    export_float(graph, job.example.cpu(), path, opset=opset, metadata=_metadata(job))
    _log.info("Exported the float model to %s (opset %d, %.1f MB)", path, opset, path.stat().st_size / 1e6)
    record_file(job, "ONNX, float", path)
    return path


def _export_quantized(job: Job, lowered: fx.GraphModule, plan: Plan, stats: ModelStats | None) -> Path:
    """Writes the integer model, its placement as a table and as ``placement.csv``; returns where the model is."""
    from qlib.deploy.export import export_quantized

    refuse_unexportable(plan, lowered)
    path, opset = _path(job, "_int8"), choose_opset(plan, job.config.export_opset)
    metadata = _metadata(job, plan=hashlib.sha256(plan_text(plan).encode()).hexdigest()[:16])
    if stats is not None:
        known = {key: Path(str(value)).name if key == "arch" else value for key, value in stats.fingerprint.items()}
        metadata["stats"] = json.dumps(known, sort_keys=True)
    export_quantized(lowered, job.example, path, opset=opset, metadata=metadata)
    in_float = sum(value.numel() * value.element_size() for value in job.model.state_dict().values())
    size = path.stat().st_size
    _log.info(
        "Exported the integer model to %s (opset %d, %.1f MB, %.0f %% of the float weights)",
        path,
        opset,
        size / 1e6,
        100 * size / in_float,
    )
    for note in storage_notes(plan, opset):
        _log.info("  %s", note)
    record_file(job, "ONNX, integers", path)
    return path


def _report_placement(
    job: Job, path: Path, graph: Graph, lowered: fx.GraphModule, rates: Mapping[str, SaturationRate]
) -> None:
    """Logs what kernel runs each layer, and writes it to ``placement.csv``."""
    from qlib.deploy.placement import placement, placement_table, write_placement_csv

    placed = placement(path, lowered, layer_macs(graph), rates)
    _log.info("%s", placement_table(placed))
    write_placement_csv(job.file("placement.csv"), placed)
    record_deployment(job, placed)


def _require_images(job: Job, count: int) -> None:
    """Raises UsageError where the test split has fewer images than are to be verified."""
    if count > (there := len(open_split(job, "test"))):
        raise UsageError(f"--verify {count} asks for more images than the {there} of the test split; lower it")


def _verify(job: Job, path: Path, lowered: fx.GraphModule, count: int) -> bool:
    """Compares the file with the exact model on `count` test images; logs a table and writes ``verify.csv``."""
    from qlib.deploy.verify import table, verify, write_verification

    dataset = open_split(job, "test")
    loader = loader_of(job, dataset, choose_subset(len(dataset), 1.0, job.config.seed, shuffled=True)[:count], BATCH)
    batches = track(loader, total_images=count, batch_size=BATCH, description="Verify", print_freq=1)
    result = verify(lowered, path, (images for images, _ in batches))
    report_skipped(loader)
    _log.info("%s", table(result))
    write_verification(job.file("verify.csv"), result)
    record_verification(job, result)
    return result.exact


def _onnx_engine(path: Path, reference: Model, device: torch.device) -> Model:
    """The file as a function of images, computed by ONNX Runtime with as many threads as torch uses.

    Its first batch is compared with that of `reference`, and the log tells the difference.
    """
    from qlib.deploy.session import open_session, run_session

    session, checked = open_session(path), False

    def run(images: Tensor) -> Tensor:
        nonlocal checked
        (logits,) = run_session(session, images)
        if not checked:
            checked = True
            difference = float((logits - reference(images.to(device)).cpu()).abs().max())
            verdict = "the same to the last bit" if difference == 0 else f"logits differ by up to {difference:.3g}"
            _log.info("First batch in ONNX Runtime and in torch: %s", verdict)
        return logits

    return run
