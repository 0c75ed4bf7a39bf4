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
    |-- OutputError           a folder or file that cannot be written
    `-- SystemRefusal         memory, open files, processes: what the system does not grant

A programmer's mistake is an ``assert``, never one of these.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

_LONG_VALUE = re.compile(r"""(?<!\w)(['"])(?:(?!\1).){200,}?\1(?!\w)|\S{200,}""", re.DOTALL)
_HEAD, _TAIL, _LONGEST = 80, 40, 2000
_MOST_PROBLEMS = 50
_LONGEST_NAME = 100


class QlibError(Exception):
    """A user's mistake, told in one sentence, in which no value is endless."""

    def __str__(self) -> str:
        return shortened(super().__str__())


class UsageError(QlibError):
    """A flag, or a combination of flags, that cannot be obeyed."""


class ConfigError(QlibError):
    """A YAML file with mistakes: all of them, one a line, the first 50 in full.

    >>> print(ConfigError(["a.yaml:3: unknown key 'bitz'", "a.yaml:7: bits must be 2 to 16"]))
    2 problems:
      a.yaml:3: unknown key 'bitz'
      a.yaml:7: bits must be 2 to 16
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__(self.problems)

    def __str__(self) -> str:
        told = [shortened(problem) for problem in self.problems[:_MOST_PROBLEMS]]
        if len(self.problems) == 1:
            return told[0]
        more = [f"and {len(self.problems) - len(told)} more"] if len(self.problems) > len(told) else []
        return "\n  ".join([f"{len(self.problems)} problems:", *told, *more])


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


class SystemRefusal(QlibError):
    """Something that the system does not grant: memory, an open file, a process."""


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """A suggestion to append to an error message, or an empty string.

    >>> did_you_mean("resnet8", ["resnet18", "vgg11"])
    '; did you mean resnet18?'
    >>> did_you_mean("xyz", ["resnet18"])
    ''
    """
    if len(name) > _LONGEST_NAME:
        return ""
    close = difflib.get_close_matches(name, list(allowed), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def shortened(sentence: str) -> str:
    """The sentence with the middle of each value cut out that is longer than 200 characters; 2,000 in all.

    A value stands in quotes, or has no blanks.

    >>> shortened("--name 'a b'"), len(shortened("x " * 10_000)) <= 2000
    ("--name 'a b'", True)
    >>> print(shortened("there is no flag --" + "y" * 999)[80:])
    yyyyyyyyyyyyyyyy... (881 characters) ...yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy
    """
    return _cut(_LONG_VALUE.sub(lambda found: _cut(found[0], 0), sentence), _LONGEST)


def _cut(text: str, longest: int) -> str:
    left_out = len(text) - _HEAD - _TAIL
    return text if len(text) <= longest else f"{text[:_HEAD]}... ({left_out} characters) ...{text[-_TAIL:]}"
