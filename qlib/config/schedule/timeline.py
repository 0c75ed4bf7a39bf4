"""What a training schedule does when, as a table for people to check before they spend days on it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from tabulate import tabulate

from qlib.config.schedule.types import Component, PolicySpec, Schedule

__all__ = ["timeline"]

_HEADERS = ["Component", "Class", "Epochs", "Every", "What"]


def timeline(schedule: Schedule, epochs: int) -> str:
    """One row a policy, in the order in which they act, for a run whose last epoch is ``epochs - 1``.

    Where there are several policies of quantizers, a second table says which of them act in which epochs.

    >>> lr = Component("lr_schedulers", "lr", "StepLR", {"step_size": 4})
    >>> print(timeline(Schedule((PolicySpec(lr, 2, 200),)), 10))
    +-------------+---------+-----------------------------+---------+-------------+
    | Component   | Class   | Epochs                      | Every   | What        |
    |-------------+---------+-----------------------------+---------+-------------|
    | lr          | StepLR  | 2 to 9 (to 199 in the file) | epoch   | step_size 4 |
    +-------------+---------+-----------------------------+---------+-------------+
    """
    rows = [
        [
            policy.component.name,
            policy.component.cls,
            _epochs(policy, epochs),
            _every(policy),
            _what(policy.component),
        ]
        for policy in schedule.policies
    ]
    table = tabulate(rows, _HEADERS, tablefmt="psql", disable_numparse=True)
    if len(schedule.of("quantizers")) < 2:
        return table
    spans = list(_quantizer_spans(schedule, epochs))
    return f"{table}\n{tabulate(spans, ['Epochs', 'Quantizers'], tablefmt='psql', disable_numparse=True)}"


def _epochs(policy: PolicySpec, epochs: int) -> str:
    """The epochs of a policy, cut at the end of the run.

    >>> component = Component("quantizers", "q", "DorefaQuantizer", {})
    >>> _epochs(PolicySpec(component, 3, 4), 10), _epochs(PolicySpec(component, 0, 41, 1, (0, 5, 40)), 10)
    ('3', '0, 5 (then 40 in the file)')
    >>> _epochs(PolicySpec(component, 35, 200), 10)
    'none (35 to 199 in the file)'
    """
    if policy.start >= epochs:
        return f"none ({', '.join(map(str, policy.epochs or ())) or _span(policy.start, policy.end - 1)} in the file)"
    if policy.epochs is not None:
        inside = ", ".join(str(epoch) for epoch in policy.epochs if epoch < epochs)
        cut = ", ".join(str(epoch) for epoch in policy.epochs if epoch >= epochs)
        return inside + f" (then {cut} in the file)" * bool(cut)
    return _span(policy.start, min(policy.end, epochs) - 1) + f" (to {policy.end - 1} in the file)" * (
        policy.end > epochs
    )


def _span(first: int, last: int) -> str:
    return f"{first}" if first == last else f"{first} to {last}"


def _every(policy: PolicySpec) -> str:
    often = "" if policy.frequency == 1 else f"{policy.frequency} epochs"
    if policy.args.get("per") == "step":
        return f"step, every {often}" if often else "step"
    return "listed" if policy.epochs else often or "epoch"


def _what(component: Component) -> str:
    """The settings, and how many overrides."""
    parts = [f"{key} {_text(key, value)}" for key, value in component.settings.items()]
    if component.rules:
        parts.append(f"{len(component.rules)} override" + "s" * (len(component.rules) > 1))
    return ", ".join(parts)


def _text(key: str, value: object) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if key == "weights" and isinstance(value, tuple):
        return f"of {len(value)} name" + "s" * (len(value) > 1)
    if isinstance(value, tuple):
        return "[" + ", ".join(_text(key, each) for each in value) + "]"
    if isinstance(value, dict):
        what = "layer" if key == "match" else "name"
        return f"of {len(value)} {what}" + "s" * (len(value) > 1)
    if key in ("bits_activations", "bits_weights") and value == 0:
        return "float"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _quantizer_spans(schedule: Schedule, epochs: int) -> Iterator[list[str]]:
    """Runs of epochs in which the same quantizers act, and their names."""

    def acting(epoch: int) -> str:
        names = [policy.component.name for policy in schedule.active(epoch) if policy.component.section == "quantizers"]
        return ", ".join(dict.fromkeys(names)) or "none: float"

    for names, group in groupby(range(epochs), acting):
        span = list(group)
        yield [_span(span[0], span[-1]), names]
