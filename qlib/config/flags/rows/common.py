"""What flags of several parts are without effect beside."""

from __future__ import annotations

from qlib.config.flags.flag import Ignored

__all__ = ["EXPORTS", "NOT_EVALUATED", "ONLY_ANALYSES"]

EXPORTS = ("--export-onnx", "--verify", "--export-encodings")

_ONLY_PRINTS = Ignored("is ignored: {by} only prints", by=("--summary", "--check"))
ONLY_ANALYSES = Ignored("has no effect: {by} only analyses", by=("--sense",), unless=("--summary", "--check"))
_ONLY_COLLECTS = Ignored(
    "has no effect: {by} alone only collects",
    by=("--qe-calibration",),
    unless=("--quantize-eval", "--summary", "--check", "--sense"),
)

NOT_EVALUATED = (_ONLY_PRINTS, ONLY_ANALYSES, _ONLY_COLLECTS)
