"""The only way to disk: a file appears whole or not at all, and one that cannot be written is one sentence.

A file is written into a scratch folder beside its place, through to the disk, and then moved: a reader never sees half
of it, a write that fails leaves the old one, and two runs in one folder do not meet. Such a `.qlib-scratch-*` is locked
by the process that fills it. One that a killed process left is not: the next write beside it removes it.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from qlib.system import unwritable

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "STATS",
    "append_csv",
    "expanded",
    "make_folder",
    "move",
    "read_csv",
    "replace_whole",
    "reserve",
    "scratch_folder",
    "told",
    "write_csv",
    "write_text",
    "write_whole",
]

STATS = Path("stats")
"""The folder of what later runs read: statistics, logits of teachers, and the unfinished work of interrupted runs."""

_SCRATCH = ".qlib-scratch-"

_NO_LOCKS = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK, errno.EBADF, errno.EINVAL)
"""The numbers of errors of a file system without locks of folders; what a killed process leaves there stays."""


def write_whole(path: Path, write: Callable[[Path], object], what: str, *, parents: bool = False) -> None:
    """Writes a file, and those that it refers to by longer names: `write` is given `path` in a scratch folder.

    With `parents`, its folder is made first.

    >>> write_whole(Path("/no/such/folder/plan.yaml"), Path.touch, "plan")
    Traceback (most recent call last):
    qlib.errors.OutputError: cannot write plan '/no/such/folder/plan.yaml' (No such file or directory); give a folder \
that can be written

    Raises:
        OutputError: the file cannot be written.
    """
    with told(what, path):
        if parents:
            path.parent.mkdir(parents=True, exist_ok=True)
        replace_whole(path, write)


def replace_whole(path: Path, write: Callable[[Path], object]) -> None:
    """The same, but what goes wrong stays an OSError."""
    with _scratch(path.parent) as folder:
        write(folder / path.name)
        made = sorted(folder.iterdir(), reverse=True)  # the file itself last
        for file in made:
            _write_through(file)
        for file in made:
            file.replace(path.with_name(file.name))


def expanded(path: str | Path) -> Path:
    """The path with the home folder that `~` or `~user` stands for; as in a shell, as it is where there is none.

    >>> str(expanded("~nobody-has-this-name/images"))
    '~nobody-has-this-name/images'
    """
    return Path(os.path.expanduser(path))


def move(source: Path, path: Path, what: str) -> None:
    """Puts a file that is whole in the place of another. Raises OutputError where that is impossible."""
    with told(what, path):
        source.replace(path)


def write_text(path: Path, text: str, what: str, *, parents: bool = False) -> None:
    """Writes a text file in UTF-8, with lines that end as in `text`. Raises OutputError where that is impossible.

    Bytes of a name that are no UTF-8 appear as escapes.
    """
    write_whole(path, lambda file: file.write_bytes(text.encode("utf-8", "backslashreplace")), what, parents=parents)


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Iterable[object]]) -> None:
    """Writes a table with a line of column names. Raises OutputError where that is impossible."""

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
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
    with told("table", path), contextlib.suppress(FileNotFoundError), path.open(newline="", encoding="utf-8") as file:
        rows += csv.DictReader(file)
    rows.append(row)
    columns = list(dict.fromkeys(column for each in rows for column in each))
    write_csv(path, columns, ([each.get(column) for column in columns] for each in rows))


def make_folder(path: Path) -> Path:
    """Makes a folder, unless it is there. Raises OutputError where that is impossible."""
    with told("folder", path):
        path.mkdir(parents=True, exist_ok=True)
    return path


@contextlib.contextmanager
def scratch_folder(parent: Path | None = None) -> Iterator[Path]:
    """A folder that is gone when the block is left: in `parent`, which is made, or where the system has its own.

    Raises OutputError where it cannot be made.
    """
    with contextlib.ExitStack() as stack:
        with told("temporary folder", parent or "$TMPDIR"):
            if parent is not None:
                parent.mkdir(parents=True, exist_ok=True)
            folder = stack.enter_context(_scratch(parent or Path(tempfile.gettempdir())))
        yield folder


@contextlib.contextmanager
def _scratch(parent: Path) -> Iterator[Path]:
    """A locked folder in `parent`; those that nobody holds any more are removed on the way."""
    for left in parent.glob(f"{_SCRATCH}*"):
        with contextlib.suppress(OSError), _closing(_lock(left)):
            if left.stat().st_uid == os.getuid():  # another user's may be a trap
                _remove(left)
    folder, lock = _new_scratch(parent)
    try:
        with _closing(lock):
            yield folder
    finally:
        with contextlib.suppress(OSError):  # what cannot be removed now is removed by the next
            _remove(folder)


def _new_scratch(parent: Path) -> tuple[Path, int | None]:
    """A new folder and what holds its lock; None where there are no locks."""
    while True:
        folder = Path(tempfile.mkdtemp(dir=parent, prefix=_SCRATCH))
        try:
            lock = _lock(folder)
            if folder.exists():
                return folder, lock
            os.close(lock)
        except (FileNotFoundError, BlockingIOError):
            pass  # another process that clears up came before the lock
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return folder, None
            folder.rmdir()
            raise


def _lock(folder: Path) -> int:
    """Locks a folder until what is returned is closed, or the process ends; raises OSError where another holds it."""
    if fcntl is None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextlib.contextmanager
def _closing(descriptor: int | None) -> Iterator[None]:
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _remove(folder: Path) -> None:
    """Deletes a folder with one open file at a time, as there may be no more."""
    for name in os.listdir(folder):
        path = folder / name
        _remove(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    folder.rmdir()


def _write_through(file: Path) -> None:
    """Has the system write a file to the disk, which may fail only then; otherwise a loss of power leaves it empty."""
    if not file.is_symlink():
        with file.open("rb") as written:
            os.fsync(written.fileno())


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
def told(what: str, path: Path | str) -> Iterator[None]:
    """Turns an OSError into the sentence for the user."""
    try:
        yield
    except OSError as error:
        raise unwritable(what, path, error) from error
