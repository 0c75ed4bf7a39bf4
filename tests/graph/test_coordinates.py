"""Channel classes: what must be kept or removed together."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from thinnable import CASES, IMAGES
from torch import nn

from qlib.graph import fold
from qlib.graph.capture import capture
from qlib.graph.coordinates import ChannelClasses, channel_classes


def rows(classes: ChannelClasses) -> dict[str, int]:
    """The axes that consecutive classes share, as ``a.weight:0 b.weight:1``, and how many classes there are."""
    found = {}
    for numbers, entries in classes.rows():
        names = [f"{name}:{axis}" + (f"x{len(at)}" if len(at) > 1 else "") for name, axis, at in entries]
        found[" ".join(names)] = len(numbers)
    return found


@pytest.mark.parametrize(("make", "expected"), CASES)
def test_classes(make: Callable[[], nn.Module], expected: dict[str, int]) -> None:
    found = rows(channel_classes(capture(make(), torch.zeros(IMAGES))))

    def in_order(table: dict[str, int]) -> dict[str, int]:
        return {" ".join(sorted(names.split())): count for names, count in table.items()}

    assert in_order(found) == in_order(expected)


def test_only_what_a_mean_is_over_is_not_neutral() -> None:
    made = {case.id: case.values[0]() for case in CASES}
    neutral = {name: channel_classes(capture(model, torch.zeros(IMAGES))).neutral.all() for name, model in made.items()}
    assert [name for name, of_all in neutral.items() if not of_all] == ["tokens and places"]


def test_classes_are_those_of_the_folded_graph() -> None:
    model = CASES[0].values[0]()
    dense = channel_classes(capture(model, torch.zeros(IMAGES)))
    folded = channel_classes(fold(model, torch.zeros(IMAGES)).graph)
    assert rows(folded) == {"a.weight:0 a.bias:0 b.weight:1": 4, "b.weight:0 last.weight:1": 6}
    assert folded.of("b.weight", 1).tolist() == dense.of("b.weight", 1).tolist() == [1, 2, 3, 4]
