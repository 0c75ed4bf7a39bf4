"""Sweeps over many models: each in a process of its own, and a results file that a broken sweep goes on from."""

from __future__ import annotations

import csv
import multiprocessing
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

__all__ = ["append_row", "apart", "read_rows", "reason_of", "start_processes_with"]

R = TypeVar("R")


def start_processes_with(*modules: str) -> None:
    """What each process has imported when it starts: importing torch takes seconds."""
    multiprocessing.set_start_method("forkserver")
    multiprocessing.set_forkserver_preload(list(modules))


def apart(function: Callable[..., R], *args: Any, limit: float | None = None) -> R | str:
    """What a function returns, run in a process of its own; why not, where it fails or takes over `limit` seconds."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.Process(target=_answer, args=(sender, function, args))
    process.start()
    sender.close()
    try:
        if not receiver.poll(limit):
            return f"stopped after {limit:.0f} s"
        answer: R | str = receiver.recv()
        return answer
    except EOFError:
        process.join()
        return f"exit code {process.exitcode}"
    finally:
        process.kill()
        process.join()


def _answer(sender: Connection, function: Callable[..., Any], args: Sequence[Any]) -> None:
    try:
        answer = function(*args)
    except Exception as error:  # a failure is a row too
        traceback.print_exc()
        answer = reason_of(error)
    sender.send(answer)


def reason_of(error: Exception) -> str:
    """An error in one line.

    >>> reason_of(ValueError("no such\\nmodel"))
    'ValueError: no such model'
    """
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def read_rows(path: Path, empty: R) -> dict[str, R]:
    """The rows of a results file, by model; none where it is absent. `empty` is a row without results."""
    if not path.exists():
        return {}
    kind, types = type(empty), {name: type(value) for name, value in asdict(empty).items()}
    with open(path, newline="", encoding="utf-8") as file:
        rows = [kind(**{key: types[key](value) for key, value in row.items()}) for row in csv.DictReader(file)]
    return {row.model: row for row in rows}


def append_row(path: Path, row: Any) -> None:
    """Adds a row to the results file."""
    new = not path.exists()
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(row)])
        if new:
            writer.writeheader()
        writer.writerow(asdict(row))
