"""HTML and SVG as text that cannot be broken: all that is not markup already is escaped, wherever it comes from."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import TypeAlias

__all__ = ["Child", "Markup", "join", "tag"]

_VOID = frozenset({"br", "img", "input", "link", "meta"})
"""Elements without content."""

_DRAWN = frozenset({"circle", "line", "path", "rect"})
"""Elements of SVG that are closed with a slash where they have no content."""


class Markup(str):
    """Text that is markup: `tag` and `join` alone make it."""

    __slots__ = ()


Child: TypeAlias = "str | int | Markup | None"
"""What an element may hold: markup as it is, text and whole numbers escaped, None for nothing."""


def tag(element: str, /, *children: Child, **attributes: str | int | float | bool | None) -> Markup:
    """An element. In the names of attributes, a last ``_`` is dropped and others are ``-``.

    An attribute that is None or False is left out, True is its name alone; numbers have four digits.

    >>> print(tag("p", "a < b", tag("br"), class_="x", data_value=0.123456))
    <p class="x" data-value="0.1235">a &lt; b<br></p>
    """
    shown = "".join(_attribute(key, value) for key, value in attributes.items() if value is not None)
    if element in _VOID or (element in _DRAWN and not children):
        assert not children
        return Markup(f"<{element}{shown}{'/' * (element in _DRAWN)}>")
    return Markup(f"<{element}{shown}>{join(children)}</{element}>")


def _attribute(key: str, value: str | int | float | bool) -> str:
    name = key.removesuffix("_").replace("_", "-")
    name = "viewBox" if name == "viewbox" else name
    if isinstance(value, bool):
        return f" {name}" if value else ""
    text = f"{value:.4g}" if isinstance(value, float) else _escaped(str(value))
    return f' {name}="{text}"'


def join(children: Iterable[Child]) -> Markup:
    """All of them, one behind the other."""
    return Markup(
        "".join(each if isinstance(each, Markup) else _escaped(str(each)) for each in children if each is not None)
    )


def _escaped(text: str) -> str:
    """The text with what HTML reads as its own, and with what no one would see, written out.

    >>> print(_escaped("<b>'\\x1b"), _escaped("a\\u202eb"))
    &lt;b&gt;&#x27;\\x1b a\\u202eb
    """
    if not text.isprintable():
        text = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
    return html.escape(text)
