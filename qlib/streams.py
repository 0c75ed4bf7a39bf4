"""Streams that grow: the console and the log. What one of them does not take is lost, and the run goes on.

Law: a line that cannot be written never ends a run. What is lost is told at the end, in a sentence and by exit code 2,
unless nobody wants it: a reader that left (``| head``), or a stream that was closed before we began (``>&-``).
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO, cast

__all__ = ["Stream", "log_stream", "standard_streams"]


class Stream:
    r"""A text stream whose `write` and `flush` do not fail; `lost` is why it takes no more, if somebody misses that.

    What its encoding does not have is written as an escape.

    >>> Stream(sys.stdout).write("\udcff\n")
    \udcff
    2
    """

    def __init__(self, stream: TextIO) -> None:
        self.lost: OSError | None = None
        self._stream, self._open = stream, True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes the text, or loses it."""
        encoding = self._stream.encoding or "utf-8"
        with self._losing():
            self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        """Hands on what is held back, or loses it."""
        with self._losing():
            self._stream.flush()

    @contextlib.contextmanager
    def _losing(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            self._drop()
        except OSError as error:
            self.lost = self.lost or error
            self._drop()
        except ValueError:
            if not self._stream.closed:
                raise

    def _drop(self) -> None:
        """Sends what the stream still holds, and all that follows, nowhere."""
        with contextlib.suppress(OSError), open(os.devnull, "w", encoding="utf-8") as nowhere:
            os.dup2(nowhere.fileno(), self._stream.fileno())


@contextlib.contextmanager
def log_stream(file: Path) -> Iterator[Stream]:
    """A stream to the end of a file. Raises OSError where it cannot be opened."""
    with file.open("a", encoding="utf-8") as opened:
        stream = Stream(opened)
        try:
            yield stream
        finally:
            stream.flush()


@contextlib.contextmanager
def standard_streams() -> Iterator[tuple[Stream, Stream]]:
    """Has stdout and stderr be such streams within the block.

    A closed one goes nowhere: its number would be given to the next file, where what libraries print would end up.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        streams = Stream(sys.stdout or nowhere), Stream(sys.stderr or nowhere)
        out, err = cast("tuple[TextIO, TextIO]", streams)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                yield streams
            finally:
                for stream in streams:
                    stream.flush()
