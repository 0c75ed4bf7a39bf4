"""Encodings of AIMET."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from qlib.deploy.encodings._base import ENCODINGS, Encodings, json_text
from qlib.errors import ExportError
from qlib.quant.affine import QParams

_MIN_BITS = 4
"""The fewest bits of an AIMET encoding."""


@ENCODINGS.register("aimet", order=2, ending="encodings.json")
def aimet(encodings: Encodings) -> tuple[str, int]:
    """JSON of AIMET's encodings, version 0.6.1: tensor -> a list with one encoding, or one for each output channel.

    AIMET counts codes from 0, whatever the sign: ``x ~= (code + offset) * scale``. So `offset` is the negative of the
    zero point of the unsigned codes: ``-z`` of an unsigned grid, ``-(z + 2^(bits-1))`` of a signed one.
    `min` and `max` are the real values of the grid's smallest and largest code.

    Raises ExportError for fewer than 4 bits, which the format does not have.

    Source: AIMET's "Encoding Format Specification"; aimet-onnx 2.42, ``_encoding.py``.
    """
    activations = {name: grid.qparams() for name, grid in encodings.own.items()}
    content = {
        "version": "0.6.1",
        "activation_encodings": {name: _aimet(name, params) for name, params in activations.items()},
        "param_encodings": {name: _aimet(name, params) for name, params in encodings.parameters.items()},
    }
    return json_text(content), len(activations) + len(encodings.parameters)


def _aimet(name: str, params: QParams) -> list[dict[str, Any]]:
    spec = params.spec
    if spec.bits < _MIN_BITS:
        raise ExportError(
            f"AIMET encodings have 4 bits or more, but {name!r} has {spec.bits}; give its layer 4, or leave it in float"
        )

    def values(tensor: Tensor) -> list[float]:
        flat: list[float] = tensor.double().reshape(-1).tolist()
        return flat

    scale = params.scale.double()
    columns = (values(scale), values(scale * params.low), values(scale * params.high), values(params.zero_point))
    return [
        {
            "bitwidth": spec.bits,
            "dtype": "int",
            "is_symmetric": str(spec.symmetric),
            "max": high,
            "min": low,
            "offset": -(int(zero_point) + spec.unsigned_shift),
            "scale": step,
        }
        for step, low, high, zero_point in zip(*columns, strict=True)
    ]
