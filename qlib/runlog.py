"""The folder of a run: its log, and the settings that repeat it."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import logging
import operator
import os
import platform
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from qlib.errors import OutputError, QlibError
from qlib.files import replace_whole, write_text, write_whole
from qlib.progress import FILE_ONLY
from qlib.streams import Stream, log_stream
from qlib.system import answered, in_words, unwritable

__all__ = ["RunLog", "open_run"]

_log = logging.getLogger("qlib")
_environment_log = logging.getLogger("app_cfg")
_PACKAGES = ("torch", "torchvision", "numpy", "scipy", "scikit-learn", "safetensors", "PyYAML")


@dataclass(frozen=True)
class RunLog:
    """Where a run writes. `folder` and `file` are absolute.

    `found` collects the sections of its report, by name, until it ends; `started` is in seconds since 1970.
    """

    folder: Path
    file: Path
    started: float = field(default_factory=time.time)
    environment: Mapping[str, str] = field(default_factory=dict)
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def configs(self) -> Path:
        """The folder with the settings of the run."""
        return self.folder / "configs"


@contextlib.contextmanager
def open_run(
    out_dir: Path,
    name: str | None = None,
    settings: str = "",
    inputs: Iterable[Path | None] = (),
    *,
    verbose: bool = False,
    cpu: bool = False,
) -> Iterator[RunLog]:
    """Makes the run's folder and sends log records to its log file, and to the console, until the block ends.

    The records are ours, and the warnings of other packages. The file's lines begin with the time; the console (stdout)
    has bare messages. The first and the last line say where the file is. Python's warnings are logged, each text once.
    An exception that leaves the block is written to the file, a user's mistake without its traceback unless `verbose`;
    one that comes from the system becomes the sentence that answers it.

    Args:
        out_dir: the folder of all runs.
        name: begins the name of the run's folder.
        settings: the text of `configs/run_config.yaml`.
        inputs: files that are copied beside it, where they exist.
        verbose: whether our debug messages are logged too.
        cpu: whether the run leaves GPUs alone.

    Raises:
        OutputError: the folder cannot be made or written; or, when all else is done, the log could not.
    """
    run = _make_folder(out_dir, name)
    _save_configs(run.configs, settings, inputs)
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(_handlers(run.file, verbose))
        stack.enter_context(_logged_warnings())
        _log.info("Log file for this run: %s", run.file)
        stack.callback(_log.info, "Log file for this run: %s", run.file)
        _link_latest(run)
        environment = _environment(cpu)
        for what, value in environment.items():
            _environment_log.debug("%s: %s", what, value, extra=FILE_ONLY)
        try:
            with answered():
                yield replace(run, environment=environment)
        except BaseException as error:
            _log_failure(error, verbose)
            raise
    if log.lost is not None:
        raise unwritable("all lines of the log", run.file, log.lost)


def _make_folder(out_dir: Path, name: str | None) -> RunLog:
    """A new folder `[name___]YYYY.MM.DD-HHMMSS`, with `-2`, `-3`... if others began in the same second."""
    stem, number = (f"{name}___" if name else "") + time.strftime("%Y.%m.%d-%H%M%S"), 1
    try:
        out = out_dir.absolute()
        out.mkdir(parents=True, exist_ok=True)
        while True:
            folder = out / (stem if number == 1 else f"{stem}-{number}")
            try:
                folder.mkdir()
                break
            except FileExistsError:
                number += 1
        run = RunLog(folder, folder / f"{folder.name}.log")
        run.file.touch()
        run.configs.mkdir()
    except OSError as error:
        raise OutputError(f"--out-dir {out_dir} cannot be written: {in_words(error)}; give another folder") from error
    return run


def _save_configs(folder: Path, settings: str, inputs: Iterable[Path | None]) -> None:
    write_text(folder / "run_config.yaml", settings, "settings")
    for source in inputs:
        if source is not None and source.is_file():
            taken = (folder / source.name).exists()
            copy = folder / (f"copy_of_{source.name}" if taken else source.name)
            write_whole(copy, functools.partial(shutil.copyfile, source), "settings")


if TYPE_CHECKING:
    _StreamHandler = logging.StreamHandler[Any]
else:  # Python 3.10 cannot subscript it
    _StreamHandler = logging.StreamHandler


class _Console(_StreamHandler):
    """Bare messages on stdout; a progress bar steps aside for them."""

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)


@contextlib.contextmanager
def _handlers(file: Path, verbose: bool) -> Iterator[Stream]:
    """The root logger's handlers and level for the time of a run: of others, nothing below a warning is shown."""
    stack = contextlib.ExitStack()
    log = stack.enter_context(log_stream(file))
    to_file, console = logging.StreamHandler(log), _Console(sys.stdout)
    to_file.setFormatter(logging.Formatter("%(asctime)s - %(message)s"))
    console.addFilter(lambda record: not getattr(record, "file_only", False))
    root = logging.getLogger()
    before = {logger: logger.level for logger in (root, _log, _environment_log)}
    root.setLevel(logging.WARNING)
    _log.setLevel(logging.DEBUG if verbose else logging.INFO)
    _environment_log.setLevel(logging.DEBUG)
    for handler in (to_file, console):
        root.addHandler(handler)
    try:
        yield log
    finally:
        for handler in (to_file, console):
            root.removeHandler(handler)
        stack.close()
        for logger, level in before.items():
            logger.setLevel(level)


@contextlib.contextmanager
def _logged_warnings() -> Iterator[None]:
    """Sends Python's warnings to the log, each text once."""
    seen: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        text = f"{category.__name__}: {message}"
        if text not in seen:
            seen.add(text)
            _log.warning(text)

    before = warnings.showwarning
    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before


def _link_latest(run: RunLog) -> None:
    """Points `latest_log_dir` and `latest_log_file` of the current folder at this run, where that is possible.

    Only a link is replaced: a file or folder of that name is the user's own.
    """
    for name, target in (("latest_log_dir", run.folder), ("latest_log_file", run.file)):
        if os.path.lexists(name) and not os.path.islink(name):
            _log.warning("Warning: %s is no link to a run but yours, and stays; rename it to have the link", name)
            continue
        try:
            replace_whole(Path(name), operator.methodcaller("symlink_to", target))
        except OSError as error:
            _log.info("The link %s was not updated: %s", name, in_words(error))


def _log_failure(error: BaseException, verbose: bool) -> None:
    """Writes to the file why the run ended."""
    if isinstance(error, KeyboardInterrupt):
        _log.error("Interrupted. %s", error, extra=FILE_ONLY)
    elif isinstance(error, QlibError):
        _log.error("error: %s", error, extra=FILE_ONLY, exc_info=verbose)
    elif isinstance(error, Exception):
        _log.error("The run failed.", extra=FILE_ONLY, exc_info=True)


def _environment(cpu: bool) -> dict[str, str]:
    """What a report of a problem should tell."""
    return {
        "Command line": " ".join(sys.argv),
        "Working folder": os.getcwd(),
        "System": platform.platform(),
        "CPUs": f"{os.cpu_count()} ({platform.processor() or platform.machine()})",
        "GPUs": "not used (--cpu)" if cpu else _gpus(),
        "Python": sys.version.split()[0],
        **{package: _version(package) for package in _PACKAGES},
        "Git": _git_revision(),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _gpus() -> str:
    import torch

    return ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())) or "none"


def _git_revision() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "not a git checkout"
