"""What flags need of each other: errors, and warnings of those that have no effect."""

from __future__ import annotations

from collections.abc import Iterator

from qlib.config.flags.correction_checks import check_corrections, correction_warnings
from qlib.config.flags.run_config import RunConfig, asks_for_something, exports, nothing_to_do, wants_onnx
from qlib.config.flags.search_checks import check_searches, search_warnings
from qlib.config.flags.training_checks import training_warnings
from qlib.config.layers.clips import CLIP_PARAMETERS, WEIGHT_CLIPS
from qlib.errors import UsageError

__all__ = ["check_combination", "ignored_flags", "startup_warnings"]

#: A quantization config file replaces what these flags say.
_REPLACED_BY_CONFIG_FILE = (
    "--qe-mode",
    "--qe-mode-acts",
    "--qe-mode-wts",
    "--qe-bits-acts",
    "--qe-bits-wts",
    "--qe-bits-accum",
    "--qe-clip-acts",
    *(each.flag for each in CLIP_PARAMETERS.values()),
    "--qe-clip-wts",
    "--qe-scale",
    "--qe-no-clip-layers",
    "--qe-no-quant-layers",
    "--qe-per-channel",
    "--qe-scale-approx-bits",
    "--qe-save-fp-weights",
)

_NEED_QUANTIZING = ("--qe-stats-file", "--qe-dynamic", "--qe-config-file", "--qe-reduce-range")
_DEPLOYING = ("--engine", "--export-onnx", "--export-opset", "--export-encodings", "--verify")

#: Flags of which one run can have only one, with what each of them does.
_EXCLUSIVE: tuple[dict[str, str], ...] = (
    {
        "--resume-from": "loads a checkpoint with all that belongs to it",
        "--resume": "is the old name of --resume-from",
        "--exp-load-weights-from": "loads only the weights of a checkpoint",
    },
    {
        "--qe-stats-file": "reads activation ranges from a file",
        "--qe-dynamic": "computes activation ranges for each batch",
        "--qe-calibration": "collects activation ranges first",
        "--qe-config-file": "takes all quantization settings from a file",
    },
)


def check_combination(config: RunConfig) -> None:
    """Checks what no flag can check alone.

    Raises:
        UsageError: flags that exclude each other or lack another, or a command line that asks for nothing.
    """
    for group in _EXCLUSIVE:
        both = [flag for flag in group if flag in config.given][:2]
        if len(both) == 2:
            reason = ", and ".join(f"{flag} {group[flag]}" for flag in both)
            raise UsageError(f"{both[0]} and {both[1]} cannot be combined: {reason}; drop one of them")
    qe = config.qe
    if qe.clip_acts == "n_std" and "clip_n_stds" not in qe.clip_parameters and qe.config_file is None:
        raise UsageError(
            "--qe-clip-acts n_std needs --qe-clip-n-stds, the number of standard deviations to keep, above 0"
        )
    for flag, given in (("--verify", config.verify is not None), ("--export-encodings", config.export_encodings)):
        if given and not config.quantize_eval and config.resume_from is None:
            raise UsageError(
                f"{flag} needs a quantized model: add --quantize-eval, or --resume-from a quantized checkpoint"
            )
    check_searches(config)
    check_corrections(config)
    # A quantized checkpoint is evaluated without being asked; whether it is one is known once it is read.
    if not asks_for_something(config) and config.resume_from is None:
        raise nothing_to_do()


def ignored_flags(config: RunConfig) -> list[str]:
    """The flags the user gave that `--qe-config-file` replaces, in the order of the help.

    >>> from pathlib import Path
    >>> from qlib.config.flags.groups import QuantArgs
    >>> ignored_flags(RunConfig(qe=QuantArgs(config_file=Path("q.yaml")), given=frozenset({"--qe-mode", "--seed"})))
    ['--qe-mode']
    """
    if config.qe.config_file is None:
        return []
    return [flag for flag in _REPLACED_BY_CONFIG_FILE if flag in config.given]


def startup_warnings(config: RunConfig) -> list[str]:
    """One sentence for each flag the user gave that will not have the effect it seems to ask for."""
    given, qe = config.given, config.qe
    source = next((flag for flag in ("--qe-stats-file", "--qe-dynamic", "--qe-config-file") if flag in given), None)
    found = [f"{flag} is ignored: {qe.config_file} (--qe-config-file) replaces it" for flag in ignored_flags(config)]
    if not config.quantize_eval and not config.check and config.sense is None:
        wanted = (*_REPLACED_BY_CONFIG_FILE, *_NEED_QUANTIZING)
        found += [f"{flag} has no effect without --quantize-eval" for flag in wanted if flag in given]
    prints = "--summary" if config.summary else "--check" if config.check else None
    if prints:
        found += [f"{flag} is ignored: {prints} only prints" for flag in _DEPLOYING if flag in given]
    elif qe.calibration is not None and not config.quantize_eval:
        verbs = ("--evaluate", *_DEPLOYING)
        found += [f"{flag} has no effect: --qe-calibration alone only collects" for flag in verbs if flag in given]
    else:
        if "--export-opset" in given and not wants_onnx(config):
            found.append("--export-opset has no effect without --export-onnx")
        if "--engine" in given and not config.evaluate and exports(config):
            found.append("--engine has no effect without --evaluate")
    if "--qe-calibration-split" in given and source:
        found.append(f"--qe-calibration-split is ignored: with {source} no images are read for calibration")
    if "--qe-histograms" in given and source:
        found.append(f"--qe-histograms is ignored: with {source} no statistics are collected")
    found += _unread_parameters(config)
    found += correction_warnings(config)
    if "--qe-pytorch-backend" in given:
        found.append("--qe-pytorch-backend is ignored: it chooses how to convert to PyTorch's own quantized modules")
    found += search_warnings(config)
    found += training_warnings(config)
    if "--resume" in given:
        found.append("--resume is deprecated: use --resume-from")
    loaded = next((flag for flag in ("--resume", "--resume-from", "--exp-load-weights-from") if flag in given), None)
    if config.pretrained and loaded:
        found.append(f"--pretrained is ignored: {loaded} gives the weights")
    if config.cpu and "--gpus" in given:
        found.append("--gpus is ignored: --cpu overrides it")
    return found


def _unread_parameters(config: RunConfig) -> Iterator[str]:
    """A sentence for each parameter of a clip method that is not used."""
    qe = config.qe
    for each in CLIP_PARAMETERS.values():
        if each.flag not in config.given or qe.config_file is not None:
            continue
        if each.method in WEIGHT_CLIPS and not {qe.clip_acts, qe.clip_wts} & {each.method, "auto"}:
            yield f"{each.flag} is ignored: neither --qe-clip-acts nor --qe-clip-wts is {each.method} or auto"
        if each.method not in WEIGHT_CLIPS and qe.clip_acts != each.method:
            yield f"{each.flag} is ignored: --qe-clip-acts is {qe.clip_acts}, not {each.method}"
