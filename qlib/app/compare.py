"""`--compare`: one page and one table of several runs, from their reports alone."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from tabulate import tabulate

from qlib.errors import DataError, UsageError
from qlib.files import write_csv, write_text
from qlib.report.comparison import Side, front, pairs, sides
from qlib.report.html.compare import comparison_page
from qlib.report.record import RunReport
from qlib.report.record_file import REPORT, read_report
from qlib.runlog import RunLog

__all__ = ["compare_runs"]

_log = logging.getLogger(__name__)

_MOST_RUNS = 200


def compare_runs(paths: Sequence[Path], run: RunLog) -> None:
    """Logs a table, writes ``compare.csv``, ``pairs.csv`` and ``compare.html``.

    Raises:
        UsageError: there are fewer than two runs, or too many.
        DataError: a report cannot be read, or the runs cannot be compared.
    """
    found = sides(_reports(paths))
    _write_tables(run.folder, found)
    page = run.folder / "compare.html"
    write_text(page, comparison_page(found), "comparison")
    _log.info("Comparison of %d runs: %s", len(found), page)


def _reports(paths: Sequence[Path]) -> dict[str, RunReport]:
    """The records by the names of their runs; of two runs with the same name the second gets a number."""
    files = list(dict.fromkeys(file.absolute() for path in paths for file in _files(path)))
    if not 2 <= len(files) <= _MOST_RUNS:
        raise UsageError(f"--compare found {len(files)} runs; give 2 to {_MOST_RUNS}, or a folder that holds such")
    found: dict[str, RunReport] = {}
    for file in files:
        name = file.parent.name if file.name == REPORT else file.stem
        number = 1 + sum(each == name or each.startswith(f"{name} (") for each in found)
        found[name if number == 1 else f"{name} ({number})"] = read_report(file)
    return found


def _files(path: Path) -> Iterator[Path]:
    """The reports that a word of the command line stands for: a file, a run's folder, a folder of such."""
    if not path.is_dir() or (path / REPORT).exists():
        yield path / REPORT if path.is_dir() else path
        return
    try:
        inside = sorted(each / REPORT for each in path.iterdir() if (each / REPORT).is_file() and not each.is_symlink())
    except OSError as error:
        raise DataError(f"--compare {str(path)!r} cannot be read: {error.strerror}; give another folder") from error
    if not inside:
        raise DataError(f"--compare {str(path)!r} holds no {REPORT}, and no folder of a run; give the folder of a run")
    yield from inside


def _write_tables(folder: Path, runs: Sequence[Side]) -> None:
    best = front([each.bytes for each in runs], [each.result.top1 for each in runs])
    headers = (
        *("run", "arch", "model", "samples", "top1", "top1_low", "top1_high", "top5", "loss", "agreement_fp32"),
        *("bytes", "macs", "integer_share", "seconds", "best_at_its_bytes"),
    )
    rows = [
        (each.name, each.report.origin.arch, result.model, result.samples, result.top1, result.low, result.high,
         result.top5, result.loss, each.agreement, each.bytes, each.macs, each.in_integers, each.report.origin.seconds,
         index in best)
        for index, each in enumerate(runs)
        for result in (each.result,)
    ]  # fmt: skip
    write_csv(folder / "compare.csv", headers, rows)
    both = [tuple(vars(each).values()) for each in pairs(runs)]
    write_csv(folder / "pairs.csv", ("first", "second", "agreement", "low", "high", "lost", "won", "mcnemar_p"), both)
    shown = [
        ("*" * (index in best), each.name, f"{result.top1:.2f}", f"{result.low:.2f} to {result.high:.2f}",
         f"{result.loss:.5f}", f"{each.bytes:,}")
        for index, each in enumerate(runs)
        for result in (each.result,)
    ]  # fmt: skip
    heads = ("", "Run", "Top1", "95 % interval", "Loss", "Bytes of weights")
    _log.info("%s", tabulate(shown, heads, tablefmt="psql", disable_numparse=True))
    _log.info("* no other run has as few bytes of weights and as high a Top1")
