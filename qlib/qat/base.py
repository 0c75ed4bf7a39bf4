"""What a quantizer for training is: it gives layers the modules that put their weights and activations on grids."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from qlib.lower.trainable import ActivationQuantizer, WeightQuantizer
from qlib.quant.affine import QParams
from qlib.registry import Registry

__all__ = ["TRAINING_QUANTIZERS", "ActivationSite", "TrainingQuantizer", "WeightSite"]


@dataclass(frozen=True, eq=False)
class WeightSite:
    """A weight ``[out, in / groups, ...]`` that shall train in `bits`, and a grid to `start` from.

    `start` is what a range method finds best for the weight as the layer holds it: before its batch-norm, unless the
    quantizer folds. Its spec is the one to train in, but that it has at least 2 bits. `stochastic`: in training it is
    rounded up or down at random, so that the mean is right; in evaluation to the nearest.
    """

    weight: Tensor
    bits: int
    start: QParams
    stochastic: bool = False


@dataclass(frozen=True, eq=False)
class ActivationSite:
    """An activation that shall train in `bits`; `start` is a grid that fits calibration images.

    `relu`: it is the output of a ReLU, which the quantizer computes: its values must not be negative. `input`: it is
    the model's own input.
    """

    bits: int
    start: QParams
    relu: bool
    input: bool = False


class TrainingQuantizer(ABC):
    """A method: a frozen dataclass whose fields are the keys of its YAML component, without those common to all."""

    min_bits: ClassVar[int] = 2
    """The fewest bits of its weights."""

    per_channel_wts: bool = False
    """Whether each output channel of a weight has a scale of its own; a method that leaves it open has it as a key."""

    quantize_inputs: bool = True
    """Whether the model's own input is quantized."""

    only_relus: ClassVar[bool] = False
    """Whether, as in its paper, it quantizes what leaves a ReLU and no other output; `edges` in YAML overrules it."""

    @property
    @abstractmethod
    def planning(self) -> Mapping[str, object]:
        """The fields of `LayerSettings` (modes, ways of clipping) that the grids to start from are planned with."""

    @abstractmethod
    def weight(self, site: WeightSite) -> WeightQuantizer:
        """The quantizer of a weight."""

    @abstractmethod
    def activation(self, site: ActivationSite) -> ActivationQuantizer:
        """The quantizer of an activation."""

    def gradient(self) -> nn.Module | None:
        """What the output of each layer that it quantizes passes through, to change the gradient on its way back."""
        return None

    @property
    def weight_decay(self) -> float:
        """That of what its quantizers learn."""
        return 0.0


TRAINING_QUANTIZERS: Registry[type[TrainingQuantizer]] = Registry("quantizer", "qlib.qat.methods")
"""Class name in a schedule -> the method."""
