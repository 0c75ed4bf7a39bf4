"""What the system refuses, in one sentence: no room, no memory, no more files, a worker process that was killed.

Such failures come from anywhere, as exceptions of many libraries: they are known by the number of their error, or by
words of their text. The two tables here are all that is known of them.
"""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from qlib.errors import OutputError, QlibError, SystemRefusal

if TYPE_CHECKING:
    from os import PathLike

__all__ = ["answered", "in_words", "refusal", "remedy", "shortage", "unwritable"]

_ROOM = "make room for it"
_REMEDIES: Mapping[int | None, str] = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG, None), _ROOM),  # numpy gives no number for a part written
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "allow more open files with ulimit -n, or give a lower -j"),
    **dict.fromkeys((errno.ENOMEM, errno.EAGAIN), "end other programs, or give a lower -j or -b"),
    errno.ENAMETOOLONG: "give a shorter name",
    errno.EILSEQ: "rename it",
    errno.EIO: "check the disk, or give a folder on another one",
}
"""The number of an error of the system -> what a user can do."""

_WORDS = (
    (
        r"[Ss]hared memory|shm_open|ancdata|Bus error|/torch_\d+_\d+",
        "the processes that read images have no room in shared memory, /dev/shm; give -j 0, or enlarge it",
    ),
    (
        r"DataLoader worker .*(killed by signal|exited unexpectedly)",
        "a process that reads images was killed, as systems do that are short of memory; give a lower -j or -b,"
        " or -j 0",
    ),
    (
        r"not enough memory|out of memory|[Cc]annot allocate memory|can't allocate memory|bad_?alloc|bad allocation"
        r"|failed to map segment|DefaultCPUAllocator|[Uu]nable to allocate",
        "there is not enough memory; give a lower -b or -j, a smaller model, or end other programs",
    ),
    (r"[Tt]oo many open files", f"too many files are open; {_REMEDIES[errno.EMFILE]}"),
    (r"can't start new thread", "no thread can be started; end other programs, or allow more with ulimit -u"),
)
"""Words in the text of an exception -> the sentence."""


def in_words(error: OSError) -> str:
    """Why the system refused, without number and path.

    >>> in_words(OSError(28, "No space left on device", "a.yaml"))
    'No space left on device'
    """
    return str(error.strerror or error)


def remedy(error: OSError, otherwise: str = "give another one, or its rights") -> str:
    """What a user can do about an error of the system."""
    return _REMEDIES.get(error.errno, otherwise)


def unwritable(what: str, path: str | PathLike[str], error: OSError) -> OutputError:
    """The sentence for a file that cannot be written.

    >>> str(unwritable("plan", "a.yaml", OSError(28, "No space left on device")))
    "cannot write plan 'a.yaml' (No space left on device); make room for it"
    """
    do = remedy(error, "give a folder that can be written")
    return OutputError(f"cannot write {what} {str(path)!r} ({in_words(error)}); {do}")


def refusal(error: BaseException) -> QlibError | None:
    """The sentence for an exception that comes from the system; None for any other.

    >>> str(refusal(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ...")))
    'there is not enough memory; give a lower -b or -j, a smaller model, or end other programs'
    >>> refusal(RuntimeError("shapes do not fit")) is None
    True
    """
    if isinstance(error, FileNotFoundError) and error.filename is None and error.errno == errno.ENOENT:
        return SystemRefusal("the current folder is no longer there; change to one that is")
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return SystemRefusal(f"cannot use {str(error.filename)!r} ({in_words(error)}); {remedy(error)}")
    if isinstance(error, UnicodeEncodeError) and re.search("[\ud800-\udfff]", error.object):
        return SystemRefusal(f"a name in {error.object!r} is not UTF-8, which is needed here; rename it")
    if found := shortage(error):
        return found
    if isinstance(error, OSError) and error.errno is not None:
        do = remedy(error, "try again")
        return SystemRefusal(f"the system refuses a file or process ({in_words(error)}); {do}")
    return None


def shortage(error: BaseException) -> SystemRefusal | None:
    """The sentence for an exception that tells of too little memory or the like, whoever's code raised it.

    >>> str(shortage(MemoryError()))
    'there is not enough memory; give a lower -b or -j, a smaller model, or end other programs'
    """
    if not isinstance(error, (OSError, RuntimeError, MemoryError, ImportError, SystemError)):
        return None
    text = "out of memory" if isinstance(error, MemoryError) else str(error)
    found = next((sentence for words, sentence in _WORDS if re.search(words, text)), None)
    return None if found is None else SystemRefusal(found)


@contextlib.contextmanager
def answered() -> Iterator[None]:
    """Turns what the system refuses within the block into its sentence."""
    try:
        yield
    except Exception as error:
        sentence = refusal(error)
        if sentence is None:
            raise
        raise sentence from error
