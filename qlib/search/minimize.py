"""scipy's methods without gradients, started with steps of a size that suits ranges."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["Vector", "minimize", "options_for"]

Vector: TypeAlias = "NDArray[np.float64]"

_STEP = -2.0
"""The first step of a simplex: narrower by a factor of 0.7. Its own, 0.00025 from zero, would change no range."""


def options_for(method: str, start: Vector, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a method, with its first step."""
    if method != "nelder-mead":
        return dict(options)
    return {**options, "initial_simplex": np.vstack([start, start + _STEP * np.eye(len(start))])}


def minimize(function: Callable[[Vector], float], start: Vector, method: str, options: Mapping[str, Any]) -> Vector:
    """Where the method ends.

    >>> minimize(lambda x: float((x[0] + 3) ** 2), np.zeros(1), "nelder-mead", {}).round(2)
    array([-3.])
    """
    from scipy.optimize import minimize as scipy_minimize

    found = scipy_minimize(function, start, method=method, options=options_for(method, start, options))
    result: Vector = np.atleast_1d(found.x)
    return result
