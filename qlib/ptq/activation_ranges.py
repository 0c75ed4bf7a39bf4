"""Ranges of activations: from the statistics of a tensor and a layer's settings to its plan."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor

from qlib.clip import CLIP_METHODS, ClipContext, choose
from qlib.config.layers.settings import LayerSettings
from qlib.quant.clip_names import HISTOGRAM_CLIPS
from qlib.quant.plan import TensorPlan
from qlib.stats.tensor_stats import TensorStats

__all__ = ["clipped", "constant_plan", "dynamic_plan", "plan_tensor", "request_of", "softmax_plan"]


def plan_tensor(stats: TensorStats, settings: LayerSettings, half_range: bool) -> TensorPlan:
    """The plan of a tensor; `auto` is replaced by the method it chooses. Raises StatsError as that method does."""
    spec, clip = settings.spec_activations, settings.clip_acts
    context = ClipContext(spec, half_range, settings.clip_parameters)
    if clip == "auto":
        clip, (low, high) = choose(stats, context)
    else:
        low, high = CLIP_METHODS[clip](stats, context)
    return TensorPlan(spec, clip, low, high, _of_plan(clip, settings))


def _of_plan(clip: str, settings: LayerSettings) -> tuple[tuple[str, float], ...]:
    """The parameters of a clip method that a plan holds: of one that can be applied again, to each image."""
    read = settings.clip_parameters.read_by(clip) if clip not in HISTOGRAM_CLIPS else {}
    return tuple((key, value) for key, value in read.items() if value is not None)


def request_of(settings: LayerSettings) -> tuple[object, ...]:
    """All that decides the grid of a layer's output, besides its statistics.

    >>> p3 = {"clip_p": 3.0}
    >>> request_of(LayerSettings().with_settings(p3, {})) == request_of(LayerSettings())
    True
    >>> lp = LayerSettings(clip_acts="lp")
    >>> request_of(lp.with_settings(p3, {})) == request_of(lp)
    False
    """
    clip = settings.clip_acts
    return (
        settings.spec_activations if settings.bits_activations else None,
        clip,
        settings.clip_parameters.read_by(clip),
    )


def dynamic_plan(settings: LayerSettings) -> TensorPlan:
    """The plan of a tensor whose range is that of each image."""
    clip = settings.clip_acts
    return TensorPlan(settings.spec_activations, clip, clip_parameters=_of_plan(clip, settings))


def constant_plan(value: Tensor, settings: LayerSettings) -> TensorPlan:
    """The plan of an operand that does not depend on the images: all of its range."""
    return TensorPlan(settings.spec_activations, "none", float(value.min()), float(value.max()))


def softmax_plan(highest: float, size: int, settings: LayerSettings) -> TensorPlan:
    """The plan of the output of a softmax over `size` elements."""
    spec = settings.spec_activations
    return TensorPlan(spec, "none", 0.0, _softmax_top(highest, spec.bits, size))


def _softmax_top(highest: float, bits: int, size: int) -> float:
    """The top of a softmax's range, for a scale that is a power of two: the kernel multiplies by ``floor(1 / scale)``.

    The scale is ``2^-(bits + j)`` with the largest j for which ``2^-j`` is at least the highest probability seen, so
    that attention spread over many tokens does not round to zero. Over `size` elements the scale stays above
    ``1 / (e^5 size)``: below it the kernel's product overflows.

    >>> _softmax_top(1.0, 8, 49) == 255 / 256, _softmax_top(0.2, 8, 49) == 255 / 1024
    (True, True)
    >>> _softmax_top(1 / 49, 8, 49) == 255 / 2**12
    True
    """
    seen = math.floor(-math.log2(highest)) if 0 < highest <= 1 else 0
    spare = max(0, min(seen, math.floor(math.log2(math.exp(5) * size) - bits)))
    top: float = (2**bits - 1) / 2 ** (bits + spare)
    return top


def clipped(stats: TensorStats, low: float, high: float) -> TensorStats:
    """The ranges and the histogram cut to ``[low, high]``; mean, std and b stay those of the whole tensor."""

    def cut(value: float | None) -> float | None:
        return None if value is None else min(max(value, low), high)

    return replace(
        stats,
        min=min(max(stats.min, low), high),
        max=min(max(stats.max, low), high),
        avg_min=cut(stats.avg_min),
        avg_max=cut(stats.avg_max),
        histogram=None if stats.histogram is None else stats.histogram.clipped(low, high),
    )
