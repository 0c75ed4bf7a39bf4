"""All that a command line can say, as one frozen value that is saved with the run and repeats it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from qlib.config.search_flags import LapqArgs, check_searches, search_warnings
from qlib.config.yaml_source import Node, load_yaml
from qlib.errors import ConfigError, UsageError, did_you_mean

__all__ = [
    "BIAS_CORRECTIONS",
    "GROUPS",
    "PtqArgs",
    "QuantArgs",
    "ROUNDINGS",
    "RunConfig",
    "asks_for_something",
    "check_combination",
    "exports",
    "ignored_flags",
    "needs_folder",
    "nothing_to_do",
    "read_run_config",
    "startup_warnings",
    "wants_onnx",
]

#: A quantization config file replaces what these flags say.
_REPLACED_BY_CONFIG_FILE = (
    "--qe-mode",
    "--qe-mode-acts",
    "--qe-mode-wts",
    "--qe-bits-acts",
    "--qe-bits-wts",
    "--qe-bits-accum",
    "--qe-clip-acts",
    "--qe-clip-n-stds",
    "--qe-clip-percentile",
    "--qe-clip-p",
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


@dataclass(frozen=True)
class QuantArgs:
    """The `--qe-*` flags: how to quantize after training. A field is named as its flag, without `--qe-`."""

    mode: str = "sym"
    mode_acts: str | None = None
    mode_wts: str | None = None
    bits_acts: int = 8
    bits_wts: int = 8
    bits_accum: int = 32
    clip_acts: str = "none"
    clip_n_stds: float | None = None
    clip_percentile: float = 99.99
    clip_p: float = 2.0
    clip_wts: str = "none"
    scale: str = "float"
    no_clip_layers: tuple[str, ...] = ()
    no_quant_layers: tuple[str, ...] = ()
    per_channel: bool = False
    scale_approx_bits: int | None = None
    reduce_range: str = "none"
    save_fp_weights: bool = False
    pytorch_backend: str = "fbgemm"
    stats_file: Path | None = None
    dynamic: bool = False
    calibration: float | None = None
    calibration_split: str = "train"
    histograms: bool = False
    config_file: Path | None = None
    budget: str | None = None
    bits_choices: tuple[int, ...] = (2, 3, 4, 6, 8)
    lapq: bool = False


ROUNDINGS = ("nearest", "gptq", "adaround", "brecq", "qdrop")
BIAS_CORRECTIONS = ("none", "empirical", "analytic")


@dataclass(frozen=True)
class PtqArgs:
    """The `--ptq-*` flags: corrections that need no training. A field is named as its flag, without `--ptq-`."""

    equalize: bool = False
    absorb_bias: bool = False
    smooth: float | None = None
    data_free: bool = False
    rounding: str = "nearest"
    bn_reestimation: bool = False
    bias_correction: str = "none"
    images: int = 1024
    iterations: int | None = None

    @property
    def of_float(self) -> str:
        """The corrections of the float model, in their order: statistics collected with others do not fit.

        >>> PtqArgs(equalize=True, smooth=0.5).of_float
        'equalize, smooth 0.5'
        """
        words = ["equalize"] * (self.equalize or self.data_free) + ["absorb_bias"] * self.absorb_bias
        return ", ".join(words + ([] if self.smooth is None else [f"smooth {self.smooth:g}"]))

    @property
    def of_plan(self) -> bool:
        """Whether any correction comes after the plan."""
        corrects_bias = self.bias_correction != "none" or self.data_free
        return self.rounding != "nearest" or self.bn_reestimation or corrects_bias


@dataclass(frozen=True)
class RunConfig:
    """What one run does. A field is named as its flag; `given` holds the flags that the user wrote.

    Law: the file that `to_yaml` makes, passed as `--run-config`, gives an equal `RunConfig`.
    """

    data: Path | None = None
    arch: str = "resnet18"
    pretrained: bool = False
    resume_from: Path | None = None
    exp_load_weights_from: Path | None = None
    dataset: str | None = None
    workers: int = 4
    batch_size: int = 256
    validation_split: float = 0.1
    effective_train_size: float = 1.0
    effective_valid_size: float = 1.0
    effective_test_size: float = 1.0
    skip_corrupt: bool = False
    evaluate: bool = False
    confusion: bool = False
    engine: str = "torch"
    summary: tuple[str, ...] = ()
    check: bool = False
    print_freq: int = 10
    verbose: bool = False
    name: str | None = None
    out_dir: Path = Path("logs")
    gpus: tuple[int, ...] | None = None
    cpu: bool = False
    seed: int = 0
    deterministic: bool = False
    quantize_eval: bool = False
    qe: QuantArgs = field(default_factory=QuantArgs)
    ptq: PtqArgs = field(default_factory=PtqArgs)
    lapq: LapqArgs = field(default_factory=LapqArgs)
    sense: str | None = None
    sense_bits: tuple[int, ...] = (2, 3, 4, 6, 8)
    sense_images: int = 256
    export_onnx: Path | None = None
    export_opset: int | None = None
    export_encodings: tuple[str, ...] = ()
    verify: int | None = None
    given: frozenset[str] = frozenset()

    def to_yaml(self) -> str:
        """The config as YAML text, in the order of the fields.

        >>> RunConfig(arch="vgg11").to_yaml().splitlines()[1:3]
        ['data: null', 'arch: vgg11']
        """
        body = yaml.safe_dump(_plain(self), sort_keys=False, default_flow_style=None, allow_unicode=True)
        return f"# repeat this run: compress.py --run-config THIS_FILE\n{body}"


GROUPS: Mapping[str, type] = {"qe": QuantArgs, "ptq": PtqArgs, "lapq": LapqArgs}
"""The fields of `RunConfig` that hold a group of flags: `--qe-mode` is the field `mode` of `qe`."""


def _plain(value: Any) -> Any:
    """`value` in the types that YAML has."""
    if dataclasses.is_dataclass(value):
        return {each.name: _plain(getattr(value, each.name)) for each in dataclasses.fields(value)}
    if isinstance(value, (tuple, frozenset)):
        return sorted(value) if isinstance(value, frozenset) else list(value)
    return str(value) if isinstance(value, Path) else value


def read_run_config(path: Path) -> dict[str, Any]:
    """The settings in a `run_config.yaml`, by field (`arch`, `qe.mode`), as YAML gave them; `given` among them.

    The command line checks the values, with the same rules as those of its flags.

    Raises:
        ConfigError: the file cannot be read, is not YAML, or has a key that is no setting (all of them are named).
    """
    top = _entries(load_yaml(path))
    settings = {key: node for key, node in top.items() if key not in GROUPS}
    allowed = [each.name for each in dataclasses.fields(RunConfig) if each.name not in GROUPS]
    for group, kind in GROUPS.items():
        settings |= {f"{group}.{key}": node for key, node in (_entries(top[group]) if group in top else {}).items()}
        allowed += [f"{group}.{each.name}" for each in dataclasses.fields(kind)]
    unknown = {key: node for key, node in settings.items() if key not in allowed}
    if unknown:
        raise ConfigError(
            [f"{node.where}: there is no setting {key!r}{did_you_mean(key, allowed)}" for key, node in unknown.items()]
        )
    return {key: _value(node) for key, node in settings.items()}


def _entries(node: Node) -> Mapping[str, Node]:
    if node.mapping is None:
        raise ConfigError(f"{node.where}: 'setting: value' lines are expected here, as in configs/run_config.yaml")
    return node.mapping


def _value(node: Node) -> Any:
    return [_value(item) for item in node.value] if isinstance(node.value, tuple) else node.value


def wants_onnx(config: RunConfig) -> bool:
    """Whether the run makes an ONNX file."""
    return config.export_onnx is not None or config.verify is not None or config.engine == "onnxruntime"


def exports(config: RunConfig) -> bool:
    """Whether the run has something to hand over, so that a quantized checkpoint need not be evaluated as well."""
    return config.export_onnx is not None or config.verify is not None or bool(config.export_encodings)


def needs_folder(config: RunConfig) -> bool:
    """Whether the run cannot do without a DATASET_DIR, as far as the command line alone can tell.

    A checkpoint or a model of the user's own may turn out to need one too.
    """
    digits = config.dataset == "digits" or (config.dataset is None and "digits" in config.arch)
    loads = config.resume_from is not None or config.exp_load_weights_from is not None
    unknown = loads or ".py:" in config.arch
    asks = (config.qe.calibration, config.verify, config.sense)
    looks_at_images = config.evaluate or any(each is not None for each in asks)
    only_exports = exports(config) and not looks_at_images
    return not (digits or unknown or config.summary or config.check or only_exports)


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
    if qe.clip_acts == "n_std" and qe.clip_n_stds is None and qe.config_file is None:
        raise UsageError(
            "--qe-clip-acts n_std needs --qe-clip-n-stds, the number of standard deviations to keep, above 0"
        )
    for flag, given in (("--verify", config.verify is not None), ("--export-encodings", config.export_encodings)):
        if given and not config.quantize_eval and config.resume_from is None:
            raise UsageError(
                f"{flag} needs a quantized model: add --quantize-eval, or --resume-from a quantized checkpoint"
            )
    check_searches(config)
    _check_corrections(config)
    # A quantized checkpoint is evaluated without being asked; whether it is one is known once it is read.
    if not asks_for_something(config) and config.resume_from is None:
        raise nothing_to_do()


def _check_corrections(config: RunConfig) -> None:
    """Raises UsageError for corrections that exclude each other or what else was asked."""
    ptq, given = config.ptq, config.given
    if ptq.of_plan and config.qe.dynamic:
        raise UsageError("corrections of a plan need fixed ranges, which --qe-dynamic has not; drop one of them")
    if not ptq.data_free:
        return
    with_images: list[str] = [f for f in ("--qe-stats-file", "--qe-calibration", "--qe-dynamic") if f in given]
    with_images += ["--ptq-rounding"] * (ptq.rounding != "nearest") + ["--ptq-bn-reestimation"] * ptq.bn_reestimation
    with_images += ["--ptq-smooth"] * (ptq.smooth is not None)
    with_images += ["--ptq-bias-correction empirical"] * (ptq.bias_correction == "empirical")
    if with_images:
        raise UsageError(f"--ptq-data-free uses no images, and {with_images[0]} needs some; drop one of them")


def _idle_corrections(config: RunConfig) -> list[str]:
    """One sentence for each --ptq flag that changes nothing."""
    ptq, given = config.ptq, config.given
    flags = sorted(flag for flag in given if flag.startswith("--ptq-"))
    if not config.quantize_eval and config.sense is None:
        collects = config.qe.calibration is not None
        of_float = ("--ptq-equalize", "--ptq-absorb-bias", "--ptq-smooth", "--ptq-images")
        return [
            f"{flag} has no effect without --quantize-eval" for flag in flags if not (collects and flag in of_float)
        ]
    looks = ptq.smooth is not None or ptq.rounding != "nearest" or ptq.bn_reestimation
    looks = looks or ptq.bias_correction == "empirical" or config.qe.config_file is not None
    found = ["--ptq-images has no effect: no correction looks at images"] if not looks else []
    if ptq.rounding not in ("adaround", "brecq", "qdrop") and config.qe.config_file is None:
        found.append(f"--ptq-iterations has no effect: --ptq-rounding {ptq.rounding} does not iterate")
    return [sentence for sentence in found if sentence.split()[0] in given]


def asks_for_something(config: RunConfig) -> bool:
    """Whether a flag says what to do."""
    verbs = (config.evaluate, config.quantize_eval, config.summary, config.check, config.qe.calibration is not None)
    return any(verbs) or config.sense is not None or exports(config)


def nothing_to_do() -> UsageError:
    """The error of a command line that asks for nothing."""
    return UsageError(
        "nothing to do: add --evaluate, --quantize-eval, --qe-calibration, --export-onnx, --sense, --summary or --check"
    )


def ignored_flags(config: RunConfig) -> list[str]:
    """The flags the user gave that `--qe-config-file` replaces, in the order of the help.

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
    for flag, method in (("--qe-clip-percentile", "percentile"), ("--qe-clip-p", "lp")):
        if flag in given and not {qe.clip_acts, qe.clip_wts} & {method, "auto"} and qe.config_file is None:
            found.append(f"{flag} is ignored: neither --qe-clip-acts nor --qe-clip-wts is {method} or auto")
    if "--qe-clip-n-stds" in given and qe.clip_acts != "n_std" and qe.config_file is None:
        found.append(f"--qe-clip-n-stds is ignored: --qe-clip-acts is {qe.clip_acts}, not n_std")
    found += _idle_corrections(config)
    if "--qe-pytorch-backend" in given:
        found.append("--qe-pytorch-backend is ignored: it chooses how to convert to PyTorch's own quantized modules")
    found += search_warnings(config)
    if "--resume" in given:
        found.append("--resume is deprecated: use --resume-from")
    loaded = next((flag for flag in ("--resume", "--resume-from", "--exp-load-weights-from") if flag in given), None)
    if config.pretrained and loaded:
        found.append(f"--pretrained is ignored: {loaded} gives the weights")
    if config.cpu and "--gpus" in given:
        found.append("--gpus is ignored: --cpu overrides it")
    return found
