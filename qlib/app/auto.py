"""`--auto`: climbs a ladder of settings from cheap to dear until a target or the time is reached, and takes the best.

Each trial is judged on training images that calibration does not see, against the float model; the test images are
looked at once, by the winner.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import math
import time
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from qlib.app.auto_report import Trial, report_trials, tell_layers
from qlib.app.capture import fold_model
from qlib.app.images import SEARCH_BATCH, loader_of, open_split, split_size
from qlib.app.job import Job
from qlib.app.layer_losses import LayerLosses
from qlib.app.plan import make_plan
from qlib.app.search import with_bits
from qlib.checkpoint.fingerprint import weights_hash
from qlib.config.flags.groups import AutoArgs, PtqArgs
from qlib.config.flags.names import flag_of
from qlib.config.flags.run_config import RunConfig, config_from_names, settings_by_name
from qlib.config.layers.write import ptq_text
from qlib.data.subset import choose_subset
from qlib.errors import UsageError
from qlib.files import STATS, make_folder, read_csv, write_csv, write_text
from qlib.graph import LAYOUT, FoldedGraph
from qlib.graph.ir import layers, name_of
from qlib.graph.kinds import layer_kind
from qlib.lower import exact_arithmetic, lower
from qlib.metrics import MICRO_BATCH, Evaluation, Meter, Model, compare
from qlib.progress import TimeUp, time_limit, track
from qlib.quant.plan_file import write_plan
from qlib.runlog import RunLog
from qlib.search.ladder import RUNGS, Judgement, Rung, Target, best_of, sensitive_layers
from qlib.search.sensitivity import divergence

__all__ = ["choose_settings"]

_log = logging.getLogger(__name__)

_MOST_IMAGES = 1024
"""Training images that calibration sees, and as many that judge."""

_PLAN, _JUDGEMENT, _STATISTICS = "plan.yaml", "judgement.csv", "acts_quantization_stats.yaml"

_TRIED = ("qe.", "ptq.", "lapq.", "sense")
"""How the names of settings begin that a trial depends on."""


def choose_settings(job: Job) -> Job:
    """The job with the plan of the best trial. Writes ``auto.csv`` and ``auto_run_config.yaml``.

    Raises UsageError where calibration leaves no training images to judge by.
    """
    climb = _Climb.of(job)
    trials = climb.run()
    best = best_of([each.judgement for each in trials])
    report_trials(job, climb.target, trials, best)
    if not climb.target.met(trials[best].judgement):
        tell_layers(climb.layer_losses(climb.configs[best]))
    winner = climb.configs[best]
    path = job.file("auto_run_config.yaml")
    write_text(path, _repeating(winner).to_yaml(), "settings")
    _log.info("Settings of the best trial saved to %s; --run-config repeats it", path)
    qe = replace(winner.qe, config_file=trials[best].folder / _PLAN, stats_file=None, calibration=None, budget=None)
    return replace(job, config=replace(winner, qe=qe, ptq=PtqArgs(images=winner.ptq.images)))


def _is_given(config: RunConfig, name: str) -> bool:
    """Whether the user gave a setting; `--qe-mode` gives that of activations and that of weights."""
    return flag_of(name) in config.given or (name.startswith("qe.mode_") and "--qe-mode" in config.given)


def _repeating(winner: RunConfig) -> RunConfig:
    """The settings of the best trial without the search."""
    given = frozenset(flag for flag in winner.given if not flag.startswith("--auto"))
    return replace(winner, automatic=False, auto=AutoArgs(), given=given)


def _base(config: RunConfig, fraction: float, images: int) -> RunConfig:
    """What the ladder stands on: what the user asks for, on calibration images, with the bits of `--auto-bits`."""
    acts, wts = (
        getattr(config.qe, name) if flag_of(f"qe.{name}") in config.given else config.auto.bits
        for name in ("bits_acts", "bits_wts")
    )
    qe = replace(config.qe, calibration=fraction, histograms=True, bits_acts=acts, bits_wts=wts)
    ptq = replace(config.ptq, images=min(config.ptq.images, images))
    lapq = replace(config.lapq, images=min(config.lapq.images, images))
    return replace(config, qe=qe, ptq=ptq, lapq=lapq, sense_images=min(config.sense_images, images))


@dataclass(frozen=True)
class _Climb:
    """The trials of one run: where they are kept, what judges them, and how far they may go."""

    job: Job
    target: Target
    judges: tuple[tuple[Tensor, Tensor], ...]
    folder: Path
    configs: list[RunConfig] = field(default_factory=list)
    statistics: dict[str, Path] = field(default_factory=dict)

    @classmethod
    def of(cls, job: Job) -> _Climb:
        args, split = job.config.auto, job.config.qe.calibration_split
        count = split_size(job, split)
        fraction = job.config.qe.calibration or min(0.5, _MOST_IMAGES / count)
        order = choose_subset(count, 1.0, job.calibration_seed, shuffled=True)
        seen = max(1, round(count * fraction))
        judging = order[seen : seen + _MOST_IMAGES]
        if not judging:
            raise UsageError(
                f"--auto judges on {split} images that calibration does not see, and --qe-calibration {fraction:g}"
                " leaves none; give a smaller fraction, such as 0.5"
            )
        _log.info("--auto: %d %s images calibrate, %d others judge", seen, split, len(judging))
        batches = loader_of(job, open_split(job, split), judging, MICRO_BATCH)
        judges = tuple((images.to(memory_format=LAYOUT), labels) for images, labels in batches)
        target = Target(args.agree, args.drop)
        if target == Target():
            target = Target(agree=99.0)
        key = weights_hash({**job.model.state_dict(), "judges": torch.tensor(judging)})
        base = replace(job, config=_base(job.config, fraction, seen))
        return cls(base, target, judges, STATS / f"auto-{key}")

    def run(self) -> list[Trial]:
        """Climbs as far as the target and the time allow; the first rung is always tried."""
        began, trials = time.monotonic(), list[Trial]()
        for rung in RUNGS:
            best = best_of([each.judgement for each in trials]) if trials else None
            if best is not None and self.target.met(trials[best].judgement):
                break
            left = 60 * self.job.config.auto.minutes - (time.monotonic() - began)
            try:
                with time_limit(math.inf if best is None else left):
                    config = self._with(rung, self.job.config if best is None else self.configs[best])
                    if config is not None:
                        trials.append(self._try(rung, config))
                        self.configs.append(config)
            except TimeUp:
                _log.info("--auto: %g minutes are over", self.job.config.auto.minutes)
                break
        return trials

    def _with(self, rung: Rung, best: RunConfig) -> RunConfig | None:
        """The best so far with the changes of a rung; None where that is nothing new, or not for this network.

        What the user gave stays as it is.
        """
        qe = best.qe
        few = 0 < qe.bits_wts < 8 or 0 < qe.bits_acts < 8 or qe.budget is not None
        if rung.sensitive and qe.budget is not None:  # which has given them their bits
            return None
        if (rung.few_bits and not few) or (rung.separable and qe.per_channel and not self._depthwise):
            return None
        if rung.sensitive:
            return self._with_sensitive(best)
        changes = {name: value for name, value in rung.changes.items() if not _is_given(best, name)}
        settings = settings_by_name(best)
        new = {name: value for name, value in changes.items() if settings[name] != value}
        if rung.changes and not new:
            return None
        return config_from_names({**settings, **new})

    def _with_sensitive(self, best: RunConfig) -> RunConfig | None:
        """The best so far with 8 bits for the layers that suffer most from fewer, as a file of settings."""
        if best.qe.config_file is not None:
            return None
        path = make_folder(self.folder / self._key(replace(best, sense="quant"))) / "settings.yaml"
        if not path.is_file():
            write_text(path, self._sensitive_settings(best, path.parent), "settings")
        return replace(best, qe=replace(best.qe, config_file=path, calibration=None))

    def _sensitive_settings(self, best: RunConfig, folder: Path) -> str:
        bits = min(each for each in (best.qe.bits_wts, best.qe.bits_acts) if each)
        folded = copy.deepcopy(self._folded)
        found = LayerLosses.of(self._job(self._with_statistics(best), folder), folded, bits)
        self.statistics.setdefault(best.ptq.of_float, folder / _STATISTICS)
        ptq, settings, chosen = found.ptq, found.settings, sensitive_layers(found.divergence)
        _log.info("Layers that suffer most from %d bits: %s", bits, ", ".join(chosen))
        raised = {**settings, **with_bits({name: settings[name] for name in chosen}, weights=8, activations=8)}
        kinds = {name_of(node): layer_kind(module) for node, module in layers(folded.graph)}
        return ptq_text(
            ptq,
            {name: each for name, each in raised.items() if not kinds[name].keeps_grid},
            {name for name, kind in kinds.items() if kind.weighted},
            str(self.statistics[best.ptq.of_float].absolute()),
            "8 bits for the layers that suffer most from fewer",
        )

    def layer_losses(self, best: RunConfig) -> dict[str, float]:
        """The divergence that each layer of the best trial makes alone, on few images, as the time may be over."""
        few = replace(best, sense_images=min(SEARCH_BATCH, best.sense_images))
        job = self._job(self._with_statistics(few), make_folder(self.folder))
        return LayerLosses.of(job, copy.deepcopy(self._folded)).divergence

    def _with_statistics(self, config: RunConfig) -> RunConfig:
        """The same with the statistics that an earlier trial has collected, where its float model is the same."""
        path = self.statistics.get(config.ptq.of_float)
        if config.qe.config_file is not None or path is None:
            return config
        return replace(config, qe=replace(config.qe, stats_file=path, calibration=None))

    def _try(self, rung: Rung, config: RunConfig) -> Trial:
        """Plans and judges; a trial of an earlier run is taken from there."""
        folder = make_folder(self.folder / self._key(config))
        collected = folder / _STATISTICS
        trial = self._earlier(rung, config, folder)
        if trial is None:
            _log.info("--auto: trying %s", rung.name)
            began, folded = time.monotonic(), copy.deepcopy(self._folded)
            plan = make_plan(self._job(self._with_statistics(config), folder), folded).plan
            judgement = self._judge(lower(folded.graph, plan))
            write_plan(folder / _PLAN, plan)
            trial = Trial(rung.name, self._changed(config), judgement, time.monotonic() - began, folder)
            _log.info("--auto: agreement %.2f %%, divergence %.5f", judgement.agreement, judgement.divergence)
            row = {**asdict(judgement), "seconds": trial.seconds}
            write_csv(folder / _JUDGEMENT, tuple(row), [tuple(row.values())])
        if collected.exists():
            self.statistics.setdefault(config.ptq.of_float, collected)
        return trial

    def _earlier(self, rung: Rung, config: RunConfig, folder: Path) -> Trial | None:
        """A trial that an earlier run of the same command has finished."""
        try:
            (row,) = read_csv(folder / _JUDGEMENT)
            numbers = {name: float(row[name]) for name in ("agreement", "drop", "divergence", "seconds")}
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if not (all(map(math.isfinite, numbers.values())) and (folder / _PLAN).is_file()):
            return None
        _log.info("--auto: %s was tried before, in %s", rung.name, folder)
        seconds = numbers.pop("seconds")
        return Trial(rung.name, self._changed(config), Judgement(**numbers), seconds, folder)

    def _changed(self, config: RunConfig) -> str:
        """The settings that differ from what was asked, as flags."""
        base, now = settings_by_name(self.job.config), settings_by_name(config)
        names = (name for name in now if now[name] != base[name] and name != "qe.calibration")
        return " ".join(f"{flag_of(name)}{'' if now[name] is True else f' {now[name]}'}" for name in names)

    def _key(self, config: RunConfig) -> str:
        """A name for all that a trial depends on, the model and the images apart."""
        settings = {name: value for name, value in settings_by_name(config).items() if name.startswith(_TRIED)}
        text = repr(sorted((name, str(value)) for name, value in settings.items()))
        return hashlib.sha256(f"{text} {config.seed} {config.data}".encode(errors="backslashreplace")).hexdigest()[:12]

    def _job(self, config: RunConfig, folder: Path) -> Job:
        """A job that writes into the folder of a trial."""
        return replace(self.job, config=replace(config, name=None), run=RunLog(folder, self.job.run.file))

    @cached_property
    def _folded(self) -> FoldedGraph:
        return fold_model(self.job)

    @cached_property
    def _depthwise(self) -> bool:
        modules = (module for _, module in layers(self._folded.graph))
        return any(1 < getattr(module, "groups", 1) == getattr(module, "in_channels", 0) for module in modules)

    @cached_property
    def _reference(self) -> tuple[list[Tensor], Evaluation]:
        """The logits of the float model, and its evaluation."""
        return self._run(self.job.model, "Float model")

    def _judge(self, lowered: Model) -> Judgement:
        (expected, reference), (logits, result) = self._reference, self._run(lowered, "Judging")
        lost = sum(map(divergence, expected, logits)) / result.samples
        return Judgement(compare(reference.predictions, result).agreement, reference.top1 - result.top1, lost)

    @torch.inference_mode()
    def _run(self, model: Model, description: str) -> tuple[list[Tensor], Evaluation]:
        meter, found = Meter(), []
        batches = track(
            self.judges,
            total_images=sum(len(labels) for _, labels in self.judges),
            batch_size=MICRO_BATCH,
            description=description,
            print_freq=len(self.judges) + 1,  # a bar, but no lines
        )
        with exact_arithmetic():
            for images, labels in batches:
                found.append(model(images.to(self.job.device)).cpu())
                meter.add(found[-1], labels)
        return found, meter.result()
