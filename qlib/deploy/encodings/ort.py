"""Calibration data of ONNX Runtime."""

from __future__ import annotations

from typing import Any

from qlib.deploy.encodings._base import ENCODINGS, Encodings, json_text


@ENCODINGS.register("ort", order=0, ending="calibration_ort.json")
def ort(encodings: Encodings) -> tuple[str, int]:
    """JSON of ONNX Runtime's `TensorsData`: tensor -> lowest and highest value; no parameters.

    For ``onnxruntime.quantization.quantize_static(..., calibration_cache_path=...)`` with its default MinMax method.
    Bits and mode are not in the file; those are arguments of `quantize_static`. It asks for the tensor before a ReLU
    too, and gives it the ReLU's range, as is done here.

    Source: onnxruntime 1.31, ``quantization/calibrate.py``, `load_tensors_data`.
    """

    def number(value: float | None) -> dict[str, Any]:
        return {"data": value, "dtype": "float32", "CLS": "numpy.array"}

    data = {
        name: {"lowest": number(grid.min), "highest": number(grid.max), "CLS": "TensorData"}
        for name, grid in encodings.activations.items()
    }
    method = {"CLS": "CalibrationMethod", "value": "CalibrationMethod.MinMax"}
    content = {"CLS": "TensorsData", "data": data, "calibration_method": method, "smooth_quant": False}
    return json_text(content), len(data)
