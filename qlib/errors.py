"""The exceptions a user can meet.

::

    QlibError                 a user's mistake: one sentence with the value, what is allowed and the remedy; exit code 2
    |-- UsageError            the command line
    |-- ConfigError           a YAML file; holds every problem found, each as ``file:line: sentence``
    |-- DataError             a dataset folder or image
    |-- ModelError            a model name, a model file, a graph that cannot be captured
    |-- StatsError            activation statistics: missing, of another model, not finite
    |-- CheckpointError       a checkpoint: unreadable, truncated, hostile, of another model
    |-- ExportError           a model that cannot be handed over in the format asked for
    `-- OutputError           a folder or file that cannot be written

A programmer's mistake is an ``assert``, never one of these.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class QlibError(Exception):
    """A user's mistake, told in one sentence."""


class UsageError(QlibError):
    """A flag, or a combination of flags, that cannot be obeyed."""


class ConfigError(QlibError):
    """A YAML file with mistakes: all of them, one a line.

    >>> print(ConfigError(["a.yaml:3: unknown key 'bitz'", "a.yaml:7: bits must be 2 to 16"]))
    2 problems:
      a.yaml:3: unknown key 'bitz'
      a.yaml:7: bits must be 2 to 16
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__(self.problems)

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return self.problems[0]
        return "\n  ".join([f"{len(self.problems)} problems:", *self.problems])


class DataError(QlibError):
    """A dataset folder or an image that cannot be used."""


class ModelError(QlibError):
    """A model that cannot be found, built or captured."""


class StatsError(QlibError):
    """Activation statistics that are missing, not finite, or of another model."""


class CheckpointError(QlibError):
    """A checkpoint that cannot be read, or does not fit the model."""


class ExportError(QlibError):
    """A model that cannot be handed over in the format asked for."""


class OutputError(QlibError):
    """A folder or file that cannot be written."""


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """A suggestion to append to an error message, or an empty string.

    >>> did_you_mean("resnet8", ["resnet18", "vgg11"])
    '; did you mean resnet18?'
    >>> did_you_mean("xyz", ["resnet18"])
    ''
    """
    close = difflib.get_close_matches(name, list(allowed), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(close)}?" if close else ""
