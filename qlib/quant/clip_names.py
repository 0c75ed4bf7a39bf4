"""The clip methods, as their files register them: which there are, and which numbers they take. None is imported."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from qlib.registry import registered
from qlib.values import FrozenMapping, Interval

__all__ = [
    "CLIP_DEFAULTS",
    "CLIP_NAMES",
    "CLIP_PARAMETERS",
    "HISTOGRAM_CLIPS",
    "WEIGHT_CLIPS",
    "ClipParameter",
    "ClipParameters",
]

_METHODS, _OF_WEIGHTS = registered("qlib.clip"), registered("qlib.clip.weights")

CLIP_NAMES = tuple(_METHODS)
"""The names that `clip_acts` takes."""

HISTOGRAM_CLIPS = tuple(name for name, facts in _METHODS.items() if facts.get("histogram"))
"""Those of `CLIP_NAMES` that need a histogram."""

WEIGHT_CLIPS = tuple(_OF_WEIGHTS)
"""The names that `clip_wts` takes."""


@dataclass(frozen=True)
class ClipParameter:
    """A number that the clip method `method` takes, `key` in YAML: from `low`, or above it where `open`, to `high`.

    Without a `default` it must be given wherever its method is used. `help` and `metavar` are those of its flag.
    """

    method: str
    key: str
    low: float
    high: float = math.inf
    open: bool = False
    default: float | None = None
    help: str = ""
    metavar: str = "F"

    @property
    def flag(self) -> str:
        """Its flag: that of `clip_p` is `--qe-clip-p`."""
        return f"--qe-{self.key.replace('_', '-')}"

    @property
    def interval(self) -> Interval:
        """The numbers that it may be."""
        return Interval(self.low, self.high, open_low=self.open)


CLIP_PARAMETERS: Mapping[str, ClipParameter] = {
    key: ClipParameter(method, key, **bounds)
    for method, facts in (*_METHODS.items(), *_OF_WEIGHTS.items())
    for key, bounds in facts.get("parameters", {}).items()
}
"""Key in YAML -> the parameter."""


class ClipParameters(FrozenMapping[float]):
    """The parameters of all clip methods, by their keys in YAML; immutable.

    Laws: one that is not given has its default; without a default, or given as None, it is absent.

    >>> parameters = ClipParameters({"clip_p": 3.0})
    >>> parameters["clip_p"], parameters["clip_percentile"], "clip_n_stds" in parameters
    (3.0, 99.99, False)
    >>> "clip_p" in parameters | {"clip_p": None}
    False
    """

    def __init__(self, given: Mapping[str, float | None] | None = None) -> None:
        defaults = {key: each.default for key, each in CLIP_PARAMETERS.items() if each.default is not None}
        values = {key: float(default) for key, default in defaults.items()} | dict(given or {})
        super().__init__({key: value for key, value in values.items() if value is not None})

    def __or__(self, changes: Mapping[str, float | None]) -> ClipParameters:
        return ClipParameters({**self, **changes})

    def read_by(self, method: str) -> dict[str, float | None]:
        """Those that a method looks at, None for one that it lacks; `auto` looks at all, and lacks none.

        >>> ClipParameters().read_by("lp"), ClipParameters().read_by("n_std"), ClipParameters().read_by("mse")
        ({'clip_p': 2.0}, {'clip_n_stds': None}, {})
        """
        if method == "auto":
            return dict(self)
        return {key: self.get(key) for key, each in CLIP_PARAMETERS.items() if each.method == method}

    def lacks(self, method: str) -> list[str]:
        """The parameters that a method cannot do without, and that are not given."""
        return [key for key, value in self.read_by(method).items() if value is None]


CLIP_DEFAULTS = ClipParameters()
