"""A run of training: model, schedule and images put together, epoch by epoch, to the last test."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from typing import Any

from torch import nn

from qlib.app.evaluate import log_confusion, log_interval, log_result, measure
from qlib.app.job import Job
from qlib.app.observe import observe
from qlib.app.policies import Setup, read_schedule, set_up
from qlib.app.removal import check_removers, remove, removers
from qlib.app.report import record_epoch, record_layers
from qlib.app.report_results import record_test
from qlib.checkpoint.fields import Record, check_fields
from qlib.checkpoint.quantized import QuantizedHeader, quantized_checkpoint
from qlib.checkpoint.write import write_checkpoint
from qlib.config.schedule.timeline import timeline
from qlib.config.schedule.types import Schedule
from qlib.errors import UsageError
from qlib.graph import LAYOUT, Graph
from qlib.lower import lower
from qlib.quant.plan import Plan
from qlib.report.observed import masks_table
from qlib.report.summary import summary
from qlib.surgery.recipe_file import saved_recipe
from qlib.tensor_file import flushed
from qlib.train.best import EpochScore, nonzero, ranked
from qlib.train.loop import Diverged, Progress, StepSettings, Trainee, run_epoch
from qlib.train.records import MetricsWriter
from qlib.train.saved import MAX_EPOCHS, REMEDY
from qlib.train.state import BEST, LAST, Checkpoints, TrainingState, is_training
from qlib.values import whole

__all__ = ["train"]

_log = logging.getLogger(__name__)


def train(job: Job, checkpoint: Mapping[str, Any]) -> int:
    """Trains as the flags and the schedule say; `checkpoint` is what `--resume-from` holds.

    Returns the exit code: 1 where the loss became NaN or infinite.

    Raises:
        UsageError: there is no epoch left to train.
        ConfigError: the schedule has mistakes, or does not fit the model.
        CheckpointError: the checkpoint is of another run.
    """
    args = job.config.train
    if args.amp and job.device.type == "cpu" and not job.config.cpu:
        _log.warning("Warning: --amp is ignored: mixed precision needs a GPU, and this machine has none")
    if "--epochs" not in job.config.given:
        _log.info("Training until %d epochs are done, as --epochs does not say otherwise", args.epochs)
    schedule = read_schedule(args.compress, args.epochs) if args.compress is not None else Schedule(())
    run = _Run(job, schedule)
    if job.config.save_untrained_model:
        run.save_untrained()
    run.resume(checkpoint)
    exit_code = run.train()
    observe(run.job)
    return exit_code


class _Run:
    """What the epochs of a run have in common."""

    def __init__(self, job: Job, schedule: Schedule) -> None:
        self.args = job.config.train
        self.timeline = timeline(schedule, self.args.epochs) if schedule.policies else ""
        pruned = bool(schedule.of("pruners")) and "--best-by" not in job.config.given
        self.best_by = "sparsity" if pruned else self.args.best_by
        self.learned: tuple[Graph, Plan] | None = None
        self.progress, self.best = Progress(), list[EpochScore]()
        self.metrics = MetricsWriter(job.run.folder)
        setup = set_up(job, schedule)
        check_removers(setup)
        self._adopt(setup, Trainee.of(self.args, setup.module, setup.weights, setup.policies))

    def _adopt(self, setup: Setup, trainee: Trainee) -> None:
        """Takes the model, the policies and the optimizer of a setup."""
        self.setup, self.trainee = setup, trainee
        self.job, self.images, self.convert = setup.job, setup.images, setup.convert
        self.state = TrainingState(self.job.model, trainee, self.progress, self.best, setup.masks)
        header = {"arch": self.job.spec.arch, "dataset": self.job.dataset_name, "num_classes": self.job.num_classes}
        header |= saved_recipe(self.job.model)
        self.header = header
        self.checkpoints = Checkpoints(self.state, self.job.file, header, self.args.save_every)

    def _begin(self, epoch: int) -> None:
        """The beginning of an epoch, or of what is left of one: policies act, and removers after them."""
        self.trainee.begin(epoch)
        acting = [spec for spec in removers(self.setup.schedule) if spec.active(epoch)]
        if acting and not self.progress.steps and (thinner := remove(self.setup, self.trainee, acting, epoch)):
            self._adopt(*thinner)
            self.trainee.begin(epoch)

    def save_untrained(self) -> None:
        """Writes the weights that training begins with."""
        path = self.job.file("untrained_checkpoint.pth.tar")
        write_checkpoint(path, {**self.header, "state_dict": flushed(self.job.model.state_dict())})
        _log.info("Saving checkpoint to: %s", path)

    def resume(self, checkpoint: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint, if there is one and `--reset-optimizer` does not say otherwise."""
        if self.args.reset_optimizer or (checkpoint.get("epoch") is None and not is_training(checkpoint)):
            return
        source = f"checkpoint {str(self.job.config.resume_from)!r}"
        check_fields(checkpoint, Record({"epoch": whole(-1, MAX_EPOCHS)}), source, REMEDY)
        last: int = checkpoint["epoch"]
        if last + 1 >= self.args.epochs:
            raise UsageError(
                f"--epochs {self.args.epochs} leaves nothing to train: {self.job.config.resume_from} has done"
                f" {last + 1} epochs; give a higher number, or --reset-optimizer to begin at epoch 0"
            )
        if is_training(checkpoint):
            self.state.load(checkpoint, source, self.images.steps)
        else:
            self.progress.epoch = last + 1
            _log.warning("Warning: %s holds no optimizer of ours; a new one begins", self.job.config.resume_from)

    def train(self) -> int:
        """All epochs that are left, and the test."""
        config = self.job.config
        settings = StepSettings(
            config.batch_size,
            config.seed,
            config.print_freq,
            self.args.label_smoothing,
            self.args.grad_clip,
            self.args.amp and self.job.device.type == "cuda",
        )
        started = False
        while self.progress.epoch < self.args.epochs:
            epoch, start = self.progress.epoch, time.monotonic()
            loader = self.images.epoch(epoch)
            _log.info("Training epoch: %d samples (%d per mini-batch)", len(loader.indices), config.batch_size)
            self._begin(epoch)
            if not started:  # there must be something to go back to
                self.checkpoints.save(LAST)
                started = True
            try:
                run_epoch(self.trainee, loader, self.progress, settings, self.job.device, self.checkpoints.after_step)
                self._finish(epoch, time.monotonic() - start)
            except Diverged as problem:
                self.checkpoints.discard_new()
                _log.error(
                    "%s; lower --lr, or clip gradients with --grad-clip. The last good checkpoint is %s",
                    problem,
                    self.checkpoints.last,
                )
                return 1
        self._test()
        return 0

    def _finish(self, epoch: int, seconds: float) -> None:
        """Validation, the policies' end of the epoch, and the checkpoints. Raises Diverged where nothing is left."""
        self.checkpoints.discard_new()
        self.checkpoints.check_weights(f"epoch {epoch}")
        lr, means = self.trainee.lr, self.progress.running.means
        with self.trainee.deployed():
            model, quantized = self._evaluated()
            left, sparsity = nonzero(self.job.model)
            if self.setup.masking is not None:
                text = summary("sparsity", self.job.model, self.job.example, self.job.run.folder)
                _log.info("\nParameters:\n%s", text)
            if self.job.config.masks_sparsity:
                _log.info("%s", masks_table(self.state.masks))
            _log.info("--- validate (epoch=%d)-----------", epoch)
            (result,) = measure(self.job, self.images.validation, f"Epoch: [{epoch}]", _laid_out(model))
        log_result(result)
        if not math.isfinite(result.loss):
            raise Diverged(f"the validation loss is {result.loss} after epoch {epoch}")
        metrics = {"loss": result.loss, "top1": result.top1, "top5": result.top5}
        for policy in self.trainee.policies:
            policy.on_epoch_end(epoch, metrics)
        score = EpochScore(epoch, result.top1, result.top5, result.loss, sparsity, left)
        self.state.best[:] = ranked([*self.state.best, score], self.best_by, max(self.args.num_best_scores, 1))
        for best in self.state.best:
            _log.info("%s", best)
        self.metrics.add(epoch, {**means, "LR": lr}, metrics, seconds)
        numbers = {f"train {name}": value for name, value in {**means, "LR": lr}.items()}
        numbers |= {**{f"valid {name}": value for name, value in metrics.items()}, "sparsity": sparsity}
        record_epoch(self.job, epoch, numbers, self.state.best[0].epoch, self.timeline)
        self.progress.epoch, self.progress.steps = epoch + 1, 0
        self.progress.running.sums, self.progress.running.images = {}, 0
        if quantized is not None:
            quantized["extras"] = {"quantized_top1": result.top1}
        self.checkpoints.save(LAST, quantized)
        if self.state.best[0].epoch == epoch:
            self.checkpoints.save(BEST, quantized)

    def _evaluated(self) -> tuple[nn.Module, dict[str, Any] | None]:
        """The model as it would be deployed, and its checkpoint if it is in integers."""
        self.learned = self.convert()
        if self.learned is None:
            return self.trainee.model.eval(), None
        graph, plan = self.learned
        lowered = lower(graph.eval(), plan).to(self.job.device)
        header = QuantizedHeader(
            self.job.spec.arch, self.job.dataset_name, self.job.num_classes, plan, saved_recipe(self.job.model)
        )
        return lowered, quantized_checkpoint(header, lowered, {})

    def _test(self) -> None:
        """The last epoch's model on the test images."""
        with self.trainee.deployed():
            model, quantized = self._evaluated()
            _log.info("--- test ---------------------")
            models = [model, *([self.trainee.model.eval()] if quantized is not None else [])]
            result, *others = measure(self.job, self.images.test, "Test", *map(_laid_out, models))
        log_result(result)
        for other in others:
            _log.info("Predictions in integers that differ from those of training: %.2f %%", result.changed(other))
        log_interval(result)
        if self.job.config.confusion:
            log_confusion(result)
        if self.learned is not None:
            record_layers(self.job, *self.learned, None)
        names = ("quantized", "training") if quantized is not None else ("fp32",)
        record_test(self.job, self.images.test, dict(zip(names, (result, *others), strict=True)))


def _laid_out(model: nn.Module) -> Any:
    return lambda images: model(images.contiguous(memory_format=LAYOUT))
