"""SECURITY.md names tests that exist, and the limits that hold."""

from __future__ import annotations

import re

import pytest
from runs import ROOT

from qlib import errors, values, yaml_tree
from qlib.cli import _MOST_NAMES
from qlib.config.layers import patterns

PAGE = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
TESTS = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "tests").rglob("test_*.py")))


def test_the_tests_that_hold_the_promises_exist() -> None:
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    assert len(named) >= 5
    assert {name for name in named if f"def {name}(" not in TESTS} == set()


def test_the_files_that_it_links_to_exist() -> None:
    linked = set(re.findall(r"\]\(([^)#]+)", PAGE))
    assert {name for name in linked if not (ROOT / name).is_file()} == set()


@pytest.mark.parametrize(
    "words",
    [
        f"{yaml_tree._MAX_BYTES >> 20} MiB; {yaml_tree._MAX_DEPTH} levels; {yaml_tree.MOST_SETTINGS:,} values",
        f"{yaml_tree._MAX_VALUES:,} in plans and statistics",
        f"2^{yaml_tree._MAX_INTEGER.bit_length()} - 1; a count of anything 10^{len(str(values._MOST)) - 1}",
        f"{patterns._LONGEST:,} characters; one second",
        f"| {_MOST_NAMES:,} |",
        f"{errors._LONGEST:,} in a sentence, {errors._MOST_PROBLEMS} problems in full",
    ],
)
def test_the_limits_are_those_of_the_code(words: str) -> None:
    assert words in PAGE
