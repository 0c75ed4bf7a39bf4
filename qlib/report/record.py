"""The record of a run: all that it found, as plain data. Pages, tables and comparisons of runs read nothing else.

A section is a frozen dataclass, or a tuple of such, and one field of `RunReport`. What finds something hands it over by
the name of that field: ``record(job, search=Search(...))`` in `qlib/app/report.py`. That is all there is to a new one:
`report.json`, its reader and the schema follow from the types; a page shows it where `qlib/report/html` says how.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from qlib.prune.sensitivity import PruningSensitivity
from qlib.report.record_parts import Deployment, Layer, Pruned, TradeOff, Training, Trials, Verification
from qlib.search.sensitivity import Sensitivity

__all__ = [
    "VERSION",
    "Calibration",
    "ChangedImage",
    "Confusion",
    "Origin",
    "Predicted",
    "Result",
    "RunReport",
    "Versus",
    "WrittenFile",
]

VERSION = 1


@dataclass(frozen=True)
class Origin:
    """Where the numbers come from: program, model, data, command.

    `command` is the line that was given, `repeat` the one that does it again; `weights` is a hash of the model's state.
    """

    verb: str
    version: str
    arch: str
    dataset: str
    classes: int
    started: str
    seconds: float
    exit_code: int
    command: str
    repeat: str
    folder: str
    weights: str = ""


@dataclass(frozen=True)
class Result:
    """One model on the test images, in percent; `low` and `high` are the 95 % Wilson interval of Top1."""

    model: str
    samples: int
    top1: float
    low: float
    high: float
    top5: float
    loss: float


@dataclass(frozen=True)
class Versus:
    """How the predictions of `model` differ from those of `other` on the same images.

    `agreement` is in percent, `low` and `high` its 95 % Wilson interval; `lost` counts the images that only the other
    predicts right, `won` those that only this one does, `p_value` is McNemar's exact one of the two; `flips` are the
    images whose prediction changed, by their class.
    """

    model: str
    other: str
    samples: int
    agreement: float
    low: float
    high: float
    lost: int
    won: int
    p_value: float
    flips: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Predicted:
    """The images of the test: a hash of their names, the classes, the label of each, what each model takes it for."""

    images: str
    classes: tuple[str, ...]
    labels: tuple[int, ...]
    predictions: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Confusion:
    """What the images of each class were taken for by a model: ``[class, predicted class, images]``, most first."""

    model: str
    counts: tuple[tuple[int, ...], ...]
    left_out: int = 0


@dataclass(frozen=True)
class ChangedImage:
    """An image whose prediction changed: classes, margins of both models, and the image as JPEG in base64, if small.

    A margin is the probability of the predicted class less that of the next one.
    """

    image: str
    label: int
    before: int
    after: int
    margin_before: float
    margin_after: float
    thumbnail: str = ""


@dataclass(frozen=True)
class Calibration:
    """The images that ranges were measured on."""

    samples: int
    split: str
    seconds: float = 0.0


@dataclass(frozen=True)
class WrittenFile:
    """A file that the run wrote for others: what it is, its size, its SHA-256."""

    what: str
    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class RunReport:
    """All that a run found, as `report.json` holds it."""

    version: int
    origin: Origin
    settings: Mapping[str, str] = field(default_factory=dict)
    given: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    results: tuple[Result, ...] = ()
    versus: tuple[Versus, ...] = ()
    tested: Predicted | None = None
    confusion: tuple[Confusion, ...] = ()
    changed: tuple[ChangedImage, ...] = ()
    calibration: Calibration | None = None
    layers: tuple[Layer, ...] = ()
    sensitivity: tuple[Sensitivity, ...] = ()
    pruned: tuple[Pruned, ...] = ()
    pruning_sensitivity: tuple[PruningSensitivity, ...] = ()
    tradeoff: TradeOff | None = None
    auto: Trials | None = None
    deployment: Deployment | None = None
    verification: Verification | None = None
    training: Training | None = None
    files: tuple[WrittenFile, ...] = ()
