"""Regular expressions for names of layers, as users write them: compiled and matched within a bounded time."""

from __future__ import annotations

import contextlib
import functools
import re
import signal
import threading
import warnings
from collections.abc import Iterable, Iterator

__all__ = ["SlowPattern", "matching", "pattern_problem"]

_SECONDS = 1.0  #: of CPU time, for one pattern and all names
_LONGEST = 10_000


class SlowPattern(Exception):
    """A pattern that takes too long."""


def pattern_problem(pattern: str) -> str:
    """What is wrong with a regular expression; empty if nothing is.

    >>> pattern_problem("layer1[.].*"), pattern_problem("*.conv1")
    ('', "'*.conv1' is not a regular expression: nothing to repeat at position 0; write '.*' for any text")
    """
    if len(pattern) > _LONGEST:
        return f"{pattern!r} has {len(pattern)} characters; a regular expression of layers has at most {_LONGEST}"
    try:
        with _time_limit(pattern):
            _compiled(pattern)
    except re.error as error:
        hint = "; write '.*' for any text" if pattern.startswith("*") else ""
        return f"{pattern!r} is not a regular expression: {error}{hint}"
    except (OverflowError, RecursionError) as error:
        return f"{pattern!r} is not a regular expression: {error}; write a simpler one"
    except SlowPattern as error:
        return str(error)
    return ""


def matching(pattern: str, names: Iterable[str]) -> frozenset[str]:
    """Those names that a pattern without a problem matches as a whole.

    >>> sorted(matching("layer[12].*", ["layer1.0", "layer2", "layer10", "conv", "0.layer1"]))
    ['layer1.0', 'layer10', 'layer2']
    >>> matching("(a+)+b", ["a" * 50])
    Traceback (most recent call last):
    qlib.config.layers.patterns.SlowPattern: '(a+)+b' takes more than a second to match the names of layers; repeat \
nothing that is repeated already, as in (a+)+

    Raises:
        SlowPattern: it takes more than a second of CPU time, where that can be told: in the main thread, on systems
            with timers of CPU time.
    """
    with _time_limit(pattern):
        found = _compiled(pattern).fullmatch
        return frozenset(name for name in names if found(name))


@functools.lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what a later Python may read in another way
        return re.compile(pattern)


@contextlib.contextmanager
def _time_limit(pattern: str) -> Iterator[None]:
    """Raises SlowPattern in a block that takes too long: `re` looks for signals while it matches."""
    if not hasattr(signal, "ITIMER_VIRTUAL") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise SlowPattern(
            f"{pattern!r} takes more than a second to match the names of layers; repeat nothing that is repeated"
            " already, as in (a+)+"
        )

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, _SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
