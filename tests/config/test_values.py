"""The readers of one value: the doors that share them allow the same, and refuse what only looks alike."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlib.config.flags import kinds
from qlib.config.layers.keys import whole as whole_of_yaml
from qlib.errors import UsageError
from qlib.values import FLAG, Interval, Value, choice, real, text, whole

BOUNDS = st.integers(-20, 20)


@given(BOUNDS, BOUNDS, st.integers(-30, 30))
def test_a_flag_and_a_file_allow_the_same_whole_numbers(low: int, high: int, number: int) -> None:
    """Law: the text of a number is allowed exactly where the number is."""
    value = whole(low, high)
    assert value.accepts(number) == (low <= number <= high)
    assert whole_of_yaml(low, high, null=None).accepts(number) == value.accepts(number)
    kind = kinds.whole(low, high)
    if value.accepts(number):
        assert kind.read(str(number)) == number == value.read(number)
    else:
        with pytest.raises(UsageError, match=rf"^--n '{number}' is not allowed: it must be {kind.allowed}$"):
            kind.value("--n", str(number))


@given(st.floats(-5, 5), st.floats(0, 5), st.booleans(), st.booleans(), st.floats())
def test_an_interval_holds_what_its_words_say(
    low: float, width: float, open_low: bool, open_high: bool, number: float
) -> None:
    interval = Interval(low, low + width, open_low, open_high)
    words = str(interval)
    assert words.startswith("above") == open_low
    assert ("below" in words) == open_high
    inside = low < number < low + width or (number == low and not open_low) or (number == low + width and not open_high)
    on_open_end = (open_low and number == low) or (open_high and number == low + width)
    assert (number in interval) == (inside and not on_open_end)


@pytest.mark.parametrize(
    ("value", "wrong"),
    [
        (whole(0, 1), True),
        (whole(0, 9), 3.0),
        (whole(0, 9), "3"),
        (whole(0), None),
        (real(Interval(0, 2)), True),
        (real(Interval(0, 2)), "1"),
        (real(Interval(0)), math.inf),
        (real(Interval(0)), math.nan),
        (choice(("a",)), None),
        (choice(("a",), any_case=False), "A"),
        (text("a name"), ""),
        (text("a name"), 3),
        (FLAG, 1),
        (FLAG, "true"),
    ],
)
def test_what_only_looks_alike_is_refused(value: Value, wrong: object) -> None:
    assert not value.accepts(wrong)
    assert value.or_null("or null").accepts(wrong) == (wrong is None)
