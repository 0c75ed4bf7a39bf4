"""The groups of flags that have a prefix of their own, each as one frozen value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qlib.config.flags.corrections import CORRECTION_FLAGS, Switches
from qlib.config.layers.settings import LayerSettings
from qlib.quant.clip_names import ClipParameters

__all__ = [
    "BEST_BY",
    "BITS_CHOICES",
    "GROUPS",
    "IMPLICIT_CALIBRATION",
    "NORMS",
    "OPTIMIZERS",
    "PHASES",
    "PRUNED_PARTS",
    "AutoArgs",
    "KdArgs",
    "LapqArgs",
    "PruneArgs",
    "PtqArgs",
    "QuantArgs",
    "TrainArgs",
]


BITS_CHOICES = (2, 3, 4, 6, 8)
"""The bits that a search tries where the user names none."""

PHASES = ("train", "valid", "test")
"""Whose images `--activation-stats` looks at."""

PRUNED_PARTS = ("element", "filter", "channel")
"""What `--sense` removes from one weight after another."""

IMPLICIT_CALIBRATION = 0.05
"""The fraction of the images that ranges are collected on where the user gives neither ranges nor a fraction."""


@dataclass(frozen=True)
class QuantArgs:
    """The `--qe-*` flags: how to quantize after training. A field is named as its flag, without `--qe-`.

    `clip_parameters` are those of the clip methods, by their keys in YAML: `clip_p` is `--qe-clip-p`. The defaults of
    what layers have are those of `LayerSettings`.
    """

    mode: str = LayerSettings.mode_activations
    mode_acts: str | None = None
    mode_wts: str | None = None
    bits_acts: int = LayerSettings.bits_activations
    bits_wts: int = LayerSettings.bits_weights
    bits_accum: int = LayerSettings.bits_accum
    clip_acts: str = LayerSettings.clip_acts
    clip_parameters: ClipParameters = LayerSettings.clip_parameters
    clip_wts: str = LayerSettings.clip_wts
    scale: str = LayerSettings.scale
    no_clip_layers: tuple[str, ...] = ()
    no_quant_layers: tuple[str, ...] = ()
    per_channel: bool = LayerSettings.per_channel_wts
    scale_approx_bits: int | None = LayerSettings.scale_approx_mult_bits
    reduce_range: str = "none"
    save_fp_weights: bool = False
    convert_pytorch: bool = False
    pytorch_backend: str = "fbgemm"
    stats_file: Path | None = None
    dynamic: bool = False
    calibration: float | None = None
    calibration_split: str = "train"
    histograms: bool = False
    config_file: Path | None = None
    budget: str | None = None
    bits_choices: tuple[int, ...] = BITS_CHOICES
    lapq: bool = False


_NO_CORRECTIONS = Switches()


@dataclass(frozen=True)
class PtqArgs:
    """The `--ptq-*` flags: corrections that need no training. A field is named as its flag, without `--ptq-`.

    `switches` are those that a flag of their own asks for: `smooth` is `--ptq-smooth`.
    """

    switches: Switches = _NO_CORRECTIONS
    data_free: bool = False
    rounding: str = "nearest"
    bias_correction: str = "none"
    images: int = 1024
    iterations: int | None = None

    @property
    def asked(self) -> dict[str, float]:
        """The corrections to do, in their order -> True, or the number of its flag.

        >>> PtqArgs(data_free=True, switches=Switches({"smooth": 0.5})).asked
        {'equalize': True, 'smooth': 0.5, 'analytic': True}
        """
        free = [each for each in CORRECTION_FLAGS.values() if each.data_free and self.data_free]
        chosen = {"rounding": self.rounding, "bias_correction": self.bias_correction}
        chosen |= {each.choice: each.name for each in free if each.choice}
        asked = {**self.switches, **dict.fromkeys([*(each.name for each in free), *chosen.values()], True)}
        return {name: asked[name] for name in CORRECTION_FLAGS if name in asked}

    def with_settings(self, settings: Mapping[str, Any]) -> PtqArgs:
        """These arguments with some replaced, which are fields or corrections with a flag of their own.

        >>> PtqArgs().with_settings({"equalize": True, "smooth": None, "rounding": "gptq"}).asked
        {'equalize': True, 'gptq': True}
        """
        switches = {name: value for name, value in settings.items() if name in CORRECTION_FLAGS}
        fields = {name: value for name, value in settings.items() if name not in CORRECTION_FLAGS}
        return replace(self, switches=Switches({**self.switches, **switches}), **fields)

    @property
    def of_float(self) -> str:
        """The corrections of the float model, in their order: statistics collected with others do not fit.

        >>> PtqArgs(switches=Switches({"equalize": True, "smooth": 0.5})).of_float
        'equalize, smooth 0.5'
        """
        asked = {name: value for name, value in self.asked.items() if CORRECTION_FLAGS[name].of_float}
        return ", ".join(name if value is True else f"{name} {value:g}" for name, value in asked.items())

    @property
    def of_plan(self) -> bool:
        """Whether any correction comes after the plan."""
        return not all(CORRECTION_FLAGS[name].of_float for name in self.asked)


@dataclass(frozen=True)
class AutoArgs:
    """The `--auto-*` flags: what `--auto` aims at. A field is named as its flag, without `--auto-`.

    `agree`, `drop`: percent of predictions that are those of FP32, and points of Top1; `bits` are those of weights and
    activations where no other flag gives them.
    """

    agree: float | None = None
    drop: float | None = None
    minutes: float = 30.0
    bits: int = 8


NORMS: Mapping[str, float] = {"l1": 1.0, "l2": 2.0, "l3": 3.0}
"""Starts of LAPQ that need no statistics: the ranges of least ``mean |error|^p`` of each tensor."""


@dataclass(frozen=True)
class LapqArgs:
    """The `--lapq-*` flags: how `--qe-lapq` searches. A field is named as its flag, without `--lapq-`."""

    maxiter: int | None = None
    maxfev: int | None = None
    method: str = "powell"
    basinhopping: bool = False
    basinhopping_niter: int = 100
    init_mode: str | None = None
    init_method: str = "powell"
    eval_size: float = 1.0
    images: int = 256
    eval_memoize_dataloader: bool = False
    search_clipping: bool = False


OPTIMIZERS = ("sgd", "adam", "adamw")
BEST_BY = ("top1", "sparsity")


@dataclass(frozen=True)
class TrainArgs:
    """The flags of training; a field is named as its flag.

    `epochs` is where the run ends, whatever epoch it is resumed at. `save_every`: seconds between two checkpoints
    within an epoch.
    """

    compress: Path | None = None
    epochs: int = 90
    optimizer: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    label_smoothing: float = 0.0
    grad_clip: float | None = None
    amp: bool = False
    reset_optimizer: bool = False
    best_by: str = "top1"
    num_best_scores: int = 1
    save_every: float = 300.0


@dataclass(frozen=True)
class KdArgs:
    """The `--kd-*` flags: how a teacher helps. A field is named as its flag, without `--kd-`.

    `teacher` is a model's name, or `self` for the float original of the student.
    """

    teacher: str | None = None
    pretrained: bool = False
    resume: Path | None = None
    temperature: float = 1.0
    distill_wt: float = 0.5
    student_wt: float = 0.5
    teacher_wt: float = 0.0
    start_epoch: int = 0


@dataclass(frozen=True)
class PruneArgs:
    """The `--prune-*` flags: what is removed without training. A field is named as its flag, without `--prune-`.

    `method` is `--prune` itself. Of `level`, `pattern` and, for channels, `budget` one is given.
    """

    method: str | None = None
    level: float | None = None
    pattern: str | None = None
    budget: str | None = None
    round_to: int = 1
    scope: str | None = None
    layers: tuple[str, ...] = ()
    repair: str = "weights"
    images: int = 512
    steps: int = 100


GROUPS: Mapping[str, type] = {
    "prune": PruneArgs,
    "auto": AutoArgs,
    "qe": QuantArgs,
    "ptq": PtqArgs,
    "lapq": LapqArgs,
    "train": TrainArgs,
    "kd": KdArgs,
}
"""The fields of `RunConfig` that hold a group of flags: `--qe-mode` is the field `mode` of `qe`."""
