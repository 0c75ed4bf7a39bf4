"""Files of every kind, cut short and with flipped bytes: an error of ours, or what was written."""

from __future__ import annotations

import pytest
from damaged import Kind, kinds, measure


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kind]:
    return kinds(tmp_path_factory.mktemp("kinds"))


@pytest.mark.parametrize("seed", [0, 1])
def test_damage_is_told_or_does_no_harm(files: dict[str, Kind], seed: int) -> None:
    for name, kind in files.items():
        counts = measure(kind, cuts=4, flips=12, seed=seed)
        known = {"refused", "same"} | (set() if kind.checked else {"other"})
        assert set(counts) <= known, (name, counts)
        assert counts["refused"] >= 4, name
