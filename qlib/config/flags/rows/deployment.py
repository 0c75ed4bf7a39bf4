"""The flags of what is written for other programs."""

from __future__ import annotations

from collections.abc import Mapping

from qlib.config.flags.flag import Flag, Need
from qlib.config.flags.kinds import choice, new_file, whole
from qlib.registry import registered

__all__ = ["GROUPS"]

_IN_RUN_FOLDER = "run-folder"

GROUPS: Mapping[str, tuple[Flag, ...]] = {
    "Deployment": (
        Flag(
            "--export-onnx",
            new_file(".onnx", without=_IN_RUN_FOLDER),
            "write the model as ONNX, in float or, with --quantize-eval or a quantized checkpoint, in integers"
            " (without FILE: into the run's folder)",
        ),
        Flag(
            "--export-opset",
            whole(18, 23),
            "ONNX operator set (default: 20, or 21 for activations of 9 to 16 bits)",
            needs=(Need(("--export-onnx",), also=("--verify", "--engine onnxruntime")),),
        ),
        Flag(
            "--export-encodings",
            choice(tuple(registered("qlib.deploy.encodings")), many="repeat"),
            "write the ranges alone, for tools that quantize by themselves",
        ),
        Flag(
            "--verify",
            whole(1, without="64"),
            "prove on N test images (64 without N) that the exported model computes the same integers;"
            " exit code 1 if not",
        ),
    ),
}
