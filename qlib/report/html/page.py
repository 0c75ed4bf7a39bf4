"""The page of a run: one file of HTML that asks nothing of any network."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeAlias

from qlib.report.html.answer import answer
from qlib.report.html.images import changed_section, confusion_section
from qlib.report.html.layers import layers_section, sensitivity_section
from qlib.report.html.markup import Markup, tag
from qlib.report.html.pruning import pruned_section, pruning_sensitivity_section
from qlib.report.html.searches import (
    auto_section,
    origin_section,
    results_section,
    tradeoff_section,
    training_section,
    verification_section,
)
from qlib.report.record import RunReport

__all__ = ["PAGE", "Part", "page", "run_page"]

PAGE = "report.html"
"""The name of the file in a run's folder."""

Part: TypeAlias = "tuple[str, str, Markup]"
"""A section: the name of its place, its title, its content."""

_HERE = Path(__file__).parent

_SECTIONS: tuple[tuple[str, str, Callable[[RunReport], Markup | None]], ...] = (
    ("results", "Results", results_section),
    ("changed", "Images whose prediction changed", changed_section),
    ("all-layers", "Layers", layers_section),
    ("sensitive", "Sensitivity", sensitivity_section),
    ("kept", "What pruning kept", pruned_section),
    ("prunable", "Sensitivity to pruning", pruning_sensitivity_section),
    ("tradeoff", "Budget", tradeoff_section),
    ("auto", "Settings that were tried", auto_section),
    ("training", "Training", training_section),
    ("verification", "Verification", verification_section),
    ("confusion", "Confusion before and after", confusion_section),
    ("origin", "Where it comes from", origin_section),
)
"""Place, title and content of each section, in order: None where the run has nothing for it."""

_VERBS = {"quantize": "quantized", "sense": "sensitivity", "calibrate": "calibrated", "train": "trained",
          "export": "exported", "evaluate": "evaluated", "nothing": "evaluated"}  # fmt: skip


def run_page(report: RunReport) -> str:
    """The page of one run."""
    origin = report.origin
    title = f"{Path(origin.arch).name} on {origin.dataset}, {_VERBS.get(origin.verb, origin.verb)}"
    parts = [(place, name, found) for place, name, make in _SECTIONS if (found := make(report)) is not None]
    return page(title, f"{origin.folder}, {origin.started}", answer(report), parts)


def page(title: str, below: str, first: Markup, parts: Iterable[Part]) -> str:
    """A page with a head, what comes first, links to the parts, and the parts."""
    parts, script = list(parts), Markup((_HERE / "page.js").read_text(encoding="utf-8"))
    links = [tag("li", tag("a", name, href=f"#{place}")) for place, name, _ in parts]
    sections = [
        tag("section", tag("h2", name, id=f"{place}-title"), content, id=place, aria_labelledby=f"{place}-title")
        for place, name, content in parts
    ]
    body = tag(
        "body",
        tag("a", "To the content", href="#content", class_="skip"),
        tag(
            "header",
            tag("button", "Dark colors", id="theme", type="button", hidden=True),
            tag("h1", title),
            tag("p", below, class_="soft"),
            tag("nav", tag("ul", *links), aria_label="Sections"),
        ),
        tag("main", first, *sections, id="content"),
        tag("script", script),
    )
    return f"<!DOCTYPE html>\n{tag('html', _head(title, script), body, lang='en')}\n"


def _head(title: str, script: str) -> Markup:
    """Its policy lets a browser load nothing, and run no script but the page's own, whatever stands in the page."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    return tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Markup((_HERE / "page.css").read_text(encoding="utf-8"))),
    )
