"""The packages of the `onnx` extra: present, or one sentence that says how to get them."""

from __future__ import annotations

import importlib.util

from qlib.errors import UsageError

__all__ = ["require_onnx"]

_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def require_onnx(what: str) -> None:
    """Raises UsageError, naming what needs them, where a package of the extra is missing."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"{what} needs {', '.join(missing)}, not installed here: pip install 'qlib-compress[onnx]'")
