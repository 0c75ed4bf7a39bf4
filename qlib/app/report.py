"""The report of a run: what finds something hands it over with `record`; at the end all of it is written at once."""

from __future__ import annotations

import hashlib
import logging
import shlex
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor

import qlib
from qlib.app.images import calibration_batches
from qlib.app.job import Job
from qlib.checkpoint.fingerprint import weights_hash
from qlib.config.flags.run_config import settings_by_name
from qlib.config.flags.verb import verb_of
from qlib.deploy.placement import Placed as PlacedLayer
from qlib.deploy.placement import int8_share
from qlib.deploy.verify import Verification as Found
from qlib.errors import DataError
from qlib.files import write_text
from qlib.graph import Graph
from qlib.quant.plan import Plan
from qlib.report.comparison import changed_results
from qlib.report.html.page import PAGE, run_page
from qlib.report.layers import layer_rows
from qlib.report.record import VERSION, Origin, RunReport, WrittenFile
from qlib.report.record_file import REPORT, read_report, report_text
from qlib.report.record_parts import Checked, Deployment, Epoch, Placed, Training, Verification
from qlib.stats.tensor_stats import ModelStats

__all__ = [
    "record",
    "record_deployment",
    "record_epoch",
    "record_file",
    "record_layers",
    "record_verification",
    "write_report",
]

_log = logging.getLogger(__name__)

_PART = 2**20
_FEW = 8

_SECTIONS = frozenset(each.name for each in fields(RunReport)) - {"version", "origin", "settings", "given"}


def record(job: Job, **sections: Any) -> None:
    """Hands over sections of the report by the names of their fields; one that is there is replaced."""
    assert sections.keys() <= _SECTIONS, sections.keys() - _SECTIONS
    job.run.found.update(sections)


def record_layers(job: Job, graph: Graph, plan: Plan | None, stats: ModelStats | None) -> None:
    """Hands over the layers of a folded graph, which may be in float, if there is to be a report."""
    if not job.config.no_report:
        record(job, layers=layer_rows(graph, plan, stats, _few_images(job) if plan is not None else None))


def _few_images(job: Job) -> Tensor | None:
    """A batch of calibration images to measure noise on, where `--qe-histograms` asks for what takes longer."""
    if not (job.config.qe.histograms and job.config.qe.calibration):
        return None
    return next((images for images, _ in calibration_batches(job, _FEW, _FEW)), None)


def record_file(job: Job, what: str, path: Path) -> None:
    """Hands over a file that was written for others."""
    if job.config.no_report:
        return
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(_PART):
            digest.update(part)
    written = WrittenFile(what, path.name, path.stat().st_size, digest.hexdigest())
    record(job, files=(*job.run.found.get("files", ()), written))


def record_deployment(job: Job, placed: list[PlacedLayer]) -> None:
    """Hands over where the layers of the exported file run."""
    rows = tuple(
        Placed(
            each.layer,
            each.kernels,
            each.integer,
            each.why,
            each.macs,
            each.saturation.pairs,
            each.saturation.share if each.saturation.outputs or not each.saturation.possible else None,
        )
        for each in placed
    )
    record(job, deployment=Deployment(int8_share(placed), rows))


def record_verification(job: Job, found: Found) -> None:
    """Hands over what comparing the exported file with the simulation found."""
    rows = tuple(
        Checked(each.layer, each.kernel, each.integer, each.codes, each.differing, each.largest, each.verdict)
        for each in found.layers
    )
    first = found.first or ""
    record(
        job,
        verification=Verification(found.exact, found.images, found.agreeing, found.logit_difference, first, rows),
    )


def record_epoch(job: Job, epoch: int, metrics: dict[str, float], best: int, schedule: str) -> None:
    """Hands over one more epoch of training, and which one was the best so far."""
    before = job.run.found.get("training", Training(()))
    record(job, training=Training((*before.epochs, Epoch(epoch, metrics)), best, schedule))


def write_report(job: Job, exit_code: int) -> None:
    """Writes `report.json` and `report.html`, unless `--no-report` says not to or the run only printed.

    Raises OutputError where it cannot be written.
    """
    if job.config.no_report or not job.run.found:
        return
    report, page = _report(job, exit_code), job.run.folder / PAGE
    write_text(job.run.folder / REPORT, report_text(report), "report")
    write_text(page, run_page(report), "report")
    _tell_repeated(job, report)
    _log.info("Report of this run: %s", page)


def _tell_repeated(job: Job, report: RunReport) -> None:
    """Says whether the numbers of the run that `--run-config` repeats came out again, if it left a report."""
    file = job.config.repeats
    if file is None or not (folder := file.parent.parent).joinpath(REPORT).is_file():
        return
    try:
        changed = changed_results(read_report(folder), report)
    except DataError as error:
        _log.warning("Warning: whether the numbers are the same is not known: %s", error)
        return
    verdict = f"differ: {'; '.join(changed)}" if changed else "are the same to the last digit"
    _log.info("Numbers of the run that is repeated, %s: they %s", folder.name, verdict)


def _report(job: Job, exit_code: int) -> RunReport:
    config = job.config
    origin = Origin(
        verb=verb_of(config).name.lower(),
        version=qlib.__version__,
        arch=job.spec.arch,
        dataset=job.dataset_name,
        classes=job.num_classes,
        started=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(job.run.started)),
        seconds=round(time.time() - job.run.started, 3),
        exit_code=exit_code,
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        repeat=shlex.join(["compress.py", "--run-config", str(job.run.configs / "run_config.yaml")]),
        folder=job.run.folder.name,
        weights=weights_hash(job.model.state_dict()),
    )
    return RunReport(
        version=VERSION,
        origin=origin,
        settings={name: _text(value) for name, value in settings_by_name(config).items() if name != "given"},
        given=tuple(sorted(config.given)),
        environment=job.run.environment,
        **job.run.found,
    )


def _text(value: object) -> str:
    """A setting as text: lists with commas, null for none.

    >>> _text((2, 4)), _text(None), _text(True)
    ('2,4', 'null', 'true')
    """
    if isinstance(value, (tuple, frozenset)):
        return ",".join(map(_text, value))
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
