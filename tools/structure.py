"""The structure of the library: rooms, floors and arrows of its import graph, circles, and the sizes of its parts.

    python tools/structure.py [CHECKOUT]

A room is a package of qlib or a module beside them; an arrow from one to another stands for all imports between them;
the floor of a room is one above the highest that it imports from.
"""

from __future__ import annotations

import ast
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

from tabulate import tabulate


def room_of(path: Path, library: Path) -> str:
    """The package of a file, or its own name where it is in none."""
    return path.relative_to(library).parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> Iterator[str]:
    """The rooms that a file imports from."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "qlib":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("qlib."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("qlib."))


def floors(rooms: dict[str, set[str]]) -> list[list[str]]:
    """The rooms of each floor, from the ground; those of circles, and above them, are missing."""
    found: list[list[str]] = []
    left = dict(rooms)
    while floor := sorted(room for room, below in left.items() if not below & set(left)):
        found.append(floor)
        for room in floor:
            del left[room]
    return found


def main() -> None:
    """Prints it."""
    library = (Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1]) / "qlib"
    rooms: dict[str, set[str]] = {}
    lines: list[int] = []
    lengths: list[int] = []
    for path in sorted(library.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        tree, room = ast.parse(text), room_of(path, library)
        if room == "__init__":
            continue
        rooms.setdefault(room, set()).update(set(imported(tree)) - {room})
        lines.append(len(text.splitlines()))
        lengths += [
            node.end_lineno - node.lineno + 1
            for node in ast.walk(tree)
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno
        ]
    stories = floors(rooms)
    lengths.sort()
    rows = [
        ["rooms", len(rooms)],
        ["floors", len(stories)],
        ["arrows", sum(map(len, rooms.values()))],
        ["rooms in circles, or above them", len(rooms) - sum(map(len, stories))],
        ["lines of a file: median, most", f"{statistics.median(lines):g}, {max(lines)}"],
        [
            "lines of a function: median, 99 %, most",
            f"{statistics.median(lengths):g}, {lengths[len(lengths) * 99 // 100]}, {lengths[-1]}",
        ],
        ["functions", len(lengths)],
    ]
    print(tabulate(rows, tablefmt="plain"))
    for number, floor in enumerate(stories, 1):
        print(f"floor {number}: {', '.join(floor)}")


if __name__ == "__main__":
    main()
