"""What flags of several parts are without effect beside."""

from __future__ import annotations

from qlib.config.flags.flag import Ignored

__all__ = ["EXPORTS", "ONLY_ANALYSES", "ONLY_COLLECTS", "ONLY_PRINTS"]

EXPORTS = ("--export-onnx", "--verify", "--export-encodings")

ONLY_PRINTS = Ignored("is ignored: {by} only prints", by=("--summary", "--check"))
ONLY_ANALYSES = Ignored("has no effect: {by} only analyses", by=("--sense",), unless=("--summary", "--check"))
ONLY_COLLECTS = Ignored(
    "has no effect: {by} alone only collects",
    by=("--qe-calibration",),
    unless=("--quantize-eval", "--summary", "--check", "--sense"),
)
