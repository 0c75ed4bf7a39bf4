"""The code of users: whatever it raises becomes one sentence that names the line of their file.

A model file, its function, the network that it returns and its transforms may fail in any way, also by `sys.exit`; only
Ctrl-C stays what it is.
"""

from __future__ import annotations

import contextlib
import os
import re
import sysconfig
import traceback
import warnings
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import TracebackType
from typing import Any

from qlib.errors import ModelError, QlibError
from qlib.system import shortage

__all__ = [
    "UsersFile",
    "definition_of",
    "layer_of",
    "line_of",
    "reason_of",
    "settings_kept",
    "users_code",
    "users_models",
]

_OURS = str(Path(__file__).parent)
_PYTHONS = re.compile(rf"<|{re.escape(sysconfig.get_path('stdlib'))}[/\\]|.*[/\\](site|dist)-packages[/\\]")
_NOTED = re.compile(r'^File "(.+)", line (\d+), in ', re.MULTILINE)  # by torch.fx, of the model's own lines
_LONGEST = 300


class UsersFile(SourceFileLoader):
    """What loads a model file: its frames are known by it."""


@contextlib.contextmanager
def users_code(what: str, remedy: str = "correct it there", function: object = None) -> Iterator[None]:
    """Where the code of a user runs. Raises ModelError, as the sentence ``{what} with ... at FILE:LINE; {remedy}``.

    Mistakes that have their sentence already pass, and so does Ctrl-C; a lack of memory has a sentence of its own. The
    line is that of `function` where the error came by none of the user's, as for arguments that it does not take.

    >>> with users_code("'net.py:make' fails"):
    ...     raise SystemExit(0)
    Traceback (most recent call last):
    qlib.errors.ModelError: 'net.py:make' fails with SystemExit (0); correct it there
    """
    try:
        yield
    except (QlibError, KeyboardInterrupt):
        raise
    except BaseException as error:  # a user's code may raise anything
        if refused := shortage(error):
            raise refused from error
        raise ModelError(f"{what} with {reason_of(error)}{_place(error, function)}; {remedy}") from error


@contextlib.contextmanager
def users_models(of_users: bool) -> Iterator[None]:
    """Where a model runs that may be a user's: what is raised by way of a model file is a mistake in it.

    So is, for a model that is `of_users`, what a graph raises that was captured of it: there is no end to what models
    may do, and the layer is what helps.
    """
    try:
        yield
    except (QlibError, KeyboardInterrupt):
        raise
    except BaseException as error:
        if any(isinstance(frame.tb_frame.f_globals.get("__loader__"), UsersFile) for frame in _frames(error)):
            with users_code("the run fails in a model file,"):
                raise
        if of_users and shortage(error) is None and any(_is_graphs(frame) for frame in _frames(error)):
            with users_code("the captured model cannot be computed, and fails", "write that layer in another way"):
                raise
        raise


@contextlib.contextmanager
def settings_kept() -> Iterator[None]:
    """Where a model file is loaded, or builds its model: what it sets for the whole process is set back.

    These are the current folder, the filters of warnings, torch's default dtype and device, and whether it makes
    gradients.
    """
    import torch

    folder, dtype = os.getcwd(), torch.get_default_dtype()
    with warnings.catch_warnings(), torch.set_grad_enabled(torch.is_grad_enabled()):
        try:
            yield
        finally:
            os.chdir(folder)
            torch.set_default_dtype(dtype)
            if torch.get_default_device() != torch.device("cpu"):
                torch.set_default_device(None)


def reason_of(error: BaseException) -> str:
    """The kind of an error and its own text, in one line and not too long.

    >>> reason_of(ValueError("no such  depth")), reason_of(MemoryError())
    ('ValueError (no such depth)', 'MemoryError')
    """
    text = " ".join(_text(error).partition("\n\nWhile executing")[0].split())
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
    return f"{type(error).__name__} ({text})" if text else type(error).__name__


def line_of(error: BaseException) -> str:
    """The last line of a user's file that an error came by, as ``FILE:LINE``; empty where there is none."""
    if isinstance(error, SyntaxError) and error.filename and not _PYTHONS.match(error.filename):
        return f"{error.filename}:{error.lineno}" if error.lineno else error.filename
    lines = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
    lines = [f"{file}:{line}" for file, line in _NOTED.findall(_text(error))] + lines
    return next((line for line in reversed(lines) if not line.startswith(_OURS) and not _PYTHONS.match(line)), "")


def layer_of(error: BaseException, model: Any = None) -> str:
    """The path of the module of `model` (the outermost that ran) in whose forward method an error arose, or empty."""
    running: list[Any] = [frame.tb_frame.f_locals.get("self") for frame in _frames(error)]
    modules = [each for each in running if hasattr(each, "named_modules") and "_modules" in vars(each)]
    root = modules[0] if model is None and modules else model
    paths = {id(module): path for path, module in root.named_modules()} if root is not None else {}
    return next((paths[id(module)] for module in reversed(modules) if id(module) in paths), "")


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # even this may fail
        return ""


def _place(error: BaseException, function: object) -> str:
    layer, line = layer_of(error), line_of(error) or definition_of(function)
    return (f" in layer {layer!r}" if layer else "") + (f" at {line}" if line else "")


def definition_of(function: object) -> str:
    """The first line of a user's function, as ``FILE:LINE``; empty for one of others."""
    code = getattr(function, "__code__", None)
    line = f"{code.co_filename}:{code.co_firstlineno}" if code is not None else ""
    return "" if line.startswith(_OURS) or _PYTHONS.match(line) else line


def _frames(error: BaseException) -> Iterator[TracebackType]:
    trace = error.__traceback__
    while trace is not None:
        yield trace
        trace = trace.tb_next


def _is_graphs(frame: TracebackType) -> bool:
    """Whether a frame runs the code of a captured graph, or interprets it."""
    name = frame.tb_frame.f_code.co_filename
    return name.startswith("<eval_with_key>") or Path(name).parts[-2:] == ("fx", "interpreter.py")
