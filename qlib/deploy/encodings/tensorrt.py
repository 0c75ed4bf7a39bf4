"""Calibration cache of TensorRT."""

from __future__ import annotations

import struct

from qlib.deploy.encodings._base import ENCODINGS, Encodings
from qlib.quant.affine import qparams_from_range
from qlib.quant.spec import QuantSpec


@ENCODINGS.register("tensorrt", order=1, ending="calibration.cache")
def tensorrt(encodings: Encodings) -> tuple[str, int]:
    """A calibration cache of TensorRT: a line for each tensor, its scale as the hexadecimal digits of a float32.

    TensorRT's implicit quantization is 8-bit and symmetric by nature, so other bits and modes of the plan are not
    expressed: ``scale = max(|min|, |max|) / 127``, 1 for an all-zero range; no parameters. The first line names a
    version of TensorRT; put yours there if it refuses the file.

    Source: NVIDIA's description of the calibration file in its sampleINT8.

    >>> from qlib.quant.plan import TensorPlan
    >>> grid = TensorPlan(QuantSpec.of_mode("asym_u", 8), min=-127.0, max=12.7)
    >>> print(tensorrt(Encodings({"conv1": grid}))[0], end="")
    TRT-8601-EntropyCalibration2
    conv1: 3f800000
    """
    lines = ["TRT-8601-EntropyCalibration2"]
    spec = QuantSpec.of_mode("sym_restr", 8)
    for name, grid in encodings.activations.items():
        assert grid.min is not None
        assert grid.max is not None
        scale = float(qparams_from_range(grid.min, grid.max, spec).scale)
        lines.append(f"{name}: {struct.pack('>f', scale).hex()}")
    return "\n".join(lines) + "\n", len(encodings.activations)
