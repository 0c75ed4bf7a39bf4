"""Sections of the record of a run: its layers, searches, deployment and training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = [
    "Bars",
    "Checked",
    "Deployment",
    "Epoch",
    "Layer",
    "Placed",
    "Pruned",
    "TradeOff",
    "TradeOffPoint",
    "Training",
    "Trial",
    "Trials",
    "Verification",
]


@dataclass(frozen=True)
class Bars:
    """A histogram of values: `counts` of neighbouring intervals of one width, from `low`; `zeros` were made 0."""

    low: float
    width: float
    counts: tuple[int, ...]
    zeros: int = 0


@dataclass(frozen=True)
class Layer:
    """One layer of the plan: grids of its weight and output, what it costs, why it is in float, what its range clips.

    Bits are None for float. A scale is a number; of a weight per channel it is the smallest, and `weight_scale_max`
    the largest. `min` and `max` are the ends of the output's range, None where each image has its own. `weight_sqnr`
    compares the weight with its quantized values, in dB; `clipped` is the share of the output's values outside the
    range, 0 to 1; `sqnr` compares the output with that of the float network where all layers up to it are quantized.
    `channels` are the largest magnitudes of the weight by output channel, or of groups of neighbours; `dead` counts
    channels that are 0 throughout. `bytes` are those of weight and bias at their bits, `float_bytes` those in float32.
    """

    name: str
    kind: str
    shape: tuple[int, ...] = ()
    macs: int | None = None
    integer: bool = False
    why_float: str = ""
    weight_bits: int | None = None
    weight_mode: str = ""
    weight_scale: float | None = None
    weight_scale_max: float | None = None
    weight_raised: int = 0
    weight_sqnr: float | None = None
    bits: int | None = None
    mode: str = ""
    clip: str = ""
    min: float | None = None
    max: float | None = None
    scale: float | None = None
    zero_point: int | None = None
    clipped: float | None = None
    sqnr: float | None = None
    histogram: Bars | None = None
    channels: tuple[float, ...] = ()
    channel_count: int = 0
    dead: int = 0
    bytes: int = 0
    float_bytes: int = 0


@dataclass(frozen=True)
class Pruned:
    """How many elements of a weight pruning kept, or of the channels that it makes, those of some layers together.

    `error` is that of the layer's outputs before the last repair, relative to their size.
    """

    name: str
    kept: int
    total: int
    shape: tuple[int, ...] = ()
    layers: int = 1
    error: float | None = None


@dataclass(frozen=True)
class TradeOffPoint:
    """The best choice under one budget: what it costs, what is expected to be lost, mean bits of the layers."""

    budget: str
    cost: str
    cost_units: int
    loss: float
    bits_weights: float
    bits_activations: float


@dataclass(frozen=True)
class TradeOff:
    """A search under a budget: the curve, the point that was chosen, and the bits of each layer there."""

    budget: str
    unit: str
    curve: tuple[TradeOffPoint, ...]
    chosen: TradeOffPoint
    bits: Mapping[str, Mapping[str, int]]


@dataclass(frozen=True)
class Trial:
    """One setting that `--auto` tried, judged against the float model; `drop` in points of Top1."""

    rung: str
    settings: str
    agreement: float
    drop: float
    divergence: float
    seconds: float


@dataclass(frozen=True)
class Trials:
    """The trials of `--auto`, the best one by number, and whether it reaches the target."""

    trials: tuple[Trial, ...]
    best: int
    target: str
    reached: bool


@dataclass(frozen=True)
class Placed:
    """Where a layer of the exported file runs; `saturated` is the share of its sums that saturate without VNNI."""

    layer: str
    kernels: str
    integer: bool
    why: str
    macs: int
    pairs_at_risk: int = 0
    saturated: float | None = None


@dataclass(frozen=True)
class Checked:
    """One tensor of the verification: how many codes, how many differ, by how many steps at most."""

    layer: str
    kernel: str
    integer: bool
    codes: int
    differing: int
    largest: int
    verdict: str


@dataclass(frozen=True)
class Verification:
    """The exported file beside the simulation: whether it is exact, and each tensor."""

    exact: bool
    images: int
    agreeing: int
    logit_difference: float
    first_differing: str
    layers: tuple[Checked, ...]


@dataclass(frozen=True)
class Deployment:
    """Where the layers of the exported file run, and the share of multiply-accumulates in integers, 0 to 1."""

    integer_share: float
    layers: tuple[Placed, ...]


@dataclass(frozen=True)
class Epoch:
    """One epoch of training: its numbers by name, as in ``training.csv``."""

    epoch: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Training:
    """A training: its epochs, the best one, and when each policy of the schedule acts."""

    epochs: tuple[Epoch, ...]
    best_epoch: int | None = None
    schedule: str = ""
