"""The flags of training and of distillation, and what they need of the others."""

from __future__ import annotations

from qlib.config.flags.run_config import RunConfig, exports, trains

__all__ = ["training_warnings"]

_TRAINING = (
    *("--optimizer", "--lr", "--momentum", "--weight-decay", "--label-smoothing", "--grad-clip", "--amp"),
    *("--reset-optimizer", "--best-by", "--num-best-scores", "--save-every"),
    *("--kd-teacher", "--kd-pretrained", "--kd-resume", "--kd-temperature", "--kd-distill-wt", "--kd-student-wt"),
    *("--kd-teacher-wt", "--kd-start-epoch"),
)


def _instead(config: RunConfig) -> str:
    """What the run does instead of training, if anything."""
    asked = {
        "--summary": bool(config.summary),
        "--sense": config.sense is not None,
        "--quantize-eval": config.quantize_eval,
        "--qe-calibration": config.qe.calibration is not None,
        "--evaluate": config.evaluate,
        "--export-onnx": exports(config),
    }
    return next((flag for flag, wanted in asked.items() if wanted), "")


def training_warnings(config: RunConfig) -> list[str]:
    """One sentence for each flag about training that has no effect."""
    given, args = config.given, config.train
    if not trains(config):
        return [f"{flag} has no effect without --compress or --epochs" for flag in _TRAINING if flag in given]
    if instead := _instead(config):
        all_flags = ("--compress", "--epochs", *_TRAINING)
        return [f"{flag} is ignored: with {instead} nothing is trained" for flag in all_flags if flag in given]
    found = ["--engine is ignored: training evaluates with torch"] if "--engine" in given else []
    if "--momentum" in given and args.optimizer != "sgd":
        found.append(f"--momentum is ignored: {args.optimizer} has its own")
    if args.amp and config.cpu:
        found.append("--amp is ignored: mixed precision needs a GPU")
    if args.reset_optimizer and config.resume_from is None:
        found.append("--reset-optimizer has no effect without --resume-from")
    return found
