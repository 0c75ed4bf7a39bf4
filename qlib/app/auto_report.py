"""What `--auto` tells of its trials."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from tabulate import tabulate

from qlib.app.job import Job
from qlib.app.report import record
from qlib.files import write_csv
from qlib.report import record_parts
from qlib.search.ladder import Judgement, Target

__all__ = ["Trial", "report_trials", "tell_layers"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trial:
    """A rung that was tried: what the best so far became with it, how good that is, and the seconds it took."""

    rung: str
    settings: str
    judgement: Judgement
    seconds: float
    folder: Path


def report_trials(job: Job, target: Target, trials: Sequence[Trial], best: int) -> None:
    """Writes ``auto.csv``, logs it as a table, and how near the best trial came to the target."""
    names = [each.name for each in fields(Judgement)]
    rows = [(each.rung, each.settings, *astuple(each.judgement), each.seconds) for each in trials]
    write_csv(job.run.folder / "auto.csv", ("rung", "settings", *names, "seconds"), rows)
    shown = [
        ("*" if index == best else "", rung, f"{agreement:.2f}", f"{drop:.2f}", f"{lost:.5f}", f"{seconds:.0f}")
        for index, (rung, _, agreement, drop, lost, seconds) in enumerate(rows)
    ]
    headers = ("", "Tried", "Agreement %", "Top1 drop", "Divergence", "Seconds")
    _log.info("%s", tabulate(shown, headers, tablefmt="psql", disable_numparse=True))
    tried = tuple(record_parts.Trial(rung, settings, *rest) for rung, settings, *rest in rows)
    record(job, auto=record_parts.Trials(tried, best, str(target), target.met(trials[best].judgement)))
    judged = trials[best].judgement
    met = "reached" if target.met(judged) else "NOT reached"
    _log.info("Best: %s (%s). Target %s: %s", trials[best].rung, trials[best].settings or "as asked", target, met)
    if nearest := target.missing(judged):
        _log.info("The best trial reaches %s", nearest)


def tell_layers(lost: Mapping[str, float], most: int = 5) -> None:
    """Logs which layers lose most of what all lose, each alone: these would gain most by more bits."""
    total = sum(lost.values())
    ranked = [name for name in sorted(lost, key=lambda name: -lost[name])[:most] if lost[name] > 0]
    if ranked:
        listed = ", ".join(f"{name} ({100 * lost[name] / total:.0f} %)" for name in ranked)
        _log.info("Most is lost in %s: more bits there help most", listed)
