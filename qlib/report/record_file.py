"""The record of a run as `report.json`: its text, its schema, and the reader, which believes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qlib.errors import DataError
from qlib.report.plain import from_plain, schema, to_plain
from qlib.report.record import VERSION, RunReport
from qlib.system import in_words

__all__ = ["REPORT", "read_report", "report_schema", "report_text"]

REPORT = "report.json"
"""The name of the file in a run's folder."""

_MOST_BYTES = 64 * 2**20


def report_text(report: RunReport) -> str:
    """The text of `report.json`: a line for each entry of a list, so that `diff` shows what changed."""
    plain = to_plain(report)
    return "{\n" + ",\n".join(f"{json.dumps(key)}: {_lines(each)}" for key, each in plain.items()) + "\n}\n"


def _lines(value: Any) -> str:
    """A list or mapping with a line for each entry.

    >>> print(_lines([{"a": 1}, {"b": []}]))
    [
    {"a": 1},
    {"b": []}
    ]
    """
    if not value or not isinstance(value, (dict, list)):
        return json.dumps(value)
    if isinstance(value, list):
        return "[\n" + ",\n".join(json.dumps(each) for each in value) + "\n]"
    return "{\n" + ",\n".join(f"{json.dumps(key)}: {json.dumps(each)}" for key, each in value.items()) + "\n}"


def read_report(path: Path) -> RunReport:
    """The record in a `report.json`, or in that of a run's folder.

    Raises:
        DataError: it cannot be read, or is no record of a run.
    """
    file = path / REPORT if path.is_dir() else path
    try:
        return _parsed(_text(file))
    except OSError as error:
        raise DataError(
            f"the report {str(file)!r} cannot be read: {in_words(error)}; give the folder of a run"
        ) from error
    except (ValueError, RecursionError) as error:
        why = "it is nested too deep" if isinstance(error, RecursionError) else error
        raise DataError(f"{str(file)!r} is no report of a run: {why}; run the command again to have one") from error


def _text(file: Path) -> str:
    with file.open("rb") as opened:
        content = opened.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise ValueError(f"it has more than {_MOST_BYTES:,} bytes")
    return content.decode("utf-8")


def _parsed(text: str) -> RunReport:
    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no JSON")

    try:
        tree = json.loads(text, parse_constant=refuse)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno} is not valid JSON") from error
    version = tree.get("version") if isinstance(tree, dict) else None
    if type(version) is int and version > VERSION:
        raise ValueError(f"it is of version {version}, and this program reads {VERSION}: update it")
    report: RunReport = from_plain(RunReport, tree)
    return report


def report_schema() -> str:
    """The text of ``docs/report.schema.json``."""
    return json.dumps(schema(RunReport), indent=1) + "\n"
