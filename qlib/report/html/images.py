"""The images of a run on its page: those whose prediction changed, and what classes are taken for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qlib.report.html.markup import Markup, join, tag
from qlib.report.html.numbers import count
from qlib.report.html.tables import Cell, Row, figure_cell, heat, table
from qlib.report.record import ChangedImage, Confusion, RunReport

__all__ = ["changed_section", "class_name", "confusion_section"]

_MOST_CLASSES, _MOST_PAIRS = 20, 20


def class_name(classes: Sequence[str], index: int) -> str:
    """The name of a class.

    >>> class_name(("cat",), 0), class_name((), 3)
    ('cat', '3')
    """
    return classes[index] if 0 <= index < len(classes) else str(index)


def changed_section(report: RunReport) -> Markup | None:
    """Thumbnails with both predictions and margins, those first of which the model before was surest."""
    if not report.changed or not report.versus or report.tested is None:
        return None
    versus = report.versus[0]
    changed = round(versus.samples * (100 - versus.agreement) / 100)
    told = (
        f"{changed:,} of {versus.samples:,} predictions differ between {versus.other} and {versus.model}; here are"
        f" {len(report.changed)}, those first of which {versus.other} was surest. A margin is the probability of the"
        " predicted class less that of the next one."
    )
    items = [_image(each, report.tested.classes, versus.other, versus.model) for each in report.changed]
    return join([tag("p", told), tag("ul", *items, class_="images"), _flips(report)])


def _image(each: ChangedImage, classes: Sequence[str], other: str, model: str) -> Markup:
    image = None
    if each.thumbnail:
        source = f"data:image/jpeg;base64,{each.thumbnail}"
        image = tag("img", src=source, alt=f"image of class {class_name(classes, each.label)}", loading="lazy")
    lines = (_line(each, classes, name, predicted, margin) for name, predicted, margin in (
        (other, each.before, each.margin_before), (model, each.after, each.margin_after)))  # fmt: skip
    label = tag("div", "class ", tag("strong", class_name(classes, each.label)))
    return tag("li", image, label, *lines, tag("div", each.image, class_="soft"))


def _line(each: ChangedImage, classes: Sequence[str], name: str, predicted: int, margin: float) -> Markup:
    right = predicted == each.label
    verdict = tag("span", class_name(classes, predicted), " ✓" if right else " ✗", class_="good" if right else "bad")
    return tag("div", f"{name}: ", verdict, f", margin {margin:.2f}")


def _flips(report: RunReport) -> Markup:
    flips = sorted(report.versus[0].flips.items(), key=lambda item: -item[1])[:_MOST_PAIRS]
    rows = ((name, figure_cell(number, count(number))) for name, number in flips)
    return tag("details", tag("summary", "Changed predictions by class"), table(("Class", "Images"), rows, "Changed"))


def confusion_section(report: RunReport) -> Markup | None:
    """Before and after: the matrix of few classes, the pairs of many that are confused most."""
    if not report.confusion or report.tested is None:
        return None
    classes = report.tested.classes
    draw = _matrix if len(classes) <= _MOST_CLASSES else _pairs
    return tag("div", *(tag("div", draw(each, classes)) for each in reversed(report.confusion[:2])), class_="side")


def _matrix(each: Confusion, classes: Sequence[str]) -> Markup:
    counts = {(label, predicted): number for label, predicted, number in each.counts}
    highest = max((number for (label, predicted), number in counts.items() if label != predicted), default=0)

    def cell(label: int, predicted: int) -> Cell:
        number = counts.get((label, predicted), 0)
        hot = heat(number, highest) if label != predicted else Cell(number, number, numeric=True)
        return Cell(str(number or ""), number, hot.heat, numeric=True)

    rows: Iterator[Row] = (
        (name, *(cell(label, predicted) for predicted in range(len(classes)))) for label, name in enumerate(classes)
    )
    return table(("Class", *classes), rows, f"{each.model}: images of a class (row) by what they are taken for")


def _pairs(each: Confusion, classes: Sequence[str]) -> Markup:
    wrong = [row for row in each.counts if row[0] != row[1]][:_MOST_PAIRS]
    rows = (
        (class_name(classes, label), class_name(classes, predicted), figure_cell(number, count(number)))
        for label, predicted, number in wrong
    )
    return table(("Class", "Taken for", "Images"), rows, f"{each.model}: the pairs that are confused most")
