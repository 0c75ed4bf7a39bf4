"""What the value of a flag may be: a reader of its text, and the words that say what is allowed."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from qlib import values
from qlib.config.flags.absent import why_absent
from qlib.config.layers.budget import parse_budget
from qlib.errors import UsageError, did_you_mean
from qlib.files import expanded
from qlib.system import in_words, remedy
from qlib.values import FLAG, Interval, TooLarge, Value

__all__ = ["Kind", "SWITCH", "arch", "bit_widths", "budget", "choice", "devices", "existing_file", "fraction"]
__all__ += ["names", "path", "real"]
__all__ += ["new_file", "reports", "run_folder", "run_name", "schedule_file", "sparsity_range", "split_names", "whole"]

_FINEST = 0.001  #: step between two levels of sparsity
_LONGEST_NAME = 200  #: of 255 that file systems take; the rest is for what files are called after it

_SCHEDULES = Path(__file__).resolve().parents[2] / "schedules"  #: in a checkout a link to the folder at its top


@dataclass(frozen=True)
class Kind:
    """How a flag's text becomes a value. `read` raises ValueError for a text that is not `allowed`.

    `many`: the flag takes several words of names (`words`) or of paths (`paths`), or may be repeated with one each
    (`repeat`), or both, and then takes no word that is none of its `choices` (`choices`).
    `without`: what the flag alone, without a value, stands for. `words`: how many a value consists of.
    """

    read: Callable[[str], object]
    allowed: str
    metavar: str | None = None
    choices: tuple[str, ...] = ()
    many: str = ""
    without: str | None = None
    words: int = 1

    def value(self, flag: str, text: str) -> object:
        """The value of `text`.

        >>> whole(1, 9).value("--batch-size", "12")
        Traceback (most recent call last):
        qlib.errors.UsageError: --batch-size '12' is not allowed: it must be a whole number from 1 to 9
        """
        try:
            return self.read(text)
        except OSError as error:
            raise UsageError(f"{flag} {text!r} cannot be used ({in_words(error)}); {remedy(error)}") from None
        except ValueError as error:
            why = why_absent(f"{flag} {text.lower()}")
            hint = str(error) if isinstance(error, TooLarge) else did_you_mean(text.lower(), self.choices)
            hint = f"; {text} {why}" if why else hint
            raise UsageError(f"{flag} {text!r} is not allowed: it must be {self.allowed}{hint}") from None


def _require(accepted: bool) -> None:
    if not accepted:
        raise ValueError


def _kind(value: Value, metavar: str | None, allowed: str = "", many: str = "") -> Kind:
    """The kind of a value that other files may hold as well."""
    return Kind(lambda text: value.read(value.parse(text)), allowed or value.allowed, metavar, value.names, many)


SWITCH = _kind(FLAG, None)


def whole(low: int, high: int | None = None, *, zero: str = "", metavar: str = "N", without: str | None = None) -> Kind:
    """A whole number from `low` to `high`; also 0 if `zero` says what that means."""
    value = values.whole(low, high)

    def read(text: str) -> object:
        number = value.parse(text)
        return number if zero and number == 0 else value.read(number)

    span = value.allowed if high is not None else f"a whole number, {low} or more"
    return Kind(read, f"0 ({zero}) or {span}" if zero else span, metavar, without=without)


def real(interval: Interval, words: str = "", metavar: str = "F") -> Kind:
    """A number of an interval."""
    return _kind(values.real(interval, words), metavar)


def fraction() -> Kind:
    """A number in (0, 1]."""
    return real(Interval(0, 1, open_low=True), "a fraction above 0 and at most 1, such as 0.05 for 5 %")


def choice(allowed: Iterable[str], *, many: str = "") -> Kind:
    """One of some names, in any case."""
    value = values.choice(allowed)
    return _kind(value, "{" + ",".join(value.names) + "}", f"one of {value.allowed}", many)


def arch(allowed: str = "a model's name") -> Kind:
    """A model's name, in any case, or ``path/to/file.py:function`` or ``hf/FOLDER`` as it stands.

    It is UTF-8, as it stands in files.
    """

    def read(text: str) -> str:
        _require(bool(text.strip()))
        if text != text.encode(errors="replace").decode():
            raise OSError(errno.EILSEQ, "not UTF-8")
        return text if ".py:" in text or text.startswith("hf/") else text.lower()

    return Kind(read, allowed, "ARCH")


def run_name() -> Kind:
    """A name that can be part of a folder's name."""

    def read(text: str) -> str:
        _require(bool(text.strip()) and not re.search(r"[/\\\0]", text) and not text.startswith("."))
        if len(os.fsencode(text)) > _LONGEST_NAME:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        return text

    return Kind(read, "a name that does not begin with a dot and has no slash in it, as a folder is called so", "NAME")


def path(metavar: str = "DIR") -> Kind:
    """A path; `~` is expanded."""

    def read(text: str) -> Path:
        _require(bool(text) and "\0" not in text)
        return expanded(text)

    return Kind(read, "a path", metavar)


def new_file(suffix: str, *, without: str) -> Kind:
    """The path of a file to write, which ends in `suffix`; `~` is expanded. `without` is left as it stands."""

    def read(text: str) -> Path:
        file = expanded(text)
        _require("\0" not in text)
        _require(text == without or (file.suffix == suffix and not file.is_dir() and os.access(file.parent, os.W_OK)))
        return file

    allowed = f"a file to write that ends in {suffix}, in a folder that exists and can be written"
    return Kind(read, allowed, "FILE", without=without)


def existing_file() -> Kind:
    """The path of a file that exists; `~` is expanded."""

    def read(text: str) -> Path:
        file = expanded(text)
        _require(file.is_file())
        # The run moves latest_log_dir before it reads a file that was named through it.
        return file.resolve() if file.parent.is_symlink() else file

    return Kind(read, "a file that exists", "FILE")


def run_folder() -> Kind:
    """The folder of a run, as it was when the command line was read: a run moves the link `latest_log_dir`."""

    def read(text: str) -> Path:
        folder = expanded(text)
        _require(bool(text) and folder.is_dir())
        return folder.resolve() if folder.is_symlink() else folder

    return Kind(read, "the folder of a run, which exists", "RUN")


def reports() -> Kind:
    """The folder of a run, of several, or the report of one, as it was when the command line was read."""

    def read(text: str) -> Path:
        path = expanded(text)
        _require(path.exists())
        return path.resolve() if path.is_symlink() or path.parent.is_symlink() else path

    return Kind(read, "the folder of a run, a folder of such, or a report.json, which exists", "RUN", many="paths")


def schedule_file() -> Kind:
    """A file that exists, else the YAML file of that name which comes with the package, after `schedules/` or bare.

    >>> schedule_file().value("--compress", "schedules/qat_lsq_4bit.yaml").name
    'qat_lsq_4bit.yaml'
    """
    plain = existing_file()
    packaged = {path.name: path for path in sorted(_SCHEDULES.glob("*.yaml"))}
    names = {f"{folder}{name}": path for folder in ("", "schedules/") for name, path in packaged.items()}

    def read(text: str) -> object:
        return plain.read(text if os.path.isfile(text) else str(names.get(text, text)))

    allowed = f"{plain.allowed}, or one that comes with the package: {', '.join(packaged)}"
    return Kind(read, allowed, plain.metavar, tuple(packaged))


def devices() -> Kind:
    """Device ids with commas between them: `0,1`."""

    def read(text: str) -> tuple[int, ...]:
        ids = tuple(int(each) for each in text.split(","))
        _require(min(ids) >= 0 and len(set(ids)) == len(ids))
        return ids

    return Kind(read, "different device numbers with commas between them, such as 0 or 0,1", "IDS")


def bit_widths() -> Kind:
    """Bit-widths with commas between them: `2,3,4,8`; they are sorted."""

    def read(text: str) -> tuple[int, ...]:
        bits = sorted(int(each) for each in text.split(","))
        _require(min(bits) >= 2 and max(bits) <= 16 and len(set(bits)) == len(bits))
        return tuple(bits)

    return Kind(read, "different whole numbers from 2 to 16 with commas between them, such as 2,3,4,8", "BITS")


def sparsity_range() -> Kind:
    """The start, the stop and the step of sparsity levels, as three words.

    >>> sparsity_range().value("--sense-range", "0 0.95 0.05")
    (0.0, 0.95, 0.05)
    """
    number = values.real(Interval(0, 1))

    def read(text: str) -> tuple[float, ...]:
        start, stop, step = (float(number.read(number.parse(word))) for word in re.split(r"[,\s]+", text))
        _require(start < stop and step >= _FINEST)
        return start, stop, step

    allowed = f"three numbers, START below STOP from 0 to 1 and a STEP from {_FINEST}, such as 0 0.95 0.05"
    return Kind(read, allowed, "START STOP STEP", words=3)


def budget() -> Kind:
    """A budget such as `3.2MB`, as text."""
    allowed = "a number above 0 with its unit: 3.2MB of weights, 4.5bits for each weight, or 12GBOPs"
    return Kind(lambda text: str(parse_budget(text)), allowed, "BUDGET")


def names() -> Kind:
    """One name or regular expression of a list of them."""

    def read(text: str) -> str:
        _require(bool(text.strip()))
        return text.strip()

    return Kind(read, "layer names", "LAYER", many="words")


def split_names(text: str) -> list[str]:
    """Splits at commas, but not at those inside the brackets of a regular expression.

    >>> split_names("conv1,fc"), split_names("layer[1,2].{1,3}")
    (['conv1', 'fc'], ['layer[1,2].{1,3}'])
    """
    names, end, inside = list[str](), len(text), False
    for place in range(len(text) - 1, -1, -1):
        if text[place] == "," and not inside:
            names.append(text[place + 1 : end])
            end = place
        elif text[place] in "[({])}":
            inside = text[place] in "])}"
    return [name for name in (text[:end], *reversed(names)) if name.strip()]
