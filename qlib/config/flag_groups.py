"""The groups of flags that have a prefix of their own, each as one frozen value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["BIAS_CORRECTIONS", "GROUPS", "LapqArgs", "PtqArgs", "QuantArgs", "ROUNDINGS"]


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


GROUPS: Mapping[str, type] = {"qe": QuantArgs, "ptq": PtqArgs, "lapq": LapqArgs}
"""The fields of `RunConfig` that hold a group of flags: `--qe-mode` is the field `mode` of `qe`."""
