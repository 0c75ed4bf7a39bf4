"""The only way to disk: a file appears whole or not at all, and one that cannot be written is one sentence.

A file is written under a temporary name of its own beside its place and then renamed, so that a reader never sees half
of it, a write that fails leaves the old one, and two runs in one folder do not meet.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import os
import secrets
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from qlib.errors import OutputError

__all__ = [
    "STATS",
    "append_csv",
    "make_folder",
    "move",
    "read_csv",
    "replace_whole",
    "reserve",
    "scratch_folder",
    "write_csv",
    "write_text",
    "write_together",
    "write_whole",
]

STATS = Path("stats")
"""The folder of what later runs read: statistics, logits of teachers, and the unfinished work of interrupted runs."""

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, None)
"""The numbers of errors of a full disk; numpy gives none when it could write a part only."""


def write_whole(path: Path, write: Callable[[Path], object], what: str, *, parents: bool = False) -> None:
    """Writes a file: `write` is given the temporary path. With `parents`, its folder is made first.

    >>> write_whole(Path("/no/such/folder/plan.yaml"), Path.touch, "plan")
    Traceback (most recent call last):
    qlib.errors.OutputError: cannot write plan '/no/such/folder/plan.yaml' (No such file or directory); give a folder \
that can be written

    Raises:
        OutputError: the file cannot be written.
    """
    with _told(what, path):
        if parents:
            path.parent.mkdir(parents=True, exist_ok=True)
        replace_whole(path, write)


def replace_whole(path: Path, write: Callable[[Path], object]) -> None:
    """The same, but what goes wrong stays an OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_together(path: Path, write: Callable[[Path], object], what: str) -> None:
    """Writes a file and those that it refers to by longer names: `write` is given `path` in a temporary folder.

    They are moved to the folder of `path`, the file itself last. Raises OutputError where they cannot be written.
    """
    with _told(what, path), tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as folder:
        write(Path(folder) / path.name)
        for made in sorted(Path(folder).iterdir(), reverse=True):
            made.replace(path.with_name(made.name))


def move(source: Path, path: Path, what: str) -> None:
    """Puts a file that is whole in the place of another. Raises OutputError where that is impossible."""
    with _told(what, path):
        source.replace(path)


def write_text(path: Path, text: str, what: str, *, parents: bool = False) -> None:
    """Writes a text file in UTF-8, with lines that end as in `text`. Raises OutputError where that is impossible."""
    write_whole(path, lambda file: file.write_text(text, encoding="utf-8", newline="\n"), what, parents=parents)


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Iterable[object]]) -> None:
    """Writes a table with a line of column names. Raises OutputError where that is impossible."""

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(columns)
            writer.writerows(rows)

    write_whole(path, write, "table")


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a table by column. Raises OSError where it cannot be read, ValueError where it is no table."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file, strict=True))
    except csv.Error as error:
        raise ValueError(str(error)) from error


def append_csv(path: Path, row: Mapping[str, object]) -> None:
    """Adds a row to a table, which may be new; a new column is empty in the rows before.

    Raises:
        OutputError: the file cannot be written.
    """
    rows: list[Mapping[str, object]] = []
    with _told("table", path), contextlib.suppress(FileNotFoundError), path.open(newline="", encoding="utf-8") as file:
        rows += csv.DictReader(file)
    rows.append(row)
    columns = list(dict.fromkeys(column for each in rows for column in each))
    write_csv(path, columns, ([each.get(column) for column in columns] for each in rows))


def make_folder(path: Path) -> Path:
    """Makes a folder, unless it is there. Raises OutputError where that is impossible."""
    with _told("folder", path):
        path.mkdir(parents=True, exist_ok=True)
    return path


@contextlib.contextmanager
def scratch_folder(parent: Path | None = None) -> Iterator[Path]:
    """A folder that is gone when the block is left: in `parent`, which is made, or where the system has its own.

    Raises OutputError where it cannot be made.
    """
    with contextlib.ExitStack() as stack:
        with _told("temporary folder", parent or Path(tempfile.gettempdir())):
            if parent is not None:
                parent.mkdir(parents=True, exist_ok=True)
            folder = stack.enter_context(tempfile.TemporaryDirectory(dir=parent, prefix=".qlib-"))
        yield Path(folder)


def reserve(path: Path, size: int, what: str) -> None:
    """Makes a file of `size` bytes for which the disk has room, so that memory mapped to it can be written."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)

    write_whole(path, write, what)


@contextlib.contextmanager
def _told(what: str, path: Path) -> Iterator[None]:
    """Turns an OSError into the sentence for the user."""
    try:
        yield
    except OSError as error:
        remedy = "make room for it" if error.errno in _NO_ROOM else "give a folder that can be written"
        raise OutputError(f"cannot write {what} {str(path)!r} ({error.strerror or error}); {remedy}") from error
