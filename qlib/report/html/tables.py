"""Tables of a page: cells that know how they sort."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from qlib.report.html.markup import Child, Markup, tag
from qlib.report.html.numbers import number

__all__ = ["Cell", "Row", "figure_cell", "heat", "table"]


@dataclass(frozen=True)
class Cell:
    """A cell: what it holds; the number that it sorts by, where it is one; how hot it is, 0 to 1."""

    content: Child
    value: float | None = None
    heat: float | None = None
    numeric: bool = False


Row: TypeAlias = "Sequence[Cell | Child]"


def figure_cell(value: float | None, text: str | None = None) -> Cell:
    """A cell of a number, which may be unknown."""
    return Cell(number(value) if text is None else text, value, numeric=True)


def heat(value: float, highest: float) -> Cell:
    """A cell whose color tells how near a number, 0 or more, is to the highest one."""
    share = min(max(value / highest, 0.0), 1.0) if highest > 0 else 0.0
    return Cell(number(value, 3), value, share**0.5 * 0.6, numeric=True)


def table(heads: Sequence[str], rows: Iterable[Row], caption: str, *, id_: str = "", best: int = -1) -> Markup:
    """A table whose first column names the rows; with an id it can be sorted, and filtered by a box above it."""
    cells = [[each if isinstance(each, Cell) else Cell(each) for each in row] for row in rows]
    numeric = [any(row[column].numeric for row in cells) for column in range(len(heads))]
    head = [tag("th", text, scope="col", class_=_class(column, right)) for column, (text, right) in
            enumerate(zip(heads, numeric, strict=True))]  # fmt: skip
    body = [
        tag("tr", *(_cell(column, each) for column, each in enumerate(row)), class_="best" if index == best else None)
        for index, row in enumerate(cells)
    ]
    found = tag(
        "table",
        tag("caption", caption),
        tag("thead", tag("tr", *head)),
        tag("tbody", *body),
        id=id_ or None,
        class_="sorts" if id_ else None,
    )
    scrolling = tag("div", found, class_="scroll", tabindex=0, role="region", aria_label=caption)
    return tag("div", _tools(id_, len(cells)), scrolling) if id_ else scrolling


def _tools(id_: str, rows: int) -> Markup:
    """The box that filters a table; without scripts it is not shown."""
    box = tag("input", type="search", data_filters=id_)
    told = tag("span", f"{rows} of {rows} shown", id=f"{id_}-shown", role="status")
    return tag("div", tag("label", "Filter rows by words: ", box), told, class_="tools", hidden=True)


def _class(column: int, right: bool) -> str | None:
    return "name" if column == 0 else "n" if right else None


def _cell(column: int, cell: Cell) -> Markup:
    if column == 0:
        return tag("th", cell.content, scope="row", class_="name", data_value=cell.value)
    hot = {} if cell.heat is None else {"style": f"--h:{cell.heat:.2f}"}
    classes = " ".join(["n"] * cell.numeric + ["heat"] * (cell.heat is not None))
    value = None if cell.value is None else f"{cell.value:.6g}".replace("inf", "Infinity")
    return tag("td", cell.content, class_=classes or None, data_value=value, **hot)
