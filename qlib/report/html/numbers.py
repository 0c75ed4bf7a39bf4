"""Numbers as people read them."""

from __future__ import annotations

import math

__all__ = ["count", "number", "percent", "seconds", "size"]


def number(value: float | None, digits: int = 4) -> str:
    """A number to some significant digits; a dash for none.

    >>> number(0.123456), number(float("inf")), number(None), number(123456.7)
    ('0.1235', '∞', '-', '123,457')
    """
    if value is None or math.isnan(value):
        return "-"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


def count(value: int | None) -> str:
    """A whole number, with commas.

    >>> count(12345), count(None)
    ('12,345', '-')
    """
    return "-" if value is None else f"{value:,}"


def percent(share: float | None, digits: int = 1) -> str:
    """A share of 1 in percent; what is nearly all or nearly nothing is not rounded to it.

    >>> percent(0.5), percent(0.99999), percent(0.0001), percent(1.0)
    ('50.0 %', '> 99.9 %', '< 0.1 %', '100 %')
    """
    if share is None:
        return "-"
    step = 10**-digits
    if share in (0, 1):
        return f"{100 * share:.0f} %"
    if 100 * share < step or 100 * share > 100 - step:
        return f"< {step:g} %" if share < 0.5 else f"> {100 - step:g} %"
    return f"{100 * share:.{digits}f} %"


def size(value: int) -> str:
    """Bytes in the unit that leaves three digits.

    >>> size(999), size(1_234_567)
    ('999 B', '1.23 MB')
    """
    for unit in ("B", "kB", "MB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value = value / 1000  # type: ignore[assignment]
    return f"{value:.3g} GB"


def seconds(value: float) -> str:
    """A time in the unit that leaves two or three digits.

    >>> seconds(4.236), seconds(75), seconds(7300)
    ('4.2 s', '1 min 15 s', '2 h 1 min')
    """
    if not math.isfinite(value):
        return number(value)
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
