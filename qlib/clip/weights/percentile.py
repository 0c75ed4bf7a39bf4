"""The ranges of weights that hold a share of the values."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from qlib.clip.weights._base import WEIGHT_METHODS, Ranges, WeightContext


@WEIGHT_METHODS.register("percentile", order=1)
def percentile(rows: Tensor, context: WeightContext) -> Ranges:
    """Percentiles 100 - P and P of each row; for a symmetric grid, percentile P of the magnitudes.

    >>> from qlib.quant.clip_names import ClipParameters
    >>> from qlib.quant.spec import QuantSpec
    >>> context = WeightContext(QuantSpec.of_mode("asym_u", 8), ClipParameters({"clip_percentile": 95.0}))
    >>> low, high = percentile(torch.arange(101.0)[None], context)
    >>> low.tolist(), high.tolist()
    ([5.0], [95.0])
    """
    share, values = context.clip_parameters["clip_percentile"] / 100, rows.numpy()
    if context.spec.symmetric:
        high = torch.from_numpy(np.quantile(np.abs(values), share, axis=1)).float()
        low = -high
    else:
        low, high = (torch.from_numpy(each).float() for each in np.quantile(values, (1 - share, share), axis=1))
    lowest, highest = rows.amin(1), rows.amax(1)
    return torch.minimum(torch.maximum(low, lowest), highest), torch.maximum(torch.minimum(high, highest), lowest)
